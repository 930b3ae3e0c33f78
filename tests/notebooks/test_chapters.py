"""Every chapter of the course keeps the rules. A new chapter is found and tested as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_lite.authoring import lint
from nemotron_lite.course.chapter_list import chapter_folders

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_the_chapter_keeps_the_rules(path: Path) -> None:
    assert lint.lint_file(path) == []


def test_chapters_are_numbered_without_a_gap() -> None:
    assert [path.name[:3] for path in CHAPTERS] == [f"{n:02}_" for n in range(len(CHAPTERS))]


def test_each_chapter_with_exercises_has_its_notebook() -> None:
    assert chapter_folders().keys() <= {path.name[:2] for path in CHAPTERS}
