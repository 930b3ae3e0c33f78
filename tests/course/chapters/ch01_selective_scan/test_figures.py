"""Figures of chapter 01: they draw the scan, their plans are scans, the sliders answer."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nemotron_lite.course.chapters.ch01_selective_scan import figures
from nemotron_lite.course.plotting import alt_of, theme
from nemotron_lite.course.plotting.widgets import BUDGET


def test_the_state_of_the_figure_is_the_recurrence() -> None:
    x, dt, A = [0.0, 2.0, 0.0, 1.0, 0.5], [1.0, 0.5, 0.0, 2.0, 0.1], -0.7
    state = first = 0.0
    found = figures.follow(x, dt, A)
    for t in range(5):
        fade = np.exp(dt[t] * A)
        state = fade * state + dt[t] * x[t]
        first = fade * first + (dt[t] * x[t] if t == 1 else 0.0)
        assert found.fade[t] == pytest.approx(fade)
        assert found.state[t] == pytest.approx(state)
        assert found.first[t] == pytest.approx(first)


def test_there_must_be_something_to_follow() -> None:
    with pytest.raises(ValueError, match="every x is zero"):
        figures.follow([0.0, 0.0], [1.0, 1.0], -1.0)


def combine(
    earlier: tuple[tuple[int, ...], int, int], later: tuple[tuple[int, ...], int, int]
) -> tuple[tuple[int, ...], int, int]:
    """Two spans as one: which entries it holds in order, its fade and its write."""
    return earlier[0] + later[0], earlier[1] * later[1], later[1] * earlier[2] + later[2]


@pytest.mark.parametrize("t", [1, 2, 8, 64])
@pytest.mark.parametrize("kind", figures.KINDS)
def test_every_plan_gives_each_entry_all_before_it_in_order(kind: str, t: int) -> None:
    spans = [((i,), i % 3, i + 1) for i in range(t)]
    for pairs in figures.scan_rounds(kind, t):
        assert len({later for _, later in pairs}) == len(pairs)
        before = list(spans)
        for earlier, later in pairs:
            spans[later] = combine(before[earlier], before[later])
    expected = list(itertools.accumulate([((i,), i % 3, i + 1) for i in range(t)], combine))
    assert spans == expected


def test_what_the_plans_cost() -> None:
    size = {kind: [len(pairs) for pairs in figures.scan_rounds(kind, 64)] for kind in figures.KINDS}
    assert (len(size["one by one"]), sum(size["one by one"])) == (63, 63)
    assert (len(size["doubling"]), sum(size["doubling"])) == (6, 6 * 64 - 63)
    assert (len(size["tree"]), sum(size["tree"])) == (11, 2 * 64 - 2 - 6)


@pytest.mark.parametrize("t", [0, 12])
def test_plans_need_a_power_of_two(t: int) -> None:
    with pytest.raises(ValueError, match=f"t is {t}"):
        figures.scan_rounds("tree", t)


def test_an_unknown_plan_names_the_known() -> None:
    with pytest.raises(ValueError, match="one by one, doubling, tree"):
        figures.scan_rounds("bush", 8)


def test_the_rules_are_those_of_the_exercise() -> None:
    fig = figures.two_rules([0.1, 1.0, 2.0])
    drawn = {trace.name: np.asarray(trace.y) for trace in fig.data}
    np.testing.assert_allclose(drawn["exact: exp(dt A)"], np.exp([-0.1, -1.0, -2.0]))
    np.testing.assert_allclose(drawn["Euler: 1 + dt A"], [0.9, 0.0, -1.0], atol=1e-12)
    np.testing.assert_allclose(drawn["exact: zero-order hold"][1], 1 - np.exp(-1.0))
    np.testing.assert_allclose(drawn["Mamba: gain = dt"], 1.0)


def test_costs_draw_the_plans() -> None:
    fig = figures.costs([8, 16])
    assert [list(trace.y) for trace in fig.data if trace.name == "tree"] == [[5, 7], [11, 26]]


def test_wiring_draws_one_line_for_each_combination() -> None:
    fig = figures.wiring(8)
    assert sum(trace.mode == "lines" for trace in fig.data) == 7 + 17 + 11


def test_step_sizes_need_a_column_for_each_token() -> None:
    with pytest.raises(ValueError, match="expected heads x 3 tokens"):
        figures.chosen_steps(". A B", np.ones((2, 4)))
    fig = figures.chosen_steps(". A B", np.ones((2, 3)))
    assert list(fig.layout.xaxis.ticktext) == [".", "A", "B"]


def test_half_lives_come_longest_first() -> None:
    fig = figures.half_lives([torch.tensor([3.0, 9.0, 1.0]), torch.tensor([2.0])])
    assert list(fig.data[0].y) == [9.0, 3.0, 1.0]
    assert [trace.name for trace in fig.data] == ["Mamba-2 layer 1", "Mamba-2 layer 2"]


def test_learning_keeps_the_rows_and_the_order() -> None:
    fig = figures.learning([0, 25], {"selective": [0.0, 97.0], "time-invariant": [0.0, 20.0]})
    assert [trace.name for trace in fig.data] == ["selective", "time-invariant"]
    assert list(fig.data[0].y) == [0.0, 97.0]
    assert "97" not in alt_of(fig)


def test_speed_is_per_token() -> None:
    fig = figures.speed([10, 100], {"loop": [1e-3, 1e-2], "parallel": [1e-4, 1e-4]})
    assert [list(trace.y) for trace in fig.data] == [[100.0, 100.0], [10.0, 1.0]]


def test_losses_of_a_shorter_run_cut_the_other() -> None:
    fig = figures.losses({"one": [3.0, 2.0, 1.0], "other": [3.0, 2.5]})
    assert [list(trace.y) for trace in fig.data] == [[3.0, 2.0], [3.0, 2.5]]
    assert list(fig.data[0].x) == [1, 2]


def test_doubling_labels_the_span_of_each_entry() -> None:
    fig = figures.doubling(8)
    labels = [list(trace.text) for trace in fig.data if trace.mode == "markers+text"]
    assert len(labels) == 4
    assert labels[1] == ["0", "0-1", "1-2", "2-3", "3-4", "4-5", "5-6", "6-7"]
    assert labels[3] == ["0", *(f"0-{i}" for i in range(1, 8))]
    assert sum(trace.mode == "lines" for trace in fig.data) == 7 + 6 + 4


def test_the_states_of_the_stepper_are_a_scan() -> None:
    found = figures.states_of()
    state = np.zeros((4, 3))
    for i in range(len(found.tokens)):
        fade = np.exp(found.dt[i] * figures.RATE)
        state = fade * state + found.dt[i] * np.outer(found.x[i], found.B[i])
        assert found.fade[i] == pytest.approx(fade)
        np.testing.assert_allclose(found.state[i], state)
        np.testing.assert_allclose(found.y[i], state @ found.C[i])


def test_the_questions_of_the_stepper_find_the_letters_in_order() -> None:
    found = figures.states_of()
    answers = [
        figures.LETTERS[int(y.argmax())]
        for token, y in zip(found.tokens, found.y, strict=True)
        if token == "?"
    ]
    assert answers == [token for token in found.tokens if token in figures.LETTERS]


def test_the_stepper_draws_the_token_it_stands_on() -> None:
    view, still = figures.state_stepper()
    found = figures.states_of()
    start = found.tokens.index("F")
    np.testing.assert_allclose(still.data[3].z, found.state[start])
    for i in (0, start, len(found.tokens) - 1):
        view.controls["step"].value = i
        np.testing.assert_allclose(view.figure.data[3].z, found.state[i])
        np.testing.assert_allclose(np.ravel(view.figure.data[4].z), found.y[i])
        assert view.figure.layout.title.text.startswith(f"Token {i}:")
        colours = view.figure.data[0].marker.color
        assert [k for k, c in enumerate(colours) if c != colours[(i + 1) % len(colours)]] == [i]
        band = view.figure.layout.shapes[0]
        assert (band.x0, band.x1) == (i - 0.5, i + 0.5)
    assert "the largest of y is F" in view.words.value


def test_the_sentences_say_what_a_token_does() -> None:
    found = figures.states_of()
    said = {token: figures.in_words(found, i) for i, token in enumerate(found.tokens)}
    assert "100% of the state is kept and nothing is written" in said["."]
    assert "90% of the state is kept, and G is written along direction 0" in said["G"]
    assert "a little noise" in said["~"]


def test_every_figure_has_a_text_and_the_theme() -> None:
    for fig in (
        figures.wiring(4),
        figures.doubling(4),
        figures.state_figure(0),
        figures.half_lives([[1.0]]),
        figures.costs([8]),
        figures.two_rules([1.0]),
        figures.explorer()[1],
    ):
        assert len(alt_of(fig) or "") >= 40
        assert fig.layout.paper_bgcolor in (None, theme.CARD)


@pytest.mark.timing
def test_the_explorer_follows_its_sliders_in_time() -> None:
    view, still = figures.explorer()
    before = np.asarray(view.figure.data[2].y).copy()
    np.testing.assert_allclose(before, np.asarray(still.data[2].y))
    for name, value in dict(dt=1.5, A=-2.0, place=30, noise=0.2).items():
        view.controls[name].value = value
        assert view.seconds < BUDGET, name
        after = np.asarray(view.figure.data[2].y).copy()
        assert not np.allclose(after, before), name
        before = after
    expected = figures.follow(np.asarray(view.figure.data[0].y), np.full(figures.TOKENS, 1.5), -2.0)
    np.testing.assert_allclose(before, expected.state)


def test_a_selective_explorer_holds_its_first_input_until_the_second() -> None:
    view, _ = figures.explorer()
    view.controls["noise"].value = 0.4
    view.controls["waits"].value = True
    first = np.asarray(view.figure.data[3].y)
    assert np.ptp(first[4:20]) == pytest.approx(0.0)
    assert first[20] < first[19]
    assert "90.5%" in view.words.value  # exp(0.25 * -0.4), the one step that lets it fade
