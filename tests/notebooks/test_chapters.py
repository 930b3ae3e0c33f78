"""Every chapter of the course keeps the rules. A new chapter is found and tested as well."""

from __future__ import annotations

import re
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


def to_come(readme: str) -> set[int]:
    """Numbers in rows such as "| 07, to come |", "| 09 and 10, to come |" and "| 11 to 13, …"."""
    found: set[int] = set()
    for row in re.finditer(r"^\| (\d\d)(?: (and|to) (\d\d))?, to come \|", readme, re.MULTILINE):
        first, last = int(row[1]), int(row[3] or row[1])
        found |= set(range(first, last + 1)) if row[2] == "to" else {first, last}
    return found


def test_chapters_are_numbered_and_a_gap_is_named_as_to_come() -> None:
    numbers = [int(path.name[:2]) for path in CHAPTERS]
    assert numbers[0] == 0
    assert numbers == sorted(set(numbers)), "two chapters have the same number"
    later = to_come((ROOT / "README.md").read_text())
    missing = set(range(numbers[-1])) - set(numbers)
    assert missing <= later, "README's table does not name these chapters as to come"
    assert not later & set(numbers), "README's table says of these that they are to come"


def test_rows_of_chapters_to_come_are_read() -> None:
    table = (
        "| 07, to come | |\n| 09 and 11, to come | |\n| 13 to 15, to come | |\n| [01](a) | b |\n"
    )
    assert to_come(table) == {7, 9, 11, 13, 14, 15}


def test_each_chapter_with_exercises_has_its_notebook() -> None:
    assert chapter_folders().keys() <= {path.name[:2] for path in CHAPTERS}
