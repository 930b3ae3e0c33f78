"""Imports run one way, and nothing on the way to the PyTorch paths needs triton.

    cli, train, … → generation, checkpoint, data → model, state → layers → ops → config, precision

A room may import its neighbours on the same floor and everything below. The rule is read from the
syntax tree, so imports inside functions count as well; only `if TYPE_CHECKING:` does not.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "nemotron_lite"

FLOORS = (
    {"config", "hf_config", "ledger", "precision"},
    {"ops"},
    {"layers"},
    {"model", "state", "arguments"},
    {"prompts", "sampling", "speculative", "generation", "checkpoint", "data", "quantize"},
    {"course", "viz", "cli", "serve", "agents", "train"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imports_of(tree: ast.AST, module: str, at_top: bool = False) -> Iterator[str]:
    """Absolute names imported in a syntax tree; `at_top` leaves out the bodies of functions.

    `module` is the dotted name that relative imports start from. `from a import b` gives `a.b`,
    because b may be a module.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif not _left_out(node, at_top):
            yield from imports_of(node, module, at_top)


def _left_out(node: ast.AST, at_top: bool) -> bool:
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return True
    return at_top and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def climbing_imports(source: str, module: str) -> list[str]:
    """Imports of `nemotron_lite` rooms that stand above the room of `module`."""
    room = module.split(".")[1]
    if room not in FLOOR_OF:
        return [f"{module}: the room {room!r} has no floor; give it one in FLOORS"]
    wrong = []
    for name in imports_of(ast.parse(source), module):
        parts = name.split(".")
        if parts[0] != "nemotron_lite" or len(parts) < 2:
            continue
        if parts[1] not in FLOOR_OF:
            wrong.append(f"{module} imports {name}: import it from its room, not the front door")
        elif FLOOR_OF[parts[1]] > FLOOR_OF[room]:
            wrong.append(f"{module} imports {name}, which stands above it")
    return wrong


def eager_triton(source: str, module: str) -> list[str]:
    """Imports of triton that happen as soon as `module` is imported."""
    names = imports_of(ast.parse(source), module, at_top=True)
    return [f"{module} imports {n}" for n in names if n.split(".")[0] == "triton"]


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles among modules that import each other at their top."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, [*path, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def modules() -> dict[str, str]:
    """Dotted name → source of every module of the package, the front door left out."""
    named = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        named[".".join(p for p in parts if p != "__init__")] = path.read_text()
    named.pop("nemotron_lite")
    return named


@pytest.mark.parametrize("module", modules())
def test_imports_never_climb(module: str) -> None:
    assert climbing_imports(modules()[module], module) == []


@pytest.mark.parametrize("module", modules())
def test_no_module_imports_triton_eagerly(module: str) -> None:
    assert eager_triton(modules()[module], module) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    sources = modules()
    graph = {}
    for module, source in sources.items():
        names = imports_of(ast.parse(source), module, at_top=True)
        # The name itself, or the module that holds it.
        hits = {n if n in sources else n.rpartition(".")[0] for n in names}
        graph[module] = {n for n in hits if n in sources and n != module}
    assert cycles(graph) == []


@pytest.mark.parametrize(
    "source",
    [
        "from nemotron_lite.layers.mamba import Mamba",
        "from nemotron_lite import layers",
        "from ..layers import mamba",
        "def f():\n    import nemotron_lite.model",
        "from nemotron_lite import Nemotron",
    ],
)
def test_a_climbing_import_is_found(source: str) -> None:
    assert len(climbing_imports(source, "nemotron_lite.ops.scan")) == 1


def test_allowed_imports_pass() -> None:
    source = (
        "from nemotron_lite.ops import _door\nimport torch\nfrom nemotron_lite.config import X\n"
        "if TYPE_CHECKING:\n    from nemotron_lite.model import Nemotron"
    )
    assert climbing_imports(source, "nemotron_lite.ops.scan") == []
    assert climbing_imports("import torch", "nemotron_lite.attic.box") != []


def test_an_eager_triton_is_found_and_a_late_one_is_not() -> None:
    guarded = "try:\n    import triton.language as tl\nexcept ImportError:\n    tl = None"
    assert len(eager_triton(guarded, "m")) == 1
    assert eager_triton("def kernel():\n    import triton", "m") == []


def test_a_circle_is_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == [["a", "b", "c", "a"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}}) == []
