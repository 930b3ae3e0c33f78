"""A matrix without a bias, multiplied by `ops.linear`: every projection of the family is one.

It is an `nn.Linear`, so that everything that looks for one (checkpoints, quantization, the
optimiser's groups) finds it; only the product goes through the door. `lay_out` keeps a second copy
of the matrix, in the order in which few rows are multiplied fastest. The copy answers only as long
as the weight is the one that was copied, and is neither saved nor copied along with the module.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron_lite import ops
from nemotron_lite.ops.linear import MOST_BLOCKED_ROWS, blocked, product


class Linear(nn.Linear):
    """y = x W^T."""

    _blocked: Tensor | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        """Project the last axis."""
        if self._blocked is not None and self._answers(input):
            return product(input, self._blocked)
        return ops.linear(input, self.weight)

    def lay_out(self) -> None:
        """Keep a copy for oneDNN; `ValueError` where it cannot multiply this weight."""
        self._blocked = blocked(self.weight)
        self._copied = (self.weight.data_ptr(), self.weight._version)

    def _answers(self, x: Tensor) -> bool:
        weight = self.weight
        return (
            self._copied == (weight.data_ptr(), weight._version)
            and not torch.is_grad_enabled()
            and 0 < x.numel() <= MOST_BLOCKED_ROWS * x.shape[-1]
            and x.dtype == torch.float32
            and x.is_cpu
            and not torch.is_autocast_enabled("cpu")
        )

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self._blocked = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_blocked"}
