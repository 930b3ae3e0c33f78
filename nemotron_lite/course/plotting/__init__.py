"""Plotly figures as functions of arrays, with one theme and an alternative text for each figure.

    theme       colours, dashes, markers and fonts, and the contrast between two colours
    figure      `described` (a figure with its text), `lines` and `matrix`
    model_map   the layers of a config as blocks
    balance     the load of the experts over the updates of a run, live too
    quality     bits per byte of models at equal compute, from the record
    widgets     sliders and steps over a live figure

The figures of a single chapter are in the `figures.py` of that chapter.

A function here takes arrays or a config and returns a figure with an alternative text, set by
`described`. The text says what the figure shows: for a reader who cannot see it, for a notebook
without a kernel, and for the test that compares outputs. `show` refuses a figure without one.

This package needs the `lab` extra (plotly, ipywidgets, anywidget); `import nemotron_lite` does not.
"""

from nemotron_lite.course.plotting.balance import LiveBalance, balance_map
from nemotron_lite.course.plotting.figure import alt_of, described, lines, matrix
from nemotron_lite.course.plotting.model_map import model_map
from nemotron_lite.course.plotting.quality import quality_claims, quality_curves
from nemotron_lite.course.plotting.theme import PALETTE, SERIES, template
from nemotron_lite.course.plotting.widgets import Explorer, Stepper, explore, live, slider, stepper

__all__ = [
    "PALETTE",
    "SERIES",
    "Explorer",
    "LiveBalance",
    "Stepper",
    "alt_of",
    "balance_map",
    "described",
    "explore",
    "lines",
    "live",
    "matrix",
    "model_map",
    "quality_claims",
    "quality_curves",
    "slider",
    "stepper",
    "template",
]
