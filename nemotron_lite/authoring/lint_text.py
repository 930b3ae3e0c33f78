"""Rules about what a chapter says: no copy of the package, no figure by hand, kept promises.

A number in a markdown cell is dead text: nobody notices when the thing it speaks of changes. So
figures about NVIDIA's models come from `facts.toml` (`tell`, `facts_table`), what was measured
comes from the cell that measures it, and a speed that stands in prose links to its record. Where a
number is neither (a mask of 50 %, a step of a recipe), the cell says so in its metadata:

    "nl_figures": "the share is chosen two cells below, not measured"

All functions take a notebook node and what it is compared with, and return faults.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from nemotron_lite.authoring.lint_cells import code_cells, markdown_cells, stub_cells, tags
from nemotron_lite.course.exercises import Exercise

SHORTEST_REASON = 15  # characters
MINUTES_OFF = 0.2  # the part by which a header may round the time for the exercises

_CLAIM = re.compile(
    r"\d[\d.,]*\s?(?:"
    r"×|x\s+(?:faster|slower|smaller|larger|cheaper|less|more|fewer)\b|"
    r"times\s+(?:as\s+\w+|faster|slower|smaller|larger|cheaper|less|more|fewer|the)\b|"
    r"(?:tokens?|tok)\s?(?:/\s?s|per second)\b|"
    r"[kKMGT]i?B(?:ytes)?\b|[GT]FLOPS?\b|FLOPS?\b|ms\b|µs\b|%|percent\b)"
)
_RECORD = re.compile(r"\]\((?:\.\./)*(benchmarks/records/[\w./-]+\.json)\)")
_WRITTEN = (
    r"```.*?```",
    r"\$\$.*?\$\$",
    r"<!--.*?-->",
    r"`[^`\n]+`",
    r"\$[^$\n]+\$",
    r"\]\([^)]*\)",
)


def prose(source: str) -> str:
    """Markdown without code, formulas, comments and link targets; paragraphs stay apart."""
    for pattern in _WRITTEN:
        source = re.sub(pattern, "]" if pattern.startswith(r"\]") else " ", source, flags=re.S)
    return source


def redefined(notebook: NotebookNode, public: Mapping[str, str]) -> list[str]:
    """Functions and classes written in the chapter under a name that the package exports.

    Args:
        notebook: the chapter.
        public: exported name → the module that exports it.
    """
    found = []
    for index, tree in _trees(notebook):
        for node in ast.walk(tree):
            for name in _defined(node):
                if name in public:
                    found.append(f"cell {index} redefines {name}; import it from {public[name]}, "
                                 "or call yours something else.")  # fmt: skip
    return found


def _defined(node: ast.AST) -> list[str]:
    """Names that a statement binds to a function or a class; plain values are free."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
        return [t.id for t in node.targets if isinstance(t, ast.Name)]
    return []


def spellings(value: Any, unit: str) -> tuple[str, ...]:
    """The ways to write a fact that can hardly mean anything else; none for a common number.

    A number is distinctive with three significant digits, unless it is a power of two (they are
    everyday sizes here). Two digits are enough together with the unit.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ()
    if isinstance(value, float) and not value.is_integer():
        plain = {f"{value}"}
    else:
        plain = {f"{int(value)}", f"{int(value):,}"}
    digits = re.sub(r"\D", "", f"{value:.15g}").strip("0")
    everyday = float(value).is_integer() and value > 0 and int(value) & (int(value) - 1) == 0
    found = set(plain) if len(digits) >= 3 and not everyday else set()
    if unit and (len(digits) >= 2 or everyday) and re.match(r"\w", unit):
        found |= {f"{way} {unit}" for way in plain}
    return tuple(sorted(found))


def quoted_facts(notebook: NotebookNode, facts: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Figures of the facts file that stand in markdown, typed by hand.

    Args:
        notebook: the chapter.
        facts: key → ways to write it, from `spellings`.
    """
    found = []
    for index, text in _free_prose(notebook):
        for key, ways in facts.items():
            for way in ways:
                if re.search(rf"(?<![\w.,]){re.escape(way)}(?![\w]|[.,]\d)", text):
                    found.append(f"cell {index} types {way!r}, which is the fact {key}; let "
                                 f'tell("… {{{key}}} …") say it.')  # fmt: skip
                    break
    return found


def claims(notebook: NotebookNode, root: Path) -> list[str]:
    """Speeds, sizes and shares in markdown, in a paragraph without a link to their record.

    Args:
        notebook: the chapter.
        root: the repository; the record must exist there.
    """
    found = []
    for index, cell in markdown_cells(notebook):
        if _reason(cell):
            continue
        for paragraph in re.split(r"\n\s*\n", re.sub(r"```.*?```", "", cell.source, flags=re.S)):
            records = _RECORD.findall(paragraph)
            missing = [r for r in records if not (root / r).is_file()]
            found += [f"cell {index} links to {record}, which is not there." for record in missing]
            claim = _CLAIM.search(prose(paragraph))
            if claim and len(missing) == len(records):
                found.append(f"cell {index} says {claim[0]!r} without a record: measure it in a "
                             "cell, link to benchmarks/records/….json in the same paragraph, or "
                             "give the reason in metadata.nl_figures.")  # fmt: skip
    return found


def _free_prose(notebook: NotebookNode) -> Iterator[tuple[int, str]]:
    """Prose of the markdown cells that give no reason for their figures."""
    for index, cell in markdown_cells(notebook):
        if not _reason(cell):
            yield index, prose(cell.source)


