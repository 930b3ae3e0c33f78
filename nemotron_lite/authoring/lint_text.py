"""Rules about the text of a chapter: no copy of the package, no number typed by hand.

Nobody notices when a number in a markdown cell is no longer true. So numbers about NVIDIA's models
come from `facts.toml` (`tell`, `facts_table`), a measured number comes from the cell that measures
it, and a speed in the text links to its record. If a number is none of these (a mask of 50 %, a
step of a recipe), the cell gives the reason in its metadata:

    "nl_figures": "the share is chosen two cells below, not measured"

There are also rules about predictions, exercises, the header and the objectives. Each function
takes a notebook and what it is compared with, and returns problems, one sentence each.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from nemotron_lite.authoring.lint_cells import (
    code_cells,
    count_words,
    exercise_cells,
    markdown_cells,
    tags,
)
from nemotron_lite.course.exercises import Exercise

SHORTEST_REASON = 15  # characters
MINUTES_TOLERANCE = 0.2  # how far a header may round its times
WORDS_PER_MINUTE = 180  # read by an engineer who is not a native speaker

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
    """Markdown without code, formulas, comments and link targets; paragraphs are kept."""
    for pattern in _WRITTEN:
        source = re.sub(pattern, "]" if pattern.startswith(r"\]") else " ", source, flags=re.S)
    return source


def redefined_names(notebook: NotebookNode, public: Mapping[str, str]) -> list[str]:
    """Functions and classes that a chapter defines under a name that the package exports.

    Args:
        notebook: the chapter.
        public: exported name → the module that exports it.
    """
    found = []
    stubs = {stub for _, stub, _ in exercise_cells(notebook)}
    for index, tree in _trees(notebook):
        if index in stubs:  # what the learner builds may have the name of the package's part
            continue
        for node in ast.walk(tree):
            for name in _defined(node):
                if name in public:
                    found.append(
                        f"cell {index} redefines {name}; import it from {public[name]}, "
                        "or choose another name."
                    )
    return found


def _defined(node: ast.AST) -> list[str]:
    """Names that a statement binds to a function or a class, and not to a plain value."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
        return [t.id for t in node.targets if isinstance(t, ast.Name)]
    return []


def spellings(value: Any, unit: str) -> tuple[str, ...]:
    """The ways to write a fact that hardly mean anything else; none for a common number.

    A number is distinctive if it has three significant digits, unless it is a power of two, which
    is a common size here. With its unit, two digits are enough.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ()
    if isinstance(value, float) and not value.is_integer():
        plain = {f"{value}"}
    else:
        plain = {f"{int(value)}", f"{int(value):,}"}
    digits = re.sub(r"\D", "", f"{value:.15g}").strip("0")
    power_of_two = float(value).is_integer() and value > 0 and int(value) & (int(value) - 1) == 0
    found = set(plain) if len(digits) >= 3 and not power_of_two else set()
    if unit and (len(digits) >= 2 or power_of_two) and re.match(r"\w", unit):
        found |= {f"{way} {unit}" for way in plain}
    return tuple(sorted(found))


def typed_facts(notebook: NotebookNode, facts: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Numbers of the facts file that are typed into markdown.

    Args:
        notebook: the chapter.
        facts: key → ways to write it, from `spellings`.
    """
    found = []
    for index, text in _free_prose(notebook):
        for key, ways in facts.items():
            for way in ways:
                if re.search(rf"(?<![\w.,]){re.escape(way)}(?![\w]|[.,]\d)", text):
                    found.append(
                        f"cell {index} types {way!r}, which is the fact {key}; use "
                        f'tell("… {{{key}}} …") instead.'
                    )
                    break
    return found


