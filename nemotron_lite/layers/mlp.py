"""The feed-forward layer of the family: two matrices and a squared ReLU between them.

    y = W2 relu(W1 x)^2

It has no gate, and biases only where a config asks for them (`mlp_bias`). It is the mixer of the
`-` layer, and every mixture of experts has one as the shared expert that all tokens pass through.

Source: reference sheet 1.1 (`mlp_hidden_act = relu2`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron_lite import ops
from nemotron_lite.backends.compiled_step import LinearStruct, MlpStruct
from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.linear import linear
from nemotron_lite.layers.mixer import LedgerLine, Matrix, Mixer, TokenStep


class MLP(Mixer):
    """d -> f -> d with a squared ReLU."""

    LETTERS: ClassVar[Mapping[str, str]] = {"f": "intermediate_size"}

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.up_proj = linear(hidden_size, intermediate_size, bias)
        self.down_proj = linear(intermediate_size, hidden_size, bias)

    @classmethod
    def build(cls, config: NemotronConfig, name: str) -> MLP:
        """The mixer of a `-` layer."""
        return cls(config.hidden_size, config.intermediate_size, config.mlp_bias)

    def init_weights(
        self, std: float, residual_divisor: float, generator: torch.Generator | None = None
    ) -> None:
        """Normal matrices; `down_proj` writes into the residual stream."""
        self.up_proj.init_weights(std, generator=generator)
        self.down_proj.init_weights(std, residual_divisor, generator)

    def forward(
        self, x: Float[Tensor, "*rows d"], cache: None = None, context: ForwardContext | None = None
    ) -> Float[Tensor, "*kept d"]:
        """Each token by itself; `cache` is what other mixers need."""
        if context is not None:
            x = context.kept(x)
        return self.down_proj(ops.squared_relu(self.up_proj(x)))

    def token_step(self, rows: int) -> TokenStep:
        """The step of `forward` for one token per row."""
        up, down = self.up_proj.product_for(rows), self.down_proj.product_for(rows)

        def step(x: Tensor, cache: None = None, starts: int | Tensor = 0) -> Tensor:
            return down(ops.squared_relu(up(x)))

        return step

    def compiled_part(self) -> MlpStruct:
        """Both matrices."""
        return MlpStruct(LinearStruct.of(self.up_proj), LinearStruct.of(self.down_proj))

    @classmethod
    def parameter_lines(cls, config: NemotronConfig) -> list[LedgerLine]:
        """Its parameters."""
        lines = [LedgerLine("up_proj, down_proj", "2 * d * f")]
        return [*lines, LedgerLine("biases", "f + d")] if config.mlp_bias else lines

    @classmethod
    def flop_lines(cls, config: NemotronConfig, mode: str) -> list[LedgerLine]:
        """Its FLOPs per token, the same in every mode."""
        return [LedgerLine("up_proj, down_proj", "2 * 2*d * f")]

    @classmethod
    def matrices(cls, config: NemotronConfig) -> list[Matrix]:
        """The two matrices of a `-` layer."""
        size = config.hidden_size * config.intermediate_size
        return [Matrix("up_proj", "mlp", size), Matrix("down_proj", "mlp", size)]
