"""scores.csv: one column for each exercise, and no cell that a spreadsheet runs."""

from __future__ import annotations

import csv
import unicodedata
from pathlib import Path

import pytest

from nemotron_lite.coursework.tables import plain_cell, write_scores, write_table

SIGNS = ("=", "+", "-", "@", "|", "%", "\uff1d", "\uff0b", "\uff0d", "\uff20")
BEFORE = ("", " ", "  ", "'", '"', "\t", "\r", "\n", "\u00a0", "\u200b", "\x00", "\x1b")


@pytest.mark.parametrize("sign", SIGNS)
@pytest.mark.parametrize("before", BEFORE, ids=map(repr, BEFORE))
def test_formulas_become_text(before: str, sign: str) -> None:
    made = plain_cell(f"{before}{sign}1+1")
    first = unicodedata.normalize("NFKC", made)[0]
    assert first not in "=+-@|%\t\r\n"
    assert made.startswith(("'", "\\"))  # text for a spreadsheet: an apostrophe, or an escape
    assert made.replace("\u00a0", " ").isprintable()


def test_programs_that_split_at_semicolons_see_no_new_cell(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", ["name", "points"], [{"name": "ann;=1+1", "points": 3.0}])
    line = (tmp_path / "t.csv").read_text().splitlines()[1]
    assert line == '"ann;=1+1",3'
    assert next(csv.reader([line], delimiter=";")) == ["ann;=1+1,3"]


@pytest.mark.parametrize("value", ["ann", "a=1", 3, -1.5, ""])
def test_other_cells_stay(value: object) -> None:
    assert plain_cell(value) == value


def test_a_row_has_a_column_for_each_exercise(tmp_path: Path) -> None:
    result = {
        "student": "=cmd|' /C calc'!A0", "assignment": "chapter_99", "points": 5.0,
        "max_points": None, "optional_points": 0.5, "max_optional_points": 2.0,
        "status": "graded", "message": "-", "notes": ["@one", "two"],
        "flags": ["imports", "similar"],
        "exercises": [{"id": "99.b", "points": 3.0}, {"id": "99.a", "points": 2.0}], "file": "f",
    }  # fmt: skip
    write_scores(tmp_path / "scores.csv", [result], ["99.a", "99.b", "99.c"])
    with (tmp_path / "scores.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["student"].startswith("'=cmd")
    assert (row["99.a"], row["99.b"], row["99.c"]) == ("2", "3", "")
    assert (row["points"], row["max_points"], row["optional_points"]) == ("5", "", "0.5")
    assert (row["flags"], row["notes"], row["message"]) == ("imports similar", "'@one; two", "'-")
