"""Read what learners hand in, without trusting it.

Learners hand in notebooks in several folder layouts. Some were saved by another tool, have deleted,
pasted or renamed cells, or were cut off in the upload. This module finds them, says in one line why
a notebook cannot be graded, and makes a clean copy of every other one, in which each graded cell is
the one that was handed out:

    folder/<student>/<assignment>/<notebook>.ipynb     nbgrader's submitted/ folder, or its parent
    folder/<student>+<assignment>+<time>[+…]/….ipynb   nbgrader's exchange; the latest one counts
    folder/<student>/<notebook>.ipynb                  the cells show which assignment it is
    folder/<student>.ipynb                             or <student>_chapter_01.ipynb

A cell is recognized by its `grade_id`, or by its cell id if a tool dropped the metadata. In the
copy, locked cells have their original text, missing test cells are added at the end, and of a cell
that is there twice the last one counts. Each change is noted, for a person to judge: it is seldom
cheating.

Files are only read. Left out: archives, and assignments with several notebooks.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

LARGEST = 20 * 2**20  # bytes of one notebook
ASSIGNMENT = re.compile(r"chapter_\d\d")
EXCHANGE_FOLDER = re.compile(r"(?P<student>[^+]+)\+(?P<assignment>[^+]+)\+(?P<time>[^+]+)(\+.*)?")
STUDENT_AND_ASSIGNMENT = re.compile(r"(?P<student>.+?)[ _+-]+(?P<assignment>chapter_\d\d)")
OWN_IMPORT = re.compile(
    r"^\s*(?:from|import)\s+(nemotron_(?:lite|kernels)[\w.]*)"
    r"(?:\s+import\s+(\([^)]*\)|[^\n#;]*))?",
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


@dataclass(frozen=True)
class Submission:
    """One notebook of one learner; with a `problem` it cannot be graded."""

    student: str
    path: Path
    assignment: str = ""
    problem: str = ""
    notes: tuple[str, ...] = ()
    time: str = ""


def read_release(path: Path) -> Assignment:
    """Read an assignment from its release notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return Assignment(path.stem, tuple(notebook["cells"]), notebook["metadata"])


def grade_id(cell: Any) -> str:
    """nbgrader's name of a cell, or ""; `cell` may be any JSON value."""
    for key in ("metadata", "nbgrader", "grade_id"):
        cell = cell.get(key) if isinstance(cell, dict) else None
    return cell if isinstance(cell, str) else ""


def text_of(cell: dict[str, Any]) -> str:
    """The source of a cell: a string, or a list of them."""
    source = cell.get("source", "")
    parts = source if isinstance(source, list) else [source]
    return "".join(part for part in parts if isinstance(part, str))


def read_notebook(path: Path) -> dict[str, Any]:
    """The JSON of a notebook.

    Raises:
        SubmissionError: it is a link, too large, not JSON, or JSON that is not a notebook.
    """
    if path.is_symlink():
        raise SubmissionError(f"{path.name} is a link, and links are not followed; copy the file.")
    if (size := path.stat().st_size) > LARGEST:
        raise SubmissionError(
            f"{path.name} has {size / 2**20:.0f} MiB, more than {LARGEST >> 20}; "
            "clear its outputs and hand it in again."
        )
    if size == 0:
        raise SubmissionError(f"{path.name} is empty; was it saved?")
    try:
        notebook = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SubmissionError(
            f"{path.name} is not a text file in UTF-8: {error.reason}; save it again."
        ) from error
    except json.JSONDecodeError as error:
        raise SubmissionError(
            f"{path.name} is not a notebook: line {error.lineno}, column {error.colno}: "
            f"{error.msg}. Was it cut off, or merged with conflicts?"
        ) from error
    except RecursionError as error:
        raise SubmissionError(f"{path.name} is not a notebook: it is nested too deeply.") from error
    version = notebook.get("nbformat") if isinstance(notebook, dict) else None
    if not isinstance(version, int):
        raise SubmissionError(f"{path.name} is JSON, but not a notebook: it has no nbformat.")
    if version < 4 or not isinstance(notebook.get("cells"), list):
        raise SubmissionError(
            f"{path.name} has no list of cells (notebook format {version}); open it in JupyterLab, "
            "save it, and hand that in."
        )
    return notebook


def assignment_of(notebook: dict[str, Any], assignments: dict[str, Assignment]) -> str:
    """The assignment that most of the cells belong to; "" if none of them is known."""
    votes: Counter[str] = Counter()
    for cell in notebook["cells"]:
        marks = {grade_id(cell), str(cell.get("id") if isinstance(cell, dict) else "")}
        votes.update(name for name, a in assignments.items() if marks & a.by_id.keys())
    return votes.most_common(1)[0][0] if votes else ""


