"""scores.csv: a row for each student and assignment, a column for each exercise.

A spreadsheet takes a cell that begins with = + - or @ for a formula, also in a CSV file, and a
formula can read other cells and send them away. Names and notes come from learners. So such a cell
gets an apostrophe in front of it, which spreadsheets take for "this is text". Spaces and quotes
before the sign, and its wide forms of East Asian scripts, are taken for it too. Control characters
become their escapes. Every text is quoted: a program that separates cells by semicolons would
otherwise begin a new cell in the middle of one.

Source: OWASP, "CSV Injection".
"""

from __future__ import annotations

import csv
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemotron_lite.coursework.texts import one_line

COLUMNS = (
    "student", "assignment", "points", "max_points", "optional_points", "max_optional_points",
    "status", "flags", "notes", "message", "file",
)  # fmt: skip
FORMULA = ("=", "+", "-", "@", "|", "%")
LONGEST = 5000  # characters of a cell; programs allow 32,767


def plain_cell(value: Any) -> Any:
    """A value that no spreadsheet takes for a formula; numbers stay numbers."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, str):
        return "" if value is None else value
    text = one_line(value, LONGEST)
    first = unicodedata.normalize("NFKC", text).lstrip(" '\"\u00a0\u200b\u200c\u200d\u2060")
    # The escape of a tab or a line break is text already, but shows that something was tried.
    dangerous = first.startswith(FORMULA) or value.startswith(("\t", "\r", "\n"))
    return f"'{text}" if dangerous else text


def score_row(result: dict[str, Any]) -> dict[str, Any]:
    """A result as a row of the table."""
    row = {name: result.get(name) for name in COLUMNS}
    row["flags"], row["notes"] = " ".join(result["flags"]), "; ".join(result["notes"])
    return row | {one["id"]: one["points"] for one in result["exercises"]}


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file; what a row does not have stays empty."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(columns)
        table = csv.DictWriter(file, columns, restval="", quoting=csv.QUOTE_NONNUMERIC)
        table.writerows({name: plain_cell(value) for name, value in row.items()} for row in rows)


def write_scores(path: Path, results: Sequence[dict[str, Any]], exercises: Sequence[str]) -> None:
    """Write scores.csv; `exercises` are the columns after the first ones."""
    write_table(path, [*COLUMNS, *exercises], map(score_row, results))
