"""Pieces of Markdown that the figures are made of: links to records, tables, wrapped paragraphs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from nemotron_lite import NemotronConfig, ledger

WIDTH = 100
EARLIER_LITE = 16_710_880  # parameters of `lite` when its experts were 168 wide


def read(file: Path) -> dict[str, Any]:
    """A record."""
    return json.loads(file.read_text())


def link(file: str, text: str = "record") -> str:
    """A link to a record, as seen from docs/."""
    return f"[{text}](../benchmarks/records/{file})"


def lengths(entries: Iterable[dict[str, Any]], label: str) -> str:
    """The lengths of some entries, as "512 / 2K"."""
    values = (entry[label] for entry in entries)
    return " / ".join(f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in values)


def size_of(found: dict[str, Any]) -> str:
    """The size of the model in a record; if it is `lite`, whether the preset has changed since."""
    name = next(found[key] for key in ("model", "size", "name") if key in found)
    # Records without the number are older than the change.
    parameters = found.get("parameters", EARLIER_LITE)
    text = f"{parameters / 1e6:.1f} million parameters"
    now = ledger.parameters(NemotronConfig.from_preset("lite")).total
    if name.startswith("lite") and parameters != now:
        text += f" (of an earlier preset; now {now / 1e6:.1f})"
    return text


def percent(summary: dict[str, float], digits: int = 2) -> str:
    """A change in percent: "+0.05 (-0.04 to +0.10)"."""
    middle, low, high = (f"{summary[name]:+.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} ({low} to {high})"


def to_be_made(commands: Sequence[str]) -> list[str]:
    """A paragraph that says which records do not exist yet; none if all exist."""
    if not commands:
        return []
    return [wrapped(f"Records that are still to be made: {', '.join(commands)}.")]


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table with these heads."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def wrapped(paragraph: str, indent: str = "") -> str:
    """Lines of at most WIDTH characters, broken only at spaces."""
    return textwrap.fill(
        paragraph, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
