"""A notebook as it is graded: the learner's answers in the notebook that was handed out.

A cell is recognized by its `grade_id`, or by its cell id if a tool dropped the metadata. In the
copy, locked cells have their original text, missing test cells are added at the end, and of a cell
that is there twice the last one counts. Each change is noted, for a person to judge: it is seldom
cheating.

Only sources are taken over, as text that can be written: half a surrogate pair becomes its escape,
which in a Python string means the same. Outputs and unknown metadata are dropped.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

MOST_CELLS = 2000
MOST_TEXT = 4 * 2**20  # characters of all sources
OWN_IMPORT = re.compile(
    r"^[ \t]*(?:from|import)[ \t]+(nemotron_(?:lite|kernels)[\w.]*)"
    r"(?:[ \t]+import[ \t]+(\([^()]*\)|[^\n#;]*))?",
    re.M,
)


class SubmissionError(ValueError):
    """A notebook that cannot be graded; the message says why, in one line."""


@dataclass(frozen=True)
class GradedExercise:
    """One exercise of an assignment, read from the metadata of its test cell."""

    id: str
    function: str
    points: float
    test: str  # grade_id of the cell that grades
    answer: str  # grade_id of the cell it grades


@dataclass(frozen=True)
class Assignment:
    """An assignment as it was handed out; submissions are compared with it."""

    name: str
    cells: tuple[dict[str, Any], ...]
    metadata: dict[str, Any]

    @property
    def by_id(self) -> dict[str, dict[str, Any]]:
        """The cells that have a grade_id, by that id."""
        return {grade_id(c): c for c in self.cells if grade_id(c)}

    @property
    def exercises(self) -> tuple[GradedExercise, ...]:
        """The exercises, in order."""
        found = []
        for name, cell in self.by_id.items():
            if cell["metadata"]["nbgrader"]["grade"]:
                about = cell["metadata"]["nemotron_lite"]
                points = float(cell["metadata"]["nbgrader"]["points"])
                answer = name.removesuffix("-check")
                found.append(
                    GradedExercise(about["exercise"], about["function"], points, name, answer)
                )
        return tuple(found)


def grade_id(cell: Any) -> str:
    """nbgrader's name of a cell, or ""; `cell` may be any JSON value."""
    for key in ("metadata", "nbgrader", "grade_id"):
        cell = cell.get(key) if isinstance(cell, dict) else None
    return cell if isinstance(cell, str) else ""


def text_of(cell: dict[str, Any]) -> str:
    """The source of a cell: a string, or a list of them."""
    source = cell.get("source", "")
    parts = source if isinstance(source, list) else [source]
    text = "".join(part for part in parts if isinstance(part, str))
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True)
class CleanCopy:
    """A notebook that can be executed, with notes about it, and flags that sum them up.

    The flags: `cells_changed` (a test cell was changed or missing), `answer_missing`, `imports`.
    """

    notebook: dict[str, Any]
    notes: list[str]
    flags: list[str]


def own_imports(source: str) -> set[str]:
    """What some code imports of this package, such as `nemotron_lite.ops`."""
    found = set()
    for module, names in OWN_IMPORT.findall(source):
        if module == "nemotron_lite" and names:
            plain = names.strip("() \t").replace("\n", " ")
            found |= {f"{module}.{name.split()[0]}" for name in plain.split(",") if name.strip()}
        else:
            found.add(module)
    return found


def check_size(notebook: dict[str, Any]) -> None:
    """Refuse a notebook with more cells or more text than anybody writes.

    Raises:
        SubmissionError: it has.
    """
    cells = notebook["cells"]
    if len(cells) > MOST_CELLS:
        raise SubmissionError(f"it has {len(cells):,} cells; expected at most {MOST_CELLS:,}.")
    size = sum(len(text_of(cell)) for cell in cells if isinstance(cell, dict))
    if size > MOST_TEXT:
        raise SubmissionError(
            f"its cells hold {size:,} characters; expected at most {MOST_TEXT:,}."
        )


