"""Draw docs/growth.svg from benchmarks/records/growth.json, with plotly.

    python -m benchmarks.plot

Left: the time per token of prefill; a horizontal line means a cost that is linear in the length.
Right: the bytes of the cache. The axes of lengths and of bytes are logarithmic. Error bars reach
from the fastest to the slowest run.

The picture has a plain white background, so that it reads the same in a light and in a dark theme.
Lines differ in dash and marker as well as in color. kaleido writes the SVG and needs a Chromium;
its output differs from run to run in the ids of its elements, not in what is shown.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import kaleido
import plotly.graph_objects as go
from plotly.subplots import make_subplots

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "benchmarks" / "records" / "growth.json"
DRAWING = ROOT / "docs" / "growth.svg"

TITLE = "Prefill time and cache size by the length of a prompt"
WIDTH, HEIGHT = 1000, 420
BACKGROUND, TEXT, GRID = "#ffffff", "#1f2328", "#d8dee4"
# How each line looks. Colors of Okabe and Ito, dark enough for a white background.
OURS = dict(color="#0072b2", dash="solid", symbol="circle")
PEER = dict(color="#d55e00", dash="dash", symbol="square")
PART = dict(color="#00795a", dash="dot", symbol="triangle-up")


def figure(record: dict[str, Any]) -> go.Figure:
    """The drawing of a record."""
    results = record["results"]
    found = make_subplots(
        cols=2, horizontal_spacing=0.23, subplot_titles=["Prefill", "Cache of one sequence"]
    )
    for who, name, look in (("ours", "nemotron_lite", OURS), ("peer", "transformers", PEER)):
        measured = [r for r in results if who in r["microseconds_per_token"]]
        times = [r["microseconds_per_token"][who] for r in measured]
        medians = [t["median"] for t in times]
        line = _line(name, look, [r["length"] for r in measured], medians)
        line.error_y = dict(
            array=[t["max"] - t["median"] for t in times],
            arrayminus=[t["median"] - t["min"] for t in times],
            thickness=1.5, width=3,
        )  # fmt: skip
        found.add_trace(line, row=1, col=1)
    lengths = [r["length"] for r in results]
    for name, look, values in (
        ("if all were attention", PEER, [r["all_attention_bytes"] for r in results]),
        ("this hybrid", OURS, [sum(r["state_bytes"].values()) for r in results]),
        ("its Mamba layers", PART, [mamba_bytes(r) for r in results]),
    ):
        found.add_trace(_line(name, look, lengths, values), row=1, col=2)
    axis = dict(gridcolor=GRID, linecolor=TEXT, ticks="outside", tickcolor=TEXT, zeroline=False)
    found.update_xaxes(
        **axis,
        type="log",
        title_text="length of the prompt (tokens)",
        tickvals=lengths,
        ticktext=[f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in lengths],
    )
    found.update_yaxes(**axis)
    found.update_yaxes(title_text="microseconds per token", rangemode="tozero", col=1)
    found.update_yaxes(
        title_text="bytes", type="log", exponentformat="SI", dtick=1, ticksuffix="B", col=2
    )
    machine = record["machine"]
    found.add_annotation(
        text=f"Size {record['size']}, float32, {machine['cpu']}, {machine['threads']} threads, "
        f"{record['date'][:10]}. Bars: fastest and slowest run.",
        x=0,
        y=-0.3,
        xref="paper",
        yref="paper",
        xanchor="left",
        showarrow=False,
        font_size=12,
    )
    found.update_xaxes(title_font_size=14)
    found.update_yaxes(title_font_size=14)
    return found.update_layout(
        width=WIDTH,
        height=HEIGHT,
        paper_bgcolor=BACKGROUND,
        plot_bgcolor=BACKGROUND,
        font=dict(family="Helvetica, Arial, sans-serif", size=14, color=TEXT),
        showlegend=False,
        margin=dict(l=70, r=160, t=40, b=95),
    )


def mamba_bytes(result: dict[str, Any]) -> int:
    """Bytes of the Mamba layers' cache."""
    return result["state_bytes"]["conv"] + result["state_bytes"]["ssm"]


def _line(
    name: str, look: dict[str, str], lengths: Sequence[int], values: Sequence[float]
) -> go.Scatter:
    """A line whose name stands at its end, so that the picture needs no legend."""
    return go.Scatter(
        name=name,
        x=lengths,
        y=values,
        mode="lines+markers+text",
        cliponaxis=False,
        line=dict(color=look["color"], dash=look["dash"], width=2.5),
        marker=dict(symbol=look["symbol"], size=8),
        text=[""] * (len(lengths) - 1) + [f" {name}"],
        textposition="middle right",
        textfont_color=look["color"],
    )


def summary(record: dict[str, Any]) -> str:
    """What the drawing shows, in words: its description for those who do not see it."""
    ends = [
        f"at {r['length']:,} tokens {r['microseconds_per_token']['ours']['median']:.0f} "
        f"microseconds per token and {sum(r['state_bytes'].values()):,} bytes of cache, "
        f"{mamba_bytes(r):,} of them for Mamba layers"
        for r in (record["results"][0], record["results"][-1])
    ]
    return f"Size {record['size']}, measured on {record['date'][:10]}: {'; '.join(ends)}."


def draw(record: Path = RECORD, drawing: Path = DRAWING) -> Path:
    """Write the SVG of a record; the path of the drawing.

    Raises:
        FileNotFoundError: nothing has been measured yet.
    """
    if not record.is_file():
        raise FileNotFoundError(f"no record {record}: run `python -m benchmarks growth` first.")
    found = json.loads(record.read_text())
    return write_svg(figure(found), drawing, title=TITLE, words=summary(found))


def write_svg(content: go.Figure, drawing: Path, *, title: str, words: str) -> Path:
    """Write a figure as an SVG with a title and a description; the path of the drawing."""
    size = dict(width=content.layout.width, height=content.layout.height)
    picture = kaleido.calc_fig_sync(content.to_dict(), opts={"format": "svg", **size}).decode()
    start = picture.index(">", picture.index("<svg")) + 1
    head = f"<title>{escape(title)}</title><desc>{escape(words)}</desc>"
    drawing.parent.mkdir(parents=True, exist_ok=True)
    drawing.write_text(f'{picture[: start - 1]} role="img">{head}{picture[start:]}\n')
    return drawing


if __name__ == "__main__":
    print(draw(*(Path(argument) for argument in sys.argv[1:])))
