"""One submission never costs another one anything, whatever it is and whatever its code does."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from nemotron_lite.course.exercises import Exercise
from nemotron_lite.coursework import feedback, grade, make, one_submission, submissions
from nemotron_lite.coursework.clean_copy import SubmissionError
from nemotron_lite.coursework.grade import ResultsError, grade_folder, handed_out
from nemotron_lite.coursework.isolation import Isolation, Limits
from nemotron_lite.coursework.one_submission import Graded, page_of, row_of
from nemotron_lite.coursework.scoring import Score
from nemotron_lite.coursework.scratch import remove_folder, scratch_folder
from nemotron_lite.coursework.submissions import find_submissions
from nemotron_lite.coursework.time_limit import OverTimeError, time_limit
from tests.coursework.bad_submissions import BAD
from tests.coursework.conftest import toy

CHAPTER = [toy("one"), toy("two")]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is removed whatever lies in it; pytest's own removal recurses too deeply."""
    made = tmp_path / "handed in"
    made.mkdir()
    yield made
    remove_folder(made)


def solved() -> str:
    return json.dumps(make.source_notebook("99", CHAPTER))


def with_cell(source: str, kind: str = "code") -> str:
    """The right answers, and a cell of the learner's own before them."""
    book = json.loads(solved())
    own = {"cell_type": kind, "id": "own", "metadata": {}, "source": source}
    book["cells"].insert(1, own | ({"outputs": []} if kind == "code" else {}))
    return json.dumps(book)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_submission_is_a_row_and_the_honest_one_is_read(
    name: str, folder: Path, chapter_99: Callable[[list[Exercise]], None]
) -> None:
    chapter_99(CHAPTER)
    known = handed_out(["99"])
    BAD[name](folder)
    (folder / "honest.ipynb").write_text(solved())
    (folder / "zoe").mkdir()
    (folder / "zoe" / "x.ipynb").write_text(solved())
    found = {one.student: one for one in find_submissions(folder, known)}
    for honest in ("honest", "zoe"):
        assert (found[honest].problem, found[honest].assignment) == ("", "chapter_99")
    rest = [one for one in found.values() if one.student not in ("honest", "zoe")]
    assert rest
    for one in rest:
        if os.geteuid() or name != "unreadable":
            assert one.problem, "a bad submission was taken for a good one"
        assert len(one.problem) < 700
        assert one.student.isprintable()
        assert one.problem.isprintable()
        row = row_of(one, None, message=one.problem)
        assert row["points"] == 0.0
        page_of(row).encode()
    before = grade._folder_state(folder)
    assert grade._folder_state(folder) == before
    (folder / "zoe" / "x.ipynb").touch()
    assert grade._folder_state(folder) != before


def without_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grade without executing anything: the package's answers pass, everybody earns nothing."""
    monkeypatch.setattr(grade, "_check_references", lambda *rest: None)
    monkeypatch.setattr(grade, "find_isolation", lambda: Isolation((), False, "", "", ""))

    def pass_all(copy: Any, assignment: Any, *rest: Any) -> Any:
        scores = [Score(e.id, "must", 1.0, e.points, "partial", "") for e in assignment.exercises]
        return one_submission.Scored(scores, {}, [], [], 0.0, {})

    monkeypatch.setattr(one_submission, "execute", pass_all)


