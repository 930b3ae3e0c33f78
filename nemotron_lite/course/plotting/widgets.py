"""Sliders that change a live figure while they are dragged, and steps that can be played.

    view = explore(figure, update, dt=slider("step dt", 0.001, 1.0, value=0.1, log=True))
    show(view, figure)

    view = stepper(figure, update, steps=24, label="token")
    show(view, figure)

`update(fig, dt=…)` changes the traces of the live figure. All its changes are sent as one message
(`batch_update`), so the browser never draws half of them. If it returns a string, that is shown
below the figure: the same result in words, for a reader who cannot see the lines. An update may
take 200 ms; a slower slider feels broken, so anything expensive is computed before. An error in an
update would only appear in a log that nobody reads, so it is shown below the figure too.

`stepper` shows something that happens in steps, such as a state that is written token by token:
Play, Back, Next and a slider, and `update(fig, step=i)` as above.

When no kernel runs, the picture of the figure and its text, stored by `show`, take its place.
"""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable
from typing import Any

import ipywidgets
import plotly.graph_objects as go

from nemotron_lite.course.plotting.figure import alt_of, described

BUDGET = 0.2  # seconds from moving a slider to the new picture
PLAY_MS = 700  # milliseconds for each step that is played: time to read its sentence
PLAY, PAUSE = "▶ Play", "❚❚ Pause"

Update = Callable[..., Any]


def live(figure: go.Figure) -> go.FigureWidget:
    """The figure as a FigureWidget, which can change while it is shown, with the same text.

    Raises:
        ValueError: the figure has no alternative text.
    """
    alt = alt_of(figure)
    if alt is None:
        raise ValueError("this figure has no alt text; end its function with described(fig, …).")
    return described(_figure_widget()(figure), alt)


def _figure_widget() -> type[go.FigureWidget]:
    """`go.FigureWidget`, without the slowest part of its first import.

    plotly imports nbformat, nbformat imports jsonschema, and jsonschema, if it finds the package
    rfc3987_syntax, builds parsers for international addresses: four of the five seconds before the
    first live figure. Nothing in a kernel checks such addresses, so the package is not found here.
    """
    hidden = "rfc3987_syntax"
    if "jsonschema" in sys.modules or hidden in sys.modules:
        return go.FigureWidget
    sys.modules[hidden] = None  # type: ignore[assignment]  # Python's way to make an import fail
    try:
        return go.FigureWidget
    finally:
        del sys.modules[hidden]


def slider(
    label: str,
    low: float | int,
    high: float | int,
    *,
    value: float | int | None = None,
    step: float | int | None = None,
    log: bool = False,
) -> ipywidgets.Widget:
    """A slider that sends its value while it is dragged.

    If `low`, `high` and `step` are integers, so is the value. With `log` the slider has a hundred
    steps of equal ratio.

    Args:
        label: the quantity and its unit.
        low: the smallest value; above 0 with `log`.
        high: the largest value.
        value: the initial value; None starts at low.
        step: the smallest move; not with `log`.
        log: equal ratios instead of equal differences.

    Raises:
        ValueError: the range is empty, the initial value is outside, or `log` with a `low` of 0.
    """
    start = low if value is None else value
    if not low < high or not low <= start <= high:
        raise ValueError(
            f"slider {label!r}: expected low <= value <= high and low < high, got "
            f"low={low}, value={start}, high={high}."
        )
    if log and (low <= 0 or step is not None):
        raise ValueError(
            f"slider {label!r}: log needs low above 0 and takes no step; got "
            f"low={low}, step={step}."
        )
    common = dict(
        description=label, continuous_update=True, style={"description_width": "initial"},
        layout=ipywidgets.Layout(width="min(100%, 460px)"),
    )  # fmt: skip
    if log:
        from math import log10

        ends = log10(low), log10(high)
        return ipywidgets.FloatLogSlider(
            value=start,
            base=10,
            min=ends[0],
            max=ends[1],
            step=(ends[1] - ends[0]) / 100,
            readout_format=".3g",
            **common,
        )
    if all(isinstance(n, int) for n in (low, high, start, step or 1)):
        return ipywidgets.IntSlider(value=start, min=low, max=high, step=step or 1, **common)
    move = step or (high - low) / 100
    return ipywidgets.FloatSlider(
        value=start, min=low, max=high, step=move, readout_format=".3g", **common
    )


