"""`record`: a record of `benchmarks/records/`, for the figures of a chapter.

A comparison that takes an hour cannot run in a chapter. It ran once, and its record has the
machine, the versions, the command and every run. The chapter draws it and runs one case live.

The records belong to the repository, not to an installed package; chapters are read in a checkout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemotron_lite.input_files import read_json

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "records"


def record(name: str) -> dict[str, Any]:
    """Read a record, such as "removal".

    Raises:
        FileNotFoundError: there is no such record; the message lists those that exist.
        FileError: it is damaged.
    """
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.json"))) or "none"
        raise FileNotFoundError(
            f"there is no record {name!r} in {FOLDER}; there are: {known}. Records come with a "
            "checkout of the repository, not with an installed package."
        )
    found: dict[str, Any] = read_json(path)
    return found
