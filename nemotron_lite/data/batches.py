"""Batches: random windows of concatenated documents, a function of seed and batch number.

All documents are concatenated to one long array of tokens. A batch is `batch_size` windows of
`seq_len` tokens at random positions in it. A window may hold the end of one document and the start
of the next, so no token is padding. `seq_idx` numbers the documents inside a window. Where it
changes, the model starts from an empty cache (the scan, the convolution and the attention), and the
loss skips the prediction across the boundary.

The sampler keeps nothing between calls. Batch number i is a function of (seed, i) alone: a
counter-based random generator (Philox, Salmon et al. 2011) takes the seed as its key and i as its
counter. A run that is resumed at step i asks for batch i, and two runs with the same seed see the
same text in the same order.

Left out: epochs. Windows are drawn with replacement. A run of the course sees only a fraction of
the text, so it rarely sees a window twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, SupportsIndex, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nemotron_lite.arguments import integer
from nemotron_lite.data.checks import check_tokens, token_documents

# Philox takes a key of 128 bits and a counter of 64-bit words.
LARGEST_SEED = 2**128 - 1
LARGEST_INDEX = 2**64 - 1
LARGEST_BATCH = 2**28  # tokens: 2 GiB of int64
_HASHED = 1 << 24  # tokens that are read at a time for a fingerprint: they may be a memory map


class Batch(NamedTuple):
    """The input of one forward pass.

    `seq_idx` is None if every row is one document. `mask` is False on tokens that do not count in
    the loss (padding, a prompt); None counts all of them.
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
    """Anything that the training loop can take its batches from.

    A source may also have a `fingerprint`, a text or a method that returns one. It identifies the
    content: equal for equal data, different for other data. A training run stores it, and refuses
    to be resumed with other data. It is optional, and so it is no part of this protocol.
    """

    def batch(self, index: int, *, batch_size: int, seq_len: int, seed: int) -> Batch:
        """Batch number `index` of the stream `seed`: always the same for the same arguments."""
        ...


@dataclass(frozen=True)
class BatchArguments:
    """The arguments of `BatchSource.batch` as Python integers within their ranges."""

    index: int
    batch_size: int
    seq_len: int
    seed: int

    @classmethod
    def checked(
        cls,
        index: SupportsIndex,
        batch_size: SupportsIndex,
        seq_len: SupportsIndex,
        seed: SupportsIndex,
    ) -> BatchArguments:
        """Any integers, NumPy's too, as Python's.

        Raises:
            TypeError: not an integer.
            ValueError: out of range, or a batch of more than 2^28 tokens.
        """
        found = cls(
            integer("index", index, low=0, high=LARGEST_INDEX),
            integer("batch_size", batch_size, low=1, high=LARGEST_BATCH),
            integer("seq_len", seq_len, low=1, high=LARGEST_BATCH),
            integer("seed", seed, low=0, high=LARGEST_SEED),
        )
        if found.batch_size * found.seq_len > LARGEST_BATCH:
            raise ValueError(
                f"batch_size={found.batch_size:,} rows of seq_len={found.seq_len:,} tokens do not "
                f"work: expected at most {LARGEST_BATCH:,} tokens in a batch."
            )
        return found

    def generator(self, stream: int) -> np.random.Generator:
        """The random numbers of this batch; `stream` keeps the kinds of sources apart."""
        counter = np.array([0, 0, self.index, stream], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=self.seed, counter=counter))


class ConcatenatedDocuments:
    """Documents in one long array of tokens; a `BatchSource` of windows into it.

    Args:
        tokens: integers [n], one document after the other; may be a memory map.
        starts: position of each document's first token, increasing from 0.
        isolate_documents: give `seq_idx`, so that documents in one window do not see each other.

    Raises:
        TypeError: not integers.
        ValueError: not one row of them, or `starts` does not fit `tokens`.
    """

    def __init__(
        self, tokens: np.ndarray, starts: np.ndarray, *, isolate_documents: bool = True
    ) -> None:
        check_tokens("tokens", tokens)
        if np.size(starts):  # an empty array has any dtype
            check_tokens("starts", starts)
        starts = np.asarray(starts).astype(np.int64).reshape(-1)
        if not len(starts) or starts[0] != 0 or (np.diff(starts) <= 0).any():
            raise ValueError(
                f"starts={starts.tolist()[:8]} does not work: it must begin with 0 and increase, "
                "with one entry per document."
            )
        if starts[-1] >= len(tokens):
            raise ValueError(
                f"the last document starts at {starts[-1]}, but there are only {len(tokens)} "
                "tokens: give the starts that belong to these tokens."
            )
        self.tokens = tokens
        self.starts = starts
        self.isolate_documents = isolate_documents

    def __len__(self) -> int:
        return len(self.tokens)

    def fingerprint(self) -> str:
        """SHA-256 over all tokens and the starts of the documents. It identifies the text."""
        kind = f"{np.dtype(self.tokens.dtype).str} {len(self.tokens)} {self.isolate_documents}\n"
        digest = hashlib.sha256(kind.encode())
        for start in range(0, len(self.tokens), _HASHED):
            digest.update(np.ascontiguousarray(self.tokens[start : start + _HASHED]).data)
        digest.update(np.ascontiguousarray(self.starts).data)
        return digest.hexdigest()

    def batch(
        self,
        index: SupportsIndex,
        *,
        batch_size: SupportsIndex,
        seq_len: SupportsIndex,
        seed: SupportsIndex,
    ) -> Batch:
        """`batch_size` windows of `seq_len` tokens; int64, and int32 for `seq_idx`.

        Raises:
            TypeError: an argument that is no integer.
            ValueError: an argument out of range, or a window is longer than the text.
        """
        which = BatchArguments.checked(index, batch_size, seq_len, seed)
        seq_len = which.seq_len
        if seq_len > len(self.tokens):
            raise ValueError(
                f"seq_len={seq_len} is more than the {len(self.tokens)} tokens of the text: "
                "shorten it, or prepare more text."
            )
        offsets = which.generator(0).integers(
            0, len(self.tokens) - seq_len + 1, size=which.batch_size
        )
        positions = offsets[:, None] + np.arange(seq_len)
        tokens = torch.from_numpy(self.tokens[positions].astype(np.int64))
        if not self.isolate_documents:
            return Batch(tokens)
        document = np.searchsorted(self.starts, positions, side="right")
        seq_idx = torch.from_numpy((document - document[:, :1]).astype(np.int32))
        return Batch(tokens, seq_idx)


def concatenate_documents(documents: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The documents one after the other in one array, and the position where each starts.

    Raises:
        TypeError: a document that is no array of integers.
        ValueError: no documents, or one without tokens.
    """
    documents = token_documents("documents", documents)
    for i, document in enumerate(documents):
        if not len(document):
            raise ValueError(f"documents[{i}] has no tokens: leave it out.")
    if not documents:
        raise ValueError("documents is empty: give at least one.")
    sizes = [len(document) for document in documents]
    return np.concatenate(documents), np.cumsum([0, *sizes[:-1]])
