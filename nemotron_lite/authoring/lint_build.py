"""Rules of a course that is built: nobody reads an answer before they have tried it.

    shown_too_early     the answer, or code of the same structure, above the exercise
    unused_answers      an exercise whose answer no later cell runs
    open_measurements   a prediction far from its measurement, or with the answer in sight
    visible_plumbing    prose, tables and comments for tools in open cells
    dead_links          links to the glossary or to files of the repository that lead nowhere

References are compared by structure: names of variables do not count, so the package's own function
is recognized too. Each function takes a notebook and returns problems, one sentence each.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from nbformat import NotebookNode

from nemotron_lite.authoring.lint_cells import code_cells, exercise_cells, markdown_cells, outputs
from nemotron_lite.course.exercises import Exercise

LEAST_NODES = 8  # of a statement that says something: `x = x + 1` has fewer
LEAST_ALIKE = 2  # statements
SHARE_ALIKE = 0.5  # of the reference's statements that make an earlier cell an answer
FEWEST_PREDICTIONS, MOST_PREDICTIONS = 3, 4
_FENCE = re.compile(r"```python\n(.*?)```", re.S)
_TOOLS = re.compile(r"#\s*(?:noqa|fmt:|type: ignore|ruff:)")
_PROSE = re.compile(r"^\s*(?:course\.)?(?:tell|facts_table)\(", re.M)
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def shown_too_early(notebook: NotebookNode, defined: Sequence[Exercise]) -> list[str]:
    """Code above an exercise that has half of the statements of its reference.

    Searched are the sources and outputs of earlier cells. What an earlier exercise shows is left
    out where the later exercise repeats it (a class that calls an earlier function does not).
    """
    found = []
    at = {name: stub for _, stub, name in exercise_cells(notebook)}
    texts = _code_by_cell(notebook)
    for exercise in defined:
        if exercise.id not in at:
            continue
        wanted = _statements(exercise.solution) - _statements(exercise.stub)
        if len(wanted) < LEAST_ALIKE:
            continue
        for index, text in texts:
            alike = wanted & _statements(text)
            enough = max(LEAST_ALIKE, SHARE_ALIKE * len(wanted))
            if index < at[exercise.id] and len(alike) >= enough:
                found.append(
                    f"cell {index} shows {len(alike)} of {len(wanted)} statements of the answer to "
                    f"{exercise.id}, which is asked for in cell {at[exercise.id]}; show it below."
                )
    return found


def _code_by_cell(notebook: NotebookNode) -> list[tuple[int, str]]:
    """Python of code cells, of fenced blocks in markdown cells, and of sources in outputs."""
    found = [(index, cell.source) for index, cell in code_cells(notebook)]
    for index, cell in markdown_cells(notebook):
        found += [(index, block) for block in _FENCE.findall(cell.source)]
    for index, output in outputs(notebook):
        text = "".join(output.get("data", {}).get("text/markdown", ""))
        found += [(index, block) for block in _FENCE.findall(text)]
    return found


@cache
def _statements(source: str) -> frozenset[str]:
    """The simple statements of some code, without the names of variables."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return frozenset()
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign | ast.AugAssign | ast.Return | ast.Expr):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if sum(1 for _ in ast.walk(node)) >= LEAST_NODES:
            found.add(ast.dump(_WithoutNames().visit(ast.parse(ast.unparse(node)))))
    return frozenset(found)


class _WithoutNames(ast.NodeTransformer):
    """Replaces every variable by the same name; functions and attributes keep theirs."""

    def visit_Name(self, node: ast.Name) -> ast.Name:
        return ast.Name("_", node.ctx)

    def visit_Call(self, node: ast.Call) -> ast.Call:
        node.args = [self.visit(arg) for arg in node.args]
        for keyword in node.keywords:
            keyword.value = self.visit(keyword.value)
        if not isinstance(node.func, ast.Name):
            node.func = self.visit(node.func)
        return node


def unused_answers(notebook: NotebookNode, defined: Sequence[Exercise]) -> list[str]:
    """Exercises of the notebook whose answer is not taken with `own(…)` in a cell below."""
    found = []
    for _, stub, name in exercise_cells(notebook):
        calls = [i for i, cell in code_cells(notebook) if f'own("{name}"' in cell.source]
        kinds = {exercise.id: exercise.kind for exercise in defined}
        if kinds.get(name, "must") != "stretch" and not any(i > stub for i in calls):
            found.append(
                f'{name} is not used: take the answer with own("{name}", …) in a cell below its '
                "stub, and run it."
            )
        found += [f'cell {i} calls own("{name}") above its exercise.' for i in calls if i < stub]
    return found


def open_measurements(notebook: NotebookNode) -> list[str]:
    """Predictions far from their measurement, too many or too few, or with the answer in sight."""
    found: list[str] = []
    cells = list(code_cells(notebook))
    asked = 0
    for position, (index, cell) in enumerate(cells):
        for key in re.findall(r'\bpredict\(\s*"(\w+)"', cell.source):
            asked += 1
            following = cells[position + 1][1].source if position + 1 < len(cells) else ""
            if f'measured("{key}"' not in following:
                found.append(
                    f"cell {index} asks to predict {key!r}; the next code cell must measure it."
                )
        if not re.search(r"\bmeasured\(", cell.source):
            continue
        if re.search(r"\b(?:low|high)\s*=", cell.source):
            found.append(
                f"cell {index} shows the bounds of a prediction; they belong into its TOML."
            )
        if not cell.metadata.get("jupyter", {}).get("outputs_hidden"):
            found.append(
                f"cell {index} measures a prediction and its output is open at rest; set "
                '"jupyter": {"outputs_hidden": true} in its metadata.'
            )
    if not FEWEST_PREDICTIONS <= asked <= MOST_PREDICTIONS:
        found.append(
            f"{asked} predictions; expected {FEWEST_PREDICTIONS} to {MOST_PREDICTIONS} a chapter."
        )
    return found


def visible_plumbing(notebook: NotebookNode) -> list[str]:
    """Comments for tools in code cells, and prose or tables of facts in a cell with open input."""
    found = []
    for index, cell in code_cells(notebook):
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden")
        if comment := _TOOLS.search(cell.source):
            found.append(
                f"cell {index} has the comment {comment[0]!r} for a tool; write it without."
            )
        if _PROSE.search(cell.source) and not hidden:
            found.append(
                f"cell {index} holds prose or a table of facts and its input is open; set "
                '"jupyter": {"source_hidden": true} in its metadata.'
            )
    return found


def dead_links(notebook: NotebookNode, root: Path) -> list[str]:
    """Links of markdown cells to files that do not exist, or to headings that they do not have.

    Args:
        notebook: the chapter; links are relative to the folder of the notebooks.
        root: the repository.
    """
    found = []
    for index, cell in markdown_cells(notebook):
        for link in _LINK.findall(cell.source):
            name, _, heading = link.partition("#")
            path = root / "notebooks" / name
            if not path.exists():
                found.append(f"cell {index} links to {name}, which does not exist.")
            elif heading and heading not in headings(path):
                found.append(f"cell {index} links to {link}; {path.name} has no such heading.")
    return found


def headings(path: Path) -> set[str]:
    """The anchors of the headings of a markdown file, in GitHub's spelling."""
    if path.suffix != ".md":
        return set()
    lines = re.findall(r"^#+ +(.+?)\s*$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}
