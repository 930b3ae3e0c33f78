"""The feed-forward layer of the family: two matrices and a squared ReLU between them.

    y = W2 relu(W1 x)^2

No gate and no bias. It stands alone as the `-` layer, and inside every mixture layer as the shared
expert that all tokens pass through.

Source: reference sheet 1.1 (`mlp_hidden_act = relu2`).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from nemotron_lite import ops
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.linear import Linear


class MLP(nn.Module):
    """d -> f -> d with a squared ReLU."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(
        self, x: Float[Tensor, "*rows d"], cache: None = None, context: ForwardContext | None = None
    ) -> Float[Tensor, "*rows d"]:
        """Each token by itself: `cache` and `context` are what other mixers need."""
        return self.down_proj(ops.squared_relu(self.up_proj(x)))
