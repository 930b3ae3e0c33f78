"""Batches for a long-context phase: rows of one long document each, alternating with short rows.

A model that was trained on short rows has never read a token that needs another one from far
before. A last phase of training gives it long rows. With nothing else, it gets worse at short texts
(tests/train/test_long_context.py measures it), so short rows come in between. Super's phase has 51
billion tokens: two thirds of them in rows of a million tokens only, then rows of a million and of
four thousand in turn (reference sheet 7).

    long = DocumentWindows(documents)                  each row lies in one document
    short = ConcatenatedDocuments(...)                 rows as in the training before
    data = LongAndShort(long, short, short_len=256, long_only=200)

    batch 0 ... 199        batch_size rows of seq_len tokens                   from `long`
    batch 200, 202, ...    the same
    batch 201, 203, ...    batch_size * seq_len / short_len rows of short_len  from `short`

All batches have the same number of tokens, so each counts the same. A row of many short documents
would teach nothing about distance, because documents are isolated from each other (`batches.py`).
That is why `DocumentWindows` takes rows from one document only.

Batch i is a function of (seed, i), as everywhere, so a run can be resumed.

Left out: text that is made for the purpose (20 % of Super's phase are questions about long
documents). Any `BatchSource` can stand for `long`, also a `Mixture`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import torch

from nemotron_lite.arguments import integer
from nemotron_lite.data.batches import (
    LARGEST_BATCH,
    LARGEST_INDEX,
    Batch,
    BatchArguments,
    BatchSource,
)
from nemotron_lite.data.checks import token_documents

_WINDOWS = 5  # stream of random numbers, beside those of the other sources


class DocumentWindows:
    """Random windows that each lie in one document; a `BatchSource`.

    Every window of every document that is long enough is equally likely. Shorter documents are
    never drawn.

    Args:
        documents: token ids, one array of integers each; they may be memory maps.

    Raises:
        TypeError, ValueError: no list of arrays of integers.
    """

    def __init__(self, documents: Sequence[np.ndarray]) -> None:
        self.documents = token_documents("documents", documents)
        self._lengths = np.array([len(document) for document in self.documents], dtype=np.int64)

    def fingerprint(self) -> str:
        """SHA-256 over all tokens, document by document."""
        digest = hashlib.sha256(b"windows in one document")
        for document in self.documents:
            digest.update(f"{np.dtype(document.dtype).str} {len(document)}\n".encode())
            digest.update(np.ascontiguousarray(document).data)
        return digest.hexdigest()

    def batch(
        self,
        index: SupportsIndex,
        *,
        batch_size: SupportsIndex,
        seq_len: SupportsIndex,
        seed: SupportsIndex,
    ) -> Batch:
        """`batch_size` windows of `seq_len` tokens; int64.

        Raises:
            TypeError: an argument that is no integer.
            ValueError: an argument out of range, or no document is that long.
        """
        which = BatchArguments.checked(index, batch_size, seq_len, seed)
        ends = np.maximum(0, self._lengths - which.seq_len + 1).cumsum()
        if not len(ends) or not ends[-1]:
            raise ValueError(
                f"no document has seq_len={which.seq_len:,} tokens; the longest has "
                f"{max(self._lengths, default=0):,}. Choose shorter rows, or give longer documents."
            )
        draws = which.generator(_WINDOWS).integers(0, ends[-1], size=which.batch_size)
        rows = []
        for draw in draws:
            number = int(np.searchsorted(ends, draw, side="right"))
            first = int(draw - (ends[number - 1] if number else 0))
            rows.append(self.documents[number][first : first + which.seq_len])
        return Batch(torch.from_numpy(np.stack(rows).astype(np.int64)))


class LongAndShort:
    """Batches of long rows, later in turn with batches of short rows; a `BatchSource`.

    Args:
        long, short: where the rows come from.
        short_len: tokens of a short row.
        long_only: number of batches at the beginning that are all long. In `train` these are
            micro-batches: an update reads `gradient_accumulation_steps` of them.

    Raises:
        TypeError, ValueError: `short_len` or `long_only` is no such integer.
    """

    def __init__(
        self,
        long: BatchSource,
        short: BatchSource,
        *,
        short_len: SupportsIndex,
        long_only: SupportsIndex = 0,
    ) -> None:
        self.long, self.short = long, short
        self.short_len = integer("short_len", short_len, low=1, high=LARGEST_BATCH)
        self.long_only = integer("long_only", long_only, low=0, high=LARGEST_INDEX)

    def fingerprint(self) -> str | None:
        """SHA-256 over both sources and the order; None if one of them has no fingerprint."""
        found = [getattr(source, "fingerprint", None) for source in (self.long, self.short)]
        texts = [text() if callable(text) else text for text in found]
        if None in texts:
            return None
        content = json.dumps([*texts, self.short_len, self.long_only])
        return hashlib.sha256(content.encode()).hexdigest()

    def is_long(self, index: SupportsIndex) -> bool:
        """Whether a batch has long rows."""
        after = integer("index", index, low=0, high=LARGEST_INDEX) - self.long_only
        return after < 0 or after % 2 == 0

    def batch(
        self,
        index: SupportsIndex,
        *,
        batch_size: SupportsIndex,
        seq_len: SupportsIndex,
        seed: SupportsIndex,
    ) -> Batch:
        """Rows of `seq_len` tokens, or as many tokens in rows of `short_len`.

        Raises:
            TypeError: an argument that is no integer.
            ValueError: an argument out of range; `seq_len` is no multiple of `short_len`.
        """
        which = BatchArguments.checked(index, batch_size, seq_len, seed)
        times, rest = divmod(which.seq_len, self.short_len)
        if rest or not times:
            raise ValueError(
                f"seq_len={which.seq_len} does not work: expected a multiple of short_len="
                f"{self.short_len}, so that all batches have the same number of tokens."
            )
        after = which.index - self.long_only
        if self.is_long(which.index):
            # each source counts its own batches, so that a mixture reads each window once
            own = which.index if after < 0 else self.long_only + after // 2
            return self.long.batch(
                own, batch_size=which.batch_size, seq_len=which.seq_len, seed=which.seed
            )
        return self.short.batch(
            after // 2,
            batch_size=which.batch_size * times,
            seq_len=self.short_len,
            seed=which.seed,
        )
