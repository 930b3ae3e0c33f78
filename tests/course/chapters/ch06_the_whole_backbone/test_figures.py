"""Figures of chapter 06: their numbers and words, and how fast the sliders answer."""

from __future__ import annotations

import numpy as np
import pytest

from nemotron_lite import NemotronConfig, ledger
from nemotron_lite.course.chapters.ch06_the_whole_backbone import figures
from nemotron_lite.course.chapters.ch06_the_whole_backbone.lesson import HEAD, Added, Work
from nemotron_lite.course.plotting import alt_of, theme
from nemotron_lite.course.plotting.widgets import BUDGET

LAYERS = [Added("", 0.1, 0.1), Added("M", 5.0, 5.0), Added("E", 0.5, 5.2), Added("*", 2.0, 6.0)]
SUPER = NemotronConfig.from_preset("super").replace(mtp_pattern="", mtp_depths=0)
PARTS = {
    "M": Work(0.05, 1, 1, 1, 1), "E": Work(0.06, 1, 1, 1, 1),
    "*": Work(0.02, 1, 1, 1, 1), HEAD: Work(0.3, 1, 1, 1, 1),
}  # fmt: skip
ESTIMATED = {"M": 0.04, "E": 0.07, "*": 0.01, HEAD: 0.2}


def test_the_stream_is_drawn_up_to_a_layer() -> None:
    fig = figures.stream(LAYERS, 1)
    assert list(fig.data[0].y) == [0.1, 5.0, 5.2, None]
    assert list(fig.data[1].y) == [0.1, 5.0, 0.5, 2.0]
    colours = list(fig.data[1].marker.color)
    assert colours[1:] == [theme.KINDS["M"].strong, theme.KINDS["E"].strong, figures.AHEAD]
    assert list(fig.layout.xaxis2.ticktext) == ["Emb", "M", "E", "*"]
    assert "rises from layer to layer. " in str(alt_of(fig))
    falling = figures.stream([*LAYERS, Added("*", 4.0, 5.5)], 1)
    assert "to layer, except behind layer 3, where it falls." in str(alt_of(falling))


@pytest.mark.timing
def test_the_stepper_says_what_a_layer_adds() -> None:
    view = figures.stream_stepper(LAYERS, start=0)
    assert "Layer 0 is M, Mamba-2. The stream has size 0.10;" in view.words.value
    assert "adds a vector of size 5.00; behind it the stream has 5.00." in view.words.value
    view.go(1)
    view.go(1)
    assert view.seconds < BUDGET
    assert "Layer 2 is *, attention. The stream has size 5.20;" in view.words.value
    assert list(view.figure.data[0].y) == [0.1, 5.0, 5.2, 6.0]
    assert view.figure.data[1].marker.color[3] == theme.KINDS["*"].strong
    view.go(1)
    assert view.controls["step"].value == 2


def test_grown_draws_the_stream_behind_each_layer() -> None:
    fig = figures.grown({"divided": LAYERS, "not divided": LAYERS[:2]})
    assert [trace.name for trace in fig.data] == ["divided", "not divided"]
    np.testing.assert_allclose(list(fig.data[0].y), [1, 50, 52, 60])
    assert list(fig.data[1].x) == [0, 1]
    assert fig.layout.yaxis.type == "log"


@pytest.mark.timing
def test_the_running_total_ends_with_the_whole_model() -> None:
    widget = figures.running_total_widget(SUPER)
    counted = ledger.parameters(SUPER)
    words = widget.words.value
    assert f"{counted.backbone:,} parameters, of which {counted.active:,} are active" in words
    widget.controls["layers"].value = 0
    assert widget.seconds < BUDGET
    assert (
        "So far 0 parameters, 0 active. The next layer is 0, M: 109,640,064" in widget.words.value
    )
    pale = {colour for trace in widget.figure.data for colour in trace.marker.color}
    assert pale == {theme.KINDS[kind].pale for kind in "ME*"}
    widget.controls["layers"].value = 8
    first = counted.layers[:8]
    assert f"So far {sum(int(layer.total) for layer in first):,} parameters" in widget.words.value
    assert "The next layer is 8, E" in widget.words.value
    filled = sum(
        colour == theme.KINDS[kind].strong
        for trace, kind in zip(widget.figure.data, "ME*", strict=True)
        for colour in trace.marker.color
    )
    assert filled == 8
    title = (
        f"8 layers, without embedding and head: {sum(layer.total for layer in first) / 1e9:.1f} "
    )
    title += "billion parameters"
    assert widget.figure.layout.title.text.startswith(title)


def test_the_static_map_is_that_of_the_widget() -> None:
    fig = figures.running_total(SUPER, 8)
    widget = figures.running_total_widget(SUPER)
    widget.controls["layers"].value = 8
    assert fig.layout.title.text == widget.figure.layout.title.text
    for one, other in zip(fig.data, widget.figure.data, strict=True):
        assert list(one.marker.color) == list(other.marker.color)
        assert list(one.insidetextfont.color) == list(other.insidetextfont.color)


def test_times_are_those_of_all_layers_of_a_kind() -> None:
    fig = figures.time_of_a_token("MEM*E", PARTS, ESTIMATED)
    assert [trace.name for trace in fig.data] == [
        "2 × Mamba-2", "2 × LatentMoE", "1 × attention", "head"
    ]  # fmt: skip
    drawn = np.array([trace.x for trace in fig.data])
    np.testing.assert_allclose(drawn, [[0.08, 0.1], [0.14, 0.12], [0.01, 0.02], [0.2, 0.3]])
    assert list(fig.data[0].y) == ["estimated", figures.TIMED]


def test_lost_additions_are_in_percent() -> None:
    fig = figures.lost("ME", [0.01, 0.05])
    assert list(fig.data[0].y) == [1, 5]
    assert list(fig.layout.xaxis.ticktext) == ["M", "E"]


def test_every_figure_says_in_words_what_it_shows() -> None:
    drawn = [
        figures.stream(LAYERS, 0), figures.grown({"a": LAYERS}), figures.running_total(SUPER, 3),
        figures.time_of_a_token("ME*", PARTS, ESTIMATED), figures.lost("ME", [0.0, 0.1]),
    ]  # fmt: skip
    assert all(len(str(alt_of(fig))) >= 40 for fig in drawn)
