"""Triton kernels for the Nemotron 3 backbone: the last rung of the ladder.

Every kernel here computes what a function of `nemotron_lite.ops` defines, and is tested against
that definition in float64. The catalogue with floors, registers and measured times is
kernels/README.md.

Names are looked up when they are first used, so importing this package costs nothing and needs no
triton; using a kernel without triton is an error that says how to get it. The scan has the name of
its file, `nemotron_kernels.ssd.ssd`, so it is imported from there.

This package does not import nemotron_lite: the import runs the other way, through the one door of
each operation.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "causal_conv1d": "conv",
    "causal_conv1d_step": "conv_step",
    "expert_mlp": "experts",
    "gated_rms_norm": "norm",
    "mamba_chunk_scan_combined": "ssd",
    "nvfp4_amax": "nvfp4_quantizer",
    "nvfp4_dequantize": "nvfp4_dequantizer",
    "nvfp4_expert_mlp": "nvfp4_experts",
    "nvfp4_fake_quantize": "nvfp4_quantizer",
    "nvfp4_matmul": "nvfp4_gemm",
    "nvfp4_quantize": "nvfp4_quantizer",
    "rms_norm": "norm",
    "rmsnorm_fn": "norm",
    "route": "routing",
    "route_logits": "routing",
    "selective_state_update": "state_update",
    "sort_by_expert": "sorting",
    "verify": "verification",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        names = ", ".join(repr(known) for known in __all__)
        raise AttributeError(f"nemotron_kernels has no {name!r}; it has {names}.")
    import_module("nemotron_kernels._compat")  # first: without triton it says what to do
    return getattr(import_module(f"nemotron_kernels.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
