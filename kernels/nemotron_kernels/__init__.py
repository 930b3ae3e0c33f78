"""Triton kernels for the Nemotron 3 backbone: the fastest implementation of each operation.

Every kernel here computes what a function of `nemotron_lite.ops` defines, and is tested against
that definition in float64. The catalogue with memory bounds, registers and measured times is
kernels/README.md.

Names are imported when they are first used, so importing this package is cheap and needs no triton.
Using a kernel without triton raises an error that says how to install it. The scan has the same
name as its file, so import it as `nemotron_kernels.ssd.ssd`.

This package does not import nemotron_lite. nemotron_lite imports it, only in its `backends`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_FILE_OF = {
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

__all__ = sorted(_FILE_OF)


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        names = ", ".join(repr(known) for known in __all__)
        raise AttributeError(f"nemotron_kernels has no {name!r}; it has {names}.")
    import_module("nemotron_kernels._compat")  # first: its error says how to install triton
    return getattr(import_module(f"nemotron_kernels.{_FILE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
