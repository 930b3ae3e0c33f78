"""What learners hand in, read without trusting it.

A folder of submissions comes in several shapes, and the notebooks in it in more: saved by another
tool, with cells deleted, pasted twice, renamed, cut off in the upload. This room finds them, says
in one line what is wrong with those that cannot be graded, and makes of the others a clean copy in
which every graded cell is the one that was handed out:

    folder/<student>/<assignment>/<notebook>.ipynb     nbgrader's submitted/ folder, or its parent
    folder/<student>+<assignment>+<time>[+…]/….ipynb   nbgrader's exchange; the latest one counts
    folder/<student>/<notebook>.ipynb                  the assignment is told by the cells
    folder/<student>.ipynb                             or <student>_chapter_01.ipynb

In the copy, a cell is what its `grade_id` says, or its cell id where a tool dropped the metadata.
Locked cells get their original text back, missing ones are put at the end, doubled ones count
once. Whatever was changed is noted, for a person to judge: it is seldom cheating.

Files are only read. Left out: archives, and assignments of several notebooks.
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
EXCHANGE = re.compile(r"(?P<student>[^+]+)\+(?P<assignment>[^+]+)\+(?P<time>[^+]+)(\+.*)?")
LOOSE = re.compile(r"(?P<student>.+?)[ _+-]+(?P<assignment>chapter_\d\d)")
OWN_IMPORT = re.compile(r"^\s*(?:from|import)\s+(nemotron_(?:lite|kernels)[\w.]*)", re.M)


class SubmissionError(ValueError):
    """A notebook that cannot be graded, and why, in a line a person can act on."""


@dataclass(frozen=True)
class Graded:
    """One exercise of an assignment, as its test cell tells it."""

    id: str
    function: str
    points: float
    test: str  # grade_id of the cell that grades
    answer: str  # grade_id of the cell it grades


@dataclass(frozen=True)
class Assignment:
    """An assignment as it was handed out: the truth that submissions are compared with."""

    name: str
    cells: tuple[dict[str, Any], ...]
    metadata: dict[str, Any]

    @property
    def by_id(self) -> dict[str, dict[str, Any]]:
        """The cells that nbgrader knows, by grade_id."""
        return {grade_id(c): c for c in self.cells if grade_id(c)}

    @property
    def exercises(self) -> tuple[Graded, ...]:
        """What earns points, in order."""
        found = []
        for name, cell in self.by_id.items():
            if cell["metadata"]["nbgrader"]["grade"]:
                about = cell["metadata"]["nemotron_lite"]
                points = float(cell["metadata"]["nbgrader"]["points"])
                answer = name.removesuffix("-check")
                found.append(Graded(about["exercise"], about["function"], points, name, answer))
        return tuple(found)


@dataclass(frozen=True)
class Submission:
    """One notebook of one learner; with a `fault` it cannot be graded."""

    student: str
    path: Path
    assignment: str = ""
    fault: str = ""
    notes: tuple[str, ...] = ()
    time: str = ""


def released(path: Path) -> Assignment:
    """Read an assignment from its release notebook."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return Assignment(path.stem, tuple(notebook["cells"]), notebook["metadata"])


def grade_id(cell: Any) -> str:
    """nbgrader's name of a cell, or ""; the cell may be anything that JSON can hold."""
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
        SubmissionError: it is a link, too large, no JSON, or JSON that is no notebook.
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
        raise SubmissionError(f"{path.name} is no text file in UTF-8: {error.reason}.") from error
    except json.JSONDecodeError as error:
        raise SubmissionError(
            f"{path.name} is no notebook: line {error.lineno}, column {error.colno}: {error.msg}. "
            "Was it cut off, or merged with conflicts?"
        ) from error
    except RecursionError as error:
        raise SubmissionError(f"{path.name} is no notebook: it is nested too deeply.") from error
    version = notebook.get("nbformat") if isinstance(notebook, dict) else None
    if not isinstance(version, int):
        raise SubmissionError(f"{path.name} is JSON, but no notebook: it has no nbformat.")
    if version < 4 or not isinstance(notebook.get("cells"), list):
        raise SubmissionError(
            f"{path.name} has no list of cells (notebook format {version}); open it in JupyterLab, "
            "save it, and hand that in."
        )
    return notebook


def assignment_of(notebook: dict[str, Any], assignments: dict[str, Assignment]) -> str:
    """Which assignment the cells belong to; "" when none of them is known."""
    votes: Counter[str] = Counter()
    for cell in notebook["cells"]:
        marks = {grade_id(cell), str(cell.get("id") if isinstance(cell, dict) else "")}
        votes.update(name for name, a in assignments.items() if marks & a.by_id.keys())
    return votes.most_common(1)[0][0] if votes else ""


