"""Passages: rows of one length, each a piece of one document, to measure a finished model with.

Training packs documents behind each other; a measurement that asks how large activations get, or
how the loss reacts to a change, wants rows without borders. A passage is a window that lies within
one document, drawn at random among all such windows, without remembering anything: the same
documents, sizes and seed give the same passages.

Left out: documents shorter than a row, which give no passage.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


def passages(
    documents: Sequence[Int[np.ndarray, "_"]], count: int, length: int, *, seed: int = 0
) -> Int[Tensor, "b t"]:
    """`count` windows of `length` tokens; int64.

    Raises:
        ValueError: no document is that long, or fewer than one row of two tokens is asked for.
    """
    if count < 1 or length < 2:
        raise ValueError(
            f"{count} passages of {length} tokens: expected at least one of at least two."
        )
    places = np.array([max(0, len(document) - length + 1) for document in documents])
    ends = places.cumsum()
    if not len(ends) or not ends[-1]:
        longest = max(map(len, documents), default=0)
        raise ValueError(
            f"no document has {length} tokens, the longest has {longest}: ask for shorter "
            "passages or give more text."
        )
    draws = np.random.default_rng(seed).integers(0, ends[-1], size=count)
    rows = []
    for draw in draws:
        which = int(np.searchsorted(ends, draw, side="right"))
        first = int(draw - (ends[which] - places[which]))
        rows.append(documents[which][first : first + length])
    return torch.from_numpy(np.stack(rows).astype(np.int64))
