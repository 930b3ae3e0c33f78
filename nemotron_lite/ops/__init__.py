"""Pure functions over tensors: the mathematics of the model, one operation a file.

Each function takes `impl`. `"naive"` is the definition, written to be read; `"torch"` is one plain
PyTorch form, and `"cpu"` and `"triton"` are fast forms that live in `backends/`. `"auto"`, the
default, takes the fastest (`backends/dispatch.py`). All of them give the same numbers up to
rounding, and the tests check it.
"""

from nemotron_lite.ops.attention import causal_attention
from nemotron_lite.ops.conv import causal_conv1d, causal_conv1d_step, causal_conv1d_window
from nemotron_lite.ops.draft_scan import draft_decays, ssd_accept_draft, ssd_read_draft
from nemotron_lite.ops.experts import expert_mlp, squared_relu
from nemotron_lite.ops.linear import linear
from nemotron_lite.ops.norm import gated_rms_norm, rms_norm
from nemotron_lite.ops.routing import Routing, route
from nemotron_lite.ops.scan import selective_scan, ssd_step
from nemotron_lite.ops.ssd import chunked_scan, ssd
from nemotron_lite.ops.stochastic_rounding import RoundingSeeds, round_to_float16
from nemotron_lite.ops.verification import Verdict, draw, verify

__all__ = [
    "RoundingSeeds",
    "Routing",
    "Verdict",
    "causal_attention",
    "causal_conv1d",
    "causal_conv1d_step",
    "causal_conv1d_window",
    "chunked_scan",
    "draft_decays",
    "draw",
    "expert_mlp",
    "gated_rms_norm",
    "linear",
    "rms_norm",
    "round_to_float16",
    "route",
    "selective_scan",
    "squared_relu",
    "ssd",
    "ssd_accept_draft",
    "ssd_read_draft",
    "ssd_step",
    "verify",
]
