"""One residual layer: a norm, one mixer, and the sum.

    x <- x + Mixer(RMSNorm(x))

The hybrid has one mixer per layer, not a mixer and a feed-forward pair: what a Transformer calls a
block is here two layers, and the pattern string decides which kinds stand where.

Source: reference sheet 1.4.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers.attention import Attention, KVCache
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.mamba import Mamba2, MambaCache
from nemotron_lite.layers.mlp import MLP
from nemotron_lite.layers.moe import MoE
from nemotron_lite.layers.norm import RMSNorm

LayerCache = KVCache | MambaCache | None


class Block(nn.Module):
    """The layer of one pattern character: `M`, `*`, `E` or `-`."""

    def __init__(self, config: NemotronConfig, kind: str, name: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer: nn.Module
        if kind == "M":
            self.mixer = Mamba2(config)
        elif kind == "*":
            self.mixer = Attention(config)
        elif kind == "E":
            self.mixer = MoE(config, name=f"{name}.mixer")
        else:
            self.mixer = MLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        cache: LayerCache = None,
        context: ForwardContext = ForwardContext(),
    ) -> Float[Tensor, "b t d"]:
        """Add the mixer's answer to the residual stream."""
        return x + self.mixer(self.norm(x), cache, context)

    def answer_last(
        self, x: Float[Tensor, "b t d"], cache: KVCache, context: ForwardContext
    ) -> Float[Tensor, "b 1 d"]:
        """An attention layer's answer for the last real token of each row; all are remembered."""
        assert isinstance(self.mixer, Attention)
        return context.last(x) + self.mixer.answer_last(self.norm(x), cache, context)