def _reason(cell: NotebookNode) -> bool:
    return len(str(cell.metadata.get("nl_figures", ""))) >= SHORTEST_REASON


def predictions(notebook: NotebookNode) -> list[str]:
    """Measurements that nobody predicted before, and predictions that are never measured."""
    asked: dict[str, int] = {}
    answered: dict[str, int] = {}
    found = []
    for index, tree in _trees(notebook):
        calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
        for call in sorted(calls, key=lambda c: (c.lineno, c.col_offset)):
            name = ast.unparse(call.func).rpartition(".")[2]
            if name not in ("predict", "measured"):
                continue
            if not call.args or not isinstance(call.args[0], ast.Constant):
                found.append(f"cell {index}: the key of {name}(…) is not written out.")
                continue
            key = str(call.args[0].value)
            (asked if name == "predict" else answered).setdefault(key, index)
            if name == "measured" and asked.get(key, index + 1) > index:
                found.append(f"cell {index} measures {key!r} before it was predicted.")
    if not asked:
        found.append("nothing is predicted.")
    found += [
        f"cell {index} asks to predict {key!r}, which is never measured."
        for key, index in asked.items()
        if key not in answered
    ]
    return found


def exercises(notebook: NotebookNode, defined: Sequence[Exercise]) -> list[str]:
    """Exercises that are missing, unknown, or no longer what their definition says.

    The definition in `course/exercises/` is the only one: the chapter repeats its task word for
    word, and may lead up to it in the same cell.

    Args:
        notebook: the chapter.
        defined: the exercises of the chapter.
    """
    by_id = {exercise.id: exercise for exercise in defined}
    found, seen = [], []
    for task, index, name in stub_cells(notebook):
        seen.append(name)
        if name not in by_id:
            found.append(f"the exercise at cell {task} has nl_exercise {name!r}; expected one of "
                         f"{sorted(by_id)}.")  # fmt: skip
            continue
        exercise = by_id[name]
        if not notebook.cells[task].source.rstrip().endswith(exercise.text):
            found.append(f"cell {task} does not end in the text of {name}; it is what "
                         f'exercises.exercise("{name}").text gives.')  # fmt: skip
        if _squeezed(notebook.cells[index].source) != _squeezed(exercise.cell):
            found.append(f"cell {index} is not the untouched stub of {name} followed by "
                         f'check("{name}", {exercise.function_name}).')  # fmt: skip
    found += [f"exercise {name} has no cell." for name in by_id if name not in seen]
    found += [f"exercise {name} is there twice." for name in by_id if seen.count(name) > 1]
    return found


def header(notebook: NotebookNode, defined: Sequence[Exercise]) -> list[str]:
    """Headers that do not say what a reader plans by, or not what the exercises add up to.

    Args:
        notebook: the chapter.
        defined: the exercises of the chapter.
    """
    first = "\n".join(c.source for _, c in markdown_cells(notebook) if "header" in tags(c))
    found = [
        f"nl:header has no row **{row}**."
        for row in ("Time", "Machine", "You know")
        if f"| **{row}** |" not in first
    ]
    said = re.search(r"(\d+) minutes to read, (\d+) for the exercises", first)
    minutes = sum(exercise.minutes for exercise in defined)
    if said is None:
        found.append("nl:header does not say … minutes to read, … for the exercises.")
    elif abs(int(said[2]) - minutes) > MINUTES_OFF * minutes:
        found.append(f"nl:header gives {said[2]} minutes to exercises that take {minutes}.")
    return found


def objectives(
    notebook: NotebookNode, defined: Sequence[Exercise], asked: Sequence[str]
) -> list[str]:
    """Objectives that the recap or the quiz forgets, and exercises and questions about none.

    A chapter lists its objectives as `- **O1** …`, comes back to each in the recap, and asks for
    each in the quiz. An exercise serves one of them; not every objective needs an exercise.

    Args:
        notebook: the chapter.
        defined: the exercises of the chapter.
        asked: the objective of each question of the quiz.
    """
    listed, kept = (_objectives_in(notebook, section) for section in ("objectives", "recap"))
    expected = [f"O{n}" for n in range(1, len(listed) + 1)]
    found = []
    if not listed or listed != expected:
        found.append(f"nl:objectives lists {listed}; expected - **O1** …, - **O2** … and so on.")
    if kept != listed:
        found.append(f"nl:recap comes back to {kept}, the objectives are {listed}.")
    if set(asked) != set(listed):
        found.append(f"the quiz asks for {sorted(set(asked))}, the objectives are {listed}.")
    found += [
        f"exercise {e.id} serves {e.objective[:2]}, which is no objective of the chapter."
        for e in defined
        if e.objective[:2] not in listed
    ]
    return found


def _objectives_in(notebook: NotebookNode, section: str) -> list[str]:
    cells = [cell.source for _, cell in markdown_cells(notebook) if section in tags(cell)]
    return re.findall(r"^- \*\*(O\d+)\*\* ", "\n".join(cells), re.M)


def _squeezed(source: str) -> str:
    """Without blank lines and trailing spaces, which editors change."""
    return "\n".join(line.rstrip() for line in source.splitlines() if line.strip())


def _trees(notebook: NotebookNode) -> Iterator[tuple[int, ast.Module]]:
    """Syntax trees of the code cells; magics and shell lines are left out."""
    for index, cell in code_cells(notebook):
        lines = ["" if re.match(r"\s*[%!]", line) else line for line in cell.source.splitlines()]
        try:
            yield index, ast.parse("\n".join(lines))
        except SyntaxError:  # not_run and errors speak about such a cell
            continue
