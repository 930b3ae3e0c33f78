"""Pure functions over tensors: the mathematics of the model, one idea a file.

Each operation has one door that takes `impl`: `"naive"` is the definition, written to be read;
`"torch"` is fast PyTorch; `"auto"` (the default) takes the fastest that can answer. All of them
give the same numbers up to rounding, and the tests hold them to it.
"""

from nemotron_lite.ops.attention import causal_attention
from nemotron_lite.ops.conv import causal_conv1d, causal_conv1d_step, causal_conv1d_window
from nemotron_lite.ops.draft_scan import draft_decays, ssd_peek, ssd_replay
from nemotron_lite.ops.experts import expert_mlp, squared_relu
from nemotron_lite.ops.linear import linear
from nemotron_lite.ops.norm import gated_rms_norm, rms_norm
from nemotron_lite.ops.routing import Routing, route
from nemotron_lite.ops.scan import selective_scan, ssd_step
from nemotron_lite.ops.ssd import ssd
from nemotron_lite.ops.stochastic_rounding import Dither, round_half
from nemotron_lite.ops.verification import Verdict, draw, verify

__all__ = [
    "Dither",
    "Routing",
    "Verdict",
    "causal_attention",
    "causal_conv1d",
    "causal_conv1d_step",
    "causal_conv1d_window",
    "draft_decays",
    "draw",
    "expert_mlp",
    "gated_rms_norm",
    "linear",
    "rms_norm",
    "round_half",
    "route",
    "selective_scan",
    "squared_relu",
    "ssd",
    "ssd_peek",
    "ssd_replay",
    "ssd_step",
    "verify",
]
