"""A matrix without a bias, multiplied by `ops.linear`: every projection of the family is one.

It is an `nn.Linear`, so that everything that looks for one (checkpoints, quantization, the
optimizer's groups) finds it; only the product is computed by `ops.linear`. `prepare_for_decoding`
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

# Past `ops.linear`: only this backend can read a prepacked copy, which is no ordinary matrix.
from nemotron_lite.backends.cpu_linear import MOST_PREPACKED_ROWS, prepack, product


class Linear(nn.Linear):
    """y = x W^T."""

    _prepacked: Tensor | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def init_weights(self, std: float, divisor: float = 1.0) -> None:
        """Draw a normal matrix with standard deviation `std`, then divide it by `divisor`."""
        nn.init.normal_(self.weight, std=std)
        self.weight.div_(divisor)

    def forward(self, input: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        """Project the last axis."""
        if self._prepacked is not None and self._may_use_copy(input):
            return product(input, self._prepacked)
        return ops.linear(input, self.weight)

    def prepare_for_decoding(self) -> None:
        """Keep a copy in oneDNN's own layout, unless there is one of this weight already.

        Raises:
            ValueError: the weight is not float32 on the CPU.
        """
        if self._prepacked is None or not self._is_current():
            self._prepacked = prepack(self.weight)
            self._copied = (self.weight.data_ptr(), self.weight._version)

    def _is_current(self) -> bool:
        """Whether the weight is still the one that was copied."""
        return self._copied == (self.weight.data_ptr(), self.weight._version)

    def _may_use_copy(self, x: Tensor) -> bool:
        return (
            self._is_current()
            and not torch.is_grad_enabled()
            and 0 < x.numel() <= MOST_PREPACKED_ROWS * x.shape[-1]
            and x.dtype == torch.float32
            and x.is_cpu
            and not torch.is_autocast_enabled("cpu")
        )

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        self._prepacked = None
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_prepacked"}
