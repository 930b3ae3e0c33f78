"""Draw docs/growth.svg from benchmarks/records/growth.json; no plotting library, no fonts to ship.

    python -m benchmarks.plot

Left, the time per token of prefill: a flat line is a cost that is linear in the length. Right, the
bytes a sequence leaves behind. Both axes of lengths are logarithmic, as is the one of bytes.

The picture stands on the page's own background, light or dark, so every colour in it has a contrast
of at least 3 (lines) or 4 (text) with both (a test computes them). Lines differ in dash and marker
too, and carry their name at their end, so colour is never the only key.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "records" / "growth.json"
DRAWING = ROOT / "docs" / "growth.svg"

WIDTH, HEIGHT = 936, 394
TOP, BOTTOM, PANEL = 62, 318, 296  # y of the axes' ends, width of a panel
LEFTS = (62, 486)
TEXT, GRID = "#6e7781", "#8b949e"
COLOURS = {"ours": "#bf5b04", "peer": "#2f81f7", "part": "#2f8f46"}
DASHES = {"ours": "", "peer": "7 4", "part": "2 4"}


@dataclass(frozen=True)
class Line:
    """One curve: its name as shown at its end, its look, its points (length, value, low, high)."""

    name: str
    look: str  # ours, peer or part
    points: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    unit: str
    lines: Sequence[Line]
    logarithmic: bool

    def ticks(self) -> list[float]:
        """Values with a grid line, the last one at or above every point."""
        high = max(point[3] for line in self.lines for point in line.points)
        low = min(point[2] for line in self.lines for point in line.points)
        if self.logarithmic:
            first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
            return [10.0**power for power in range(first, max(last, first + 1) + 1)]
        step = 10 ** math.floor(math.log10(high))
        step = next(step * f for f in (0.1, 0.2, 0.25, 0.5, 1, 2) if high <= 5 * step * f)
        return [step * i for i in range(math.ceil(high / step) + 1)]

    def height(self, value: float) -> float:
        """The y of a value."""
        ticks = self.ticks()
        if self.logarithmic:
            share = math.log(value / ticks[0]) / math.log(ticks[-1] / ticks[0])
        else:
            share = value / ticks[-1]
        return BOTTOM - share * (BOTTOM - TOP)


def panels(record: dict[str, Any]) -> list[Panel]:
    """What is drawn, from what was measured."""
    results = record["results"]
    who = {"ours": "nemotron_lite", "peer": "transformers"}
    times = []
    for name, shown in who.items():
        points = [
            (r["length"], s["median"], s["min"], s["max"])
            for r in results
            if (s := r["microseconds_per_token"].get(name))
        ]
        times.append(Line(shown, name, points))
    totals = {
        ("if all were attention", "peer"): [r["all_attention_bytes"] for r in results],
        ("this hybrid", "ours"): [sum(r["state_bytes"].values()) for r in results],
        ("its Mamba layers", "part"): [
            r["state_bytes"]["conv"] + r["state_bytes"]["ssm"] for r in results
        ],
    }
    held = [
        Line(name, look, [(r["length"], b, b, b) for r, b in zip(results, values, strict=True)])
        for (name, look), values in totals.items()
    ]
    return [
        Panel("Prefill: time per token", "us", times, logarithmic=False),
        Panel("Memory of a sequence", "B", held, logarithmic=True),
    ]


def svg(record: dict[str, Any]) -> str:
    """The drawing as text."""
    results = record["results"]
    longest = results[-1]
    told = (
        f"Size {record['size']}. At {length(longest['length'])} tokens prefill takes "
        f"{longest['microseconds_per_token']['ours']['median']:.0f} microseconds per token and "
        f"leaves {in_bytes(sum(longest['state_bytes'].values()))} behind; at "
        f"{length(results[0]['length'])} tokens "
        f"{results[0]['microseconds_per_token']['ours']['median']:.0f} and "
        f"{in_bytes(sum(results[0]['state_bytes'].values()))}."
    )
    machine = record["machine"]
    foot = (
        f"Size {record['size']}, float32, {machine['cpu']}, {machine['threads']} threads, "
        f"{record['date'][:10]}. Bars: fastest and slowest run."
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-labelledby="title text" font-family="system-ui, sans-serif" font-size="13">',
        '<title id="title">How prefill time and memory grow with the length of a prompt</title>',
        f'<desc id="text">{escape(told)}</desc>',
    ]
    for left, panel in zip(LEFTS, panels(record), strict=True):
        parts += _panel(panel, left, [r["length"] for r in results])
    parts.append(_text(LEFTS[0], HEIGHT - 12, foot, size=11))
    return "\n".join([*parts, "</svg>", ""])


def _panel(panel: Panel, left: float, lengths: Sequence[int]) -> list[str]:
    low, high = math.log(lengths[0]), math.log(lengths[-1])

    def across(value: float) -> float:
        return left + (math.log(value) - low) / (high - low) * PANEL

    parts = [_text(left, TOP - 26, panel.title, size=15, weight="600")]
    for tick in panel.ticks():
        y = panel.height(tick)
        parts.append(
            f'<line x1="{left}" x2="{left + PANEL}" y1="{y:.1f}" y2="{y:.1f}" stroke="{GRID}" '
            'stroke-opacity="0.35"/>'
        )
        shown = in_bytes(tick) if panel.unit == "B" else f"{tick:g} {panel.unit}"
        parts.append(_text(left - 6, y + 4, shown, anchor="end"))
    for tokens in lengths:
        parts.append(_text(across(tokens), BOTTOM + 20, length(tokens), anchor="middle"))
    parts.append(_text(left + PANEL / 2, BOTTOM + 38, "tokens", anchor="middle"))
    names = _apart([panel.height(line.points[-1][1]) + 4 for line in panel.lines])
    for line, y in zip(panel.lines, names, strict=True):
        places = [(across(x), panel.height(v)) for x, v, _, _ in line.points]
        colour = COLOURS[line.look]
        path = " ".join(f"{x:.1f},{v:.1f}" for x, v in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5" '
            f'stroke-dasharray="{DASHES[line.look]}"/>'
        )
        for x, _, least, most in line.points:
            if most > least:
                ends = f'y1="{panel.height(least):.1f}" y2="{panel.height(most):.1f}"'
                parts.append(
                    f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" {ends} stroke="{colour}" '
                    'stroke-width="1.5"/>'
                )
        parts += [_marker(line.look, x, v, colour) for x, v in places]
        parts.append(_text(places[-1][0] + 9, y, line.name, colour=colour))
    return parts


def _apart(heights: Sequence[float], gap: float = 15) -> list[float]:
    """The same heights, moved down where names would overlap."""
    moved = list(heights)
    order = sorted(range(len(moved)), key=lambda i: moved[i])
    for upper, lower in pairwise(order):
        moved[lower] = max(moved[lower], moved[upper] + gap)
    return moved


def _marker(look: str, x: float, y: float, colour: str) -> str:
    if look == "ours":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    if look == "peer":
        return f'<rect x="{x - 3.5:.1f}" y="{y - 3.5:.1f}" width="7" height="7" fill="{colour}"/>'
    return f'<path d="M{x:.1f} {y - 4.5:.1f}l4.5 8h-9z" fill="{colour}"/>'


def _text(
    x: float, y: float, words: str, *, anchor: str = "start", size: int = 13,
    colour: str = TEXT, weight: str = "400",
) -> str:  # fmt: skip
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}" fill="{colour}">{escape(words)}</text>'
    )


def length(tokens: int) -> str:
    """Tokens as people say them: 512, 64K."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def in_bytes(value: float) -> str:
    """Bytes in decimal units, as the logarithmic axis has them: 10 kB, 1 MB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g} B"


def draw(record: Path = RECORD, drawing: Path = DRAWING) -> Path:
    """Write the SVG of a record; the path of the drawing.

    Raises:
        FileNotFoundError: nothing has been measured yet.
    """
    if not record.is_file():
        raise FileNotFoundError(f"no record {record}: run `python -m benchmarks growth` first.")
    drawing.parent.mkdir(parents=True, exist_ok=True)
    drawing.write_text(svg(json.loads(record.read_text())))
    return drawing


if __name__ == "__main__":
    print(draw(*(Path(argument) for argument in sys.argv[1:])))
