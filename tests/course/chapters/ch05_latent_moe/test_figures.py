"""Figures of chapter 05: their numbers, marks and words, and how fast the sliders answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nemotron_lite.config import NemotronConfig
from nemotron_lite.course import exercises
from nemotron_lite.course.chapters.ch05_latent_moe import figures, lesson
from nemotron_lite.course.plotting import alt_of, theme
from nemotron_lite.course.plotting.widgets import BUDGET

STANDARD = lesson.Sizes(d=4096, latent=None, experts=128, top_k=6, f=2688)


@pytest.fixture(scope="module")
def step_costs() -> Any:
    return exercises.exercise("05.step_costs").build()


def test_arrows_are_as_wide_as_what_they_carry() -> None:
    fig = figures.layer(d=8, latent=4, top_k=2)
    arrows = [note for note in fig.layout.annotations if note.showarrow]
    wide = [note for note in arrows if note.name == "8 numbers"]
    narrow = [note for note in arrows if note.name == "4 numbers"]
    assert len(wide) + len(narrow) == len(arrows)
    assert {note.arrowwidth for note in wide} == {figures.WIDE}
    assert {note.arrowwidth for note in narrow} == {figures.NARROW}
    assert len(narrow) == 2 * 2 + 1  # there and back for each expert, and the sum to W_up
    assert len(wide) == 3 + 1 + 1 + 1  # x to three places, W_up, shared expert, y
    words = [note.text for note in fig.layout.annotations]
    for part in ("router", "W<sub>down</sub>", "expert 2", "W<sub>up</sub>", "shared expert"):
        assert part in words
    assert [trace.name for trace in fig.data] == ["d = 8 numbers", "l = 4 numbers"]
    assert {trace.line.dash for trace in fig.data} == {"solid"}  # as the arrows are
    assert "4 come back from each" in str(alt_of(fig))
    assert "expert 3" in [note.text for note in figures.layer(8, 4, 3).layout.annotations]


def test_the_first_values_are_on_a_step_of_their_sliders(step_costs: Any) -> None:
    controls = figures.walls_widget(step_costs, STANDARD).controls
    for name, value in {"tokens": 128, "memory": 3000, "link": 100}.items():
        control = controls[name]
        assert control.value == value
        steps = (np.log10(value) - control.min) / control.step
        assert steps == pytest.approx(round(steps), abs=1e-6)


def test_bars_are_the_weights_of_each_part() -> None:
    lite = NemotronConfig.from_preset("lite")
    layers = {"latent": lesson.weights_of_a_token(lite)}
    layers["plain"] = {"router": 9, "latent projections": 0, "experts": 20_000}
    fig = figures.token_weights(layers)
    assert [trace.name for trace in fig.data] == list(lesson.PARTS)
    for trace in fig.data:
        assert list(trace.x) == [layers[name][trace.name] for name in layers]
    assert list(fig.data[2].text) == ["98,304", "20,000"]
    assert fig.data[0].text[1] == ""  # too narrow for its number
    assert all(theme.contrast(theme.text_on(shade), shade) > 4.5 for shade in figures.SHADES)


def test_lines_are_the_times_of_the_learners_function(step_costs: Any) -> None:
    device = lesson.Device()
    fig = figures.walls(step_costs, STANDARD, 64, device)
    assert [trace.name for trace in fig.data] == list(figures.TIMES)
    for place in (0, 13, -1):
        tokens = int(figures.TOKENS[place])
        expected = device.microseconds(STANDARD.costs(step_costs, tokens))
        assert [trace.y[place] for trace in fig.data] == pytest.approx(list(expected))
    assert fig.layout.shapes[0].x0 == 64
    low, high = (10**end for end in fig.layout.yaxis.range)
    drawn = np.concatenate([np.asarray(trace.y, dtype=float) for trace in fig.data])
    assert low < drawn.min() < drawn.max() < high

    def twice(*sizes: Any) -> list[float]:
        return [2 * cost for cost in step_costs(*sizes)]

    doubled = figures.walls(twice, STANDARD, 64, device)
    np.testing.assert_allclose(doubled.data[1].y, 2 * np.asarray(fig.data[1].y))


@pytest.mark.timing
def test_the_walls_widget_redraws_in_time(step_costs: Any) -> None:
    widget = figures.walls_widget(step_costs, STANDARD)
    assert "The longest is reading weights." in widget.words.value
    before = np.asarray(widget.figure.data[2].y, dtype=float)
    widget.controls["ratio"].value = 4
    assert widget.seconds < BUDGET
    np.testing.assert_allclose(widget.figure.data[2].y, before / 4)
    assert widget.figure.layout.title.text.endswith("l = 1024")
    widget.controls["experts"].value = 512
    widget.controls["top_k"].value = 22
    assert widget.figure.layout.title.text.startswith("22 of 512 experts")
    widget.controls["tokens"].value = 8192
    assert "8,192 tokens: " in widget.words.value
    assert "The longest is exchange." in widget.words.value
    assert widget.figure.layout.shapes[0].x1 == 8192
    widget.controls["link"].value = 1000
    assert "The longest is arithmetic." in widget.words.value
    widget.controls["tokens"].value = 1
    assert "1 token: " in widget.words.value
    widget.controls["experts"].value = 8
    assert widget.figure.layout.title.text.startswith("8 of 8 experts")
    widget.controls["d"].value = 1024
    widget.controls["memory"].value = 300
    widget.controls["ratio"].value = 1
    assert widget.figure.layout.title.text.endswith("d = 1024, no latent space")


def test_bars_of_choices_have_their_digits() -> None:
    fig = figures.choices({"plain": (128, 6, 10), "α = 4": (512, 22, 39)})
    assert list(fig.data[0].y) == [10, 39]
    assert list(fig.data[0].x) == ["plain<br>6 of 128", "α = 4<br>22 of 512"]
    assert fig.layout.yaxis.range[1] > 39


def test_every_seed_is_a_circle_of_its_model() -> None:
    fig = figures.runs({"plain": [2.5, 2.6], "latent": [2.4, 2.45]})
    assert [list(trace.x) for trace in fig.data] == [[2.5, 2.6], [2.4, 2.45]]
    assert list(fig.data[1].y) == ["latent", "latent"]


def test_energy_has_both_lines_and_the_trained_mark() -> None:
    fig = figures.energy((16, 64, 256), [50.0, 80.0, 100.0], 20.0, 64)
    assert list(fig.data[0].y) == [50, 80, 100]
    assert list(fig.data[1].y) == [6.25, 25, 100]
    assert (fig.data[2].x[0], fig.data[2].y[0]) == (64, 20)
    assert theme.contrast(fig.data[2].marker.color, theme.PLOT) > 3


def test_cut_models_are_drawn_over_their_widths() -> None:
    fig = figures.narrower(
        64, (32, 16), {"most energy": [2.5, 2.6], "random": [2.7, 2.8]}, 2.4, 2.9
    )
    assert list(fig.data[0].x) == ["α = 2<br>l = 32", "α = 4<br>l = 16"]
    assert list(fig.data[1].y) == [2.7, 2.8]
    assert list(fig.data[2].y) == [2.4, 2.4]
    assert (fig.data[3].name, *fig.data[3].y) == ("without routed experts", 2.9, 2.9)
    assert len({trace.line.dash for trace in fig.data}) == 4


def test_every_figure_says_in_words_what_it_shows(step_costs: Any) -> None:
    parts = {"router": 1, "latent projections": 2, "experts": 3}
    drawn = [
        figures.token_weights({"plain": parts}), figures.choices({"plain": (8, 2, 2)}),
        figures.walls(step_costs, STANDARD, 1, lesson.Device()), figures.runs({"plain": [1.0]}),
        figures.energy((1, 2), [50.0, 100.0], 20.0, 1),
        figures.layer(8, 4, 2), figures.narrower(4, (2,), {"random": [1.0]}, 0.5, 2.0),
    ]  # fmt: skip
    assert all(len(str(alt_of(fig))) >= 40 for fig in drawn)
