"""Decode NVFP4 in registers: a matrix product does this right before it multiplies.

A byte has two codes, the even column in its low 4 bits. E2M1 has the bits s ee m, and float16 has
s eeeee mmmmmmmmmm. With its bits at the same positions, `s 000ee m000000000`, a code is a float16
that is the value times 2^-14; this includes zeros and the subnormal 0.5. Both codes of a byte are
moved at once, by two multiplications and two masks:

    byte       hhhh llll           h: odd column, l: even column
    byte * (2^0 + 2^12)            l at bits 0..3, h at bits 16..19: the two halves of 32 bits
    << 9  & 0x0e000e00             exponent and mantissa of both
    << 12 & 0x80008000             signs of both

An E4M3 scale is s eeee mmm. As the upper bits of a float16 it is the scale times 2^-8. The decoded
tile is the product of both in float16, times 2^-9. It has six significant bits and values from
2^-19 to 5.25, so it is exact, also in bfloat16 and float32. The float32 sum is multiplied by `UNIT`
= 2^9, which restores the factor.

A scale of NaN (0x7f) makes its block NaN. In float16 the smallest values are subnormal, which
float16 arithmetic and tensor cores keep. They must not be flushed to zero by a compiler option.

Source: OCP Microscaling formats 1.0, 5.3.3; reference sheet 6.1. Left out: the conversion
instruction of sm_100, whose result could not be checked without such a GPU.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_kernels._compat import unit_stride

UNIT = tl.constexpr(512.0)


class Packed(Protocol):
    """The fields of `nemotron_lite.quantization.nvfp4.QuantizedTensor` that the kernels read."""

    codes: Tensor  # uint8 `*rows cols/2`, the even column in the low 4 bits of a byte
    scales: Tensor  # E4M3 `*rows cols/16`
    scale: Tensor  # float32, one, or one for each matrix of a stack
    shape: tuple[int, ...]  # of the values; cols is its last size, padded to a multiple of 16


def packed_parts(w: Packed) -> tuple[Tensor, Tensor, tuple[int, int, int, int]]:
    """Codes and scales as bytes contiguous along the rows, and their strides.

    The strides are those of matrix and row, first of the codes and then of the scales; the stride
    of a single matrix is 0. A stack of matrices that is not contiguous is not copied.
    """
    codes, scales = unit_stride(w.codes), unit_stride(w.scales.view(torch.uint8))
    strides = [
        part.stride(i) if part.ndim > -i - 1 else 0 for part in (codes, scales) for i in (-3, -2)
    ]
    return codes, scales, tuple(strides)  # type: ignore[return-value]


@triton.jit
def decode_pairs(codes):
    """uint8 -> two float16 tensors: the even columns and the odd ones, each times 2^-14."""
    byte = codes.to(tl.uint32)
    both = ((byte * (0x1001 << 9)) & 0x0E000E00) | ((byte * (0x1001 << 12)) & 0x80008000)
    even = (both & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    odd = (both >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return even, odd


@triton.jit
def decode_scales(bytes_):
    """E4M3 values in uint8 -> float16, times 2^5."""
    wide = bytes_.to(tl.uint16)
    bits = ((wide & 0x7F) << 7) | ((wide & 0x80) << 8)
    scales = bits.to(tl.float16, bitcast=True) * 8192.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), scales).to(tl.float16)


@triton.jit
def decode_halves(codes, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile's even and odd columns, divided by UNIT, each `ROWS, COLUMNS / 16, 8` in float16.

    codes `ROWS, COLUMNS / 2` and scales `ROWS, COLUMNS / 16` are uint8.
    """
    even, odd = decode_pairs(tl.reshape(codes, [ROWS, COLUMNS // 16, 8]))
    factor = decode_scales(scales)[:, :, None]
    return even * factor, odd * factor


@triton.jit
def decode_tile(codes, scales, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile divided by UNIT, `ROWS, COLUMNS` in float16; arguments as for `decode_halves`."""
    even, odd = decode_halves(codes, scales, ROWS, COLUMNS)
    return tl.reshape(tl.join(even, odd), [ROWS, COLUMNS])
