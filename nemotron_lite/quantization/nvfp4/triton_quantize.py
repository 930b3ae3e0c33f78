"""`quantize` and `fake_quantize` by Triton kernels: what `impl="triton"` runs.

There are two passes over memory. The first finds amax, which has to be known before a block can be
scaled; the second does the rest. Between them the CPU waits for amax, because a tensor with NaN or
infinity is refused here as in every implementation. A caller that knows its amax can call
`nemotron_kernels` without this wait.

The bits are those of the definition, including the sign of zeros.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemotron_lite.backends import triton
from nemotron_lite.quantization.nvfp4.scaling import check_finite
from nemotron_lite.quantization.nvfp4.tensor import (
    QuantizedTensor,
    QuantizeOptions,
    check,
    naive_fake_quantize,
    naive_quantize,
)


def triton_quantize(x: Tensor, options: QuantizeOptions) -> QuantizedTensor:
    """`quantize(impl="triton")`."""
    check(x, options)
    if x.numel() == 0:
        return naive_quantize(x, options)
    x = x.detach()
    codes, scales, scale = triton.nvfp4_quantize(x, _amax(x, options), **_kernel_options(options))
    *lead, n = x.shape
    columns = 2 * codes.shape[-1] if options.hadamard else n
    scales = scales.view(torch.float8_e4m3fn)
    return QuantizedTensor(codes, scales, scale, (*lead, columns), options.block)


def triton_fake_quantize(x: Tensor, dim: int, options: QuantizeOptions) -> Tensor:
    """`fake_quantize(impl="triton")`; `dim` is -1 or -2."""
    if dim == -2:
        return triton_fake_quantize(x.mT, -1, options.transposed()).mT
    check(x, options)
    if x.numel() == 0:
        return naive_fake_quantize(x, dim, options)
    x = x.detach()
    return triton.nvfp4_fake_quantize(x, _amax(x, options), **_kernel_options(options))


def _amax(x: Tensor, options: QuantizeOptions) -> Tensor:
    amax = triton.nvfp4_amax(x, hadamard=options.hadamard, batch_dims=options.batch_dims)
    check_finite(amax, options.name)
    if options.amax is None:
        return amax
    return check_finite(options.amax, f"amax of {options.name}")


def _kernel_options(options: QuantizeOptions) -> dict[str, Any]:
    return {
        "block": options.block,
        "hadamard": options.hadamard,
        "seed": options.seed,
        "bits": options.bits,
    }
