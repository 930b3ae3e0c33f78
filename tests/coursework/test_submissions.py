"""Submissions are found in every layout, and no broken notebook stops the grading.

The assignments are small notebooks made in the tests; nothing is executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_lite.coursework import submissions
from nemotron_lite.coursework.clean_copy import (
    Assignment,
    SubmissionError,
    assignment_of,
    clean_copy,
)
from nemotron_lite.coursework.submissions import find_submissions, read_notebook

Cell = dict[str, Any]


def code(name: str, source: str, **metadata: Any) -> Cell:
    return {
        "cell_type": "code", "id": name, "metadata": metadata, "source": source,
        "execution_count": 3, "outputs": [{"output_type": "stream", "name": "stdout", "text": "x"}],
    }  # fmt: skip


def marks(grade_id: str, *, solution: bool) -> dict[str, Any]:
    return {
        "grade": not solution, "grade_id": grade_id, "locked": not solution, "points": 4,
        "schema_version": 3, "solution": solution, "task": False,
    }  # fmt: skip


def assignment(chapter: str) -> Assignment:
    """Two exercises, `one` and `two`, between a title and a set-up cell."""
    cells: list[Cell] = [
        {"cell_type": "markdown", "id": f"{chapter}-opening", "metadata": {}, "source": "# Work"},
        code(f"{chapter}-setup", "from nemotron_lite.course import check"),
    ]
    for name in ("one", "two"):
        key, about = f"{chapter}-{name}", {"exercise": f"{chapter}.{name}", "function": name}
        test = f'check("{chapter}.{name}", {name}).points'
        answer = f"def {name}():\n    raise NotImplementedError"
        cells += [
            code(key, answer, nbgrader=marks(key, solution=True)),
            code(
                f"{key}-check",
                test,
                nbgrader=marks(f"{key}-check", solution=False),
                nemotron_lite=about,
            ),
        ]
    return Assignment(f"chapter_{chapter}", tuple(cells), {"kernelspec": {"name": "python3"}})


KNOWN = {a.name: a for a in map(assignment, ("01", "02"))}
FIRST = KNOWN["chapter_01"]


def notebook(*cells: Cell, of: Assignment = FIRST) -> dict[str, Any]:
    own = json.loads(json.dumps(list(cells or of.cells)))
    return {"cells": own, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def put(path: Path, content: dict[str, Any] | str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content or notebook()))
    return path


@pytest.mark.parametrize(
    ("where", "student"),
    [
        ("ann/chapter_01/chapter_01.ipynb", "ann"),
        ("ann/chapter_01/my work.ipynb", "ann"),
        ("submitted/ann/chapter_01/chapter_01.ipynb", "ann"),
        ("ann/anything.ipynb", "ann"),
        ("ann/uploads/late/anything.ipynb", "ann"),
        ("ann.ipynb", "ann"),
        ("ann_chapter_01.ipynb", "ann"),
        ("ann+chapter_01+2026-01-02 03:04:05 UTC+ab12/chapter_01.ipynb", "ann"),
        ("Ann B. [x]*/chapter_01/chapter_01.ipynb", "Ann B. [x]*"),
    ],
)
def test_every_layout_is_found(tmp_path: Path, where: str, student: str) -> None:
    path = put(tmp_path / where)
    (found,) = find_submissions(tmp_path, KNOWN)
    assert (found.student, found.assignment, found.problem) == (student, "chapter_01", "")
    assert found.path == path


def test_learners_and_assignments_are_kept_apart(tmp_path: Path) -> None:
    put(tmp_path / "bob" / "b.ipynb", notebook(of=KNOWN["chapter_02"]))
    put(tmp_path / "bob" / "a.ipynb")
    put(tmp_path / "ann.ipynb")
    put(tmp_path / "bob" / ".ipynb_checkpoints" / "a-checkpoint.ipynb")
    put(tmp_path / ".trash.ipynb")
    put(tmp_path / "roster.csv", "ann,bob")
    found = [(s.student, s.assignment) for s in find_submissions(tmp_path, KNOWN)]
    assert found == [("ann", "chapter_01"), ("bob", "chapter_01"), ("bob", "chapter_02")]


def test_of_two_the_later_or_rightly_named_one_counts(tmp_path: Path) -> None:
    early = put(tmp_path / "ann+chapter_01+2026-01-01 00:00:00 UTC" / "chapter_01.ipynb")
    late = put(tmp_path / "ann+chapter_01+2026-01-09 00:00:00 UTC" / "chapter_01.ipynb")
    named = put(tmp_path / "bob" / "chapter_01" / "chapter_01.ipynb")
    copy = put(tmp_path / "bob" / "chapter_01" / "z copy.ipynb")
    ann, bob = find_submissions(tmp_path, KNOWN)
    assert (ann.path, bob.path) == (late, named)
    assert ann.notes == (f"also handed in, and not graded: {early.relative_to(tmp_path)}",)
    assert str(copy.relative_to(tmp_path)) in bob.notes[0]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"cells": [', "not a notebook: line 1, column 12"),
        ("", "is empty"),
        ("<<<<<<< HEAD\n{}", "merged with conflicts"),
        ("[1, 2]", "no nbformat"),
        ('{"nbformat": 4}', "no list of cells"),
        ('{"nbformat": 3, "worksheets": []}', "save it, and hand that in"),
        ('{"nbformat": 4, "cells": {}}', "no list of cells"),
        ('{"nbformat": 4, "cells": [1, null, {"metadata": [], "id": {}}]}', "another notebook"),
        ("[" * 100_000, "not a notebook"),
    ],
    ids=["cut", "empty", "conflict", "list", "no-cells", "old", "dict", "junk", "deep"],
)
def test_an_unreadable_notebook_becomes_a_line(tmp_path: Path, content: str, says: str) -> None:
    put(tmp_path / "ann" / "chapter_01" / "chapter_01.ipynb", content)
    put(tmp_path / "bob.ipynb")
    ann, bob = find_submissions(tmp_path, KNOWN)
    assert says in ann.problem
    assert "\n" not in ann.problem
    assert (bob.student, bob.problem) == ("bob", "")


def test_binary_files_links_and_large_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = put(tmp_path / "good.ipynb")
    (tmp_path / "binary.ipynb").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "link.ipynb").symlink_to(good)
    (tmp_path / "ann").mkdir()
    (tmp_path / "ann" / "inner.ipynb").symlink_to("/etc/hostname")
    put(tmp_path / "large.ipynb", json.dumps({"nbformat": 4, "x": "x" * 20_000}))
    monkeypatch.setattr(submissions, "LARGEST", 10_000)
    problems = {s.student: s.problem for s in find_submissions(tmp_path, KNOWN)}
    assert problems["good"] == ""
    assert "UTF-8" in problems["binary"]
    assert "link" in problems["link"]
    assert "link" in problems["ann"]
    assert "clear its outputs" in problems["large"]


def test_a_wrong_assignment_and_an_empty_folder_are_reported(tmp_path: Path) -> None:
    put(tmp_path / "ann" / "chapter_02" / "chapter_02.ipynb")
    put(tmp_path / "bob" / "chapter_77" / "x.ipynb")
    (tmp_path / "cem").mkdir()
    problems = {s.student: s.problem for s in find_submissions(tmp_path, KNOWN)}
    assert "its cells are those of chapter_01" in problems["ann"]
    assert "there is no assignment chapter_77; there are chapter_01, chapter_02" in problems["bob"]
    assert "no notebook in cem/" in problems["cem"]


def test_a_folder_that_holds_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SubmissionError, match="there is no submission in"):
        find_submissions(tmp_path, KNOWN)


def test_a_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "ann.ipynb"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(notebook()).encode())
    assert len(read_notebook(path)["cells"]) == len(FIRST.cells)


# What learners do to their notebooks, and what the clean copy makes of it.


def drop(name: str) -> Callable[[dict[str, Any]], None]:
    def change(book: dict[str, Any]) -> None:
        book["cells"] = [c for c in book["cells"] if c["id"] != name]

    return change


def edit(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    def change(book: dict[str, Any]) -> None:
        next(c for c in book["cells"] if c["id"] == name).update(fields)

    return change


def copied(*changes: Callable[[dict[str, Any]], None]) -> tuple[dict[str, Cell], list[str]]:
    """Cells of the clean copy by grade_id, and the notes."""
    book = notebook()
    for change in changes:
        change(book)
    copy = clean_copy(book, FIRST)
    whole, notes = copy.notebook, copy.notes
    assert whole["metadata"] == FIRST.metadata
    assert all(isinstance(c["source"], str) for c in whole["cells"])
    named = [(c["metadata"].get("nbgrader", {}).get("grade_id"), c) for c in whole["cells"]]
    graded = [name for name, _ in named if name]
    assert len(set(graded)) == len(graded), "a graded cell stands twice"
    assert [e.test for e in FIRST.exercises if e.test not in graded] == []
    assert len({c["id"] for c in whole["cells"]}) == len(whole["cells"])
    return {name: cell for name, cell in named if name}, notes


def test_an_honest_answer_is_copied_without_a_note() -> None:
    cells, notes = copied(edit("01-one", source=["def one():\n", "    return 1"]))
    assert notes == []
    assert cells["01-one"]["source"] == "def one():\n    return 1"
    assert cells["01-one"]["outputs"] == []


def test_a_tampered_test_cell_is_restored() -> None:
    cells, notes = copied(edit("01-one-check", source="4", cell_type="markdown"))
    assert cells["01-one-check"]["source"] == 'check("01.one", one).points'
    assert cells["01-one-check"]["cell_type"] == "code"
    assert notes == ["01.one: the test cell had been changed; the original was run"]


def test_points_raised_in_the_metadata_do_not_count() -> None:
    raised = {"nbgrader": {**marks("01-one-check", solution=False), "points": 400}}
    cells, _ = copied(edit("01-one-check", metadata=raised))
    assert cells["01-one-check"]["metadata"]["nbgrader"]["points"] == 4


def test_missing_cells_are_put_back_and_noted() -> None:
    cells, notes = copied(drop("01-one-check"), drop("01-two"))
    assert "01-two" not in cells
    assert notes == [
        "01.one: the test cell was missing and has been put back",
        "01.two: the answer cell is missing",
    ]


def test_cells_without_metadata_are_known_by_their_ids() -> None:
    cells, notes = copied(edit("01-one", metadata={}), edit("01-one-check", metadata={}))
    assert {"01-one", "01-one-check"} <= set(cells)
    assert notes == []


def test_of_a_cell_pasted_twice_the_last_one_is_graded() -> None:
    def paste(book: dict[str, Any]) -> None:
        again = json.loads(json.dumps(book["cells"][2])) | {"source": "def one(): return 2"}
        book["cells"].append(again)

    cells, _ = copied(paste)
    assert cells["01-one"]["source"] == "def one(): return 2"


def test_junk_between_the_cells_is_left_out() -> None:
    cells, notes = copied(lambda book: book["cells"].extend([7, None, {"cell_type": "heading"}]))
    assert notes == ["cells of an unknown kind, left out: 3"]
    assert len(cells) == 4


@pytest.mark.parametrize(
    ("source", "noted"),
    [
        ("from nemotron_lite.ops.scan import selective_scan", "nemotron_lite.ops.scan"),
        ("def one():\n    import nemotron_kernels", "nemotron_kernels"),
        ("from nemotron_lite import (\n    ledger,\n    ops as o,\n)",
         "nemotron_lite.ledger, nemotron_lite.ops"),
        ("from nemotron_lite.course.exercises import exercise", "nemotron_lite.course.exercises"),
        ("from nemotron_lite.course import hint", ""),
        ("# nemotron_lite has this too", ""),
    ],
)  # fmt: skip
def test_answers_that_import_the_package_are_noted(source: str, noted: str) -> None:
    _, notes = copied(edit("01-one", source=source))
    assert notes == (
        [f"imports {noted}: read the answers, they may call what they teach"] if noted else []
    )


def test_the_assignment_is_that_of_most_of_the_cells() -> None:
    mixed = notebook(*FIRST.cells, KNOWN["chapter_02"].cells[2])
    assert assignment_of(mixed, KNOWN) == "chapter_01"
    assert assignment_of(notebook({"cell_type": "code"}), KNOWN) == ""
