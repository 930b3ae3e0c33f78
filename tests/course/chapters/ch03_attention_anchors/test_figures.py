"""Figures of chapter 03: their numbers, marks and words, and how fast the sliders answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemotron_lite import ledger, ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.chapters.ch03_attention_anchors import figures
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
def test_the_memory_widget_says_what_the_ledger_says() -> None:
    widget = figures.memory_widget(SUPER)
    assert "8 anchors" in widget.words.value
    assert "8,192 bytes a token" in widget.words.value
    assert "8.00 GiB" in widget.words.value
    widget.controls["key_heads"].value = 32
    assert widget.seconds < BUDGET
    assert "128.00 GiB" in widget.words.value
    assert widget.figure.data[0].y[-1] == 128.0
    widget.controls["tokens"].value = 2**15
    assert widget.figure.data[3].x == (32768,)
    assert widget.figure.data[3].y == (4.0,)
    widget.controls["anchors"].value = 0
    assert "0.00 GiB of keys" in widget.words.value


def test_memory_draws_the_ledgers_bytes() -> None:
    fig = figures.memory(SUPER)
    found = ledger.cache(SUPER, 2**20)
    anchors, states, everywhere = (trace.y[-1] * 2**30 for trace in fig.data)
    assert anchors == found.kv
    assert states == pytest.approx(found.conv + found.ssm)
    assert everywhere == found.kv * 11


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
        figures.crowding(), figures.memory(SUPER),
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
