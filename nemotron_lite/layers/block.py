"""One residual layer: a norm, one mixer, and the sum.

    x <- x + Mixer(RMSNorm(x))

The hybrid has one mixer per layer, not a mixer and a feed-forward pair. What a Transformer calls a
block is here two layers, and the pattern string says which mixer each layer has.

Source: reference sheet 1.4.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemotron_lite.backends.cpu_norm import rms_norm
from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers.attention import Attention
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.mamba2 import Mamba2
from nemotron_lite.layers.mixer import LayerCache, LedgerLine, Mixer, TokenStep
from nemotron_lite.layers.mlp import MLP
from nemotron_lite.layers.moe import MoE
from nemotron_lite.layers.norm import RMSNorm

# Which mixer each character of a pattern stands for. `config.LAYER_KINDS` has the same characters.
MIXERS: dict[str, type[Mixer]] = {"M": Mamba2, "*": Attention, "E": MoE, "-": MLP}


class Block(nn.Module):
    """The layer of one pattern character; `MIXERS` lists them.

    Attributes:
        recompute: gradient checkpointing. The forward pass keeps only the block's input, and the
            backward pass computes the block once more. It changes no result, needs less memory,
            and takes about a third more time. It has no effect without gradients.
    """

    recompute = False

    def __init__(self, config: NemotronConfig, kind: str, name: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = MIXERS[kind].build(config, f"{name}.mixer")

    def init_weights(
        self, std: float, residual_divisor: float, generator: torch.Generator | None = None
    ) -> None:
        """Fresh weights for norm and mixer (see `Mixer.init_weights`)."""
        self.norm.init_weights()
        self.mixer.init_weights(std, residual_divisor, generator)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        cache: LayerCache | None = None,
        context: ForwardContext = ForwardContext(),
    ) -> Float[Tensor, "b _ d"]:
        """Add the mixer's output to the residual stream; `b 1 d` with `context.last_only`."""
        y = self.mixer(self.norm(x), cache, context)
        return context.kept(x) + y

    def token_step(self, rows: int) -> TokenStep:
        """The step of `forward` for one token per row (see `Mixer.token_step`)."""
        mix, weight, eps = self.mixer.token_step(rows), self.norm.weight, self.norm.eps

        def step(x: Tensor, cache: LayerCache | None, starts: int | Tensor) -> Tensor:
            return x + mix(rms_norm(x, weight, eps), cache, starts)

        return step

    @staticmethod
    def parameter_lines(config: NemotronConfig, kind: str) -> list[LedgerLine]:
        """Parameters of a layer of this kind, for the ledger: its norm and its mixer."""
        return [LedgerLine("prenorm", "d"), *MIXERS[kind].parameter_lines(config)]


def run_layers(
    layers: Iterable[nn.Module],
    x: Float[Tensor, "b t d"],
    cache: Sequence[LayerCache | None] | None,
    context: ForwardContext,
) -> Float[Tensor, "b t d"]:
    """The residual stream after `layers`.

    Args:
        layers: the blocks, in order.
        cache: one entry per block; None without a cache.
    """
    layers = list(layers)
    for layer, layer_cache in zip(layers, cache or [None] * len(layers), strict=True):
        if isinstance(layer, Block) and layer.recompute and torch.is_grad_enabled():
            x = checkpoint(layer, x, layer_cache, context, use_reentrant=False)
        else:
            x = layer(x, layer_cache, context)
    return x