def test_all_bad_submissions_at_once_are_written_as_rows_and_pages(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    chapter_99: Callable[[list[Exercise]], None], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chapter_99(CHAPTER)
    without_processes(monkeypatch)
    for number, make_bad in enumerate(BAD.values()):
        inner = folder / "all"
        inner.mkdir(exist_ok=True)
        make_bad(inner)
        for name in os.listdir(os.fsencode(inner)):
            place = os.path.join(os.fsencode(inner), name)
            os.rename(place, os.path.join(os.fsencode(folder), b"%03d " % number + name[:240]))
    inner.rmdir()
    (folder / "honest.ipynb").write_text(solved())
    monkeypatch.setattr(grade, "handed_out", lambda names: handed_out(["99"]))
    assert grade.main([str(folder), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 0
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    with (tmp_path / "out" / "scores.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= len(BAD)
    honest = next(row for row in rows if row["student"] == "honest")
    assert (honest["points"], honest["status"]) == ("2", "graded")
    summary = json.loads((tmp_path / "out" / "scores.json").read_text())
    pages = [one["feedback"] for one in summary["submissions"]]
    assert len(set(pages)) == len(pages)
    assert all((tmp_path / "out" / page).is_file() for page in pages)


BAD_CODE = {
    "printed surrogates": r"print('\ud800' * 5, '\x1b[2J\x00')",
    "raised surrogates": r"raise ValueError('\udc80\x00')",
    "half a pair in the source": "x = '\ud83d'",
    "bytes on stderr": "import os\nos.write(2, bytes(range(256)) * 100)\nos.write(1, b'\\xff')",
    "a flood": "import os\nfor _ in range(4000):\n    try:\n        os.write(2, b'x' * 2**17)\n"
               "    except OSError:\n        break",
    "ten million digits": "print('9' * 10**7)\nx = 16 ** 10**5",
    "exits": "raise SystemExit(3)",
    "interrupts": "raise KeyboardInterrupt",
    "a group of errors": "raise ExceptionGroup('several', [ValueError(1), OSError(2)])",
    "an error of the system": "open('/nowhere')",
    "recursion": "def f():\n    return f()\nf()",
    "an error that cannot be shown": "class E(Exception):\n    def __str__(self):\n        1 / 0\n"
                                     "raise E",
    "no home": "import shutil, os\nshutil.rmtree(os.path.expanduser('~'), ignore_errors=True)\n"
               "os.chdir('/')",
    "a deep home": "import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')",
    "output of every kind": "from IPython.display import display\nfor kind in ('text/html', "
        "'image/png', 'image/svg+xml', 'text/latex', 'text/markdown'):\n"
        "    display({kind: '\\ud800<script>'}, raw=True)",
}  # fmt: skip


def test_the_code_of_one_submission_costs_the_next_nothing(
    folder: Path, tmp_path: Path, chapter_99: Callable[[list[Exercise]], None]
) -> None:
    """All of it in one notebook, in a cell each; the answers after them earn everything."""
    chapter_99(CHAPTER)
    book = json.loads(solved())
    own = [
        {"cell_type": "code", "id": f"own{i}", "metadata": {}, "source": source, "outputs": []}
        for i, source in enumerate(BAD_CODE.values())
    ]
    own.append({"cell_type": "markdown", "id": "m", "metadata": {}, "source": "\ud800 $\udc00$"})
    book["cells"][1:1] = own
    (folder / "bad").mkdir()
    (folder / "bad" / "x.ipynb").write_text(json.dumps(book))
    (folder / "honest.ipynb").write_text(solved())
    summary = grade_folder(folder, tmp_path / "out", names=["99"])
    for one in summary["submissions"]:
        assert (one["points"], one["status"]) == (6.0, "graded"), one
    page = (tmp_path / "out" / "feedback" / "bad" / "chapter_99.html").read_text(encoding="utf-8")
    assert "\x1b" not in page
    assert "FileNotFoundError" in page
    assert "ExceptionGroup" in page


def test_a_folder_that_cannot_be_searched_is_a_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch, chapter_99: Callable[[list[Exercise]], None]
) -> None:
    """As of another user: tests that run as root cannot make one."""
    chapter_99(CHAPTER)
    (folder / "bad").mkdir()
    (folder / "honest.ipynb").write_text(solved())
    walk = os.walk

    def refused(place: Any, onerror: Any = None, **options: Any) -> Any:
        if str(place).endswith("bad"):
            onerror(PermissionError(13, "Permission denied"))
            return iter(())
        return walk(place, onerror=onerror, **options)

    monkeypatch.setattr(submissions.os, "walk", refused)
    bad, honest = find_submissions(folder, handed_out(["99"]))
    assert "Permission denied" in bad.problem
    assert honest.problem == ""


@pytest.mark.parametrize(
    "source",
    ["<b id=1>" * 20_000, "[" * 20_000, "`" * 19_999, "*_" * 20_000, "<script>" * 20_000,
     "$$" * 20_000, "$a$1" * 10_000, "> " * 5000, "- " * 3000, "\n" * 200_000, "\\" * 50_000,
     "![" * 9000, "<!--" * 9000, "|a|\n|-|\n" * 4000, "&" * 50_000, "$" + "{" * 5000 + "$"],
    ids=lambda text: repr(text[:6]),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a lost alarm
def test_a_page_takes_limited_time(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_submission, "PAGE_SECONDS", 0.5)
    row = row_of(submissions.Submission("ann", Path("x")), None, message="")
    cells = [{"cell_type": kind, "source": source, "metadata": {}} for kind in ("markdown", "code")]
    outputs = {1: [{"output_type": "display_data", "data": {"text/html": source[:100_000]}}]}
    begun = time.process_time()
    page = page_of(row, {"cells": cells}, outputs)
    assert time.process_time() - begun < 20
    assert page.endswith("</html>\n")


def test_a_page_that_cannot_be_made_becomes_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(text: str) -> str:
        raise RecursionError("too deep")

    monkeypatch.setattr(feedback, "markdown", fail)
    cells = [{"cell_type": "markdown", "source": "<b>mine</b>", "metadata": {}}]
    row = row_of(submissions.Submission("ann", Path("x")), None, message="")
    page = page_of(row, {"cells": cells})
    assert "&lt;b&gt;mine" in page
    assert "RecursionError: too deep" in page


def test_time_that_is_over_ends_code_that_loses_the_error() -> None:
    """As Python does with an error in a destructor: it is printed, and the program goes on."""
    with pytest.raises(OverTimeError), time_limit(0.05):
        _lose_one_error()
    time.sleep(0.1)  # the alarm is off


def test_time_that_is_over_ends_code_that_catches_everything() -> None:
    with pytest.raises(OverTimeError), time_limit(0.05):
        _catch_everything()
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # nothing rings afterwards
    done: list[int] = []
    thread = threading.Thread(target=lambda: done.extend(_limited()))
    thread.start()
    thread.join()
    assert done == [1]


def _lose_one_error() -> None:
    with suppress(OverTimeError):
        _catch_everything()
    _catch_everything()


def _catch_everything() -> None:
    while True:
        with suppress(Exception):
            time.sleep(1)


def _limited() -> list[int]:
    with time_limit(0.01):
        return [1]


SPOILERS: dict[str, Callable[[Path], Any]] = {
    "it is gone": lambda path: path.rmdir(),
    "a link": lambda path: (path.rmdir(), path.symlink_to("/usr")),
    "a file": lambda path: (path.rmdir(), path.touch()),
    "no rights": lambda path: ((path / "a" / "b").mkdir(parents=True), (path / "a").chmod(0)),
    "a pipe": lambda path: os.mkfifo(path / "p"),
}


@pytest.mark.parametrize("name", [*SPOILERS, "deep"])
def test_a_scratch_folder_is_removed_whatever_became_of_it(name: str) -> None:
    with scratch_folder("nl-test-") as folder:
        if name == "deep":
            script = "import os\nfor _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')"
            subprocess.run([sys.executable, "-S", "-c", script], cwd=folder, check=True)
        else:
            SPOILERS[name](folder)
    assert not os.path.lexists(folder)
    assert Path("/usr").is_dir()


def test_removal_follows_no_link(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o500)
    with scratch_folder("nl-test-") as folder:
        (folder / "link").symlink_to(kept)
        (folder / "closed").mkdir()
        (folder / "closed" / "link").symlink_to(kept)
        (folder / "closed").chmod(0)
    assert kept.stat().st_mode & 0o777 == 0o500


@pytest.mark.parametrize(
    "points",
    [4000.0, -1.0, float("nan"), float("inf"), 3, True, "3", None, type("F", (float,), {})(1.0)],
)
def test_points_are_plain_numbers_in_range(
    points: Any, chapter_99: Callable[[list[Exercise]], None]
) -> None:
    chapter_99(CHAPTER)
    assignment = handed_out(["99"])["chapter_99"]
    scores = [Score(e.id, "must", 1.0, e.points, "partial", "") for e in assignment.exercises]
    one_submission.check_scores(scores, assignment)
    for field in ("points", "max_points"):
        bad = [Score(**vars(score)) for score in scores]
        setattr(bad[1], field, points)
        with pytest.raises(one_submission.ScoreError, match=r"99\.two"):
            one_submission.check_scores(bad, assignment)
    with pytest.raises(one_submission.ScoreError):
        one_submission.check_scores(scores[:1], assignment)


def test_nothing_is_graded_if_the_packages_own_answers_do_not_pass(
    folder: Path, tmp_path: Path, chapter_99: Callable[[list[Exercise]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As on a Python in which something that a check needs does not work."""
    broken = toy("broken", solution="def broken(x):\n    raise ImportError('bad pattern')")
    chapter_99([broken, toy("fine")])
    monkeypatch.setattr(grade, "grade_one", lambda *rest: pytest.fail("a submission was graded"))
    book = make.release_notebook("99", [broken, toy("fine")])
    (folder / "honest.ipynb").write_text(json.dumps(book))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scores.csv").write_text("of before")
    with pytest.raises(SubmissionError) as caught:
        grade_folder(folder, tmp_path / "out", names=["99"])
    message = str(caught.value)
    assert "99.broken earns 0 of 3 points" in message
    assert "ImportError: bad pattern" in message
    assert "99.fine" not in message
    assert (tmp_path / "out" / "scores.csv").read_text() == "of before"


def test_a_full_disk_leaves_the_old_results_and_saves_the_scores(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    chapter_99: Callable[[list[Exercise]], None], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    chapter_99(CHAPTER)
    without_processes(monkeypatch)
    (folder / "honest.ipynb").write_text(solved())
    out = tmp_path / "out"
    grade_folder(folder, out, names=["99"], seed="first")
    monkeypatch.setattr(grade, "handed_out", lambda names: handed_out(["99"]))
    write = Path.write_text
    rescue = tmp_path / "rescue"
    rescue.mkdir()
    make_folder = tempfile.mkdtemp

    def mkdtemp(prefix: str) -> str:
        return str(rescue) if prefix.endswith("scores-") else make_folder(prefix=prefix)

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp)

    def full(path: Path, text: str, **options: Any) -> int:
        if path.suffix == ".html" and "out" in str(path):
            raise OSError(28, "No space left on device")
        return write(path, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ResultsError):
        grade_folder(folder, out, names=["99"])
    assert grade.main([str(folder), "--out", str(out)]) == 2
    told = capsys.readouterr().err
    assert "No space left on device" in told
    assert str(rescue) in told
    assert json.loads((out / "scores.json").read_text())["seed"] == "first"
    assert (rescue / "scores.csv").read_text().count('"honest"') == 1
    assert not [name for name in os.listdir(tmp_path) if "saving" in name]


def test_two_graders_at_once_leave_complete_results(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    chapter_99: Callable[[list[Exercise]], None],
) -> None:  # fmt: skip
    chapter_99(CHAPTER)
    without_processes(monkeypatch)
    monkeypatch.setattr(grade, "grade_one", lambda one, assignment, *rest: Graded(
        row_of(one, assignment), "page", {}
    ))  # fmt: skip
    (folder / "honest.ipynb").write_text(solved())
    faults: list[BaseException] = []

    def run(seed: str) -> None:
        try:
            for _ in range(5):
                grade_folder(folder, tmp_path / "out", names=["99"], seed=seed)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert sorted(os.listdir(tmp_path / "out")) == sorted(grade.RESULTS)
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["seed"] in ("one", "two")
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1, 0, "5", True, None])
def test_limits_are_checked(bad: Any) -> None:
    for name in ("cell_seconds", "seconds"):
        with pytest.raises((TypeError, ValueError), match=name):
            grade.checked(Limits(**{name: bad}))
    if bad != 0 or isinstance(bad, bool):
        with pytest.raises((TypeError, ValueError), match="memory_gib"):
            grade.checked(Limits(memory_gib=bad))
