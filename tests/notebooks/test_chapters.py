"""Every chapter of the course keeps the rules. A new chapter is found and tested as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_lite.authoring import lint
from nemotron_lite.course.chapter_list import chapter_folders

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CHAPTERS = [path for path in NOTEBOOKS if not path.stem.endswith("_deeper")]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_notebook_keeps_the_rules(path: Path) -> None:
    assert lint.lint_file(path) == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_every_exercise_of_the_chapter_stands_in_one_notebook(path: Path) -> None:
    assert lint.lint_chapter(sorted(path.parent.glob(f"{path.name[:2]}_*.ipynb"))) == []


def test_a_deeper_notebook_belongs_to_a_chapter() -> None:
    deeper = [path.stem.removesuffix("_deeper") for path in NOTEBOOKS if path not in CHAPTERS]
    assert set(deeper) <= {path.stem for path in CHAPTERS}


def test_chapters_are_numbered_without_a_gap() -> None:
    assert [path.name[:3] for path in CHAPTERS] == [f"{n:02}_" for n in range(len(CHAPTERS))]


def test_each_chapter_with_exercises_has_its_notebook() -> None:
    assert chapter_folders().keys() <= {path.name[:2] for path in CHAPTERS}
