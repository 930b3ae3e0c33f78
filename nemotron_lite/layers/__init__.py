"""The parts a Nemotron model is made of, as `nn.Module`s over `nemotron_lite.ops`.

Each mixer has the same call, `mixer(x, past, span)`: the tokens, what this layer remembers of those
before (changed in place), and where they stand. `Block` adds the norm and the residual sum.
"""

from nemotron_lite.layers.attention import Attention, KVCache
from nemotron_lite.layers.block import Block, Memory
from nemotron_lite.layers.linear import Linear
from nemotron_lite.layers.mamba import GatedRMSNorm, Mamba2, MambaMemory
from nemotron_lite.layers.mlp import MLP
from nemotron_lite.layers.moe import Experts, MoE, Router
from nemotron_lite.layers.mtp import MTP
from nemotron_lite.layers.norm import RMSNorm
from nemotron_lite.layers.quantised import MXFP8Linear, NVFP4Experts, NVFP4Linear
from nemotron_lite.layers.span import RouterStats, Span

__all__ = [
    "MLP",
    "MTP",
    "Attention",
    "Block",
    "Experts",
    "GatedRMSNorm",
    "KVCache",
    "Linear",
    "MXFP8Linear",
    "Mamba2",
    "MambaMemory",
    "Memory",
    "MoE",
    "NVFP4Experts",
    "NVFP4Linear",
    "RMSNorm",
    "Router",
    "RouterStats",
    "Span",
]
