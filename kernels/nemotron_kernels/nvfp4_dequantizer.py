"""Decode NVFP4 into memory: 0.5625 bytes read and 2 or 4 written per value.

    value = e2m1(code) * (c * s_dec)        in float32, rounded once to the requested dtype

This is for decoded matrices that must exist in memory: a checkpoint that is decoded, or a backward
pass. Matrix products read packed matrices themselves (`nvfp4_gemm`) and multiply only the sum by
s_dec. Here each value is multiplied by s_dec, in the order of the definition, and has the same bits
as there.

Source: reference sheet 6.1. Left out: scales in the 128 x 4 order of tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nemotron_kernels._compat import (
    FLOATS,
    Config,
    by_arch,
    cdiv,
    check_inputs,
    next_power_of_2,
    on_device,
)
from nemotron_kernels.nvfp4_decode import Packed, decode_pairs
from nemotron_kernels.nvfp4_rounding import decode_e4m3, rounded_to


@triton.jit
def _nvfp4_dequantize(
    codes_ptr,
    scales_ptr,
    scale_ptr,
    out_ptr,
    rows,
    columns,
    each,
    stride_c,
    stride_s,
    WHOLE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    across = tl.cdiv(columns, COLUMNS)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) % across * COLUMNS
    byte = first // 2 + tl.arange(0, COLUMNS // 2)
    block = first // 16 + tl.arange(0, COLUMNS // 16)
    inside = (row < rows)[:, None]
    has_codes = inside
    has_scale = inside
    if not WHOLE:  # WHOLE needs no column mask, and then loads are 16 bytes wide
        has_codes = inside & (byte < tl.cdiv(columns, 16) * 8)[None, :]
        has_scale = inside & (block < tl.cdiv(columns, 16))[None, :]
    codes = tl.load(codes_ptr + row[:, None] * stride_c + byte[None, :], mask=has_codes, other=0)
    scales = tl.load(scales_ptr + row[:, None] * stride_s + block[None, :], mask=has_scale, other=0)
    decode = tl.load(scale_ptr + row // each, mask=row < rows, other=0.0)
    # Quantizing never gives a scale of NaN, but a file may contain one.
    factor = tl.where((scales & 0x7F) == 0x7F, float("nan"), decode_e4m3(scales)) * decode[:, None]
    even, odd = decode_pairs(tl.reshape(codes, [ROWS, COLUMNS // 16, 8]))
    value = tl.reshape(tl.join(even, odd), [ROWS, COLUMNS // 16, 16]).to(tl.float32) * 16384.0
    value = tl.reshape(value * factor[:, :, None], [ROWS, COLUMNS])
    k = first + tl.arange(0, COLUMNS)
    tl.store(
        out_ptr + row[:, None] * columns + k[None, :],
        rounded_to(value, out_ptr.dtype.element_ty),
        mask=inside & (k < columns)[None, :],
    )


CONFIGS = {
    0: Config({"ROWS": 256, "COLUMNS": 128}, fp_fusion=False),
    80: Config({"ROWS": 16, "COLUMNS": 256}, num_warps=4, fp_fusion=False),
}


def nvfp4_dequantize(w: Packed, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
    """The values of a packed tensor, in `dtype`.

    Args:
        w: codes, scales and s_dec; one s_dec, or one for each tensor along leading dimensions.
        dtype: float32, bfloat16 or float16.

    Raises:
        ValueError: another dtype.
        RuntimeError: tensors on the CPU outside the interpreter.
    """
    scales = w.scales.view(torch.uint8)
    check_inputs("nvfp4_dequantize", w.codes, scales, w.scale)
    if dtype not in FLOATS:
        known = ", ".join(map(str, FLOATS))
        raise ValueError(f"nvfp4_dequantize: the kernel writes {known}, not {dtype}.")
    out = torch.empty(w.shape, dtype=dtype, device=w.codes.device)
    if out.numel() == 0:
        return out
    codes, scales = _rows(w.codes), _rows(scales)
    rows, columns = codes.shape[0], w.shape[-1]
    config = by_arch(CONFIGS)
    small = {
        "ROWS": min(config["ROWS"], next_power_of_2(rows)),
        "COLUMNS": min(config["COLUMNS"], max(16, next_power_of_2(columns))),
    }
    tiles = cdiv(rows, small["ROWS"]) * cdiv(columns, small["COLUMNS"])
    with on_device(codes):
        _nvfp4_dequantize[(tiles,)](
            codes,
            scales,
            w.scale.contiguous(),
            out,
            rows,
            columns,
            rows // w.scale.numel(),
            codes.stride(0),
            scales.stride(0),
            WHOLE=columns % small["COLUMNS"] == 0,
            **{**config.kwargs, **small},
        )
    return out


def _rows(part: Tensor) -> Tensor:
    """Bytes as a matrix that is contiguous along its rows; copied only if it is not."""
    flat = part.reshape(-1, part.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()