def _resolved(found: Submission, assignments: dict[str, Assignment]) -> Submission:
    """Fill in the assignment and the fault of a submission, from its content."""
    try:
        inside = assignment_of(read_notebook(found.path), assignments)
    except (SubmissionError, OSError) as error:
        return replace(found, fault=str(error))
    claimed = found.assignment
    if claimed and claimed not in assignments:
        known = ", ".join(sorted(assignments))
        return replace(found, fault=f"there is no assignment {claimed}; there are {known}.")
    if claimed and inside and claimed != inside:
        fault = f"it was handed in as {claimed}, but its cells are those of {inside}."
        return replace(found, fault=fault)
    if not inside:
        fault = "none of its cells is a cell of the coursework; was another notebook handed in?"
        return replace(found, fault=fault)
    return replace(found, assignment=inside)


def _found(folder: Path) -> Iterator[Submission]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "__")):
            continue
        if entry.is_symlink():
            yield Submission(entry.stem, entry, fault=f"{entry.name} is a link; copy the files.")
        elif entry.suffix == ".ipynb":
            match = LOOSE.fullmatch(entry.stem)
            student = match["student"] if match else entry.stem
            yield Submission(student, entry, match["assignment"] if match else "")
        elif entry.is_dir():
            yield from _found_in(entry)


def _found_in(entry: Path) -> Iterator[Submission]:
    match = EXCHANGE.fullmatch(entry.name)
    student = match["student"] if match else entry.name
    notebooks = [
        p for p in sorted(entry.rglob("*.ipynb"))
        if not any(part.startswith(".") for part in p.relative_to(entry).parts)
    ]  # fmt: skip
    if not notebooks:
        fault = f"there is no notebook in {entry.name}/."
        yield Submission(student, entry, match["assignment"] if match else "", fault)
    for path in notebooks:
        folders = [p for p in path.relative_to(entry).parts[:-1] if ASSIGNMENT.fullmatch(p)]
        claimed = match["assignment"] if match else "".join(folders[:1])
        yield Submission(student, path, claimed, time=match["time"] if match else "")


def find_submissions(folder: Path, assignments: dict[str, Assignment]) -> list[Submission]:
    """Every submission below `folder`, one a learner and assignment, sorted.

    Raises:
        SubmissionError: there is no submission in it.
    """
    inner = folder / "submitted"
    found = [
        s if s.fault else _resolved(s, assignments)
        for s in _found(inner if inner.is_dir() else folder)
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
    """Of two notebooks for one assignment: the later, the readable, the rightly named one."""
    named = one.path.stem == one.assignment
    return one.time, not one.fault, named, one.path.stat().st_mtime_ns, one.path.name


def clean_copy(
    notebook: dict[str, Any], handed_out: Assignment
) -> tuple[dict[str, Any], list[str]]:
    """A valid notebook with the learner's cells and the original graded ones, and what was changed.

    Outputs and foreign metadata are dropped; the notes say which graded cells were missing or
    changed, and which rooms of the package the answers import.
    """
    known, notes = handed_out.by_id, []
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
            copied.append(_original(known[name], cell, notes))
        else:
            copied.append(_plain(f"own-{i}", cell["cell_type"], text_of(cell)))
    for exercise in handed_out.exercises:
        if exercise.answer not in last:
            notes.append(f"{exercise.id}: the answer cell is missing")
        if exercise.test not in last:
            notes.append(f"{exercise.id}: the test cell was missing and has been put back")
            copied.append(_original(known[exercise.test], known[exercise.test], notes))
    allowed = set(OWN_IMPORT.findall("\n".join(map(text_of, handed_out.cells))))
    used = set(OWN_IMPORT.findall("\n".join(c["source"] for c in copied)))
    if extra := sorted(used - allowed):
        notes.append(f"imports {', '.join(extra)}: read the answers, they may call what they teach")
    whole = {"cells": copied, "metadata": handed_out.metadata, "nbformat": 4, "nbformat_minor": 5}
    return whole, notes


def _plain(name: str, kind: str, source: str, **metadata: Any) -> dict[str, Any]:
    code: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    return {"cell_type": kind, "id": name, "metadata": metadata, "source": source, **code}


def _original(handed_out: dict[str, Any], cell: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """A known cell: its own text where it is an answer, the text handed out where it grades."""
    marks = handed_out["metadata"]
    source = text_of(cell)
    if marks["nbgrader"]["locked"]:
        if source.strip() != text_of(handed_out).strip():
            about = marks["nemotron_lite"]["exercise"]
            notes.append(f"{about}: the test cell had been changed; the original was run")
        source = text_of(handed_out)
    return _plain(handed_out["id"], handed_out["cell_type"], source, **marks)
