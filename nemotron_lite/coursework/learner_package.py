"""The part of this package that a learner's process can import, copied into a folder.

It has three parts:

- the config, which checks pass to answers, and the modules that the handed-out cells import; with
  what those import in turn;
- stand-ins for `nemotron_lite.course`: `check`, `hint` and the others exist and do nothing, so that
  the notebook runs as it was handed out;
- `learner_process` with its parts and `wire`, which execute the code and answer the grading
  process.

Exercises, checks, references, tests and this package's tools for instructors are never among them,
even if a module imports them.
"""

from __future__ import annotations

import ast
import compileall
import re
from collections.abc import Iterable
from pathlib import Path

import nemotron_lite
from nemotron_lite.course.syntax import parse

PACKAGE = Path(nemotron_lite.__file__).parent
NAME = "nemotron_lite"
OWN = (
    "coursework.learner_process", "coursework.learner_limits", "coursework.learner_shell",
    "coursework.learner_answers", "coursework.wire", "course.learner_code", "course.syntax",
)  # fmt: skip
ALWAYS = "from nemotron_lite import NemotronConfig"
NEVER = re.compile(r"nemotron_lite\.(course|coursework|authoring|cli)(\.|$)")

STAND_IN = '''"""Stands in for nemotron_lite.course where coursework is graded; it does nothing."""

GIVEN = {}  # answers to exercises of other chapters, by id


class _Nothing:
    """What every function here returns: no points, no message, nothing to show."""

    passed, points, max_points, message, hint, failed = False, 0, 0, "", None, ()

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return self

    def __call__(self, *args, **kwargs):
        return self

    def __repr__(self):
        return ""

    def _ipython_display_(self):
        pass


_NOTHING = _Nothing()


def check(exercise_id, function):
    """Grades in a chapter; here another process grades."""
    return _NOTHING


def own(exercise_id, function=None):
    """The function that was passed in, or an answer to an exercise of another chapter."""
    if function is not None:
        return function
    if exercise_id not in GIVEN:
        raise LookupError(f"{exercise_id} is not an exercise that this coursework needs.")
    return GIVEN[exercise_id]


def progress(iterable, *args, **kwargs):
    """Shows a bar in a chapter."""
    return iterable


def __getattr__(name):
    if name.startswith("_"):
        raise AttributeError(name)
    return _NOTHING
'''


def _imports(tree: ast.AST, module: str) -> Iterable[str]:
    """Names of modules, or of things in modules, that some code imports when it runs."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: -node.level or None]
                base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        yield from _imports(node, module)


def _file(module: str) -> Path | None:
    """The file of a module of this package, None if there is no such module."""
    inside = PACKAGE.joinpath(*module.split(".")[1:])
    for path in (inside / "__init__.py", inside.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _module_of(name: str) -> str:
    """The module that an imported name means: itself, or where the thing is defined."""
    top, _, rest = name.partition(".")
    if rest in nemotron_lite._MODULE_OF:
        return f"{top}.{nemotron_lite._MODULE_OF[rest]}"
    while name and _file(name) is None:
        name = name.rpartition(".")[0]
    return name


def needed_modules(sources: Iterable[str]) -> dict[str, Path]:
    """The modules of this package that some sources import, directly or not, with their files."""
    found: dict[str, Path] = {}
    waiting = [name for text in sources for name in _imports(parse(text), "")]
    while waiting:
        name = waiting.pop()
        if name.partition(".")[0] != NAME:
            continue
        module = _module_of(name)
        parts = module.split(".")
        for one in (".".join(parts[:i]) for i in range(1, len(parts) + 1)):
            path = _file(one)
            if path is None or one in found or NEVER.match(one):
                continue
            found[one] = path
            text = path.read_text(encoding="utf-8")
            waiting += _imports(parse(text), one + ".x" * (path.name == "__init__.py"))
    return found


def _plain_code(text: str) -> str:
    """Source that ast can read: lines of IPython's magics are left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith(("%", "!"))]
    return "\n".join(lines)


def write_package(folder: Path, cells: Iterable[str]) -> list[str]:
    """Write what a learner's process can import into `folder`; returns the modules.

    Args:
        folder: an empty folder.
        cells: the handed-out code cells; what they import is included.
    """
    modules = needed_modules([ALWAYS, *map(_plain_code, cells)])
    own = [f"{NAME}.{name}" for name in OWN]
    files = {**modules, NAME: PACKAGE / "__init__.py"}
    files |= {name: PACKAGE.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in own}
    for path in files.values():
        target = folder / NAME / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
        for above in target.relative_to(folder / NAME).parents:
            (folder / NAME / above / "__init__.py").touch()
    (folder / NAME / "course" / "__init__.py").write_text(STAND_IN, encoding="utf-8")
    # Each learner's process would compile the same files again.
    compileall.compile_dir(folder, quiet=2)
    for path in (folder, *folder.rglob("*")):  # another user may read it, whatever umask holds here
        path.chmod(0o755 if path.is_dir() else 0o644)
    return sorted(modules)
