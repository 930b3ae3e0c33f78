"""Figures of chapter 02, second part: the layer around the scan, its cost, and its bugs.

    mixer_layout   widths inside a Mamba-2 layer: z | x B C | dt, convolution, groups of the norm
    crossing       time against length, with the place where two lines meet
    fingerprints   where in a text two implementations part
    losses         training loss of several models

The pictures of the scan itself are in ssd.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import described, lines


def mixer_layout(config: NemotronConfig) -> go.Figure:
    """The channels of a Mamba-2 layer from projection to projection, to scale."""
    inner, shared = config.mamba_inner_size, config.n_groups * config.ssm_state_size
    heads, groups, d = config.mamba_num_heads, config.n_groups, config.hidden_size
    head_width, per_group = config.mamba_head_dim, inner // config.n_groups
    z = ("z", "the gate", inner, "sky")
    xbc = [
        ("x", f"{heads} heads of {head_width}", inner, "orange"),
        ("B", f"{groups} groups of {config.ssm_state_size}", shared, "green"),
        ("C", f"{groups} groups of {config.ssm_state_size}", shared, "purple"),
    ]
    dt = ("dt", "one step size a head", heads, "vermillion")
    norm = [(f"norm {i}", "one group", per_group, "yellow") for i in range(1, groups + 1)]
    gate = ("silu(z)", "multiplied into y before the norm", inner, "sky")
    rows: list[tuple[str, int, list[tuple[str, str, int, str]]]] = [
        ("in_proj", 0, [z, *xbc, dt]),
        (f"conv, {config.conv_kernel} taps, SiLU", inner, xbc),
        ("scan", inner, [("y", f"{heads} heads of {head_width}", inner, "orange")]),
        ("gate, then norm", 0, [gate, *norm]),
        ("out_proj", inner, [("out", "back to the residual stream", d, "sky")]),
    ]
    fig = go.Figure()
    for name, start, parts in rows:
        widths = [width for _, _, width, _ in parts]
        fills = [theme.PALETTE[colour] for *_, colour in parts]
        fig.add_bar(
            y=[name] * len(parts), x=widths, base=(start + np.cumsum([0, *widths[:-1]])).tolist(),
            orientation="h", width=0.66, showlegend=False, marker_color=fills,
            text=[f"<b>{label}</b> {w:,}" if w > 0.05 * inner else "" for label, _, w, _ in parts],
            textposition="inside", insidetextanchor="middle", textangle=0, constraintext="none",
            insidetextfont=dict(size=13, color=[theme.text_on(fill) for fill in fills]),
            hovertext=[f"{label}: {meaning}, {w:,} channels" for label, meaning, w, _ in parts],
            hoverinfo="text",
        )  # fmt: skip
    fig.add_annotation(
        x=config.mamba_in_proj_size, y="in_proj", text=f"<b>dt</b> {heads}", showarrow=False,
        xanchor="left", xshift=6,
    )  # fmt: skip
    fig.update_layout(barmode="overlay", height=310, margin_t=24)
    fig.update_xaxes(title_text="channels", range=[0, 1.08 * config.mamba_in_proj_size])
    fig.update_yaxes(categoryorder="array", categoryarray=[r[0] for r in rows], showgrid=False)
    fig.update_yaxes(autorange="reversed")
    return described(
        fig,
        "Five bars, one for each stage of a Mamba-2 layer, cut into channels to scale. The input "
        "projection is cut into z, x, B, C and a sliver dt. The convolution passes over x, B and "
        "C. The scan leaves y, as wide as z. The gate is multiplied in, the norm cuts the product "
        f"into {groups} groups, and the output projection returns to the width of the model.",
    )


def crossing(
    lengths: ArrayLike, seconds: Mapping[str, ArrayLike], at: float | None = None
) -> go.Figure:
    """Milliseconds against length, both axes logarithmic, with a mark where two lines meet.

    Args:
        lengths: `k` tokens.
        seconds: name → `k` times.
        at: the length to mark; None marks nothing.
    """
    fig = go.Figure()
    for name, times in seconds.items():
        fig.add_scatter(
            x=np.asarray(lengths), y=1e3 * np.asarray(times, dtype=float), name=name,
            mode="lines+markers",
        )  # fmt: skip
    if at is not None:
        fig.add_vline(x=at, line=dict(color=theme.MUTED, dash="dot", width=2))
        fig.add_annotation(
            x=float(np.log10(at)), y=1.0, yref="paper", text="equal", showarrow=False,
            xanchor="left", xshift=4, yanchor="top",
        )  # fmt: skip
    fig.update_xaxes(title_text="tokens", type="log", tickvals=np.asarray(lengths))
    fig.update_yaxes(title_text="milliseconds", type="log")
    fig.update_layout(height=330, margin_t=24)
    return described(
        fig,
        f"Time against length on logarithmic axes for {' and '.join(seconds)}. Both lines "
        "rise; the one for attention is steeper and starts lower, and they meet at a marked "
        "length, beyond which the scan takes less time.",
    )


def fingerprints(
    errors: Mapping[str, ArrayLike], marks: Mapping[str, int], *, floor: float = 1e-9
) -> go.Figure:
    """The largest error at each position, one small plot for each suspect.

    Args:
        errors: name → `t` absolute errors; anything below `floor` is drawn at it.
        marks: what happens where, name → position: dotted lines in each plot.
        floor: the smallest error drawn.

    Raises:
        ValueError: nothing to draw.
    """
    if not errors:
        raise ValueError("errors is empty; expected at least one suspect.")
    columns = min(2, len(errors))
    rows = -(-len(errors) // columns)
    fig = make_subplots(
        rows, columns, shared_xaxes=True, shared_yaxes=True, subplot_titles=list(errors),
        horizontal_spacing=0.06, vertical_spacing=0.14,
    )  # fmt: skip
    look = theme.SERIES[1]
    for i, (name, values) in enumerate(errors.items()):
        y = np.maximum(np.asarray(values, dtype=np.float32), np.float32(floor))
        where = dict(row=i // columns + 1, col=i % columns + 1)
        fig.add_scatter(
            y=y, name=name, mode="lines", showlegend=False,
            line=dict(color=look.colour, dash="solid"), **where,
        )  # fmt: skip
        for position in marks.values():
            line = dict(color=theme.MUTED, dash="dot", width=2)
            fig.add_vline(x=position - 0.5, line=line, **where)
    for label, position in marks.items():
        fig.add_annotation(
            x=position, y=0.02, yref="y domain", xref="x", text=label, showarrow=False,
            xanchor="left", yanchor="bottom", xshift=2,
        )  # fmt: skip
    fig.update_yaxes(type="log", range=[np.log10(floor), 1.2], exponentformat="power")
    fig.update_yaxes(title_text="largest error", col=1)
    fig.update_xaxes(title_text="position in the text", row=rows)
    fig.update_layout(height=110 + 130 * rows, margin_t=40)
    plots = f"{len(errors)} small plots" if len(errors) > 1 else "One plot"
    return described(
        fig,
        f"{plots} of error against position in the text, named {'; '.join(errors)}, with dotted "
        f"lines at {' and '.join(marks)}. Errors are at the floor where two programs agree and "
        "jump by many powers of ten where they part.",
    )


def losses(curves: Mapping[str, ArrayLike], *, every: int) -> go.Figure:
    """Training loss by step, the model without memory first.

    Args:
        curves: name → mean losses of `every` steps each, of equal length.
        every: how many steps stand behind one value; it is drawn in their middle.

    Raises:
        ValueError: curves of different lengths.
    """
    count = len(np.asarray(next(iter(curves.values()))))
    return lines(
        np.arange(count) * every + (every + 1) / 2, curves, height=320,
        title=f"Training loss, mean of {every} steps", x_title="step", y_title="nats per byte",
        alt=f"Training loss against steps for {'; '.join(curves)}. All fall; the curve of "
        f"{next(iter(curves))} levels off far above the others, which lie on top of each other.",
    )  # fmt: skip
