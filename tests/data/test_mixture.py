"""Mixtures: the shares of the weights, every window once in an epoch, the same batch each time."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_lite.data import BatchSource, ConcatenatedDocuments, Mixture, Phase

FIRST = {"a": 0.62, "b": 0.38, "c": 0.0}
SECOND = {"a": 0.1, "b": 0.2, "c": 0.7}


def text(number: int, size: int) -> ConcatenatedDocuments:
    """Tokens that say in which text they are and where."""
    tokens = np.arange(size, dtype=np.int32) + number * 100_000
    return ConcatenatedDocuments(tokens, np.array([0, size // 3, size // 2]))


def mixture(batches: int = 100, phases: tuple[Phase, ...] | None = None) -> Mixture:
    phases = phases or (Phase("one", 0.0, FIRST), Phase("two", 0.8, SECOND))
    sizes = {"a": 2_000, "b": 1_231, "c": 700}
    return Mixture({name: text(i, n) for i, (name, n) in enumerate(sizes.items())}, phases, batches)


def rows(source: Mixture, first: int, last: int, **kind: int) -> list[list[int]]:
    return [r for i in range(first, last) for r in source.batch(i, **kind).tokens.tolist()]


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_shares_are_those_of_the_phase(batch_size: int) -> None:
    source = mixture(batches=5_000 // batch_size)
    kind = dict(batch_size=batch_size, seq_len=16, seed=3)
    change = source.phase_starts[1]
    for first, last, weights in ((0, change, FIRST), (change, source.batches, SECOND)):
        drawn = Counter("abc"[row[0] // 100_000] for row in rows(source, first, last, **kind))
        total = drawn.total()
        for name, weight in weights.items():
            assert abs(drawn[name] / total - weight) < 0.02, (name, drawn)
    assert "c" not in {"abc"[row[0] // 100_000] for row in rows(source, 0, change, **kind)}
    assert source.phase_of(change - 1).name == "one"
    assert source.phase_of(change).name == "two"
    assert source.phase_of(10**9).name == "two"


@given(
    batch_size=st.integers(1, 9),
    seq_len=st.sampled_from([3, 16, 50]),
    seed=st.integers(0, 2**128 - 1),
    start=st.sampled_from([0.3, 0.77]),
)
@settings(max_examples=25, deadline=None)
def test_every_window_is_read_once_before_one_is_read_again(
    batch_size: int, seq_len: int, seed: int, start: float
) -> None:
    source = mixture(batches=300, phases=(Phase("1", 0, FIRST), Phase("2", start, SECOND)))
    read: dict[int, list[int]] = {}
    for row in rows(source, 0, 300, batch_size=batch_size, seq_len=seq_len, seed=seed):
        assert row == list(range(row[0], row[0] + seq_len))  # a piece of one text
        read.setdefault(row[0] // 100_000, []).append(row[0])
    for which, starts in read.items():
        windows = (len(source.sources["abc"[which]]) + 1) // seq_len - 1
        for first in range(0, len(starts), windows):
            epoch = sorted(starts[first : first + windows])
            assert all(b - a >= seq_len for a, b in pairwise(epoch))
            if len(epoch) == windows:
                assert epoch[-1] - epoch[0] == seq_len * (windows - 1)
        if len(starts) >= 2 * windows > 40:  # another order in the second epoch
            assert starts[:windows] != starts[windows : 2 * windows]


def test_a_batch_depends_on_its_number_and_the_seed_alone() -> None:
    kind = dict(batch_size=6, seq_len=32)
    whole = mixture()
    in_order = [whole.batch(i, seed=1, **kind) for i in range(100)]
    for i in (99, 81, 3, 80, 0, 79):
        again = mixture().batch(np.int64(i), seed=1, **kind)
        assert torch.equal(again.tokens, in_order[i].tokens)
        assert torch.equal(again.seq_idx, in_order[i].seq_idx)
        assert not torch.equal(mixture().batch(i, seed=2, **kind).tokens, again.tokens)
    assert isinstance(whole, BatchSource)
    assert in_order[0].tokens.dtype == torch.int64
    assert in_order[0].seq_idx.dtype == torch.int32


def test_documents_in_a_window_are_numbered() -> None:
    source = mixture()
    for i in range(40):
        batch = source.batch(i, batch_size=4, seq_len=90, seed=0)
        for row, seq_idx in zip(batch.tokens.tolist(), batch.seq_idx.tolist(), strict=True):
            starts = source.sources["abc"[row[0] // 100_000]].starts.tolist()
            document = [sum(s <= token % 100_000 for s in starts) for token in row]
            assert seq_idx == [d - document[0] for d in document]


def test_far_batches_and_the_end_of_the_last_phase() -> None:
    source = mixture(batches=2)
    for index in (2, 10**6, 2**63, 2**64 - 1):
        batch = source.batch(index, batch_size=3, seq_len=8, seed=2**128 - 1)
        assert batch.tokens.shape == (3, 8)
    alone = Mixture({"a": text(0, 31)}, (Phase("one", 0, {"a": 1.0}),), 1)
    assert alone.batch(5, batch_size=2, seq_len=16, seed=0).tokens.shape == (2, 16)


def test_the_fingerprint_holds_texts_weights_and_places() -> None:
    base = mixture().fingerprint()
    assert mixture().fingerprint() == base
    assert mixture(batches=101).fingerprint() != base
    phases = (Phase("one", 0.0, FIRST), Phase("two", 0.8, FIRST))
    assert mixture(phases=phases).fingerprint() != base
    other = mixture()
    other.sources["a"].tokens[5] += 1
    assert other.fingerprint() != base


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ((), r"the phases start at \[\]"),
        ((Phase("x", 0.1, FIRST),), r"start at \[0.1\]"),
        ((Phase("x", 0.0, FIRST), Phase("y", 0.0, FIRST)), r"start at \[0.0, 0.0\]"),
        ((Phase("x", 0.0, FIRST), Phase("y", 1.0, FIRST)), "expected 0 for the first"),
        ((Phase("x", 0.0, FIRST), Phase("y", float("nan"), FIRST)), "expected 0 for the first"),
        ((Phase("x", 0.0, {"a": 0.5, "b": 0.4}),), "add up to 1"),
        ((Phase("x", 0.0, {"a": 1.5, "b": -0.5}),), "shares from 0 to 1"),
        ((Phase("x", 0.0, {"a": float("nan"), "b": 1.0}),), "shares from 0 to 1"),
        ((Phase("x", 0.0, {"other": 1.0}),), "phase 'x' has a weight for 'other'"),
    ],
)
def test_impossible_phases_are_refused(phases: tuple[Phase, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixture({name: text(0, 100) for name in "abc"}, phases, 10)


def test_windows_that_are_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match=r"seq_len=400 is too long for the 700 tokens of 'c'"):
        rows(mixture(), 80, 100, batch_size=4, seq_len=400, seed=0)
    with pytest.raises(ValueError, match="batches=0"):
        mixture(batches=0)
    with pytest.raises(ValueError, match="index=-1"):
        mixture().batch(-1, batch_size=1, seq_len=8, seed=0)
