"""Figures: plotly drawings as pure functions of arrays, one theme, and a text for each.

    theme       colours, dashes, markers and fonts; what is readable is computed, not guessed
    base        `described` (a figure with its text), `lines` and `matrix`
    model_map   the layers of a config as blocks
    widgets     sliders over a live figure
    blueprint, scan, ssd, recall   the figures of one chapter each; import them by name

A function here takes arrays or a config and returns a figure that `described` has given an
alternative text: what is to be seen, for a reader who cannot see it, for the notebook that is not
running, and for the test that compares outputs. `show` refuses a figure without one.

This room needs the `lab` extra (plotly, ipywidgets, anywidget); `import nemotron_lite` does not.
"""

from nemotron_lite.course.plotting.figure import alt_of, described, lines, matrix
from nemotron_lite.course.plotting.model_map import model_map
from nemotron_lite.course.plotting.theme import PALETTE, SERIES, template
from nemotron_lite.course.plotting.widgets import Explorer, explore, live, slider

__all__ = [
    "PALETTE",
    "SERIES",
    "Explorer",
    "alt_of",
    "described",
    "explore",
    "lines",
    "live",
    "matrix",
    "model_map",
    "slider",
    "template",
]
