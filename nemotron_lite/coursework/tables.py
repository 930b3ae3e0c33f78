"""scores.csv: a row for each student and assignment, a column for each exercise.

A spreadsheet takes a cell that begins with = + - or @ for a formula, also in a CSV file, and a
formula can read other cells and send them away. Names and notes come from learners. So such a cell
gets an apostrophe in front of it, which spreadsheets take for "this is text".
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLUMNS = (
    "student", "assignment", "points", "max_points", "optional_points", "max_optional_points",
    "status", "flags", "notes", "message", "file",
)  # fmt: skip
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")


def plain_cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula; numbers stay numbers."""
    if isinstance(value, str) and value.startswith(FORMULA):
        return f"'{value}"
    return value


def score_row(result: dict[str, Any]) -> dict[str, Any]:
    """A result as a row of the table."""
    row = {name: result.get(name) for name in COLUMNS}
    row["flags"], row["notes"] = " ".join(result["flags"]), "; ".join(result["notes"])
    row |= {one["id"]: one["points"] for one in result["exercises"]}
    return {name: plain_cell(_shown(value)) for name, value in row.items()}


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else value


def write_scores(path: Path, results: Sequence[dict[str, Any]], exercises: Sequence[str]) -> None:
    """Write scores.csv; `exercises` are the columns after the first ones."""
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, [*COLUMNS, *exercises], restval="")
        table.writeheader()
        table.writerows(map(score_row, results))