def claims_without_record(notebook: NotebookNode, root: Path) -> list[str]:
    """Speeds, sizes and shares in markdown, in a paragraph that does not link to a record.

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
            found += [
                f"cell {index} links to {record}, which does not exist." for record in missing
            ]
            claim = _CLAIM.search(prose(paragraph))
            if claim and len(missing) == len(records):
                found.append(
                    f"cell {index} says {claim[0]!r} without a record: measure it in a "
                    "cell, link to benchmarks/records/….json in the same paragraph, or "
                    "give the reason in metadata.nl_figures."
                )
    return found


def _free_prose(notebook: NotebookNode) -> Iterator[tuple[int, str]]:
    """Prose of the markdown cells whose metadata give no reason for their numbers."""
    for index, cell in markdown_cells(notebook):
        if not _reason(cell):
            yield index, prose(cell.source)


def _reason(cell: NotebookNode) -> bool:
    return len(str(cell.metadata.get("nl_figures", ""))) >= SHORTEST_REASON


def unmatched_predictions(notebook: NotebookNode) -> list[str]:
    """Measurements without a prediction before them, and predictions that are never measured."""
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
                found.append(f"cell {index}: the key of {name}(…) is not a literal string.")
                continue
            key = str(call.args[0].value)
            (asked if name == "predict" else answered).setdefault(key, index)
            if name == "measured" and asked.get(key, index + 1) > index:
                found.append(f"cell {index} measures {key!r} before it was predicted.")
    found += [
        f"cell {index} asks to predict {key!r}, which is never measured."
        for key, index in asked.items()
        if key not in answered
    ]
    return found


def changed_exercises(notebook: NotebookNode, defined: Sequence[Exercise]) -> list[str]:
    """Exercises that are unknown, or different from their definition.

    The `exercises.py` of the chapter defines an exercise. The notebook repeats the task word for
    word; the same cell may introduce it.

    Args:
        notebook: the chapter.
        defined: the exercises of the chapter.
    """
    by_id = {exercise.id: exercise for exercise in defined}
    found = []
    for task, index, name in exercise_cells(notebook):
        if name not in by_id:
            found.append(
                f"the exercise at cell {task} has nl_exercise {name!r}; expected one of "
                f"{sorted(by_id)}."
            )
            continue
        exercise = by_id[name]
        if not notebook.cells[task].source.rstrip().endswith(exercise.text):
            found.append(
                f"cell {task} does not end in the text of {name}; it is what "
                f'exercises.exercise("{name}").text gives.'
            )
        stub = notebook.cells[index].source
        if _without_blank_lines(stub) != _without_blank_lines(exercise.cell):
            found.append(
                f"cell {index} is not the untouched stub of {name} followed by "
                f'check("{name}", {exercise.function_name}).'
            )
    return found


def missing_exercises(notebooks: Sequence[NotebookNode], defined: Sequence[Exercise]) -> list[str]:
    """Exercises that stand in none of the notebooks of a chapter, or twice.

    Args:
        notebooks: the chapter, and the notebook beside it if there is one.
        defined: the exercises of the chapter.
    """
    seen = [name for notebook in notebooks for _, _, name in exercise_cells(notebook)]
    names = [exercise.id for exercise in defined]
    found = [f"exercise {name} has no cell." for name in names if name not in seen]
    return found + [f"exercise {name} is there twice." for name in names if seen.count(name) > 1]


def header_problems(notebook: NotebookNode, defined: Sequence[Exercise]) -> list[str]:
    """A header without a required row, or with times that the words and exercises do not add up to.

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
    times = re.search(r"(\d+) minutes to read, (\d+) for the exercises", first)
    if times is None:
        return [*found, "nl:header does not have the text … minutes to read, … for the exercises."]
    reading = count_words(notebook) / WORDS_PER_MINUTE
    here = {name for _, _, name in exercise_cells(notebook)}
    building = sum(e.minutes for e in defined if e.kind == "must" and e.id in here)
    for said, counted, what in (
        (int(times[1]), reading, "to read"),
        (int(times[2]), building, "for the exercises that are a must"),
    ):
        if abs(said - counted) > max(1.0, MINUTES_TOLERANCE * counted):
            found.append(f"nl:header says {said} minutes {what}; counted are {counted:.0f}.")
    return found


def objective_problems(
    notebook: NotebookNode, defined: Sequence[Exercise], quiz_objectives: Sequence[str]
) -> list[str]:
    """Objectives that are missing in the recap or the quiz, and exercises without an objective.

    A chapter lists its objectives as `- **O1** …`. The recap repeats each of them, and the quiz has
    a question for each. An exercise serves one of them; not every objective needs an exercise.

    Args:
        notebook: the chapter.
        defined: the exercises of the chapter.
        quiz_objectives: the objective of each question of the quiz.
    """
    listed, kept = (_objectives_in(notebook, section) for section in ("objectives", "recap"))
    expected = [f"O{n}" for n in range(1, len(listed) + 1)]
    found = []
    if not listed or listed != expected:
        found.append(f"nl:objectives lists {listed}; expected - **O1** …, - **O2** … and so on.")
    if kept != listed:
        found.append(f"nl:recap has {kept}; expected the objectives {listed}.")
    if set(quiz_objectives) != set(listed):
        found.append(
            f"the quiz has questions for {sorted(set(quiz_objectives))}; expected the objectives "
            f"{listed}."
        )
    found += [
        f"exercise {e.id} serves {e.objective[:2]}, which is not an objective of the chapter."
        for e in defined
        if e.objective[:2] not in listed
    ]
    return found


def _objectives_in(notebook: NotebookNode, section: str) -> list[str]:
    cells = [cell.source for _, cell in markdown_cells(notebook) if section in tags(cell)]
    return re.findall(r"^- \*\*(O\d+)\*\* ", "\n".join(cells), re.M)


def _without_blank_lines(source: str) -> str:
    """Source without blank lines and trailing spaces, which editors change."""
    return "\n".join(line.rstrip() for line in source.splitlines() if line.strip())


def _trees(notebook: NotebookNode) -> Iterator[tuple[int, ast.Module]]:
    """Syntax trees of the code cells, without magics and shell lines."""
    for index, cell in code_cells(notebook):
        lines = ["" if re.match(r"\s*[%!]", line) else line for line in cell.source.splitlines()]
        try:
            yield index, ast.parse("\n".join(lines))
        except SyntaxError:  # not_executed and stored_errors report such a cell
            continue
