"""The progress page: what was kept, chapter by chapter, in a notebook and in a terminal."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemotron_lite.course import check, hint, progress_page, progress_report, progress_store
from tests.course.conftest import Shown
from tests.course.sample_exercises import FADE, forget, use

ROOT = Path(__file__).resolve().parents[2]
QUIZ = """
[[questions]]
question = "?"
[[questions]]
question = "??"
[[opening]]
question = "???"
"""
PREDICTIONS = """
[[predictions]]
key = "speed"
[[predictions]]
key = "size"
"""


@pytest.fixture
def course(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A course of one chapter, 99, and a folder `work` in which its progress is kept."""
    chapter = tmp_path / "ch99_fading"
    chapter.mkdir()
    (chapter / "quiz.toml").write_text(QUIZ)
    (chapter / "predictions.toml").write_text(PREDICTIONS)
    (tmp_path / "work" / ".course").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    use(monkeypatch)
    from nemotron_lite.course import exercises

    monkeypatch.setattr(progress_report, "exercises", exercises.exercises)
    monkeypatch.setattr(progress_report, "chapter_folders", lambda: {"99": chapter})
    yield tmp_path
    forget()


NOTHING = """
chapter    must  optional  opening  quiz  predictions
---------  ----  --------  -------  ----  -----------
99_fading  0/2   0/1       0/1      0/2   0/2

99_fading
exercise  kind      state  date  hints
--------  --------  -----  ----  -----
99.fade   must                   0/3
99.gate   must                   0/3
99.add    optional               0/3
""".strip()


def test_nothing_was_done(course: Path, shown: Callable[..., Shown]) -> None:
    assert shown(progress_page).plain == f"{NOTHING}\n\nKept in {course / 'work' / '.course'}."


def test_what_was_done_is_counted(course: Path, shown: Callable[..., Shown]) -> None:
    check("99.fade", FADE.build())
    check("99.gate", lambda gain: None)
    hint("99.gate")
    hint("99.gate")
    progress_store.put("guesses/99.size", 3.0)
    progress_store.put("quiz/99.questions.1", {"chosen": "a", "right": True})
    progress_store.put("quiz/99.questions.2", {"chosen": "b", "right": False})
    progress_store.put("quiz/99.questions.3", {"chosen": "of an older quiz", "right": True})
    forget()
    lines = shown(progress_page).plain.splitlines()
    assert lines[2].split() == ["99_fading", "1/2", "0/1", "0/1", "1/2", "1/2"]
    day = progress_store.saved_at("checks/99.fade")
    assert day
    assert lines[7].startswith("99.fade   must      ✓ done")
    assert day[:4] in lines[7]
    assert "begun, 0 of 2 points" in lines[8]
    assert lines[8].endswith("2/3")


def test_a_chapter_that_is_there_is_a_link(course: Path, shown: Callable[..., Shown]) -> None:
    link = '<a href="99_fading.ipynb">99_fading</a>'
    assert link not in shown(progress_page).html
    (course / "work" / "99_fading.ipynb").touch()
    assert link in shown(progress_page).html


def test_without_a_folder_it_says_that_progress_is_forgotten(
    course: Path, shown: Callable[..., Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(course)
    check("99.fade", FADE.build())
    plain = shown(progress_page).plain
    assert "1/2" in plain
    assert plain.endswith("`make lab` opens the chapters in work/, where it is kept.")


def test_damaged_facts_count_as_not_done(course: Path, shown: Callable[..., Shown]) -> None:
    saved = '{"saved": "2026-01-02T03:04:05+00:00", "value": '
    for name, text in {
        "checks/99.fade.json": '{"saved": "x", "value": {"passed": true}}',
        "checks/99.gate.json": saved + "[1]}",
        "checks/99.add.json": saved + '{"passed": "yes"}}',
        "hints/99.fade.json": saved + '"all"}',
        "hints/99.gate.json": saved + "[[1], 2]}",
        "quiz/99.questions.1.json": saved + "7}",
    }.items():
        path = course / "work" / ".course" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    warning, page = shown(progress_page).bundles
    assert "99.fade.json is damaged" in warning["text/plain"]
    lines = page["text/plain"].splitlines()
    assert lines[2].split() == ["99_fading", "0/2", "0/1", "0/1", "0/2", "0/2"]
    assert [line.split()[-1] for line in lines[7:10]] == ["0/3", "1/3", "0/3"]


def test_the_terminal_prints_the_same(
    course: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(course)
    here = Path.cwd()
    assert progress_report.main([]) == 0  # work/ is here
    assert progress_report.main(["work"]) == 0
    assert capsys.readouterr().out.count(NOTHING) == 2
    assert Path.cwd() == here
    assert progress_report.main([str(here)]) == 1
    assert "holds no progress" in capsys.readouterr().err


def test_the_command_lists_every_chapter(tmp_path: Path) -> None:
    (tmp_path / ".course").mkdir()
    command = [sys.executable, "-m", "nemotron_lite.course.progress_report", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert "01_selective_scan" in run.stdout
    assert "01.selective_recurrence" in run.stdout
