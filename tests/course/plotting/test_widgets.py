"""A slider moves a live figure: at once, in one step, and with its words below."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import pytest

from nemotron_lite.course.plotting import alt_of, described, explore, live, slider, stepper
from nemotron_lite.course.plotting.widgets import BUDGET

WORDS = "Four curves that decay from one towards zero, the faster the larger the step size is."
TIME = np.linspace(0, 8, 2000)


def curves() -> go.Figure:
    fig = go.Figure([go.Scatter(x=TIME, y=np.exp(-TIME), name=str(i)) for i in range(4)])
    return described(fig, WORDS)


def decay(fig: go.FigureWidget, *, dt: float, rows: int = 1) -> str:
    """A chapter-sized update: four lines of two thousand points."""
    for number, trace in enumerate(fig.data):
        trace.y = np.exp(-TIME * dt * rows * (number + 1))
    return f"after one step {np.exp(-dt):.2f} of the state is left"


def test_a_slider_moves_the_figure_and_the_words() -> None:
    view = explore(curves(), decay, dt=slider("step dt", 0.0, 2.0, value=1.0))
    assert (
        view.words.value == '<div aria-live="polite">after one step 0.37 of the state is left</div>'
    )
    view.controls["dt"].value = 2.0
    np.testing.assert_allclose(view.figure.data[1].y, np.exp(-TIME * 4))
    assert "0.14 of the state" in view.words.value
    assert alt_of(view.figure) == WORDS


def test_the_figure_that_was_given_is_not_changed() -> None:
    figure = curves()
    explore(figure, decay, dt=slider("step dt", 0.0, 2.0, value=2.0))
    np.testing.assert_array_equal(figure.data[0].y, np.exp(-TIME))


@pytest.mark.timing
def test_an_update_is_faster_than_the_eye() -> None:
    view = explore(
        curves(), decay, dt=slider("step dt", 0.0, 2.0, value=1.0), rows=slider("rows", 1, 4)
    )
    taken = []
    for value in np.linspace(0.1, 1.9, 15):
        view.controls["dt"].value = value
        taken.append(view.seconds)
    assert 0 < statistics.median(taken) < BUDGET


def test_all_changes_of_an_update_leave_as_one_message() -> None:
    view = explore(curves(), decay, dt=slider("step dt", 0.0, 2.0))
    sent: list[dict] = []
    for channel in ("_py2js_update", "_py2js_restyle", "_py2js_relayout"):
        view.figure.observe(lambda change: sent.append(change["new"]), names=channel)
    view.controls["dt"].value = 1.5
    (message,) = [message for message in sent if message]
    assert len(message["style_traces"]) == len(view.figure.data)


def test_an_error_in_an_update_is_shown_and_at_the_start_it_is_raised() -> None:
    def breaks(fig: go.FigureWidget, dt: float) -> None:
        if dt > 1:
            raise RuntimeError("A <b> is not negative")

    view = explore(curves(), breaks, dt=slider("step dt", 0.0, 2.0))
    view.controls["dt"].value = 1.5
    assert "RuntimeError: A &lt;b&gt; is not negative" in view.words.value
    with pytest.raises(RuntimeError, match="not negative"):
        explore(curves(), breaks, dt=slider("step dt", 0.0, 2.0, value=2.0))


def test_a_live_figure_needs_a_text() -> None:
    assert alt_of(live(curves())) == WORDS
    with pytest.raises(ValueError, match="no alt text"):
        live(go.Figure())


def test_the_kind_of_slider_follows_from_the_range() -> None:
    assert isinstance(slider("n", 1, 8), ipywidgets.IntSlider)
    assert isinstance(slider("dt", 0, 1.5), ipywidgets.FloatSlider)
    steps = slider("t", 1, 1_000_000, value=1000, log=True)
    assert isinstance(steps, ipywidgets.FloatLogSlider)
    assert (steps.min, steps.max, steps.value) == (0, 6, 1000)
    assert steps.continuous_update


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(low=2, high=1), "low=2"),
        (dict(low=0, high=1, value=3), "value=3"),
        (dict(low=0, high=1, log=True), "log needs low above 0"),
        (dict(low=1, high=9, log=True, step=1), "takes no step"),
    ],
)
def test_an_impossible_slider_is_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slider("x", **arguments)


def reach(fig: go.FigureWidget, *, step: int) -> str:
    fig.data[0].y = TIME * step
    return f"token {step} of 24"


def test_a_stepper_goes_forward_and_back_and_stays_inside() -> None:
    view = stepper(curves(), reach, steps=24, label="token", start=22)
    assert "token 22 of 24" in view.words.value
    view.forward.click()
    view.forward.click()
    assert view.controls["step"].value == 23
    np.testing.assert_allclose(view.figure.data[0].y, TIME * 23)
    assert 'aria-live="polite">token 23' in view.words.value
    view.back.click()
    assert view.controls["step"].value == 22
    view.go(-100)
    assert view.controls["step"].value == 0


def test_a_stepper_can_be_played_and_names_its_parts() -> None:
    view = stepper(curves(), reach, steps=24, label="token")
    assert (view.clock.min, view.clock.max, view.clock.value) == (0, 23, 0)
    links = {(link.source, link.target) for link in view._links}
    assert links == {
        ((view.clock, "value"), (view.controls["step"], "value")),
        ((view.clock, "playing"), (view.play, "value")),
    }
    assert view.controls["step"].description == "token"
    assert (view.back.description, view.forward.description) == ("◀ Back", "Next ▶")
    assert view.play.description == "▶ Play"
    view.play.value = True
    assert view.play.description == "❚❚ Pause"
    row, figure, words = view.children
    assert row.children == (
        view.clock, view.play, view.back, view.forward, view.controls["step"],
    )  # fmt: skip
    assert (figure, words) == (view.figure, view.words)


FIRST = """
import sys
from tests.course.plotting.test_widgets import curves, live
live(curves())
import jsonschema
assert "rfc3987_syntax" not in sys.modules
import rfc3987_syntax
"""


def test_the_first_live_figure_does_not_wait_for_parsers_of_addresses() -> None:
    pytest.importorskip("rfc3987_syntax")
    subprocess.run([sys.executable, "-c", FIRST], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.timing
def test_a_step_is_faster_than_the_eye() -> None:
    def grow(fig: go.FigureWidget, *, step: int) -> None:
        decay(fig, dt=0.1 * (step + 1))

    view = stepper(curves(), grow, steps=24, label="token")
    taken = []
    for _ in range(15):
        view.forward.click()
        taken.append(view.seconds)
    assert 0 < statistics.median(taken) < BUDGET


@pytest.mark.parametrize("wrong", [dict(steps=1), dict(steps=4, start=4), dict(steps=4, start=-1)])
def test_an_impossible_stepper_is_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="two or more steps and a start"):
        stepper(curves(), reach, label="token", **wrong)
