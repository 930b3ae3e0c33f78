"""Read what learners hand in, without trusting it.

Learners hand in notebooks in several folder layouts. Some were saved by another tool, have deleted,
pasted or renamed cells, or were cut off in the upload. This module finds them, says in one line why
a notebook cannot be graded, and makes a clean copy of every other one (`clean_copy`):

    folder/<student>/<assignment>/<notebook>.ipynb     nbgrader's submitted/ folder, or its parent
    folder/<student>+<assignment>+<time>[+…]/….ipynb   nbgrader's exchange; the latest one counts
    folder/<student>/<notebook>.ipynb                  the cells show which assignment it is
    folder/<student>.ipynb                             or <student>_chapter_01.ipynb

What is in the folder of one learner does not concern the others: whatever goes wrong in it, also an
error that nobody has thought of, becomes the `problem` of that learner. Links are not followed,
pipes and devices not opened, and the number of files, their depth and their sizes are limited.

All notebooks are read here, before the first one is executed. So nothing that a learner's code does
can change what is graded of another.

Files are only read. Left out: archives, and assignments with several notebooks.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from nemotron_lite.coursework.clean_copy import (
    Assignment,
    CleanCopy,
    SubmissionError,
    assignment_of,
    clean_copy,
)
from nemotron_lite.coursework.texts import one_line
from nemotron_lite.input_files import FileError, parse_json, read_bytes

LARGEST = 20 * 2**20  # bytes of one notebook
MOST_FILES = 5000  # below one learner's folder
MOST_NOTEBOOKS = 50
DEEPEST = 8  # folders below each other
ASSIGNMENT = re.compile(r"chapter_\d\d")
EXCHANGE_FOLDER = re.compile(r"(?P<student>[^+]+)\+(?P<assignment>[^+]+)\+(?P<time>[^+]+)(\+.*)?")
STUDENT_AND_ASSIGNMENT = re.compile(r"(?P<student>.+?)[ _+-]+(?P<assignment>chapter_\d\d)")


@dataclass(frozen=True)
class Submission:
    """One notebook of one learner: what is graded of it, or the `problem` why nothing is.

    Attributes:
        student: the name in one line; a character that cannot be shown stands as its escape.
        path: of the notebook, or of the folder that has none.
        copy: what is graded.
        modified: time of the last change, in nanoseconds.
    """

    student: str
    path: Path
    assignment: str = ""
    problem: str = ""
    notes: tuple[str, ...] = ()
    time: str = ""
    copy: CleanCopy | None = None
    modified: int = 0


def read_notebook(path: Path) -> dict[str, Any]:
    """The JSON of a notebook.

    Raises:
        SubmissionError: it is no regular file, a link, too large, not JSON, or JSON that is not a
            notebook.
    """
    name = one_line(path.name)
    try:
        content = read_bytes(path, limit=LARGEST, follow_links=False)
        if not content:
            raise SubmissionError(f"{name} is empty; was it saved?")
        notebook = parse_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise SubmissionError(
            f"{name} is not a text file in UTF-8: {error.reason}; save it again."
        ) from error
    except JSONDecodeError as error:
        raise SubmissionError(
            f"{name} is not a notebook: line {error.lineno}, column {error.colno}: "
            f"{error.msg}. Was it cut off, or merged with conflicts?"
        ) from error
    except FileNotFoundError as error:
        raise SubmissionError(f"{name} was there and is gone.") from error
    except FileError as error:
        way = "; clear its outputs and hand it in again" if "bytes" in error.fault else ""
        raise SubmissionError(f"{name} {one_line(error.fault)}{way}.") from error
    except SubmissionError:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        raise SubmissionError(f"{name} is not a notebook: {one_line(str(error))}.") from error
    version = notebook.get("nbformat") if isinstance(notebook, dict) else None
    if type(version) is not int:
        raise SubmissionError(f"{name} is JSON, but not a notebook: it has no nbformat.")
    if version < 4 or not isinstance(notebook.get("cells"), list):
        raise SubmissionError(
            f"{name} has no list of cells (notebook format {version}); open it in JupyterLab, "
            "save it, and hand that in."
        )
    return dict(notebook)


def _read(found: Submission, assignments: dict[str, Assignment]) -> Submission:
    """The submission with its assignment and clean copy, or with the problem it has."""
    try:
        notebook = read_notebook(found.path)
        inside = assignment_of(notebook, assignments)
        claimed = found.assignment
        if claimed and claimed not in assignments:
            known = ", ".join(sorted(assignments))
            raise SubmissionError(f"there is no assignment {one_line(claimed)}; there are {known}.")
        if claimed and inside and claimed != inside:
            raise SubmissionError(
                f"it was handed in as {claimed}, but its cells are those of {inside}."
            )
        if not inside:
            raise SubmissionError(
                "none of its cells is a cell of the coursework; was another notebook handed in?"
            )
        copy = clean_copy(notebook, assignments[inside])
        modified = found.path.lstat().st_mtime_ns
    except SubmissionError as error:
        return replace(found, problem=str(error))
    except Exception as error:  # of this learner; the others are read all the same
        return replace(found, problem=f"it cannot be read: {told(error)}")
    return replace(found, assignment=inside, copy=copy, modified=modified)


def told(error: BaseException) -> str:
    """An error in one line."""
    with suppress(Exception):
        return one_line(f"{type(error).__name__}: {error}")
    return type(error).__name__


def _candidates(folder: Path) -> Iterator[Submission]:
    for name in sorted(os.listdir(folder)):
        if not name.startswith((".", "__")):
            try:
                yield from _entry(folder / name)
            except Exception as error:  # an unreadable folder, a loop of links, a path too long
                problem = f"it cannot be searched: {told(error)}"
                yield Submission(one_line(Path(name).stem), folder / name, problem=problem)


def _entry(entry: Path) -> list[Submission]:
    """The submissions of one file or folder."""
    kind = entry.lstat().st_mode
    if stat.S_ISLNK(kind):
        problem = f"{one_line(entry.name)} is a link; copy the files."
        return [Submission(one_line(entry.stem), entry, problem=problem)]
    if entry.suffix == ".ipynb":
        match = STUDENT_AND_ASSIGNMENT.fullmatch(entry.stem)
        student = match["student"] if match else entry.stem
        return [Submission(one_line(student), entry, match["assignment"] if match else "")]
    return _notebooks_of(entry) if stat.S_ISDIR(kind) else []


def _notebooks_of(entry: Path) -> list[Submission]:
    match = EXCHANGE_FOLDER.fullmatch(entry.name)
    student = one_line(match["student"] if match else entry.name)
    of = match["assignment"] if match else ""
    notebooks, problem = _search(entry)
    if not notebooks and not problem:
        problem = f"there is no notebook in {one_line(entry.name)}/."
    if problem:
        return [Submission(student, entry, of, problem)]
    found = []
    for path in notebooks:
        folders = [p for p in path.relative_to(entry).parts[:-1] if ASSIGNMENT.fullmatch(p)]
        claimed = of if match else "".join(folders[:1])
        found.append(Submission(student, path, claimed, time=match["time"] if match else ""))
    return found


def _search(folder: Path) -> tuple[list[Path], str]:
    """The notebooks below a folder, and why it cannot be searched, "" if it can."""
    found: list[Path] = []
    faults: list[OSError] = []
    seen, top = 0, len(folder.parts)
    for place, folders, files in os.walk(folder, onerror=faults.append):
        depth = len(Path(place).parts) - top
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if depth >= DEEPEST:
            folders.clear()
        seen += len(folders) + len(files)
        if seen > MOST_FILES:
            return [], f"it holds more than {MOST_FILES:,} files; hand in the notebook alone."
        found += [
            Path(place, name)
            for name in sorted(files)
            if name.endswith(".ipynb") and not name.startswith(".")
        ]
        if len(found) > MOST_NOTEBOOKS:
            return [], f"it holds more than {MOST_NOTEBOOKS} notebooks; hand in one for each task."
    if faults and not found:
        return [], f"it cannot be searched: {told(faults[0])}"
    return found, ""


def find_submissions(folder: Path, assignments: dict[str, Assignment]) -> list[Submission]:
    """The submissions below `folder`, one for each learner and assignment, sorted.

    Raises:
        SubmissionError: there is no submission in it.
    """
    inner = folder / "submitted"
    place = inner if inner.is_dir() and not inner.is_symlink() else folder
    found = [s if s.problem else _read(s, assignments) for s in _candidates(place)]
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
            left = one_line(str(other.path.relative_to(folder)))
            note = f"also handed in, and not graded: {left}"
            one = replace(one, notes=(*one.notes, *other.notes, note))
        chosen[key] = one
    return [chosen[key] for key in sorted(chosen)]


def _preference(one: Submission) -> tuple[Any, ...]:
    """Sort key of notebooks for one assignment: later, readable and correctly named ones win."""
    named = one.path.stem == one.assignment
    return one.time, not one.problem, named, one.modified, one.path.name
