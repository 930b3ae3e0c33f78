"""Figures of chapter 02: one map as a matrix, in chunks, and as a state that walks.

    factors        decay mask, scores, and the matrix that is their product
    two_parts      the matrix cut along its chunks: blocks on the diagonal, and what lies below
    chunk_map      which blocks are done how, beside the multiply-adds that this costs
    explore_chunks the same with sliders: chunk length and half-life
    states_walk    what each chunk adds to the state, and the state that is handed on
    memory         bytes kept against tokens read;  chunk_times  time against chunk length

The layer around the scan, and what it costs, is drawn in mixer.py.

A matrix has readers l as rows and writers r as columns, first token top left. What a causal map
never touches is left blank, so that a blank is not mistaken for a small number.

The multiply-adds are those of `ledger.flops` for one head with its own B and C: inside a chunk of
q tokens (q+1)/2 (n+p) a token, into and out of the state 2np, from chunk to chunk np/q.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from numpy import ndarray
from numpy.typing import ArrayLike
from plotly.basedatatypes import BaseFigure
from plotly.subplots import make_subplots

from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import described, lines
from nemotron_lite.course.plotting.widgets import Explorer, explore, slider

INSIDE, THROUGH = theme.INK, theme.SERIES[3].colour  # outlines of the two kinds of blocks


def factors(decay: ArrayLike, scores: ArrayLike) -> go.Figure:
    """The decay mask, the scores C B^T, and their product, side by side.

    Args:
        decay: `t t`, zero above the diagonal.
        scores: `t t`; what lies above the diagonal is not shown.

    Raises:
        ValueError: the two are not square matrices of one size.
    """
    mask, dots = _square("decay", decay), _square("scores", scores)
    if mask.shape != dots.shape:
        raise ValueError(f"decay is {mask.shape} and scores are {dots.shape}; they must agree.")
    return _row_of_matrices(
        {
            "decay mask L (dark is 1)": (mask, False),
            "scores C·B": (dots, True),
            "matrix M": (mask * dots, True),
        },
        "×=",
        "Three lower triangles side by side. The decay mask is one on the diagonal and fades to "
        "the lower left. The scores have both signs everywhere. Their product, the matrix, keeps "
        "the scores near the diagonal and loses them far from it.",
    )


def two_parts(matrix: ArrayLike, chunk: int) -> go.Figure:
    """The matrix as the sum of its blocks on the diagonal and everything below them.

    Args:
        matrix: `t t`, lower-triangular.
        chunk: tokens per chunk, q.

    Raises:
        ValueError: not a square matrix, or a chunk below 1.
    """
    whole = _square("matrix", matrix)
    where = np.arange(len(whole)) // _at_least_one(chunk)
    near = where[:, None] == where[None, :]
    return _row_of_matrices(
        {
            "step 1: inside chunks": (np.where(near, whole, np.nan), True),
            "steps 2–4: through the state": (np.where(near, np.nan, whole), True),
            "matrix M": (whole, True),
        },
        "+=",
        f"Three matrices side by side. The first holds only square blocks of {chunk} tokens on the "
        "diagonal, the second only what lies below these blocks. Together they are the third, the "
        "whole lower triangle.",
    )


def chunk_map(matrix: ArrayLike, chunk: int, *, p: int, n: int) -> go.Figure:
    """Which block of the matrix is done how, and the arithmetic of every chunk length.

    Args:
        matrix: `t t`, lower-triangular.
        chunk: tokens per chunk, q; outlined on the left, arrowed on the right.
        p: head width.
        n: state size.

    Raises:
        ValueError: not a square matrix, or a chunk below 1.
    """
    whole = _square("matrix", matrix)
    t = len(whole)
    lengths = _chunk_lengths(t)
    fig = make_subplots(
        1, 2, column_widths=[0.52, 0.48], horizontal_spacing=0.12,
        subplot_titles=("which block is done how", "multiply-adds per token and head"),
    )  # fmt: skip
    fig.add_trace(_heatmap(_blank_above(whole), diverging=True), 1, 1)
    for name, colour, dash in (
        ("step 1: a small masked matrix", INSIDE, "solid"),
        ("steps 2–4: through the state", THROUGH, "dash"),
    ):
        fig.add_scatter(
            x=[None], y=[None], mode="lines", name=name, line=dict(color=colour, dash=dash, width=3)
        )
    work = multiply_adds(np.array(lengths), p, n)
    # Dark, light and middle, in the order of the stack: no colour is needed to tell them apart.
    for (name, each), colour in zip(work.items(), (theme.INK, "#9CCDEB", "#E69F00"), strict=True):
        fig.add_bar(
            x=[str(q) for q in lengths], y=each, name=name, marker_color=colour,
            row=1, col=2,
        )  # fmt: skip
    fig.update_layout(
        barmode="stack", height=430, margin=dict(t=40, b=130),
        shapes=_outlines(t, _at_least_one(chunk)),
        legend=dict(orientation="h", y=-0.2, yanchor="top", x=0, traceorder="normal"),
    )  # fmt: skip
    _square_axes(fig, 1, "r, the token that wrote")
    fig.update_yaxes(title_text="l, the token that reads", col=1)
    fig.update_xaxes(title_text="chunk length q, tokens", type="category", col=2)
    fig.update_yaxes(title_text="multiply-adds", col=2)
    _point_at(fig, chunk, work, lengths)
    return described(
        fig,
        f"Left: a lower triangle of {t} tokens cut into chunks of {chunk}. Blocks on the diagonal "
        "are outlined as small masked matrices, and the strip to the left of each block as done "
        "through the state. Right: stacked bars of multiply-adds per token over the chunk length. "
        "Short chunks spend on the walk from chunk to chunk, long ones inside the chunks, and into "
        "and out of the state is the same for all.",
    )


def explore_chunks(
    dt: ArrayLike, scores: ArrayLike, *, p: int, n: int, chunk: int = 8, half_life: float = 6.0
) -> tuple[Explorer, go.Figure]:
    """`chunk_map` with two sliders: chunk length, and the half-life of the head in tokens.

    Args:
        dt: `t` step sizes, above 0; their mean step is what the half-life is counted in.
        scores: `t t`, C B^T.
        p: head width.
        n: state size.
        chunk: where the first slider starts.
        half_life: where the second one starts.

    Returns:
        (widget, figure): both for `show`; the figure is the one at rest.

    Raises:
        ValueError: scores that are not square, or a start that is neither a power of two nor t.
    """
    dots, steps = _square("scores", scores), np.asarray(dt, dtype=float)
    t = len(dots)
    lengths = _chunk_lengths(t)
    if chunk not in lengths:
        raise ValueError(f"chunk is {chunk}; expected one of {lengths}.")
    bound = float(np.abs(np.tril(dots)).max())

    def matrix(half_life: float) -> ndarray:
        s = -np.log(2) / half_life * np.cumsum(steps / steps.mean())
        return np.tril(np.exp(np.minimum(s[:, None] - s[None, :], 0))) * dots

    def update(fig: BaseFigure, chunk: int, half_life: float) -> str:
        fig.data[0].update(z=_cells(_blank_above(matrix(half_life))), zmin=-bound, zmax=bound)
        fig.layout.shapes = _outlines(t, chunk)
        work = multiply_adds(np.array(lengths), p, n)
        _point_at(fig, chunk, work, lengths)
        count = -(-t // chunk)
        total = sum(each[lengths.index(chunk)] for each in work.values())
        return (
            f"{count} block{'s' if count > 1 else ''} of {chunk} × {chunk} on the diagonal, "
            f"{count - 1} strip{'' if count == 2 else 's'} through the state; "
            f"{total:,.0f} multiply-adds per token and head."
        )

    figure = chunk_map(matrix(half_life), chunk, p=p, n=n)
    moving = go.Figure(figure)
    moving.data[0].z = _cells(_blank_above(matrix(half_life)))
    length = ipywidgets.SelectionSlider(
        options=lengths, value=chunk, description="chunk length q", continuous_update=True,
        style={"description_width": "initial"}, layout=ipywidgets.Layout(width="min(100%, 460px)"),
    )  # fmt: skip
    fade = slider("half-life, tokens", 0.5, 64.0, value=half_life, log=True)
    return explore(moving, update, chunk=length, half_life=fade), figure


def multiply_adds(chunk: ArrayLike, p: int, n: int) -> dict[str, ndarray]:
    """Multiply-adds per token of one head, by what they are for, at each chunk length."""
    q = np.asarray(chunk, dtype=float)
    return {
        "step 1, inside": (q + 1) / 2 * (n + p),
        "steps 2 and 4, into and out of the state": np.full_like(q, 2.0 * n * p),
        "step 3, from chunk to chunk": n * p / q,
    }


def states_walk(added: ArrayLike, states: ArrayLike) -> go.Figure:
    """What each chunk adds to one head's state (step 2), and the state after it (step 3).

    Args:
        added: `c p n`, what each chunk writes, as it stands at the chunk's end.
        states: `c p n`, the state after each chunk.

    Raises:
        ValueError: the two have different shapes, or are not three-dimensional.
    """
    new, after = (np.asarray(v, dtype=np.float32) for v in (added, states))
    if new.ndim != 3 or new.shape != after.shape:
        raise ValueError(f"added is {new.shape} and states {after.shape}; expected c p n twice.")
    count = len(new)
    fig = make_subplots(
        2, count, column_titles=[f"chunk {c}" for c in range(count)], horizontal_spacing=0.03,
        vertical_spacing=0.12,
    )  # fmt: skip
    bound = float(max(np.abs(new).max(), np.abs(after).max())) or 1.0
    for row, pictures in enumerate((new, after), start=1):
        for column, picture in enumerate(pictures, start=1):
            fig.add_heatmap(
                z=picture, coloraxis="coloraxis", row=row, col=column,
                hovertemplate="p %{y}, n %{x}: %{z:.3f}<extra></extra>",
            )  # fmt: skip
    fig.update_xaxes(showticklabels=False, showgrid=False, ticks="")
    fig.update_yaxes(showticklabels=False, showgrid=False, ticks="", autorange="reversed")
    fig.update_yaxes(title_text="step 2: adds U", row=1, col=1)
    fig.update_yaxes(title_text="step 3: state S", row=2, col=1)
    fig.update_xaxes(title_text="n", row=2)
    colours = dict(colorscale=theme.DIVERGING, cmin=-bound, cmax=bound, colorbar_outlinewidth=0)
    fig.update_layout(height=340, margin_t=40, coloraxis=colours)
    return described(
        fig,
        f"Two rows of {count} small matrices, p rows by n columns. Above, what each chunk adds to "
        "the state. Below, the state after each chunk: the faded state of the chunk before it plus "
        "the matrix above it. The first pair is equal, since the state starts at zero.",
    )


def memory(lengths: ArrayLike, kept: Mapping[str, ArrayLike]) -> go.Figure:
    """Bytes that a layer keeps against the tokens it has read.

    Args:
        lengths: `k` tokens.
        kept: name → `k` bytes.
    """
    return lines(
        lengths, kept, title="What one layer remembers", x_title="tokens", y_title="bytes",
        log_x=True, log_y=True, height=320,
        alt="Bytes kept against tokens read, both axes logarithmic. The line of the attention "
        "layer starts far below and rises steadily; that of the Mamba-2 layer is level; they "
        "cross.",
    )  # fmt: skip


def chunk_times(chunks: ArrayLike, seconds: ArrayLike) -> go.Figure:
    """Milliseconds of one scan against the chunk length.

    Args:
        chunks: `k` chunk lengths, powers of two.
        seconds: `k` times.
    """
    fig = lines(
        chunks, {"time": 1e3 * np.asarray(seconds, dtype=float)}, title="The same scan in chunks",
        x_title="chunk length q, tokens", y_title="milliseconds", log_x=True, height=300,
        alt="Time against chunk length: a valley. The shortest chunks take longer than those in "
        "the middle, and from there on time rises with the length.",
    )  # fmt: skip
    fig.update_xaxes(tickvals=np.asarray(chunks))
    fig.update_yaxes(rangemode="tozero")
    return fig


def _row_of_matrices(
    panels: Mapping[str, tuple[ndarray, bool]], signs: Sequence[str], alt: str
) -> go.Figure:
    """Matrices side by side with signs between them; (values, whether both signs occur)."""
    fig = make_subplots(1, len(panels), subplot_titles=list(panels), horizontal_spacing=0.09)
    both = [values for values, diverging in panels.values() if diverging]
    bound = float(max(np.nanmax(np.abs(np.tril(np.nan_to_num(v)))) for v in both))
    for column, (values, diverging) in enumerate(panels.values(), start=1):
        picture = _heatmap(_blank_above(values), diverging=diverging, bound=bound)
        picture.showscale = column == len(panels)
        fig.add_trace(picture, 1, column)
        _square_axes(fig, column, "r, wrote")
    for column, sign in enumerate(signs, start=1):
        edge = fig.layout[f"xaxis{column if column > 1 else ''}"].domain[1]
        fig.add_annotation(
            x=edge + 0.022, y=0.5, xref="paper", yref="paper", text=sign, showarrow=False,
            font_size=24,
        )  # fmt: skip
    fig.update_yaxes(title_text="l, reads", col=1)
    fig.update_layout(height=300, margin_t=40)
    return described(fig, alt)


def _heatmap(values: ndarray, *, diverging: bool, bound: float | None = None) -> go.Heatmap:
    limit = bound or float(np.nanmax(np.abs(values))) or 1.0
    return go.Heatmap(
        z=np.asarray(values, dtype=np.float32),  # a third of the bytes in a committed chapter
        zmin=-limit if diverging else 0, zmax=limit if diverging else 1,
        colorscale=theme.DIVERGING if diverging else theme.SEQUENTIAL, showscale=False,
        hovertemplate="row %{y}, column %{x}: %{z:.3f}<extra></extra>", hoverongaps=False,
    )  # fmt: skip


def _square_axes(fig: go.Figure, column: int, x_title: str) -> None:
    """First row on top, square cells, ticks few enough to read."""
    x = f"x{column if column > 1 else ''}"
    fig.update_xaxes(
        title_text=x_title, showgrid=False, zeroline=False, constrain="domain", nticks=5,
        col=column,
    )  # fmt: skip
    fig.update_yaxes(
        autorange="reversed", showgrid=False, zeroline=False, constrain="domain", scaleanchor=x,
        nticks=5, col=column,
    )  # fmt: skip


def _outlines(t: int, chunk: int) -> list[dict[str, object]]:
    """One rectangle for each block on the diagonal, and one for the strip to its left."""
    shapes: list[dict[str, object]] = []
    for first in range(0, t, chunk):
        low, high = first - 0.5, min(first + chunk, t) - 0.5
        common = dict(type="rect", xref="x", yref="y", y0=low, y1=high)
        if first:
            line = dict(color=THROUGH, dash="dash", width=2)
            shapes.append(dict(common, x0=-0.5, x1=low, line=line))
        shapes.append(dict(common, x0=low, x1=high, line=dict(color=INSIDE, width=2)))
    return shapes


def _point_at(
    fig: BaseFigure, chunk: int, work: Mapping[str, ndarray], lengths: Sequence[int]
) -> None:
    """An arrow over the bar of this chunk length; the last annotation of the figure."""
    titles = [a for a in fig.layout.annotations if a.name != "here"]
    if chunk in lengths:
        at = lengths.index(chunk)
        top = float(sum(each[at] for each in work.values()))
        titles.append(
            go.layout.Annotation(
                name="here", x=at, y=top, xref="x2", yref="y2", text=f"q = {chunk}", ay=-28, ax=0,
                arrowhead=2, arrowcolor=theme.INK,
            )
        )  # fmt: skip
    fig.layout.annotations = titles


def _chunk_lengths(t: int) -> list[int]:
    """Powers of two below t, and t itself."""
    return [*(2**i for i in range(t.bit_length()) if 2**i < t), t]


def _blank_above(values: ndarray) -> ndarray:
    return np.where(np.tri(len(values), dtype=bool), values, np.nan)


def _cells(values: ndarray) -> list[list[float | None]]:
    """Rows with None for a blank: a live figure sends matrices as JSON, which has no nan."""
    return [[None if np.isnan(v) else round(float(v), 4) for v in row] for row in values]


def _square(name: str, values: ArrayLike) -> ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ValueError(f"{name} has shape {array.shape}; expected a square matrix.")
    return array


def _at_least_one(chunk: int) -> int:
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 token.")
    return chunk
