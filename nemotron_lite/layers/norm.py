"""RMSNorm as a module: a learned weight, and the operation that uses it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron_lite import ops


class RMSNorm(nn.Module):
    """`ops.rms_norm` with a learned scale per channel."""

    def __init__(self, size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size))

    def init_weights(self) -> None:
        """Start with scales of one."""
        self.weight.fill_(1)

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Normalize each row."""
        return ops.rms_norm(x, self.weight, self.eps)
