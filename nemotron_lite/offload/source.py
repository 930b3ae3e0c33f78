"""Where the weights of an offloaded model come from, and how large they are.

A source fills a buffer that the store gives it, so that it never holds weights itself. It is asked
by the names of the model's state_dict. A tensor may be asked for as a whole, by expert (a slice of
its first axis), or by row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; vector instructions read whole cache lines


@runtime_checkable
class WeightSource(Protocol):
    """Reads weights into buffers."""

    @property
    def nbytes(self) -> int:
        """Bytes that the source itself keeps in memory; they are part of the budget."""

    def read(
        self, name: str, out: Tensor, *, expert: int | None = None, row: int | None = None
    ) -> int:
        """Fill `out` with a tensor of the model, with one expert's slice of it, or with one row.

        Args:
            name: key of the model's state_dict.
            out: contiguous, of the shape and dtype that the model has.
            expert, row: index on the first axis; None for all of it.

        Returns:
            Bytes that were read from the disk or generated.
        """


@dataclass(frozen=True)
class Part:
    """One tensor of an entry.

    Attributes:
        name: key of the state_dict.
        shape, dtype: of the tensor, or of one expert's slice.
        weights: of the model that it encodes: two in a byte of NVFP4, none in a scale or padding.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    weights: int

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """Tensors that are fetched and kept together: those of one module, or of one expert's matrix.

    Attributes:
        path: of the module, or of the stack of experts.
        parts: by their name in the module.
    """

    path: str
    parts: Mapping[str, Part]

    @cached_property
    def used_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for part in self.parts.values())

    @cached_property
    def weights(self) -> int:
        """Weights of the model that the tensors encode."""
        return sum(part.weights for part in self.parts.values())

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where each tensor begins in a buffer for the entry."""
        found, end = {}, 0
        for leaf, part in self.parts.items():
            found[leaf] = end
            end += -(-part.nbytes // ALIGNMENT) * ALIGNMENT
        return found

    @cached_property
    def nbytes(self) -> int:
        """Bytes of a buffer for the entry."""
        return sum(-(-part.nbytes // ALIGNMENT) * ALIGNMENT for part in self.parts.values())

    def views(self, buffer: Tensor) -> dict[str, Tensor]:
        """The tensors in a buffer of bytes, by their name in the module."""
        return {
            leaf: buffer[start : start + part.nbytes].view(part.dtype).view(part.shape)
            for (leaf, part), start in zip(self.parts.items(), self.offsets.values(), strict=True)
        }
