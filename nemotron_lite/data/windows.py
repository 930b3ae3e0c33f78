"""Random windows that each lie within one document, to calibrate or measure a trained model.

Training windows cross document boundaries (`batches.py`). Some measurements need rows without such
boundaries: how large activations become (calibration), or how the loss reacts to a change
(sensitivity). Here a window is drawn at random among all windows that lie within one document. The
same documents, sizes and seed give the same windows.

Left out: documents that are shorter than a window. They are never drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def sample_windows(
    documents: Sequence[Int[np.ndarray, "_"]], count: int, seq_len: int, *, seed: int = 0
) -> Int[Tensor, "b t"]:
    """`count` windows of `seq_len` tokens; int64.

    Raises:
        ValueError: no document is long enough, or fewer than one window of two tokens is requested.
    """
    if count < 1 or seq_len < 2:
        raise ValueError(
            f"{count} windows of {seq_len} tokens do not work: expected at least 1 window of at "
            "least 2 tokens."
        )
    starts_per_document = np.array([max(0, len(doc) - seq_len + 1) for doc in documents])
    ends = starts_per_document.cumsum()
    if not len(ends) or not ends[-1]:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"no document has {seq_len} tokens; the longest has {longest}. Choose shorter windows "
            "or give more text."
        )
    draws = np.random.default_rng(seed).integers(0, ends[-1], size=count)
    rows = []
    for draw in draws:
        which = int(np.searchsorted(ends, draw, side="right"))
        first = int(draw - (ends[which] - starts_per_document[which]))
        rows.append(documents[which][first : first + seq_len])
    return torch.from_numpy(np.stack(rows).astype(np.int64))
