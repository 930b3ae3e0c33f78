"""Figures of chapter 03: their numbers, marks and words, and how fast the sliders answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemotron_lite import ledger, ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course import removal
from nemotron_lite.course.chapters.ch03_attention_anchors import figures, lesson
from nemotron_lite.course.plotting import alt_of, theme
from nemotron_lite.course.plotting.widgets import BUDGET

SUPER = NemotronConfig.from_preset("super")


def test_the_state_of_the_figure_is_the_packages_scan() -> None:
    keys, values = (part[:6] for part in figures._pairs(4, seed=0))
    zeros = np.zeros((6, figures.VALUE_WIDTH))
    x, B, dt = (
        torch.tensor(np.concatenate(parts))[None]
        for parts in ((values, zeros), (keys, keys), (np.ones(6), np.zeros(6)))
    )
    A = torch.zeros(1, dtype=torch.float64)
    y, _ = ops.selective_scan(x[:, :, None], dt[..., None], A, B[:, :, None], B[:, :, None])
    read = y[0, 6:, 0].numpy() @ values.T / figures.VALUE_WIDTH
    np.testing.assert_allclose(figures.read_state(keys, values), read, atol=1e-12)


def test_the_cache_of_the_figure_is_the_packages_attention() -> None:
    keys, values = (part[:5] for part in figures._pairs(figures.VALUE_WIDTH, seed=1))
    q = torch.tensor(keys)[None, None] * figures.SHARPNESS * figures.VALUE_WIDTH**0.5
    k, v = (torch.tensor(part)[None, None] for part in (keys, values))
    y = ops.causal_attention(q[:, :, 4:], k, v, starts=4)
    read = y[0, 0, 0].numpy() @ values.T / figures.VALUE_WIDTH
    np.testing.assert_allclose(figures.read_cache(keys, values)[4], read, atol=1e-12)


def test_orthogonal_keys_do_not_disturb_each_other() -> None:
    values = figures._pairs(4, seed=0)[1][:4]
    read = figures.read_state(np.eye(4), values)
    np.testing.assert_allclose(read, values @ values.T / figures.VALUE_WIDTH)
    assert len(figures.mistakes(read)[0]) == 0


def right(pairs: int, n: int, name: str) -> float:
    """Share of right answers over five draws."""
    wrong = [len(figures.mistakes(figures._crowded(pairs, n, seed)[name])[0]) for seed in range(5)]
    return 1 - sum(wrong) / (5 * pairs)


def test_recall_falls_with_pairs_over_n_and_the_cache_keeps_all() -> None:
    for n in (8, 16, 32):
        assert right(n // 2, n, "Answers of the state") > 0.95
        assert 0.4 < right(2 * n, n, "Answers of the state") < 0.7
    assert right(64, 2, "Answers of the state") < 0.1
    assert right(64, 2, "Answers of the cache") == 1.0


def test_mistakes_are_where_another_answer_wins() -> None:
    read = np.array([[1.0, 0.2, 0.3], [0.4, 0.1, 0.9], [0.0, 0.0, 0.5]])
    rows, columns = figures.mistakes(read)
    assert (rows.tolist(), columns.tolist()) == ([1], [2])


@pytest.mark.timing
def test_the_crowding_widget_redraws_both_maps_in_time() -> None:
    widget = figures.crowding_widget(32, 8)
    before = np.array(widget.figure.data[0].z)
    widget.controls["n"].value = 64
    assert widget.seconds < BUDGET
    assert not np.array_equal(before, widget.figure.data[0].z)
    wrong = len(figures.mistakes(np.asarray(widget.figure.data[0].z))[0])
    assert wrong < len(figures.mistakes(before)[0])
    assert f"1,024 numbers, {32 - wrong} of 32 answers right" in widget.words.value
    widget.controls["pairs"].value = 64
    assert np.shape(widget.figure.data[0].z) == np.shape(widget.figure.data[2].z) == (64, 64)
    assert widget.figure.layout.xaxis2.range == (-0.5, 63.5)


@pytest.mark.timing
def test_the_memory_widget_moves_the_crossing() -> None:
    widget = figures.memory_widget(SUPER)
    assert "cross at 4,096 tokens" in widget.words.value
    assert "1,024 MiB" in widget.words.value
    widget.controls["key_heads"].value = 32
    assert widget.seconds < BUDGET
    assert "cross at 256 tokens" in widget.words.value
    assert widget.figure.data[0].y[-1] == 16 * 1024
    assert widget.figure.data[3].x == (256,)
    widget.controls["n"].value = 64
    assert "cross at 128 tokens" in widget.words.value
    assert set(widget.figure.data[1].y) == set(widget.figure.data[3].y) == {2.0}


def test_memory_draws_the_ledgers_bytes_of_one_layer() -> None:
    fig = figures.memory(SUPER)
    found = ledger.cache(SUPER, 2**20)
    shared, state, unshared = (trace.y[-1] * 2**20 for trace in fig.data[:3])
    assert shared == found.kv / 8
    assert state == found.ssm / 40
    assert unshared == 16 * shared


def test_the_crossings_lie_on_both_lines() -> None:
    """Where the marks stand, keys and values have as many bytes as the state."""
    config = SUPER.replace(num_key_value_heads=4, ssm_state_size=96)
    marks = figures.memory(config).data[3]
    for tokens, mebibytes, heads in zip(marks.x, marks.y, (4, 32), strict=True):
        layer = config.replace(pattern="*", num_key_value_heads=heads)
        assert ledger.cache(layer, tokens).kv / 2**20 == mebibytes


@pytest.fixture(scope="module")
def watched() -> lesson.Watched:
    return lesson.watch(removal.small_model("recall"), lesson.book(pairs=4, questions=2))


def test_the_stepper_fills_the_cache_token_by_token(watched: lesson.Watched) -> None:
    view = figures.filling_stepper(watched, start=3)
    keys = np.asarray(view.figure.data[0].z, dtype=float)
    assert (keys[:, :4] != 0).any(0).all()
    assert (keys[:, 4:] == 0).all()
    before = np.asarray(view.figure.data[2].z)
    view.go(1)
    assert view.seconds < BUDGET
    keys = np.asarray(view.figure.data[0].z, dtype=float)
    np.testing.assert_array_equal(keys[:, 4], watched.keys[4].numpy())
    assert (keys[:, 5:] == 0).all()
    bars = np.asarray(view.figure.data[1].y)
    assert bars.sum() == pytest.approx(1, abs=1e-5)
    assert np.count_nonzero(bars) == 5
    assert not np.array_equal(before, view.figure.data[2].z)
    best = int(bars.argmax())
    assert f"Token 4 is {watched.names[4]}." in view.words.value
    assert "160 numbers, and as many of values; the state still has 128" in view.words.value
    assert f"on token {best}, which is {watched.names[best]}" in view.words.value
    assert f"{100 * bars[best]:.0f} %" in view.words.value


def test_who_looks_where_leaves_out_what_is_not_seen() -> None:
    weights = torch.tensor([[[[1.0, 0.0], [0.4, 0.6]]]])
    (drawn,) = figures.who_looks_where({"only": weights}).data[:1]
    np.testing.assert_allclose(drawn.z, [[1.0, np.nan], [0.4, 0.6]], rtol=1e-6)


def test_key_heads_mark_the_head_that_is_read() -> None:
    fig = figures.key_heads({"repeat_interleave": (0, 0, 1, 1), "repeat": (0, 1, 0, 1)}, kv=2)
    assert fig.data[0].z.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]
    assert "repeat: query heads 0 to 3 read key heads 0 1 0 1" in str(alt_of(fig))
    with pytest.raises(ValueError, match="there are 0 to 1"):
        figures.key_heads({"broken": (0, 2)}, kv=2)


def test_recall_curves_are_in_percent_with_a_tick_for_each_number_of_pairs() -> None:
    fig = figures.recall_curves([4, 8], {"Mamba": [1.0, 0.25], "hybrid": [1.0, 1.0]})
    assert fig.data[0].y.tolist() == [100.0, 25.0]
    assert list(fig.layout.xaxis.ticktext) == ["4", "8"]


def test_marks_are_crosses_as_well_as_a_colour() -> None:
    fig = figures.crowding(32, 8)
    crosses = fig.data[1].marker
    assert crosses.symbol == "x"
    assert len(fig.data[1].x) > 5
    assert len(fig.data[3].x) == 0
    assert theme.contrast(crosses.color, theme.PLOT) > 3


def test_every_figure_says_in_words_what_it_shows() -> None:
    drawn = [
        figures.crowding(), figures.memory(SUPER), figures.losses({"a": [2.0], "b": [3.0]}),
        figures.shuffled({"*": 1e-6, "M": 1.0}), figures.two_orders({"a": 90.0, "b": 20.0}),
        figures.recall_curves([4, 8], {"a": [1, 1], "b": [1, 0]}),
        figures.key_heads({"in order": (0, 0, 1, 1)}, kv=2),
        figures.bars({"a": 1.0}, title="t", y_title="y", alt="One bar that stands for a. " * 2),
    ]  # fmt: skip
    assert all(len(str(alt_of(fig))) >= 40 for fig in drawn)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 64 pairs"):
        figures.crowding(65, 8)
    with pytest.raises(ValueError, match="expected panels for all"):
        figures.panels({"a": [[1.0]]}, title="t", alt="x" * 50, marks={"b": ([0], [0])})
    with pytest.raises(ValueError, match="40"):
        figures.bars({"a": 1.0}, title="t", y_title="y", alt="too short")
