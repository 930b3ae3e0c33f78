"""`make grade` from a folder of submissions to scores and feedback.

One test grades submissions of the kinds that learners hand in: an answer, the untouched notebook,
an endless loop, a renamed function, an edited test cell, a file that was cut off.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_lite.course import exercises
from nemotron_lite.course.exercises import Exercise
from nemotron_lite.coursework import grade, make, one_submission
from nemotron_lite.coursework.clean_copy import SubmissionError
from nemotron_lite.coursework.grade import grade_folder, handed_out, importing_sources
from nemotron_lite.coursework.isolation import Limits
from nemotron_lite.coursework.one_submission import Graded, row_of
from nemotron_lite.coursework.similarity import Answer, Pair
from tests.coursework.conftest import toy

SPY = """
print("secret:", __import__("os").environ.get("SECRET_OF_THE_INSTRUCTOR", "not here"))
from IPython.display import HTML, display
display(HTML("<script>stolen()</script><i id='kept' onclick='stolen()'>shown</i>"))
import warnings; warnings.warn("a library that warns costs nothing")
"""
CHAPTER = [toy("one"), toy("two"), toy("three"), toy("extra", kind="optional")]


def cell(book: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [c for c in book["cells"] if c["id"] == name]
    return found


def put(path: Path, book: dict[str, Any] | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(book if isinstance(book, str) else json.dumps(book))


def hand_in(folder: Path) -> None:
    """Five submissions of chapter 99."""

    def solved() -> dict[str, Any]:
        return json.loads(json.dumps(make.source_notebook("99", CHAPTER)))

    put(folder / "alice" / "chapter_99" / "chapter_99.ipynb", solved())
    put(folder / "bob.ipynb", make.release_notebook("99", CHAPTER))

    carl = solved()
    # An endless loop that leaves the processor to the other tests.
    loop = "import time\ndef one(x):\n    while True:\n        time.sleep(0.01)"
    cell(carl, "99-one")["source"] = loop
    cell(carl, "99-two")["source"] = "def two(x:\n    return 1"
    put(folder / "carl_chapter_99.ipynb", carl)

    dora = solved()
    answer = "".join(cell(dora, "99-one")["source"])
    cell(dora, "99-one")["source"] = answer.replace("def one", "def mine")
    cell(dora, "99-two-check")["source"] = "3"
    cell(dora, "99-two")["source"] = "from nemotron_lite import ledger\ndef two(x):\n    return 1"
    dora["cells"] = [c for c in dora["cells"] if c["id"] != "99-three-check"]
    spy = {"cell_type": "code", "id": "spy", "metadata": {}, "source": SPY, "outputs": []}
    dora["cells"].insert(1, {**spy, "execution_count": None})
    put(folder / "dora" / "chapter_99" / "anything.ipynb", dora)

    text = json.dumps(solved())
    put(folder / "=eve" / "chapter_99" / "chapter_99.ipynb", text[: len(text) // 2])


def test_a_folder_of_submissions_is_graded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chapter_99: Callable[[list[Exercise]], None],
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_INSTRUCTOR", "hunter2")
    chapter_99(CHAPTER)
    folder, out = tmp_path / "handed in", tmp_path / "results"
    hand_in(folder)
    before = {p: p.read_bytes() for p in folder.rglob("*.ipynb")}

    summary = grade_folder(folder, out, limits=Limits(cell_seconds=5), names=["99"], seed="again")

    assert {p: p.read_bytes() for p in folder.rglob("*.ipynb")} == before
    assert summary["submissions_unchanged"] is True
    assert json.loads((out / "scores.json").read_text()) == json.loads(json.dumps(summary))
    assert summary["seed"] == "again"
    assert "hunter2" not in "".join(p.read_text() for p in out.rglob("*") if p.is_file())
    found = {one["student"]: one for one in summary["submissions"]}
    status = {s: {e["id"][3:]: e["status"] for e in one["exercises"]} for s, one in found.items()}
    messages = {
        s: {e["id"][3:]: e["message"] for e in one["exercises"]} for s, one in found.items()
    }
    points = {s: (one["points"], one["optional_points"]) for s, one in found.items()}

    assert points == {
        "alice": (9, 3), "bob": (0, 0), "carl": (3, 3), "dora": (3, 3), "=eve": (0, 0),
    }  # fmt: skip
    most = {(one["max_points"], one["max_optional_points"]) for one in found.values()}
    assert most == {(9, 3)}
    assert found["alice"]["flags"] == []
    assert set(status["bob"].values()) == {"failed"}
    assert all("not done yet" in line for line in messages["bob"].values())

    assert status["carl"]["one"] == "stopped"
    assert "an endless loop?" in messages["carl"]["one"]
    assert status["carl"]["two"] == "error"
    assert "its cell ended in SyntaxError" in messages["carl"]["two"]

    assert "was it renamed" in messages["dora"]["one"]
    assert status["dora"] == {"one": "error", "two": "error", "three": "passed", "extra": "passed"}
    assert found["dora"]["flags"] == ["cells_changed", "imports"]
    assert any("99.two: the test cell had been changed" in n for n in found["dora"]["notes"])
    assert any("99.three: the test cell was missing" in n for n in found["dora"]["notes"])
    assert any("imports nemotron_lite.ledger" in n for n in found["dora"]["notes"])

    assert found["=eve"]["status"] == "unreadable"
    assert "is not a notebook: line" in found["=eve"]["message"]

    with (out / "scores.csv").open(newline="") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"alice", "bob", "carl", "dora", "'=eve"}
    assert rows["carl"]["99.three"] == "3"
    assert (rows["carl"]["99.one"], rows["'=eve"]["99.one"]) == ("0", "")
    assert rows["dora"]["flags"] == "cells_changed imports"
    assert (out / "similarity.csv").read_text().startswith("exercise,student,other,similarity")

    pages = {s: (out / one["feedback"]).read_text() for s, one in found.items()}
    assert "chapter_99: 9 of 9 points, and 3 of 3 optional points" in pages["alice"]
    assert "✓ five numbers" in pages["alice"]
    assert "<math" in pages["alice"]
    assert "is not a notebook" in pages["=eve"]
    assert "a library that warns" in pages["dora"]
    assert "<script" not in pages["dora"]
    assert "<i>shown</i>" in pages["dora"]
    assert "secret: not here" in pages["dora"]


def test_a_failing_grader_costs_one_submission_only(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chapter_99: Callable[[list[Exercise]], None],
) -> None:
    chapter_99(CHAPTER)
    put(tmp_path / "subs" / "ann.ipynb", make.release_notebook("99", CHAPTER))

    def fail(*args: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(one_submission, "execute", fail)
    summary = grade_folder(tmp_path / "subs", tmp_path / "out", names=["99"])
    (one,) = summary["submissions"]
    assert (one["status"], one["flags"]) == ("error", ["grader_failed"])
    assert one["message"] == "the grader failed: RuntimeError: a bug; grade it by hand"


def test_each_run_has_a_secret_of_its_own(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chapter_99: Callable[[list[Exercise]], None],
) -> None:
    chapter_99(CHAPTER)
    put(tmp_path / "subs" / "ann.ipynb", "{}")
    seeds = [
        grade_folder(tmp_path / "subs", tmp_path / "out", names=["99"])["seed"] for _ in range(2)
    ]
    assert seeds[0] != seeds[1]
    assert all(len(seed) >= 16 for seed in seeds)


def test_alike_answers_are_noted_once_for_each_exercise() -> None:
    results = [
        {"student": name, "exercises": [{"id": "99.one"}], "notes": [], "flags": []}
        for name in ("ann", "bob")
    ]
    ann, *others = (Answer(name, "") for name in ("ann", "bob", "c", "d", "e", "f"))
    grade._note_similar(results, [Pair("99.one", ann, o, 0.9, (1, 1)) for o in others])
    assert results[0]["notes"] == [
        "99.one: the answer is like that of bob (90%), c (90%), d (90%), e (90%) and 1 more"
    ]
    assert results[1]["notes"] == ["99.one: the answer is like that of ann (90%)"]
    assert results[0]["flags"] == ["similar"]


def test_references_of_other_chapters_can_be_imported_from(chapter_99: Any) -> None:
    other = toy("other", id="98.other", stub="import math\n\n\n" + toy("other").stub)
    chapter_99([toy("one", needs=("98.other",)), other])
    sources = importing_sources(handed_out(["99"])["chapter_99"])
    assert any(source == "import math" for source in sources)


def test_results_never_go_among_the_submissions(tmp_path: Path) -> None:
    (tmp_path / "subs").mkdir()
    with pytest.raises(SubmissionError, match="among the submissions"):
        grade_folder(tmp_path / "subs", tmp_path / "subs" / "results")


def test_a_missing_folder_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grade.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    messages = capsys.readouterr().err
    assert messages.startswith("Nothing was graded: ")
    assert "is not a folder" in messages
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["..", "../../", "file", "file/results"])
def test_a_wrong_out_is_reported_before_anything_runs(
    tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "subs" / "ann" / "x.ipynb", "{}")
    put(tmp_path / "here" / "file", "mine")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(grade, "find_isolation", lambda: pytest.fail("the grading began"))
    assert grade.main([str(tmp_path / "subs"), "--out", out]) == 2
    messages = capsys.readouterr().err
    assert messages.startswith("Nothing was graded: the results cannot be written into --out ")
    assert (tmp_path / "here" / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["here", "subs"]


def test_the_command_prints_a_line_for_each_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chapter = make.chapters()[0]
    put(tmp_path / "subs" / "ann.ipynb", "cut off")
    found = exercises.exercises(chapter)
    put(tmp_path / "subs" / "bob.ipynb", make.release_notebook(chapter, found))
    monkeypatch.setattr(grade, "_check_references", lambda *rest: None)
    monkeypatch.setattr(grade, "grade_one", lambda one, assignment, *rest: Graded(
        row_of(one, assignment, status="graded", message="fine", notes=["a note"]), "", {}
    ))  # fmt: skip
    out = tmp_path / "out"
    assert (
        grade.main([str(tmp_path / "subs"), "--out", str(out), "--jobs", "1", "--seed", "s"]) == 0
    )
    printed = capsys.readouterr().out
    most = sum(e.points for e in found if e.kind == "must")
    assert f"0 of {most}" in printed
    assert "note: a note" in printed
    assert "Network of the submissions: " in printed
    assert "files: " in printed
