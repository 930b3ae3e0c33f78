"""The parts a Nemotron model is made of, as `nn.Module`s over `nemotron_lite.ops`.

mixer       what every mixer provides: initial weights, a cache, lines of the ledger, matrices
mamba2      Mamba-2        attention   grouped-query attention
moe         LatentMoE      mlp         two matrices
block       a norm, one mixer and the residual sum; which mixer each pattern letter stands for
mtp         the multi-token prediction module
context     the positions of one call's tokens
linear, norm, conv   a matrix; RMSNorm; the causal convolution
one_token            a decoded token through the layers with few calls, or in compiled code

All mixers are called alike, `mixer(x, cache, context)`: the tokens, the layer's cache (changed in
place), and the positions of the tokens.
"""

from nemotron_lite.layers.attention import Attention, KVCache
from nemotron_lite.layers.block import MIXERS, Block, run_layers
from nemotron_lite.layers.context import ForwardContext, RouterStats
from nemotron_lite.layers.conv import CausalConv1d
from nemotron_lite.layers.linear import BiasedLinear, Linear, plain_weight
from nemotron_lite.layers.mamba2 import GatedRMSNorm, Mamba2, MambaCache
from nemotron_lite.layers.mixer import CacheOptions, LayerCache, LedgerLine, Matrix, Mixer
from nemotron_lite.layers.mlp import MLP
from nemotron_lite.layers.moe import Experts, MoE, Router
from nemotron_lite.layers.mtp import MTP
from nemotron_lite.layers.norm import RMSNorm
from nemotron_lite.layers.one_token import TokenSteps, compiled_decoding, decodes_compiled

__all__ = [
    "MIXERS",
    "MLP",
    "MTP",
    "Attention",
    "BiasedLinear",
    "Block",
    "CacheOptions",
    "CausalConv1d",
    "Experts",
    "ForwardContext",
    "GatedRMSNorm",
    "KVCache",
    "LayerCache",
    "LedgerLine",
    "Linear",
    "Mamba2",
    "MambaCache",
    "Matrix",
    "Mixer",
    "MoE",
    "RMSNorm",
    "Router",
    "RouterStats",
    "TokenSteps",
    "compiled_decoding",
    "decodes_compiled",
    "plain_weight",
    "run_layers",
]
