"""Random windows that each lie within one document, to calibrate or measure a trained model.

Training windows cross document boundaries (`batches.py`). Some measurements need rows without such
boundaries: how large activations become (calibration), or how the loss reacts to a change
(sensitivity). Here a window is drawn at random among all windows that lie within one document. The
same documents, sizes and seed give the same windows.

Left out: documents that are shorter than a window. They are never drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from nemotron_lite.arguments import integer
from nemotron_lite.data.batches import LARGEST_BATCH, LARGEST_SEED
from nemotron_lite.data.checks import token_documents


def sample_windows(
    documents: Sequence[np.ndarray],
    count: SupportsIndex,
    seq_len: SupportsIndex,
    *,
    seed: SupportsIndex = 0,
) -> Int[Tensor, "b t"]:
    """`count` windows of `seq_len` tokens; int64.

    Args:
        documents: token ids, one array of integers each.

    Raises:
        TypeError: an argument that is no integer, or a document of another dtype.
        ValueError: no document is long enough, fewer than one window of two tokens is requested,
            more than 2^28 tokens, or a negative seed.
    """
    count, seq_len = integer("count", count), integer("seq_len", seq_len)
    seed = integer("seed", seed, low=0, high=LARGEST_SEED)
    if count < 1 or seq_len < 2:
        raise ValueError(
            f"{_short(count)} windows of {_short(seq_len)} tokens do not work: expected a count of "
            "at least 1 and a seq_len of at least 2."
        )
    if count * seq_len > LARGEST_BATCH:
        raise ValueError(
            f"count={_short(count)} windows of seq_len={_short(seq_len)} tokens do not work: "
            f"expected at most {LARGEST_BATCH:,} tokens in all."
        )
    documents = token_documents("documents", documents)
    starts_per_document = np.array([max(0, len(doc) - seq_len + 1) for doc in documents])
    ends = starts_per_document.cumsum()
    if not len(ends) or not ends[-1]:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"no document has {seq_len} tokens; the longest has {longest}. Choose shorter windows "
            "(seq_len), or give longer documents."
        )
    draws = np.random.default_rng(seed).integers(0, ends[-1], size=count)
    rows = []
    for draw in draws:
        which = int(np.searchsorted(ends, draw, side="right"))
        first = int(draw - (ends[which] - starts_per_document[which]))
        rows.append(documents[which][first : first + seq_len])
    return torch.from_numpy(np.stack(rows).astype(np.int64))


def _short(value: int) -> str:
    """An integer for a message; Python refuses to print those of thousands of digits."""
    return str(value) if abs(value) < 10**12 else "…"
