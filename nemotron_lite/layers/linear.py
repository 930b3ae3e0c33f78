"""A matrix without a bias, multiplied by `ops.linear`: every projection of the family is one.

It is an `nn.Linear`, so that everything that looks for one (checkpoints, quantization, the
optimiser's groups) finds it; only the product is computed by `ops.linear`. `prepare_for_decoding`
keeps a second copy of the matrix in the layout in which few rows are multiplied fastest. The copy
is used only as long as the weight is unchanged. It is neither saved nor copied along with the
module. Changes are found by the version counter that PyTorch keeps for each tensor: an in-place
operation, an optimizer step and `load_state_dict` raise it, a write through `weight.data` does not.
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

    def prepare_for_decoding(self) -> None:
        """Keep a copy for oneDNN, unless there is one of this weight already.

        Raises:
            ValueError: oneDNN cannot multiply this weight.
        """
        if self._blocked is None or not self._is_current():
            self._blocked = blocked(self.weight)
            self._copied = (self.weight.data_ptr(), self.weight._version)

    def _is_current(self) -> bool:
        """Whether the weight is still the one that was copied."""
        return self._copied == (self.weight.data_ptr(), self.weight._version)

    def _answers(self, x: Tensor) -> bool:
        return (
            self._is_current()
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
