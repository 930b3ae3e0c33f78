"""The Triton kernels of `nemotron_kernels` as ordinary functions.

Each function imports its kernel when it is called. So `import nemotron_lite` works without triton,
and an editor can still follow the name to the kernel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def nvfp4_matmul(x: Any, w: Any, dtype: Any) -> Tensor:
    """x W^T with W in NVFP4, and x as floating point or in NVFP4."""
    from nemotron_kernels.nvfp4_gemm import nvfp4_matmul as kernel

    return kernel(x, w, dtype)


def nvfp4_expert_mlp(z: Tensor, up: Any, down: Any, weights: Tensor, indices: Tensor) -> Tensor:
    """The weighted sum of each token's experts, whose matrices are in NVFP4."""
    from nemotron_kernels.nvfp4_experts import nvfp4_expert_mlp as kernel

    return kernel(z, up, down, weights, indices)


def nvfp4_amax(x: Tensor, *, hadamard: bool, batch_dims: int) -> Tensor:
    """The largest magnitude of a tensor, or of each tensor of a batch."""
    from nemotron_kernels.nvfp4_quantizer import nvfp4_amax as kernel

    return kernel(x, hadamard=hadamard, batch_dims=batch_dims)


def nvfp4_quantize(x: Tensor, amax: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, block scales and tensor scale of x in NVFP4."""
    from nemotron_kernels.nvfp4_quantizer import nvfp4_quantize as kernel

    return kernel(x, amax, **options)


def nvfp4_fake_quantize(x: Tensor, amax: Tensor, **options: Any) -> Tensor:
    """x rounded to the values that NVFP4 can hold."""
    from nemotron_kernels.nvfp4_quantizer import nvfp4_fake_quantize as kernel

    return kernel(x, amax, **options)


def nvfp4_dequantize(w: Any, dtype: Any) -> Tensor:
    """The numbers of a tensor in NVFP4."""
    from nemotron_kernels.nvfp4_dequantizer import nvfp4_dequantize as kernel

    return kernel(w, dtype)
