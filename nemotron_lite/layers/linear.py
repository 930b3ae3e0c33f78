"""A matrix without a bias, multiplied by `ops.linear`: every projection of the family is one.

It is an `nn.Linear`, so that everything that looks for one (checkpoints, quantisation, the
optimiser's groups) finds it; only the product goes through the door.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from nemotron_lite import ops


class Linear(nn.Linear):
    """y = x W^T."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Float[Tensor, "*rows i"]) -> Float[Tensor, "*rows o"]:
        """Project the last axis."""
        return ops.linear(input, self.weight)
