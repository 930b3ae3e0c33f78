"""Batches: functions of (seed, index), windows of the text, documents kept apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemotron_lite.data import ConcatenatedDocuments, concatenate_documents


@pytest.fixture
def text() -> ConcatenatedDocuments:
    """Documents 0 to 29 of uneven length; the tokens of document i are i * 100, i * 100 + 1, ..."""
    lengths = np.random.default_rng(0).integers(1, 20, size=30)
    tokens, starts = concatenate_documents([i * 100 + np.arange(n) for i, n in enumerate(lengths)])
    return ConcatenatedDocuments(tokens.astype(np.uint16), starts)


def test_same_arguments_same_batch_in_any_order(text: ConcatenatedDocuments) -> None:
    size = dict(batch_size=4, seq_len=16)
    forward = [text.batch(i, seed=3, **size).tokens for i in range(6)]
    backward = [text.batch(i, seed=3, **size).tokens for i in reversed(range(6))]
    for a, b in zip(forward, reversed(backward), strict=True):
        assert torch.equal(a, b)
    assert len({tuple(t.flatten().tolist()) for t in forward}) == 6
    assert not torch.equal(text.batch(0, seed=4, **size).tokens, forward[0])


def test_rows_are_windows_and_seq_idx_counts_their_documents(text: ConcatenatedDocuments) -> None:
    tokens = text.tokens.astype(np.int64)
    batch = text.batch(7, batch_size=50, seq_len=24, seed=0)
    assert batch.tokens.dtype == torch.int64
    several = 0
    for row, seq_idx in zip(batch.tokens.tolist(), batch.seq_idx.tolist(), strict=True):
        places = np.flatnonzero(tokens == row[0])
        assert any(tokens[p : p + 24].tolist() == row for p in places)
        documents = [token // 100 for token in row]
        # equal numbers exactly where the document is the same, starting from 0 and increasing
        assert [s - seq_idx[0] for s in seq_idx] == [d - documents[0] for d in documents]
        assert seq_idx[0] == 0
        several += documents[0] != documents[-1]
    assert several > 25


def test_every_place_is_drawn_about_equally_often() -> None:
    text = ConcatenatedDocuments(np.arange(20), np.array([0]))
    first = torch.cat(
        [text.batch(i, batch_size=64, seq_len=11, seed=1).tokens[:, 0] for i in range(100)]
    )
    counts = torch.bincount(first, minlength=10)
    assert len(counts) == 10  # offsets 0 to 20 - 11, the last one included
    assert 540 < int(counts.min()) <= int(counts.max()) < 740  # 640 each, sd 24


def test_batches_without_isolation_have_no_seq_idx(text: ConcatenatedDocuments) -> None:
    plain = ConcatenatedDocuments(text.tokens, text.starts, isolate_documents=False)
    batch = plain.batch(0, batch_size=2, seq_len=8, seed=0)
    assert batch.seq_idx is None
    assert torch.equal(batch.tokens, text.batch(0, batch_size=2, seq_len=8, seed=0).tokens)


def test_errors(text: ConcatenatedDocuments) -> None:
    with pytest.raises(ValueError, match="seq_len=9999 is more than the"):
        text.batch(0, batch_size=1, seq_len=9999, seed=0)
    for starts in ([], [1, 5], [0, 5, 5], [0, 5, 3]):
        with pytest.raises(ValueError, match="must begin with 0 and increase"):
            ConcatenatedDocuments(np.arange(10), np.array(starts))
    with pytest.raises(ValueError, match="starts at 10, but there are only 10 tokens"):
        ConcatenatedDocuments(np.arange(10), np.array([0, 10]))
