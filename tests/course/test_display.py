"""The live view, the figure and the words; and bars that say something at rest."""

from __future__ import annotations

from collections.abc import Callable

import ipywidgets
import plotly.graph_objects as go
import pytest

from nemotron_lite.course import display, output, progress, progress_hook, show
from nemotron_lite.course.display import LIVE_CLASS, PLOTLY, WIDGET
from tests.course.conftest import Shown

ALT = "A line that rises from 1 to 3 as the length grows from 0 to 2 tokens."


def figure(alt: object = ALT, kind: type = go.Figure) -> go.Figure:
    fig = kind(go.Scatter(y=[1, 2, 3]))
    return fig.update_layout(meta={"alt": alt})


def test_a_figure_that_is_replaced_keeps_its_words(shown: Callable[..., Shown]) -> None:
    class Handle:
        """What IPython returns for an updatable output."""

        def __init__(self) -> None:
            self.bundles: list[dict] = []

        def update(self, bundle: dict, raw: bool) -> None:
            assert raw
            self.bundles.append(bundle)

    seen = shown(display.show_updating, figure())
    first, words = seen.bundles
    assert first["text/plain"] == ALT
    assert first[PLOTLY]["data"][0]["y"] == [1, 2, 3]
    assert ALT in words["text/html"]
    handle = Handle()
    output.update_output(handle, "words", more={PLOTLY: {"data": []}})
    assert handle.bundles == [{"text/plain": "words", PLOTLY: {"data": []}}]
    replaced = shown(seen.result, go.Figure(go.Scatter(y=[4])))
    box, new = replaced.bundles
    assert PLOTLY not in box, "it ends the renderer of the figure before"
    assert "height: 450px" in box["text/html"]
    assert box["text/plain"] == new["text/plain"] == ALT
    assert "text/html" not in new
    assert new[PLOTLY]["data"][0]["y"] == [4]


def test_a_terminal_says_the_words_of_such_a_figure_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    replace = display.show_updating(figure())
    replace(figure())
    assert capsys.readouterr().out == ALT + "\n"
    with pytest.raises(TypeError, match="show_updating got int"):
        display.show_updating(3)


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


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a kernel."""
    monkeypatch.setattr(output, "in_notebook", lambda: True)


@pytest.mark.usefixtures("notebook")
def test_below_a_widget_stands_what_is_seen_without_it(shown: Callable[..., Shown]) -> None:
    box = ipywidgets.VBox([ipywidgets.IntSlider()])
    live, rest, words = shown(show, box, figure()).bundles
    assert set(live) == {WIDGET, "text/plain"}
    assert live[WIDGET]["model_id"] == box.model_id
    assert LIVE_CLASS in box._dom_classes
    assert set(rest) == {PLOTLY, "text/plain"}
    assert rest["text/plain"] == ALT
    assert ALT in words["text/html"]


@pytest.mark.usefixtures("notebook")
def test_a_figure_widget_is_both(shown: Callable[..., Shown]) -> None:
    live, rest, _ = shown(show, figure(kind=go.FigureWidget)).bundles
    assert WIDGET in live
    assert set(rest) == {PLOTLY, "text/plain"}


def test_a_terminal_shows_no_widget(shown: Callable[..., Shown]) -> None:
    bundle, _ = shown(show, ipywidgets.VBox(), figure()).bundles
    assert bundle["text/plain"] == ALT


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


def test_a_terminal_has_a_bar_of_tqdm(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress([1, 2, 3], "training")) == [1, 2, 3]
    assert list(progress(iter("ab"), "reading", total=2)) == ["a", "b"]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "training: 100%" in printed.err


def test_the_hook_counts_log_records(capsys: pytest.CaptureFixture[str]) -> None:
    on_step = progress_hook(total=2)
    on_step({"ce": 1.5})
    on_step({"ce": 1.25, "step": 2})
    assert "loss 1.250" in capsys.readouterr().err


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch, notebook: None) -> list[tuple[str, str]]:
    """Text and HTML of every state of a bar in a notebook."""
    states: list[tuple[str, str]] = []

    def show_output(plain: str, rich: str, *, updatable: bool) -> object:
        assert updatable
        states.append((plain, rich))
        return states

    monkeypatch.setattr(output, "show_output", show_output)
    monkeypatch.setattr(display, "_at_end_of_cell", lambda call: None)
    monkeypatch.setattr(output, "update_output", lambda _, *forms: states.append(forms))
    return states


def test_a_bar_is_one_line_whose_text_stays(drawn: list[tuple[str, str]]) -> None:
    assert list(progress(range(3), "a < b")) == [0, 1, 2]
    assert {plain for plain, _ in drawn} == {"a < b: 3 steps"}
    first, last = drawn[0][1], drawn[-1][1]
    assert 'aria-label="a &lt; b" value="0" max="3"' in first
    assert 'value="3" max="3"' in last
    assert "3 steps, done" in last


def test_a_loop_that_is_left_early_says_so(drawn: list[tuple[str, str]]) -> None:
    steps = progress(range(1000), "training")
    assert (next(steps), next(steps)) == (0, 1)
    steps.close()
    assert drawn[-1][0] == "training: 1,000 steps"
    assert "Cut short after 1 of 1,000 steps." in drawn[-1][1]
    assert "Cut short" not in drawn[0][1]


def test_a_bar_is_drawn_five_times_a_second_at_most(drawn: list[tuple[str, str]]) -> None:
    list(progress(range(20_000), "training"))
    assert len(drawn) < 12


def test_a_bar_that_hides_the_time(drawn: list[tuple[str, str]]) -> None:
    list(progress(range(3), "training", timed=False))
    assert "3 steps, done</div>" in drawn[-1][1].replace(" · ", "").replace("\n", "")
    list(progress(range(3), "training"))
    assert "3 steps, done · " in drawn[-1][1]


def test_a_bar_without_a_total(drawn: list[tuple[str, str]]) -> None:
    list(progress(iter("ab"), "reading"))
    assert {plain for plain, _ in drawn} == {"reading"}
    assert "value" not in drawn[0][1]
    assert "2 steps, done" in drawn[-1][1]


def test_the_hook_closes_its_bar(drawn: list[tuple[str, str]]) -> None:
    on_step = progress_hook("tuning", total=2)
    on_step({"ce": 1.5})
    on_step({"ce": 1.25, "step": 2})
    assert drawn[-1][0] == "tuning: 2 steps"
    assert "loss 1.250" in drawn[-1][1]
    assert "done" in drawn[-1][1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (12.3, "12 s"), (185.2, "3 min 05 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert display._duration(seconds) == text