def _with_assignment(found: Submission, assignments: dict[str, Assignment]) -> Submission:
    """The submission with its assignment, or with the problem that its content shows."""
    try:
        inside = assignment_of(read_notebook(found.path), assignments)
    except (SubmissionError, OSError) as error:
        return replace(found, problem=str(error))
    claimed = found.assignment
    if claimed and claimed not in assignments:
        known = ", ".join(sorted(assignments))
        return replace(found, problem=f"there is no assignment {claimed}; there are {known}.")
    if claimed and inside and claimed != inside:
        problem = f"it was handed in as {claimed}, but its cells are those of {inside}."
        return replace(found, problem=problem)
    if not inside:
        problem = "none of its cells is a cell of the coursework; was another notebook handed in?"
        return replace(found, problem=problem)
    return replace(found, assignment=inside)


def _candidates(folder: Path) -> Iterator[Submission]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "__")):
            continue
        if entry.is_symlink():
            yield Submission(entry.stem, entry, problem=f"{entry.name} is a link; copy the files.")
        elif entry.suffix == ".ipynb":
            match = STUDENT_AND_ASSIGNMENT.fullmatch(entry.stem)
            student = match["student"] if match else entry.stem
            yield Submission(student, entry, match["assignment"] if match else "")
        elif entry.is_dir():
            yield from _notebooks_of(entry)


def _notebooks_of(entry: Path) -> Iterator[Submission]:
    match = EXCHANGE_FOLDER.fullmatch(entry.name)
    student = match["student"] if match else entry.name
    notebooks = [
        p
        for p in sorted(entry.rglob("*.ipynb"))
        if not any(part.startswith(".") for part in p.relative_to(entry).parts)
    ]
    if not notebooks:
        problem = f"there is no notebook in {entry.name}/."
        yield Submission(student, entry, match["assignment"] if match else "", problem)
    for path in notebooks:
        folders = [p for p in path.relative_to(entry).parts[:-1] if ASSIGNMENT.fullmatch(p)]
        claimed = match["assignment"] if match else "".join(folders[:1])
        yield Submission(student, path, claimed, time=match["time"] if match else "")


def find_submissions(folder: Path, assignments: dict[str, Assignment]) -> list[Submission]:
    """The submissions below `folder`, one for each learner and assignment, sorted.

    Raises:
        SubmissionError: there is no submission in it.
    """
    inner = folder / "submitted"
    found = [
        s if s.problem else _with_assignment(s, assignments)
        for s in _candidates(inner if inner.is_dir() else folder)
    ]
    if not found:
        raise SubmissionError(
            f"there is no submission in {folder}: expected <student>/<assignment>/<name>.ipynb "
            "or <student>.ipynb."
        )
    chosen: dict[tuple[str, str], Submission] = {}
    for one in found:
        key = one.student, one.assignment or str(one.path)
        if (other := chosen.get(key)) is not None:
            one, other = sorted((one, other), key=_preference, reverse=True)
            note = f"also handed in, and not graded: {other.path.relative_to(folder)}"
            one = replace(one, notes=(*one.notes, *other.notes, note))
        chosen[key] = one
    return [chosen[key] for key in sorted(chosen)]


def _preference(one: Submission) -> tuple[Any, ...]:
    """Sort key of notebooks for one assignment: later, readable and correctly named ones win."""
    named = one.path.stem == one.assignment
    return one.time, not one.problem, named, one.path.stat().st_mtime_ns, one.path.name


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


def clean_copy(notebook: dict[str, Any], handed_out: Assignment) -> CleanCopy:
    """A valid notebook with the learner's cells and the original test cells.

    Outputs and unknown metadata are dropped. The notes say which graded cells were missing or
    changed, and what of this package the answers import that they were not given.
    """
    known = handed_out.by_id
    notes: list[str] = []
    flags: list[str] = []
    by_cell_id = {cell["id"]: name for name, cell in known.items()}
    cells: list[tuple[str, dict[str, Any]]] = []
    for cell in notebook["cells"]:
        if not isinstance(cell, dict) or cell.get("cell_type") not in ("code", "markdown", "raw"):
            notes.append("a cell of an unknown kind was left out")
            continue
        name = grade_id(cell)
        if name not in known:
            name = by_cell_id.get(str(cell.get("id")), "")
        cells.append((name, cell))
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
