"""scores.csv: one column for each exercise, and no cell that a spreadsheet runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from nemotron_lite.coursework.tables import plain_cell, write_scores


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_formulas_become_text(text: str) -> None:
    assert plain_cell(text) == f"'{text}"


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
