"""The kernels behind `quantize` and `fake_quantize`: what `impl="triton"` runs.

Two passes over memory: one for amax, which has to be known before a block can be scaled, and one
for the rest. Between them the host waits for amax, because a tensor with NaN or infinity is refused
here as everywhere; a launcher that knows its amax can call `nemotron_kernels` without the wait.

Bits are those of the definition, the sign of zeros included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemotron_lite.backends import triton
from nemotron_lite.quantization.nvfp4.scaling import check_finite
from nemotron_lite.quantization.nvfp4.tensor import (
    Options,
    QuantizedTensor,
    check,
    naive_fake,
    naive_quantize,
)


def triton_quantize(x: Tensor, options: Options) -> QuantizedTensor:
    """`quantize(impl="triton")`."""
    check(x, options)
    if x.numel() == 0:
        return naive_quantize(x, options)
    x = x.detach()
    codes, scales, scale = triton.nvfp4_quantize(x, _amax(x, options), **_how(options))
    *lead, n = x.shape
    width = 2 * codes.shape[-1] if options.hadamard else n
    scales = scales.view(torch.float8_e4m3fn)
    return QuantizedTensor(codes, scales, scale, (*lead, width), options.block)


def triton_fake(x: Tensor, dim: int, options: Options) -> Tensor:
    """`fake_quantize(impl="triton")`; `dim` is -1 or -2."""
    if dim == -2:
        return triton_fake(x.mT, -1, options.turned()).mT
    check(x, options)
    if x.numel() == 0:
        return naive_fake(x, dim, options)
    x = x.detach()
    return triton.nvfp4_fake_quantize(x, _amax(x, options), **_how(options))


def _amax(x: Tensor, options: Options) -> Tensor:
    amax = triton.nvfp4_amax(x, hadamard=options.hadamard, batch_dims=options.batch_dims)
    check_finite(amax, options.name)
    if options.amax is None:
        return amax
    return check_finite(options.amax, f"amax of {options.name}")


def _how(options: Options) -> dict[str, Any]:
    return {
        "block": options.block,
        "hadamard": options.hadamard,
        "seed": options.seed,
        "bits": options.bits,
    }
