"""One theme for every figure, and the contrast of its colours.

A figure has a light background and dark text. In JupyterLab's dark theme the style of the course
inverts it, turns the hues back and strengthens them (`style/custom.css`; `in_the_dark` says what
becomes of a colour): the background becomes the grey of the page, and blue stays blue. A scale from
light to dark becomes one from dark to light, so a text names the end of a scale, not its
brightness. Colours are those of Okabe and Ito (jfly.uni-koeln.de/color, 2008), which colour-blind
readers can distinguish. Three of the eight are too pale for a thin line on a light background (WCAG
2.2 requires 3:1 for graphics and 4.5:1 for text), so lines use a darker shade of the same hue:

    contrast(a, b) = (L_a + 0.05) / (L_b + 0.05),  L the relative luminance of the lighter first

No information is in the colour alone: each series also has its own dash and marker, and `template`
assigns them to the lines of a figure in order.

Left out: a dark theme of plotly. A figure is also a picture in a committed notebook, which cannot
know the reader's theme; a filter can be laid over both.
"""

from __future__ import annotations

from typing import NamedTuple

import plotly.graph_objects as go
import plotly.io as pio

# The eight colours of Okabe and Ito with their names, for areas and for shapes with a dark outline.
PALETTE = {
    "black": "#000000",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "green": "#009E73",
    "yellow": "#F0E442",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "purple": "#CC79A7",
}

CARD = "#F6F8FA"  # background around a plot
PLOT = "#FFFFFF"  # background of the data
INK = "#1F2328"
MUTED = "#57606A"
GRID = "#D8DEE4"

NAME = "nemotron"
FONT = 'system-ui, "Segoe UI", Helvetica, Arial, "DejaVu Sans", sans-serif'
MONO = 'ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace'
SMALLEST = 12  # pixels


class Series(NamedTuple):
    """Style of one line; colour, dash or marker alone are enough to recognize it."""

    name: str
    colour: str
    dash: str
    marker: str


SERIES = (
    Series("blue", PALETTE["blue"], "solid", "circle"),
    Series("vermillion", PALETTE["vermillion"], "dash", "square"),
    Series("green", "#00795A", "dot", "diamond"),
    Series("purple", "#A8487F", "dashdot", "triangle-up"),
    Series("orange", "#A86F00", "longdash", "x"),
    Series("ink", INK, "longdashdot", "cross"),
)


class Kind(NamedTuple):
    """Style of one kind of layer in every diagram: a pale and a strong colour."""

    letter: str
    name: str
    pale: str
    strong: str


# The same four hues as docs/architecture.svg.
KINDS = {
    "M": Kind("M", "Mamba-2", "#CFE4F2", "#0072B2"),
    "E": Kind("E", "experts", "#CDEBE1", "#00795A"),
    "*": Kind("*", "attention", "#FBE3B5", "#8F5C00"),
    "-": Kind("-", "dense MLP", "#E4E7EB", "#57606A"),
    "MTP": Kind("P", "multi-token prediction", "#F1DCE8", "#A8487F"),
}

# Light to dark, so that the order is also clear in print and to colour-blind readers
# (cividis, Nuñez and others 2018).
SEQUENTIAL = [
    [0.0, "#FDE737"], [0.25, "#BCAF6F"], [0.5, "#7D7C78"], [0.75, "#414D6B"], [1.0, "#00224E"],
]  # fmt: skip
DIVERGING = [
    [0.0, "#0072B2"], [0.25, "#7FB8D8"], [0.5, "#FFFFFF"], [0.75, "#EAAE7F"], [1.0, "#D55E00"],
]  # fmt: skip


def luminance(colour: str) -> float:
    """Relative luminance of a colour `#rrggbb`, 0 for black and 1 for white (WCAG 2.2)."""
    channels = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one: str, other: str) -> float:
    """Contrast ratio of two colours, from 1 to 21. Text needs 4.5, lines and marks 3 (WCAG 2.2)."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def in_the_dark(colour: str, invert: float = 0.93, saturate: float = 1.4) -> str:
    """What the filter `invert(…) hue-rotate(180deg) saturate(…)` of a browser makes of a colour.

    The two matrices are those of the standard (Filter Effects, W3C). An angle of 180 degrees gives
    twice the grey of the same luminance, minus the colour.
    """
    channels = [invert + (1 - 2 * invert) * int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    for step in (lambda grey, c: 2 * grey - c, lambda grey, c: grey + saturate * (c - grey)):
        grey = sum(w * c for w, c in zip((0.213, 0.715, 0.072), channels, strict=True))
        channels = [min(max(step(grey, c), 0.0), 1.0) for c in channels]
    return "#" + "".join(f"{round(255 * c):02X}" for c in channels)


def text_on(fill: str) -> str:
    """The dark text colour or white, whichever has more contrast on `fill`."""
    return max((INK, "#FFFFFF"), key=lambda ink: contrast(ink, fill))


def _template() -> go.layout.Template:
    axis = dict(
        gridcolor=GRID, zerolinecolor=GRID, linecolor=MUTED, tickcolor=MUTED, showline=True,
        ticks="outside", automargin=True, title_standoff=8, title_font_size=14, tickfont_size=12,
    )  # fmt: skip
    look = go.layout.Template()
    look.layout = go.Layout(
        font=dict(family=FONT, size=13, color=INK),
        title=dict(font_size=16, x=0.02, xanchor="left"),
        paper_bgcolor=CARD,
        plot_bgcolor=PLOT,
        colorway=[s.colour for s in SERIES],
        colorscale=dict(sequential=SEQUENTIAL, diverging=DIVERGING),
        hoverlabel=dict(bgcolor=PLOT, bordercolor=MUTED, font=dict(color=INK, size=13)),
        legend=dict(font_size=13, bgcolor="rgba(255,255,255,0.85)"),
        margin=dict(l=64, r=24, t=56, b=52),
        xaxis=axis,
        yaxis=axis,
    )
    look.data.scatter = [
        go.Scatter(
            line=dict(color=s.colour, dash=s.dash, width=2),
            marker=dict(color=s.colour, symbol=s.marker, size=8),
        )
        for s in SERIES
    ]
    bar = dict(outlinewidth=0, tickfont_size=12)
    look.data.heatmap = [go.Heatmap(colorscale=SEQUENTIAL, colorbar=bar)]
    look.data.bar = [go.Bar(marker_line=dict(color=INK, width=1))]
    return look


template = _template()


def use() -> None:
    """Make this the default theme of plotly for the session."""
    pio.templates[NAME] = template
    pio.templates.default = NAME
