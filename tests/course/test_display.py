"""One bundle: the live view, the figure, and the words; and bars that say something at rest."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets
import plotly.graph_objects as go
import pytest

from nemotron_lite.course import progress, progress_hook, show
from nemotron_lite.course.display import PLOTLY, WIDGET
from tests.course.conftest import Shown

ALT = "A line that rises from 1 to 3 as the length grows from 0 to 2 tokens."


def figure(alt: object = ALT, kind: type = go.Figure) -> go.Figure:
    fig = kind(go.Scatter(y=[1, 2, 3]))
    return fig.update_layout(meta={"alt": alt})


def test_a_figure_is_json_and_words(shown: Callable[..., Shown]) -> None:
    bundle, _ = shown(show, figure()).bundles
    assert set(bundle) == {PLOTLY, "text/plain"}
    assert bundle["text/plain"] == ALT
    assert bundle[PLOTLY]["data"][0]["type"] == "scatter"


def test_the_words_can_be_opened_below_the_figure(shown: Callable[..., Shown]) -> None:
    """JupyterLab draws a bundle's richest form alone; the words need one of their own."""
    alt = "A fade & a gain: where z < 1 the first lies <b>below</b> the second."
    _, words = shown(show, figure(alt)).bundles
    assert words["text/html"] == (
        "<details><summary>The figure in words</summary>"
        "A fade &amp; a gain: where z &lt; 1 the first lies &lt;b&gt;below&lt;/b&gt; the second."
        "</details>"
    )
    assert words["text/plain"] == "The figure in words"


def test_a_terminal_shows_the_alt_text_once(capsys: pytest.CaptureFixture[str]) -> None:
    show(figure())
    assert capsys.readouterr().out == ALT + "\n"


def test_a_widget_comes_with_its_figure(shown: Callable[..., Shown]) -> None:
    box = ipywidgets.VBox([ipywidgets.IntSlider()])
    bundle, _ = shown(show, box, figure()).bundles
    assert set(bundle) == {WIDGET, PLOTLY, "text/plain"}
    assert bundle[WIDGET]["model_id"] == box.model_id


def test_a_figure_widget_is_both(shown: Callable[..., Shown]) -> None:
    bundle, _ = shown(show, figure(kind=go.FigureWidget)).bundles
    assert set(bundle) == {WIDGET, PLOTLY, "text/plain"}


@pytest.mark.parametrize("alt", [None, "", "A plot of the thing."])
def test_a_figure_without_alt_text_is_refused(alt: object) -> None:
    with pytest.raises(ValueError, match="expected at least 40 characters"):
        show(figure(alt))
    with pytest.raises(ValueError, match="alt text is ''"):
        show(go.Figure())


def test_other_things_are_refused() -> None:
    with pytest.raises(TypeError, match="last argument is a VBox"):
        show(figure(), ipywidgets.VBox())
    with pytest.raises(TypeError, match="first argument is a int"):
        show(3, figure())
    with pytest.raises(TypeError, match="got 3 arguments"):
        show(1, 2, 3)


def test_a_bar_gives_back_what_it_was_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2, 3], "training")) == [1, 2, 3]
    assert list(progress(iter("ab"), "reading", total=2)) == ["a", "b"]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "training: 100%" in printed.err


def test_a_bar_closes_when_the_loop_is_left() -> None:
    steps = progress(range(3), "training")
    assert next(steps) == 0
    steps.close()


def test_the_hook_counts_log_records(capsys: pytest.CaptureFixture[str]) -> None:
    on_step = progress_hook(total=2)
    on_step({"ce": 1.5})
    on_step({"ce": 1.25, "step": 2})
    assert "loss 1.250" in capsys.readouterr().err
