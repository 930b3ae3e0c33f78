"""Figures of chapter 04: their numbers, marks and words, and how fast the sliders answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemotron_lite.course.chapters.ch04_mixture_of_experts import figures, lesson
from nemotron_lite.course.plotting import alt_of, theme
from nemotron_lite.course.plotting.widgets import BUDGET


@pytest.fixture
def looked() -> lesson.Looked:
    """Three tokens and five experts; expert 4 is chosen because of its bias."""
    scores = torch.tensor(
        [[0.9, 0.8, 0.3, 0.2, 0.1], [0.1, 0.7, 0.6, 0.2, 0.3], [0.2, 0.4, 0.9, 0.8, 0.1]]
    )
    bias = torch.tensor([2.0, 2.0, 2.0, 2.0, 2.75])
    indices = (scores + bias).topk(2).indices
    chosen = torch.zeros(3, 5, dtype=torch.bool).scatter(1, indices, True)
    weights = scores * chosen
    weights = 2.5 * weights / weights.sum(1, keepdim=True)
    return lesson.Looked(["def", "␣f", "("], scores, bias, chosen, weights)


def test_the_map_has_a_weight_where_an_expert_reads(looked: lesson.Looked) -> None:
    fig = figures.who_reads(looked, "title")
    drawn = np.asarray(fig.data[0].z)
    np.testing.assert_array_equal(drawn > 0, looked.chosen.numpy())
    np.testing.assert_allclose(drawn.sum(1), 2.5, rtol=1e-6)
    assert list(fig.layout.yaxis.ticktext) == looked.names
    assert "In each row 2 cells are coloured" in str(alt_of(fig))


def test_bars_of_a_token_are_scores_biased_scores_and_weights(looked: lesson.Looked) -> None:
    fig = figures.routing(looked, 0)
    heights = [np.asarray(trace.y, dtype=float) for trace in fig.data]
    np.testing.assert_allclose(heights[0], looked.scores[0])
    np.testing.assert_allclose(heights[1] - heights[0], looked.bias - 2, atol=1e-6)
    np.testing.assert_allclose(heights[2], looked.weights[0])
    marked = [[colour == figures.CHOSEN for colour in trace.marker.color] for trace in fig.data]
    assert marked == [[True, False, False, False, False]] * 3
    assert [trace.marker.color[4] for trace in fig.data] == [figures.BY_BIAS] * 3
    assert "another colour: 4." in str(alt_of(fig))


@pytest.mark.timing
def test_the_stepper_goes_from_token_to_token(looked: lesson.Looked) -> None:
    view = figures.routing_stepper(looked, start=0)
    words = "Token 0 is def. Experts 0, 4 compute it. Chosen only because of their bias: 4."
    assert words in view.words.value
    view.go(1)
    assert view.seconds < BUDGET
    assert "Token 1 is ␣f. Experts 1, 4 compute it." in view.words.value
    view.go(1)
    assert "Experts 2, 4 compute it. Chosen only because of their bias: 4." in view.words.value
    assert "add up to 2.50" in view.words.value
    np.testing.assert_allclose(view.figure.data[0].y, looked.scores[2])
    assert view.figure.data[1].marker.color[2] == figures.CHOSEN


def test_the_chosen_bars_differ_from_the_others() -> None:
    assert theme.contrast(figures.CHOSEN, theme.PLOT) > 4.5
    assert theme.contrast(figures.CHOSEN, figures.IDLE) > 3
    assert theme.contrast(figures.BY_BIAS, theme.PLOT) > 3


def test_the_share_of_experts_read_is_that_of_a_simulation() -> None:
    generator = torch.Generator().manual_seed(0)
    for experts, top_k, tokens in ((64, 6, 1), (64, 6, 10), (512, 22, 32)):
        found = 100 * lesson.distinct(experts, top_k, tokens, generator)
        expected = figures.share_read(experts, top_k, [tokens])[0]
        assert found == pytest.approx(expected, abs=2)
    assert figures.share_read(512, 22, [1])[0] == pytest.approx(100 * 22 / 512)


@pytest.mark.timing
def test_the_reading_widget_redraws_in_time() -> None:
    widget = figures.reading_widget(512, 22)
    assert "1 token 4 %" in widget.words.value
    widget.controls["experts"].value = 128
    assert widget.seconds < BUDGET
    widget.controls["top_k"].value = 6
    assert "6 of 128 experts each. Read in one step: 1 token 5 %" in widget.words.value
    assert widget.figure.data[0].y[0] == pytest.approx(100 * 6 / 128)
    assert widget.figure.layout.title.text.startswith("128 experts, 6 for each token")
    widget.controls["experts"].value = 8
    widget.controls["top_k"].value = 32
    assert "8 of 8 experts each" in widget.words.value


def test_lines_are_means_of_neighbouring_updates() -> None:
    values = np.arange(25.0)
    fig = figures.violations({"no balancing": values, "bias": values / 2})
    assert list(fig.data[0].y) == [4.5, 14.5]
    assert list(fig.data[1].x) == [10, 20]


def test_zeros_are_in_percent() -> None:
    fig = figures.zeros({"layer 1": 0.5, "layer 3": 0.75})
    assert list(fig.data[0].y) == [50, 75]
    assert list(fig.data[0].text) == ["50", "75"]


def test_every_device_has_its_marks() -> None:
    fig = figures.drifted(torch.tensor([[0.5, -0.5, 0.0], [-0.5, 0.5, 0.0]]))
    assert [trace.name for trace in fig.data] == ["device 0", "device 1"]
    assert list(fig.data[1].y) == [-0.5, 0.5, 0.0]


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 8 chosen"):
        figures.reading(8, 9)
    with pytest.raises(ValueError, match="expected at least 10"):
        figures.violations({"a": np.ones(9)})


def test_every_figure_says_in_words_what_it_shows(looked: lesson.Looked) -> None:
    drawn = [
        figures.who_reads(looked, "t"), figures.routing(looked, 0), figures.zeros({"layer 1": 0.5}),
        figures.violations({"a": np.ones(10)}),
        figures.drifted(torch.zeros(2, 3)), figures.reading(64, 6),
    ]  # fmt: skip
    assert all(len(str(alt_of(fig))) >= 40 for fig in drawn)
