"""Draw docs/quality_per_flop.svg from benchmarks/records/quality_per_flop.json, with plotly.

    python -m benchmarks.quality_plot

Left: bits per byte of the held-out text over training FLOPs, the median of the seeds; error bars
reach from the smallest to the largest. Right: the difference of the two models of each claim, one
open circle for each seed, and the interval of the mean. The band marks differences below the
margin, which do not matter. The chapters draw the same (`course/plotting/quality.py`).

The picture has a white background, as docs/growth.svg (`benchmarks/plot.py`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from benchmarks.plot import BACKGROUND, GRID, ROOT, TEXT, write_svg
from nemotron_lite.course.plotting.quality import quality_claims, quality_curves

RECORD = ROOT / "benchmarks" / "records" / "quality_per_flop.json"
DRAWING = ROOT / "docs" / "quality_per_flop.svg"
TITLE = "Bits per byte over training FLOPs, and the differences of models at equal compute"
WIDTH, HEIGHT = 1000, 460
BAND = "#eceff2"


def figure(record: dict[str, Any]) -> go.Figure:
    """The drawing of a record."""
    left, right = quality_curves(found=record), quality_claims(found=record)
    found = make_subplots(
        cols=2, horizontal_spacing=0.25, column_widths=[0.5, 0.5],
        subplot_titles=["Held-out text", "Differences of two models"],
    )  # fmt: skip
    for column, part in enumerate((left, right), 1):
        for trace in part.data:
            found.add_trace(trace, row=1, col=column)
    margin = record["claims"][0]["margin"]
    found.add_vrect(x0=-margin, x1=margin, fillcolor=BAND, line_width=0, layer="below", col=2)
    found.add_vline(x=0, line=dict(color=TEXT, width=1), col=2)
    axis = dict(gridcolor=GRID, linecolor=TEXT, ticks="outside", tickcolor=TEXT, zeroline=False)
    for column, part in enumerate((left, right), 1):
        for name in ("xaxis", "yaxis"):
            here = getattr(part.layout, name).to_plotly_json()
            {"xaxis": found.update_xaxes, "yaxis": found.update_yaxes}[name](
                **{**axis, **here}, col=column
            )
    seeds = {len(entry["seeds"]) for entry in record["models"].values() if entry["seeds"]}
    found.add_annotation(
        text=f"{_range(seeds)}, {record['scale']['tokens'] / 1e6:.2f} million "
        f"tokens, {record['date'][:10]}. Bars, left: smallest and largest seed; right: "
        f"{record['confidence']:.0%} interval of the mean.",
        x=0, y=-0.29, xref="paper", yref="paper", xanchor="left", showarrow=False, font_size=12,
    )  # fmt: skip
    return found.update_layout(
        width=WIDTH,
        height=HEIGHT,
        paper_bgcolor=BACKGROUND,
        plot_bgcolor=BACKGROUND,
        font=dict(family="Helvetica, Arial, sans-serif", size=13, color=TEXT),
        legend=dict(x=0.375, y=1, xanchor="right", yanchor="top", font_size=12),
        margin=dict(l=70, r=20, t=40, b=100),
    )


def _range(seeds: set[int]) -> str:
    low, high = min(seeds), max(seeds)
    return f"{low} to {high} seeds" if low < high else f"{low} seed{'s' * (low > 1)}"


def summary(record: dict[str, Any]) -> str:
    """What the drawing shows, in words: its description for those who do not see it."""
    parts = [
        f"{entry['words']} {entry['bits_per_byte']['median']:.3f} bits per byte after "
        f"{entry['curve'][-1]['flops']:.2e} FLOPs ({_range({len(entry['seeds'])})})"
        for entry in record["models"].values()
        if entry["seeds"]
    ]
    verdicts = [f"{claim['claim']} {claim['verdict']}." for claim in record["claims"]]
    return f"Measured on {record['date'][:10]}: {'; '.join(parts)}. {' '.join(verdicts)}"


def draw(record: Path = RECORD, drawing: Path = DRAWING) -> Path:
    """Write the SVG of a record; the path of the drawing.

    Raises:
        FileNotFoundError: nothing has been measured yet.
    """
    if not record.is_file():
        raise FileNotFoundError(
            f"no record {record}: run `python -m benchmarks quality_per_flop` first."
        )
    found = json.loads(record.read_text())
    return write_svg(figure(found), drawing, title=TITLE, words=summary(found))


if __name__ == "__main__":
    print(draw(*(Path(argument) for argument in sys.argv[1:])))
