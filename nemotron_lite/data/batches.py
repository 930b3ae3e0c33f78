"""Batches: random windows of packed documents, drawn without remembering anything.

All documents stand in one long row of tokens. A batch is `batch_size` windows of `length` tokens at
random places in it, so a window may hold the end of one file and the start of the next: the row is
*packed* and no token is padding. `seq_idx` numbers the documents inside a window; where it changes,
the model forgets (the scan, the convolution and the attention all start anew) and the loss skips
the step across the border.

The sampler has no state. Batch number i is a function of (seed, i) alone: a counter-based random
generator (Philox: Salmon et al. 2011) is keyed with the seed and its counter set to i. To resume a
run at step i is to ask for batch i, and two runs with one seed see the same text in the same order.

Left out: epochs. Windows are drawn with replacement; a run of the course sees a fraction of the
text, so a window rarely comes twice.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Batch(NamedTuple):
    """What one forward pass reads.

    `seq_idx` is None where every row is one document. `mask` is False on tokens that are not to be
    learned (padding, a prompt); None learns all of them.
    """

    tokens: Int[Tensor, "b t"]
    seq_idx: Int[Tensor, "b t"] | None = None
    mask: Bool[Tensor, "b t"] | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        seq_idx = None if self.seq_idx is None else self.seq_idx.to(device)
        mask = None if self.mask is None else self.mask.to(device)
        return Batch(self.tokens.to(device), seq_idx, mask)


@runtime_checkable
class BatchSource(Protocol):
    """Anything the training loop can read from."""

    def batch(self, index: int, *, batch_size: int, length: int, seed: int) -> Batch:
        """Batch number `index` of the stream `seed`: always the same for the same arguments."""
        ...


class PackedTokens:
    """One long row of tokens made of documents, and the windows into it.

    Args:
        tokens: integers [n], every document behind the other; may be a memory map.
        starts: position of each document's first token, increasing from 0.
        packed: give `seq_idx`, so that documents in one window do not see each other.

    Raises:
        ValueError: starts that do not describe the tokens.
    """

    def __init__(self, tokens: np.ndarray, starts: np.ndarray, *, packed: bool = True) -> None:
        starts = np.asarray(starts, dtype=np.int64)
        if not len(starts) or starts[0] != 0 or (np.diff(starts) <= 0).any():
            raise ValueError("starts must begin with 0 and increase: one entry per document.")
        if starts[-1] >= len(tokens):
            raise ValueError(
                f"the last document starts at {starts[-1]}, past the {len(tokens)} tokens."
            )
        self.tokens = tokens
        self.starts = starts
        self.packed = packed

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, index: int, *, batch_size: int, length: int, seed: int) -> Batch:
        """`batch_size` windows of `length` tokens; int64, and int32 for `seq_idx`.

        Raises:
            ValueError: a window longer than the text.
        """
        if length > len(self.tokens):
            raise ValueError(
                f"length={length} is more than the {len(self.tokens)} tokens there are: "
                "shorten it or prepare more text."
            )
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, 0]))
        offsets = generator.integers(0, len(self.tokens) - length + 1, size=batch_size)
        positions = offsets[:, None] + np.arange(length)
        tokens = torch.from_numpy(self.tokens[positions].astype(np.int64))
        if not self.packed:
            return Batch(tokens)
        document = np.searchsorted(self.starts, positions, side="right")
        seq_idx = torch.from_numpy((document - document[:, :1]).astype(np.int32))
        return Batch(tokens, seq_idx)


def pack(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Documents behind each other, and where each starts."""
    sizes = [len(document) for document in documents]
    return np.concatenate(documents), np.cumsum([0, *sizes[:-1]])