class Explorer(ipywidgets.VBox):
    """Controls, a live figure, and a line of text below it.

    `figure` is the live figure, `controls` the widgets by name, `seconds` how long the last update
    took in the kernel, `words` the line of text.
    """

    def __init__(self, figure: go.Figure, update: Update, **controls: ipywidgets.Widget) -> None:
        self.figure = live(figure)
        self.controls = controls
        self.words = ipywidgets.HTML()
        self.seconds = 0.0
        self._update = update
        super().__init__([ipywidgets.VBox(list(controls.values())), self.figure, self.words])
        for control in controls.values():
            control.observe(self._changed, names="value")
        self.refresh()

    def refresh(self) -> None:
        """Update the figure with the values of the controls; an error of the update is raised."""
        start = time.perf_counter()
        values = {name: control.value for name, control in self.controls.items()}
        with self.figure.batch_update():
            text = self._update(self.figure, **values)
        if isinstance(text, str):
            self.words.value = f'<div aria-live="polite">{html.escape(text)}</div>'
        self.seconds = time.perf_counter() - start

    def _changed(self, change: dict[str, Any]) -> None:
        try:
            self.refresh()
        except (
            Exception
        ) as error:  # shown to the learner, because nobody sees an error in a callback
            text = html.escape(f"{type(error).__name__}: {error}")
            self.words.value = f'<div role="alert"><b>The update failed.</b> {text}</div>'


def explore(figure: go.Figure, update: Update, **controls: ipywidgets.Widget) -> Explorer:
    """Put `controls` above a live copy of `figure`, and call `update` when one of them changes.

    Args:
        figure: a described figure; it is not changed.
        update: called as `update(fig, name=value, …)` with the live figure and the value of each
            control. It changes traces in place; a string it returns is shown below. The first
            call is made at once, with the initial values; an error in it is raised.
        controls: widgets with a `value`, by the name under which `update` takes it.
    """
    return Explorer(figure, update, **controls)


class Stepper(Explorer):
    """An `Explorer` over the steps 0 … `steps` - 1, with buttons to play them and to go by one.

    `play`, `back` and `forward` are the buttons; `controls["step"]` is the slider. `clock` counts
    the steps while it plays. ipywidgets gives its own buttons no names that a screen reader could
    read, so they are hidden.
    """

    def __init__(
        self, figure: go.Figure, update: Update, steps: int, label: str, start: int = 0
    ) -> None:
        last = steps - 1
        where = slider(label, 0, last, value=start)
        self.clock = ipywidgets.Play(
            value=start, min=0, max=last, interval=PLAY_MS, layout=ipywidgets.Layout(display="none")
        )
        self.play = ipywidgets.ToggleButton(
            description=PLAY,
            tooltip=f"Play all {steps} steps",
            layout=ipywidgets.Layout(width="88px"),
        )
        self.back = _button("◀ Back", f"Back to the {label} before")
        self.forward = _button("Next ▶", f"Go on to the next {label}")
        # The browser moves the slider while it plays; the kernel only draws.
        self._links = (
            ipywidgets.jslink((self.clock, "value"), (where, "value")),
            ipywidgets.jslink((self.clock, "playing"), (self.play, "value")),
        )
        self.play.observe(self._named, names="value")
        super().__init__(figure, update, step=where)
        self.back.on_click(lambda _: self.go(-1))
        self.forward.on_click(lambda _: self.go(1))
        row = ipywidgets.HBox(
            [self.clock, self.play, self.back, self.forward, where],
            layout=ipywidgets.Layout(flex_flow="row wrap", align_items="center"),
        )
        self.children = [row, self.figure, self.words]

    def _named(self, change: dict[str, Any]) -> None:
        self.play.description = PAUSE if change["new"] else PLAY

    def go(self, by: int) -> None:
        """Move by a number of steps; stays at the first and at the last one."""
        where = self.controls["step"]
        where.value = min(max(where.value + by, where.min), where.max)


def stepper(figure: go.Figure, update: Update, steps: int, label: str, start: int = 0) -> Stepper:
    """Put Play, Back, Next and a slider above a live copy of `figure`.

    Args:
        figure: a described figure; it is not changed.
        update: called as `update(fig, step=i)` with the live figure and i from 0 to steps - 1. It
            changes traces in place; a string it returns is shown below.
        steps: how many there are.
        label: what one step is, such as "token".
        start: the first step to show.

    Raises:
        ValueError: fewer than two steps, or a start outside of them.
    """
    if steps < 2 or not 0 <= start < steps:
        raise ValueError(
            f"stepper: steps={steps}, start={start}; expected two or more steps and a start from "
            "0 to steps - 1."
        )
    return Stepper(figure, update, steps, label, start)


def _button(text: str, tooltip: str) -> ipywidgets.Button:
    return ipywidgets.Button(
        description=text, tooltip=tooltip, layout=ipywidgets.Layout(width="auto")
    )
