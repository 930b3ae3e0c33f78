"""Every chapter is complete: notebook, exercises, checks, quiz, figures, and tests with mutants."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_lite.authoring.chapter_parts import chapter_names, missing_parts, parts
from nemotron_lite.course.chapter_list import chapter_folders

ROOT = Path(__file__).resolve().parents[3]
NAME = "01_selective_scan"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one complete chapter; its files are empty."""
    lesson = tmp_path / "nemotron_lite/course/chapters" / f"ch{NAME}" / "lesson.py"
    lesson.parent.mkdir(parents=True)
    lesson.touch()
    for path in parts(tmp_path, NAME).values():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    return tmp_path


def test_no_chapter_lacks_a_part() -> None:
    assert missing_parts(ROOT) == []


def test_the_chapters_are_those_that_the_course_finds() -> None:
    assert [f"ch{name}" for name in chapter_names(ROOT)] == [
        folder.name for folder in chapter_folders().values()
    ]


def test_a_complete_chapter_is_accepted(repository: Path) -> None:
    assert chapter_names(repository) == [NAME]
    assert missing_parts(repository) == []


@pytest.mark.parametrize(
    "part",
    [
        "notebooks/01_selective_scan.ipynb",
        "nemotron_lite/course/chapters/ch01_selective_scan/__init__.py",
        "nemotron_lite/course/chapters/ch01_selective_scan/exercises.py",
        "nemotron_lite/course/chapters/ch01_selective_scan/checks.py",
        "nemotron_lite/course/chapters/ch01_selective_scan/quiz.toml",
        "nemotron_lite/course/chapters/ch01_selective_scan/figures.py",
        "tests/course/chapters/ch01_selective_scan/mutants.py",
        "tests/course/chapters/ch01_selective_scan/test_figures.py",
        "tests/course/chapters/ch01_selective_scan/test_lesson.py",
    ],
)
def test_a_missing_part_is_named(repository: Path, part: str) -> None:
    (repository / part).unlink()
    (problem,) = missing_parts(repository)
    assert problem.startswith(f"Chapter {NAME} lacks ")
    assert problem.endswith(f": expected the file {part}.")


def test_a_notebook_alone_lacks_everything_else(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "02_mamba2.ipynb").touch()
    problems = missing_parts(tmp_path)
    assert len(problems) == len(parts(tmp_path, "02_mamba2")) - 1
    assert "Chapter 02_mamba2 lacks its quiz" in "\n".join(problems)


def test_a_folder_with_another_name_than_the_notebook_is_found(repository: Path) -> None:
    chapters = repository / "nemotron_lite/course/chapters"
    (chapters / f"ch{NAME}").rename(chapters / "ch01_scan")
    text = "\n".join(missing_parts(repository))
    assert f"Chapter {NAME} lacks its exercises" in text
    assert "Chapter 01_scan lacks its notebook" in text


def test_what_python_leaves_behind_is_no_chapter(repository: Path) -> None:
    (repository / "tests/course/chapters/ch09_gone/__pycache__").mkdir(parents=True)
    assert chapter_names(repository) == [NAME]