def assignment_of(notebook: dict[str, Any], assignments: dict[str, Assignment]) -> str:
    """The assignment that most of the cells belong to; "" if none of them is known."""
    votes: Counter[str] = Counter()
    known = {name: assignment.by_id.keys() for name, assignment in assignments.items()}
    for cell in notebook["cells"]:
        marks = {grade_id(cell), _cell_id(cell)} - {""}
        votes.update(name for name, ids in known.items() if marks & ids)
    return votes.most_common(1)[0][0] if votes else ""


def _cell_id(cell: Any) -> str:
    found = cell.get("id") if isinstance(cell, dict) else None
    return found if isinstance(found, str) else ""


def clean_copy(notebook: dict[str, Any], handed_out: Assignment) -> CleanCopy:
    """A valid notebook with the learner's cells and the original test cells.

    Outputs and unknown metadata are dropped. The notes say which graded cells were missing or
    changed, and what of this package the answers import that they were not given.

    Raises:
        SubmissionError: more cells or more text than anybody writes.
    """
    check_size(notebook)
    known = handed_out.by_id
    notes: list[str] = []
    flags: list[str] = []
    by_cell_id = {cell["id"]: name for name, cell in known.items()}
    cells: list[tuple[str, dict[str, Any]]] = []
    left_out = 0
    for cell in notebook["cells"]:
        kind = cell.get("cell_type") if isinstance(cell, dict) else None
        if not isinstance(kind, str) or kind not in ("code", "markdown", "raw"):
            left_out += 1
            continue
        name = grade_id(cell)
        if name not in known:
            name = by_cell_id.get(_cell_id(cell), "")
        cells.append((name, cell))
    if left_out:
        notes.append(f"cells of an unknown kind, left out: {left_out}")
    last = {name: i for i, (name, _) in enumerate(cells)}
    copied = []
    for i, (name, cell) in enumerate(cells):
        if name and last[name] == i:
            copied.append(_restored(known[name], cell, notes, flags))
        else:
            copied.append(_cell(f"own-{i}", cell["cell_type"], text_of(cell)))
    for exercise in handed_out.exercises:
        if exercise.answer not in last:
            notes.append(f"{exercise.id}: the answer cell is missing")
            flags.append("answer_missing")
        if exercise.test not in last:
            notes.append(f"{exercise.id}: the test cell was missing and has been put back")
            flags.append("cells_changed")
            copied.append(_restored(known[exercise.test], known[exercise.test], notes, flags))
    if extra := sorted(_extra_imports(copied, handed_out)):
        notes.append(f"imports {', '.join(extra)}: read the answers, they may call what they teach")
        flags.append("imports")
    whole = {"cells": copied, "metadata": handed_out.metadata, "nbformat": 4, "nbformat_minor": 5}
    return CleanCopy(whole, notes, sorted(set(flags)))


def _extra_imports(copied: list[dict[str, Any]], handed_out: Assignment) -> set[str]:
    """What answers import that their stubs do not, and other cells that no handed-out cell does."""
    given = {name: own_imports(text_of(cell)) for name, cell in handed_out.by_id.items()}
    everywhere = own_imports("\n".join(map(text_of, handed_out.cells)))
    course = {name for name in everywhere if name.startswith("nemotron_lite.course")}
    found = set()
    for cell in copied:
        if cell["cell_type"] == "code":
            allowed = given.get(grade_id(cell), everywhere) | course
            found |= own_imports(text_of(cell)) - allowed
    return found


def _cell(name: str, kind: str, source: str, **metadata: Any) -> dict[str, Any]:
    code: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": name, "metadata": metadata, "source": source, **code}


def _restored(
    handed_out: dict[str, Any], cell: dict[str, Any], notes: list[str], flags: list[str]
) -> dict[str, Any]:
    """A known cell: an answer keeps the learner's text, a locked cell gets the original text."""
    marks = handed_out["metadata"]
    source = text_of(cell)
    if marks["nbgrader"]["locked"]:
        if source.strip() != text_of(handed_out).strip() and marks["nbgrader"]["grade"]:
            about = marks["nemotron_lite"]["exercise"]
            notes.append(f"{about}: the test cell had been changed; the original was run")
            flags.append("cells_changed")
        source = text_of(handed_out)
    return _cell(handed_out["id"], handed_out["cell_type"], source, **marks)
