"""The parts a Nemotron model is made of, as `nn.Module`s over `nemotron_lite.ops`.

Each mixer has the same call, `mixer(x, cache, context)`: the tokens, what this layer remembers of
those before (changed in place), and where they stand. `Block` adds the norm and the residual sum.
"""

from nemotron_lite.layers.attention import Attention, KVCache
from nemotron_lite.layers.block import Block, LayerCache
from nemotron_lite.layers.context import ForwardContext, RouterStats
from nemotron_lite.layers.linear import Linear
from nemotron_lite.layers.mamba import GatedRMSNorm, Mamba2, MambaCache
from nemotron_lite.layers.mlp import MLP
from nemotron_lite.layers.moe import Experts, MoE, Router
from nemotron_lite.layers.mtp import MTP
from nemotron_lite.layers.norm import RMSNorm

__all__ = [
    "MLP",
    "MTP",
    "Attention",
    "Block",
    "Experts",
    "ForwardContext",
    "GatedRMSNorm",
    "KVCache",
    "LayerCache",
    "Linear",
    "Mamba2",
    "MambaCache",
    "MoE",
    "RMSNorm",
    "Router",
    "RouterStats",
]
