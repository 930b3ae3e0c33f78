"""`show_source`: show the package's own code in a chapter, read from its file.

A copy of code in a chapter soon differs from the package. `show_source` shows the code that runs.
When the package changes, the stored output no longer matches, a test fails, and the chapter has to
be published again.

The output is markdown with a block of Python. JupyterLab colours it like a cell, in both themes and
also in a notebook that is not trusted, where it would remove the colours from HTML. With
`folded="Compare with yours"` the block is folded under that line: the answer to an exercise stands
below it, for a learner who has tried.

Left out: the docstring, unless you ask for it, because the text around the cell explains the code;
and line numbers, which change with every edit above.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

from nemotron_lite.course import output
from nemotron_lite.course.syntax import parse


def show_source(obj: Any, *, folded: str = "", docstring: bool = False) -> None:
    """Show the source of a function, method, class, property or Triton kernel.

    Args:
        obj: the object itself, not its name.
        folded: fold the source under this line; "" shows it open.
        docstring: keep the docstring of the object (methods of a class keep theirs either way).

    Raises:
        TypeError: it has no Python source, such as a number or something written in C.
    """
    source, where = source_of(obj, docstring=docstring)
    fence = max(["``", *re.findall("`{3,}", source)], key=len) + "`"
    block = f"{fence}python\n{source}\n{fence}"
    if not folded:
        output.show_output(source, more={"text/markdown": f"`{where}`\n\n{block}"})
        return
    # The empty lines end the HTML: what stands between them is markdown again.
    summary = f"<summary>{output.inline_html(folded)} · <code>{where}</code></summary>"
    markdown = f"<details>{summary}\n\n{block}\n\n</details>"
    output.show_output(f"{folded} · {where}\n{source}", more={"text/markdown": markdown})


def source_of(obj: Any, *, docstring: bool = False) -> tuple[str, str]:
    """The source of `obj`, and its file, such as `nemotron_lite/ops/scan.py`."""
    target = _python_object(obj)
    try:
        lines, _ = inspect.getsourcelines(target)
        path = inspect.getsourcefile(target) or "?"
    except (TypeError, OSError) as error:
        raise TypeError(
            f"show_source({obj!r:.80}) has no Python source to show. Pass a function, a method, "
            "a class or a Triton kernel, and pass the object itself rather than a call."
        ) from error
    source = textwrap.dedent("".join(lines)).rstrip("\n")
    if not docstring:
        source = _without_docstring(source)
    return source, _short(path)


def _python_object(obj: Any) -> Any:
    """The function that was written, without decorators, properties and partial()."""
    for _ in range(10):
        if isinstance(obj, property):
            obj = obj.fget
        elif type(obj).__module__.partition(".")[0] == "triton" and hasattr(obj, "fn"):
            obj = obj.fn  # a JIT function, an autotuner or the interpreter's wrapper
        elif hasattr(obj, "func") and hasattr(obj, "keywords"):
            obj = obj.func  # functools.partial
        else:
            break
    return inspect.unwrap(obj) if callable(obj) else obj


def _without_docstring(source: str) -> str:
    tree = parse(source)
    node = tree.body[0]
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return source
    first = node.body[0]
    if ast.get_docstring(node) is None or len(node.body) == 1:
        return source
    lines = source.splitlines()
    end = first.end_lineno or first.lineno
    while end < len(lines) and not lines[end].strip():
        end += 1
    return "\n".join([*lines[: first.lineno - 1], *lines[end:]])


def _short(path: str) -> str:
    """The path that starts with the package's folder, or the file's name."""
    parts = Path(path).parts
    for root in ("nemotron_lite", "nemotron_kernels"):
        if root in parts:
            return "/".join(parts[len(parts) - parts[::-1].index(root) - 1 :])
    return "this notebook" if "ipykernel" in path or path.startswith("<") else Path(path).name
