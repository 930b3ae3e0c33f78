"""A mixture of sources: each row of a batch comes from one source, drawn by weight.

A model that is trained on everything in proportion to its size reads mostly what there is most of.
A mixture gives every source a share of the tokens instead:

    weights = {"standard library source": 0.45, "packages: source": 0.35, ...}

Weights change during a run. Nemotron 3 Super is pre-trained in two phases: 80 % of the tokens for
variety, then 20 % with more of the best sources. So a mixture has phases, each with weights and the
fraction of the run at which it begins.

The windows of a source are numbered, and each epoch over it reads them in another random order. So
no window is read twice before all of them are read once. The borders of the windows move by a
random offset in each epoch.

Nothing is kept between calls: batch i is a function of (seed, i), so that a run can be resumed.
For that, the number of rows that a source gave before row r has to be known without a count. Rows
are dealt in blocks of `BLOCK`. A block has exactly the shares of the weights, in random order.

Source: reference sheet 7 (the phases). Left out: packing of whole documents. A window may begin and
end inside a document, as in `batches.py`.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import SupportsIndex

import numpy as np
import torch

from nemotron_lite.arguments import integer
from nemotron_lite.data.batches import (
    LARGEST_INDEX,
    Batch,
    BatchArguments,
    ConcatenatedDocuments,
)

BLOCK = 1000  # rows; a weight is rounded to a multiple of 1/BLOCK
_EPOCHS, _BLOCKS = 3, 4  # streams of random numbers, beside those of the other sources


@dataclass(frozen=True)
class Phase:
    """A part of a run with its own weights.

    Attributes:
        name: of the phase.
        start: fraction of the run at which it begins, from 0 up to below 1.
        weights: share of the tokens of each source; they add up to 1.
    """

    name: str
    start: int | float
    weights: Mapping[str, int | float]


def check_phases(phases: Sequence[Phase], sources: Sequence[str]) -> None:
    """Refuse phases that are not in order, or weights that are no shares of these sources.

    Raises:
        TypeError: a start or a weight that is no number.
        ValueError: which phase is wrong, and why.
    """
    for phase in phases:
        for value in (phase.start, *phase.weights.values()):
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(
                    f"phase {phase.name!r} has {value!r} as its start or a weight: expected a "
                    "number."
                )
    starts = [phase.start for phase in phases]
    increasing = all(a < b for a, b in pairwise(starts))
    if not starts or starts[0] != 0 or not increasing or not starts[-1] < 1:
        raise ValueError(
            f"the phases start at {starts} of the run: expected 0 for the first one, and "
            "increasing fractions below 1."
        )
    for phase in phases:
        unknown = set(phase.weights) - set(sources)
        if unknown:
            raise ValueError(
                f"phase {phase.name!r} has a weight for {min(unknown)!r}: expected "
                f"{', '.join(map(repr, sources))}."
            )
        total = sum(phase.weights.values())
        if not all(weight >= 0 for weight in phase.weights.values()) or abs(total - 1) > 1e-6:
            raise ValueError(
                f"the weights of phase {phase.name!r} are {dict(phase.weights)}: expected shares "
                "from 0 to 1 that add up to 1."
            )


class Mixture:
    """Several texts as one `BatchSource`.

    Args:
        sources: name and concatenated documents of each source.
        phases: their weights; see `check_phases`.
        batches: length of the run, which places the phases. Later batches belong to the last one.

    Raises:
        TypeError, ValueError: phases that do not fit, or no number of batches.
    """

    def __init__(
        self,
        sources: Mapping[str, ConcatenatedDocuments],
        phases: Sequence[Phase],
        batches: SupportsIndex,
    ) -> None:
        self.sources = dict(sources)
        self.phases = tuple(phases)
        self.batches = integer("batches", batches, low=1, high=LARGEST_INDEX)
        check_phases(self.phases, list(self.sources))
        self.phase_starts = tuple(round(phase.start * self.batches) for phase in self.phases)
        self._rows_of_a_block = [self._shares(phase.weights) for phase in self.phases]
        self._orders: dict[tuple[int, ...], np.ndarray] = {}

    def fingerprint(self) -> str:
        """SHA-256 over all sources, the phases and where they start."""
        phases = [
            [phase.name, start, dict(phase.weights)]
            for phase, start in zip(self.phases, self.phase_starts, strict=True)
        ]
        texts = {name: text.fingerprint() for name, text in self.sources.items()}
        return hashlib.sha256(json.dumps([phases, texts]).encode()).hexdigest()

    def phase_of(self, index: SupportsIndex) -> Phase:
        """The phase that a batch belongs to."""
        index = integer("index", index, low=0, high=LARGEST_INDEX)
        return self.phases[self._phase(index)]

    def batch(
        self,
        index: SupportsIndex,
        *,
        batch_size: SupportsIndex,
        seq_len: SupportsIndex,
        seed: SupportsIndex,
    ) -> Batch:
        """`batch_size` windows of `seq_len` tokens; int64, and int32 for `seq_idx`.

        Windows are read once per epoch as long as `batch_size` and `seq_len` stay the same.

        Raises:
            TypeError: an argument that is no integer.
            ValueError: an argument out of range, or a window is longer than a source.
        """
        which = BatchArguments.checked(index, batch_size, seq_len, seed)
        first = which.index * which.batch_size
        rows = [self._window(which, first + i) for i in range(which.batch_size)]
        return Batch(
            torch.from_numpy(np.stack([tokens for tokens, _ in rows])),
            torch.from_numpy(np.stack([seq_idx for _, seq_idx in rows])),
        )

    def source_of_row(self, which: BatchArguments, row: int) -> tuple[str, int]:
        """The source of a row of the run, and how many rows that source gave before."""
        phase = self._phase(which.index)
        starts = [start * which.batch_size for start in self.phase_starts]
        block, place = divmod(row - starts[phase], BLOCK)
        order = self._order(which.seed, _BLOCKS, phase, block)
        source = int(order[place])
        before = block * self._rows_of_a_block[phase][source]
        before += int((order[:place] == source).sum())
        for earlier in range(phase):
            blocks, rest = divmod(starts[earlier + 1] - starts[earlier], BLOCK)
            before += blocks * self._rows_of_a_block[earlier][source]
            order = self._order(which.seed, _BLOCKS, earlier, blocks)
            before += int((order[:rest] == source).sum())
        return list(self.sources)[source], before

    def _window(self, which: BatchArguments, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a row, and the document of each of them, counted from the first."""
        name, number = self.source_of_row(which, row)
        text, length = self.sources[name], which.seq_len
        windows = (len(text) + 1) // length - 1  # whatever the offset is
        if windows < 1:
            raise ValueError(
                f"seq_len={length} is too long for the {len(text):,} tokens of {name!r}, which "
                f"allow at most {(len(text) + 1) // 2}: shorten it."
            )
        epoch, place = divmod(number, windows)
        key = (which.seed, _EPOCHS, list(self.sources).index(name), epoch)
        order = self._order(*key, windows, length)
        start = int(order[place])
        positions = np.arange(start, start + length)
        document = np.searchsorted(text.starts, positions, side="right")
        tokens = text.tokens[start : start + length].astype(np.int64)
        return tokens, (document - document[0]).astype(np.int32)

    def _phase(self, index: int) -> int:
        return bisect_right(self.phase_starts, index) - 1

    def _shares(self, weights: Mapping[str, int | float]) -> list[int]:
        """Rows of each source in a block: the weights by largest remainders."""
        exact = np.array([weights.get(name, 0.0) for name in self.sources]) * BLOCK
        rows = np.floor(exact + 1e-9).astype(int)
        for i in np.argsort(rows - exact, kind="stable")[: BLOCK - int(rows.sum())]:
            rows[i] += 1
        return [int(count) for count in rows]

    def _order(self, seed: int, stream: int, *key: int) -> np.ndarray:
        """A random order, remembered: the sources of a block, or the first tokens of an epoch."""
        found = self._orders.get((seed, stream, *key))
        if found is None:
            counter = np.array([0, key[0], key[1] % 2**64, stream], dtype=np.uint64)
            random = np.random.Generator(np.random.Philox(key=seed, counter=counter))
            if stream == _BLOCKS:
                rows = self._rows_of_a_block[key[0]]
                found = random.permutation(np.repeat(np.arange(len(rows)), rows))
            else:
                _, _, windows, length = key
                found = random.integers(length) + length * random.permutation(windows)
            while len(self._orders) >= _REMEMBERED:
                del self._orders[next(iter(self._orders))]
            self._orders[seed, stream, *key] = found
        return found


_REMEMBERED = 32  # random orders; a batch needs one of each source and one or two of blocks
