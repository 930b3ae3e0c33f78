"""A figure and its text, and the two plots that every chapter draws.

`described` is the last line of every figure function:

    return described(fig, "Two lines over time: the error of the chunked scan stays flat, …")

It applies the theme, refuses a figure that cannot be read (fonts below 12 px, a text that is too
short), and stores the text in `fig.layout.meta["alt"]`. From there the notebook, the widget and the
tests read it. The text says what the figure shows, in words that are true on any machine. It has no
measured numbers, because the notebook test compares it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike
from plotly.basedatatypes import BaseFigure

from nemotron_lite.course.display import SHORTEST_ALT
from nemotron_lite.course.plotting import theme

# go.Figure and go.FigureWidget are siblings; this is what they share.
AnyFigure = TypeVar("AnyFigure", bound=BaseFigure)


def described(fig: AnyFigure, alt: str) -> AnyFigure:
    """Give `fig` the theme and its alternative text; returns the same figure.

    Raises:
        ValueError: the text is shorter than 40 characters or equal to the title, or a font in the
            figure is smaller than 12 px.
    """
    alt = " ".join(alt.split())
    if len(alt) < SHORTEST_ALT:
        raise ValueError(
            f"alt text {alt!r} has {len(alt)} characters, expected at least {SHORTEST_ALT}: say "
            "what the figure shows, which way the lines go and where they separate."
        )
    if alt == (fig.layout.title.text or ""):
        raise ValueError(f"alt text {alt!r} equals the title; say what the plot shows.")
    small = [f"{where}={size}" for where, size in _font_sizes(fig) if size < theme.SMALLEST]
    if small:
        raise ValueError(
            f"{', '.join(small)}: fonts below {theme.SMALLEST} px are too small; make them larger, "
            "or show fewer labels."
        )
    meta = fig.layout.meta if isinstance(fig.layout.meta, dict) else {}
    fig.update_layout(template=theme.template, meta={**meta, "alt": alt})
    return fig


def alt_of(fig: BaseFigure | Mapping[str, Any]) -> str | None:
    """The alternative text of a figure, or of a figure's JSON; None if it has none."""
    layout = fig.get("layout", {}) if isinstance(fig, Mapping) else fig.layout
    meta = layout.get("meta") if isinstance(layout, Mapping) else layout.meta
    return meta.get("alt") if isinstance(meta, Mapping) else None


def lines(
    x: ArrayLike,
    series: Mapping[str, ArrayLike],
    *,
    title: str,
    x_title: str,
    y_title: str,
    alt: str,
    log_x: bool = False,
    log_y: bool = False,
    markers: bool = True,
    height: int = 380,
) -> go.Figure:
    """Lines over one axis, each with its own colour, dash and marker.

    Args:
        x: `n` positions, shared by all lines.
        series: name → `n` values; nan makes a gap.
        title: what the plot shows.
        x_title: label of the x axis, with its unit.
        y_title: label of the y axis, with its unit.
        alt: the alternative text (see `described`).
        log_x: a logarithmic axis.
        log_y: a logarithmic axis.
        markers: also mark the points.
        height: pixels.

    Raises:
        ValueError: a line has another length than x, or there are more lines than line styles.
    """
    at = np.asarray(x)
    if len(series) > len(theme.SERIES):
        raise ValueError(
            f"{len(series)} lines; at most {len(theme.SERIES)} can be told apart without colour. "
            "Split them over two figures."
        )
    fig = go.Figure()
    for name, values in series.items():
        y = np.asarray(values, dtype=float)
        if y.shape != at.shape:
            raise ValueError(
                f"line {name!r} has shape {y.shape}, x has {at.shape}; they must agree."
            )
        fig.add_scatter(x=at, y=y, name=name, mode="lines+markers" if markers else "lines")
    fig.update_layout(title_text=title, height=height, showlegend=len(series) > 1)
    fig.update_xaxes(title_text=x_title, type="log" if log_x else "-")
    fig.update_yaxes(title_text=y_title, type="log" if log_y else "-")
    return described(fig, alt)


def matrix(
    values: ArrayLike,
    *,
    title: str,
    alt: str,
    x_title: str = "",
    y_title: str = "",
    diverging: bool = False,
    numbers: bool = False,
    digits: int = 2,
    height: int = 380,
) -> go.Figure:
    """A matrix as a picture, first row on top.

    Args:
        values: `rows columns`; nan is drawn blank.
        title: what the matrix is.
        alt: the alternative text (see `described`).
        x_title: what the columns are.
        y_title: what the rows are.
        diverging: blue below zero, white at zero, vermillion above; otherwise light to dark.
        numbers: also write each value, which makes a small matrix readable without colour.
        digits: after the point, in `numbers`.
        height: pixels.

    Raises:
        ValueError: `values` is not a matrix.
    """
    z = np.asarray(values, dtype=float)
    if z.ndim != 2:
        raise ValueError(f"values has shape {z.shape}; expected two axes, rows and columns.")
    bound = float(np.nanmax(np.abs(z), initial=0.0)) or 1.0
    fig = go.Figure(
        go.Heatmap(
            z=z,
            zmin=-bound if diverging else None,
            zmax=bound if diverging else None,
            colorscale=theme.DIVERGING if diverging else theme.SEQUENTIAL,
            texttemplate=f"%{{z:.{digits}f}}" if numbers else None,
            textfont_size=12,
            hovertemplate="row %{y}, column %{x}: %{z}<extra></extra>",
        )
    )
    fig.update_layout(title_text=title, height=height)
    fig.update_xaxes(title_text=x_title, showgrid=False, constrain="domain")
    fig.update_yaxes(title_text=y_title, showgrid=False, autorange="reversed")
    return described(fig, alt)


def _font_sizes(fig: BaseFigure) -> Iterator[tuple[str, float]]:
    """Every font size that the figure sets itself, with the path to it."""
    content = fig.to_plotly_json()
    content["layout"] = {k: v for k, v in content["layout"].items() if k != "template"}
    yield from _sizes_in(content, "")


def _sizes_in(node: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            if key.endswith("font") and isinstance(value, Mapping):
                sizes = np.atleast_1d(value.get("size", theme.SMALLEST))
                yield f"{path}{key}.size", float(sizes.min())
            else:
                yield from _sizes_in(value, f"{path}{key}.")
    elif isinstance(node, Sequence) and not isinstance(node, str):
        for index, value in enumerate(node):
            yield from _sizes_in(value, f"{path}{index}.")
