"""Long rows lie in one document, and take turns with short ones; a batch is always the same."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_lite.data import (
    Batch,
    BatchSource,
    ConcatenatedDocuments,
    DocumentWindows,
    LongAndShort,
)


def documents(*lengths: int) -> list[np.ndarray]:
    """Tokens that say in which document they are and where."""
    return [np.arange(n, dtype=np.int32) + 1000 * i for i, n in enumerate(lengths)]


@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=6),
    seq_len=st.integers(1, 40),
    index=st.integers(0, 2**64 - 1),
    seed=st.integers(0, 2**128 - 1),
)
@settings(max_examples=60, deadline=None)
def test_a_row_lies_in_one_document(
    lengths: list[int], seq_len: int, index: int, seed: int
) -> None:
    source = DocumentWindows(documents(*lengths))
    kind = dict(batch_size=3, seq_len=seq_len, seed=seed)
    if max(lengths) < seq_len:
        with pytest.raises(ValueError, match=rf"no document has.*longest has {max(lengths)}"):
            source.batch(index, **kind)
        return
    batch = source.batch(index, **kind)
    assert batch.tokens.shape == (3, seq_len)
    assert batch.tokens.dtype == torch.int64
    assert batch.seq_idx is None
    for row in batch.tokens.tolist():
        which, first = divmod(row[0], 1000)
        assert row == list(range(row[0], row[0] + seq_len))
        assert first + seq_len <= lengths[which]
    assert torch.equal(source.batch(index, **kind).tokens, batch.tokens)


def test_every_window_is_equally_likely() -> None:
    source = DocumentWindows(documents(9, 3, 12, 10))  # of 10 tokens: 0, 0, 3 and 1 windows
    drawn = Counter(
        row[0]
        for i in range(400)
        for row in source.batch(i, batch_size=10, seq_len=10, seed=1).tokens.tolist()
    )
    assert set(drawn) == {2000, 2001, 2002, 3000}
    assert all(abs(count / 4000 - 0.25) < 0.03 for count in drawn.values())
    rows = [source.batch(0, batch_size=20, seq_len=10, seed=s).tokens for s in (1, 2)]
    assert not torch.equal(*rows)


class Numbered:
    """Rows that say which batch of which source they are."""

    def __init__(self, name: int, fingerprint: str | None = "x") -> None:
        self.name = name
        if fingerprint is not None:
            self.fingerprint = fingerprint

    def batch(self, index: int, *, batch_size: int, seq_len: int, seed: int) -> Batch:
        return Batch(torch.full((batch_size, seq_len), 1000 * self.name + index))


@pytest.mark.parametrize("long_only", [0, 1, 4])
def test_long_rows_first_and_then_in_turn(long_only: int) -> None:
    source = LongAndShort(Numbered(1), Numbered(2), short_len=4, long_only=long_only)
    assert isinstance(source, BatchSource)
    kind: dict[str, Any] = dict(batch_size=2, seq_len=12, seed=0)
    batches = [source.batch(i, **kind).tokens for i in range(10)]
    expected, short = [], 0
    for i in range(10):
        if i < long_only or (i - long_only) % 2 == 0:
            expected.append(((2, 12), 1000 + i - short))
        else:
            expected.append(((6, 4), 2000 + short))
            short += 1
    assert [(tuple(b.shape), int(b[0, 0])) for b in batches] == expected
    assert [source.is_long(i) for i in range(10)] == [shape == (2, 12) for shape, _ in expected]


def test_arguments_of_the_turns() -> None:
    source = LongAndShort(Numbered(1), Numbered(2), short_len=5)
    for length in (12, 3):
        with pytest.raises(ValueError, match=rf"seq_len={length}.*multiple of short_len=5"):
            source.batch(0, batch_size=1, seq_len=length, seed=0)
    with pytest.raises(ValueError, match="short_len=0"):
        LongAndShort(Numbered(1), Numbered(2), short_len=0)
    with pytest.raises(ValueError, match="long_only=-1"):
        LongAndShort(Numbered(1), Numbered(2), short_len=1, long_only=-1)
    with pytest.raises(TypeError, match="documents"):
        DocumentWindows("text")  # type: ignore[arg-type]


def test_fingerprints_name_the_content() -> None:
    def make(lengths: tuple[int, ...] = (9, 5), short_len: int = 2, long_only: int = 1) -> Any:
        text = ConcatenatedDocuments(np.arange(30), np.array([0, 9]))
        long = DocumentWindows(documents(*lengths))
        return LongAndShort(long, text, short_len=short_len, long_only=long_only).fingerprint()

    assert make() == make()
    assert len({make(), make((9, 6)), make((14,)), make(short_len=3), make(long_only=2)}) == 5
    unknown = LongAndShort(Numbered(1), Numbered(2, None), short_len=2)
    assert unknown.fingerprint() is None
