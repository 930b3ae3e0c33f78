"""y = x W^T with W packed in NVFP4, decoded in registers or multiplied directly in NVFP4.

    y = (sum_k x_k e2m1(code_k) c_k) s_dec        c: the block's scale, s_dec: the tensor's

A code times its block's scale is exact in 16 bits (`nvfp4_decode`). So ordinary tensor cores with
float32 sums compute the products, and s_dec is applied once, to the sum. Which kernel runs:

    x float, one row           `nvfp4_matvec`: W read once, no tensor cores
    x float                    `_rows_kernel`: tiles of W decoded in registers, `tl.dot` in the type
                               of x. Also for stacks of experts (`grouped_rows`), where each tile
                               of rows has its own expert's matrix.
    x of 16 bits, MANY rows    W decoded once, into memory, and cuBLAS: each tile of rows would
                               decode W again
    x packed, sm_80 to sm_90   `_packed_kernel`: both decoded, `tl.dot` in float16
    x packed, from sm_100      `_packed_kernel` with `tl.dot_scaled`: Blackwell's tensor cores read
                               codes and scales directly. Up to 16 rows it decodes there too.

`tl.dot_scaled` with E4M3 scales does not compile for sm_90 with Triton 3.6, and the interpreter is
silently wrong (it takes the scale for a power of two). So SCALED is false in the interpreter, as on
sm_90: addresses, masks and sums are tested, but not the instruction itself. A test checks that the
compiled code contains the instruction (tests/kernels/test_nvfp4_listing.py:
`tcgen05.mma ... mxf4nvf4.block_scale`, `mma.sync ... mxf4nvf4`). Only a Blackwell GPU can show that
its result is right, above all that each scale is applied to its block. W is packed along k, as
sm_120 requires, and each sum has one dot.

float32 x is multiplied exactly without tensor cores ("ieee"), or on request with "tf32" or
"tf32x3". Rows beyond the last row of x are read as zeros. There is no bias, because no layer of
these models has one.

Source: reference sheet 6 and 10.3; Triton's tutorial 10 for `dot_scaled`. Left out: scales in the
128 x 4 order that tensor cores read fastest (a checkpoint has them row by row), gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nemotron_kernels._compat import (
    DOT_F32,
    FLOATS,
    Config,
    arch,
    by_arch,
    cdiv,
    check_inputs,
    on_device,
    unit_stride,
)
from nemotron_kernels.grouped import PRECISIONS
from nemotron_kernels.nvfp4_decode import UNIT, Packed, decode_tile, packed_parts
from nemotron_kernels.nvfp4_dequantizer import nvfp4_dequantize
from nemotron_kernels.nvfp4_matvec import matvec
from nemotron_kernels.sorting import Order


def _rows_name(kernel: Any) -> str:
    sort = "_grouped" if kernel.constants["SORTED"] else ""
    return f"_nvfp4{sort}_rows" + ("_activate" if kernel.constants["ACTIVATE"] else "")


def _packed_name(kernel: Any) -> str:
    return "_nvfp4_packed" + ("_scaled" if kernel.constants["SCALED"] else "_decoded")


@triton.jit
def _bytes(at, row_inside, column_inside, WHOLE: tl.constexpr):
    """Load a tile of codes or scales; zero outside the matrix, which decodes to zero."""
    if WHOLE:
        return tl.load(at, mask=row_inside[:, None], other=0)
    return tl.load(at, mask=row_inside[:, None] & column_inside[None, :], other=0)


@triton.jit(repr=_rows_name)
def _rows_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    scale_ptr,
    y_ptr,
    pairs_ptr,
    starts_ptr,
    tile_experts_ptr,
    tile_starts_ptr,
    tokens,
    stride_x,
    stride_ce,
    stride_cn,
    stride_se,
    stride_sn,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    SORTED: tl.constexpr,
    GATHER: tl.constexpr,
    ACTIVATE: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across: tl.constexpr = (N + ROWS - 1) // ROWS
    filled: tl.constexpr = (K + 15) // 16 * 16
    tile = tl.program_id(0) // across  # neighbours share their rows, and their expert's matrix
    n = tl.program_id(0) % across * ROWS + tl.arange(0, ROWS)
    if SORTED:
        expert = tl.load(tile_experts_ptr + tile)
        if expert < 0:
            return
        place = tl.load(tile_starts_ptr + tile) + tl.arange(0, TOKENS)
        inside = place < tl.load(starts_ptr + expert + 1)
        expert = expert.to(tl.int64)
    else:
        expert = tl.full([], 0, tl.int64)
        place = tile * TOKENS + tl.arange(0, TOKENS)
        inside = place < tokens
    if GATHER:
        pair = tl.load(pairs_ptr + place, mask=inside, other=0)
        row = (pair // TOP_K).to(tl.int64)
    else:
        row = place.to(tl.int64)
    k, byte, block = tl.arange(0, DEPTH), tl.arange(0, DEPTH // 2), tl.arange(0, DEPTH // 16)
    x_at = x_ptr + row[:, None] * stride_x + k[None, :]
    wide = n.to(tl.int64)[:, None]
    codes_at = codes_ptr + expert * stride_ce + wide * stride_cn + byte[None, :]
    scales_at = scales_ptr + expert * stride_se + wide * stride_sn + block[None, :]
    sums = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
    for first in range(0, K, DEPTH):
        mask = inside[:, None]
        if K % DEPTH:  # the padding after column K may hold any codes
            mask = mask & (first + k < K)[None, :]
        x = tl.load(x_at, mask=mask, other=0.0)
        codes = _bytes(codes_at, n < N, first // 2 + byte < filled // 2, filled % DEPTH == 0)
        scales = _bytes(scales_at, n < N, first // 16 + block < filled // 16, filled % DEPTH == 0)
        w = decode_tile(codes, scales, ROWS, DEPTH).to(x.dtype)
        if DOT_F32:
            x, w = x.to(tl.float32), w.to(tl.float32)
        sums = tl.dot(x, tl.trans(w), sums, input_precision=PRECISION)
        x_at += DEPTH
        codes_at += DEPTH // 2
        scales_at += DEPTH // 16
    sums *= tl.load(scale_ptr + expert) * UNIT
    if ACTIVATE:
        sums = tl.where(sums < 0, 0.0, sums)  # not maximum(): a NaN has to stay one
        sums = sums * sums
    out = y_ptr + place.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out, sums.to(y_ptr.dtype.element_ty), mask=inside[:, None] & (n < N)[None, :])


@triton.jit(repr=_packed_name)
def _packed_kernel(
    x_codes_ptr,
    x_scales_ptr,
    x_scale_ptr,
    codes_ptr,
    scales_ptr,
    scale_ptr,
    y_ptr,
    tokens,
    stride_xc,
    stride_xs,
    stride_cn,
    stride_sn,
    N: tl.constexpr,
    K: tl.constexpr,
    SCALED: tl.constexpr,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across: tl.constexpr = (N + ROWS - 1) // ROWS
    filled: tl.constexpr = (K + 15) // 16 * 16
    whole: tl.constexpr = filled % DEPTH == 0
    token = tl.program_id(0) // across * TOKENS + tl.arange(0, TOKENS)
    n = tl.program_id(0) % across * ROWS + tl.arange(0, ROWS)
    byte, block = tl.arange(0, DEPTH // 2), tl.arange(0, DEPTH // 16)
    t, wide = token.to(tl.int64)[:, None], n.to(tl.int64)[:, None]
    x_codes_at = x_codes_ptr + t * stride_xc + byte[None, :]
    x_scales_at = x_scales_ptr + t * stride_xs + block[None, :]
    codes_at = codes_ptr + wide * stride_cn + byte[None, :]
    scales_at = scales_ptr + wide * stride_sn + block[None, :]
    sums = tl.zeros([TOKENS, ROWS], dtype=tl.float32)
    for first in range(0, K, DEPTH):
        byte_inside = first // 2 + byte < filled // 2
        block_inside = first // 16 + block < filled // 16
        x_codes = _bytes(x_codes_at, token < tokens, byte_inside, whole)
        if K % 16:  # the padding after column K may hold any codes
            last = 2 * byte[None, :] + first
            x_codes = tl.where(last + 1 < K, x_codes, tl.where(last < K, x_codes & 0xF, 0))
        x_scales = _bytes(x_scales_at, token < tokens, block_inside, whole)
        codes = _bytes(codes_at, n < N, byte_inside, whole)
        scales = _bytes(scales_at, n < N, block_inside, whole)
        if SCALED:
            x_scales = x_scales.to(tl.float8e4nv, bitcast=True)
            scales = scales.to(tl.float8e4nv, bitcast=True)
            sums = tl.dot_scaled(x_codes, x_scales, "e2m1", tl.trans(codes), scales, "e2m1", sums)
        else:
            x = decode_tile(x_codes, x_scales, TOKENS, DEPTH)
            w = decode_tile(codes, scales, ROWS, DEPTH)
            if DOT_F32:
                x, w = x.to(tl.float32), w.to(tl.float32)
            sums = tl.dot(x, tl.trans(w), sums)
        x_codes_at += DEPTH // 2
        x_scales_at += DEPTH // 16
        codes_at += DEPTH // 2
        scales_at += DEPTH // 16
    if not SCALED:
        sums *= UNIT * UNIT
    sums = sums * tl.load(x_scale_ptr) * tl.load(scale_ptr)
    out = y_ptr + t * N + n[None, :]
    tl.store(
        out, sums.to(y_ptr.dtype.element_ty), mask=(token < tokens)[:, None] & (n < N)[None, :]
    )


def _blocks(rows: int, depth: int, warps: int, stages: int) -> Config:
    return Config({"ROWS": rows, "DEPTH": depth}, num_warps=warps, num_stages=stages)


# Keys: bytes per element of x, then tokens of a tile. With few tokens the time is that of reading
# W, so blocks are deep. W needs half a byte of shared memory per value, so the 99 KiB of sm_120 are
# enough for every entry.
ROWS = {
    2: {
        16: {80: _blocks(32, 256, 4, 4)},
        32: {80: _blocks(64, 128, 4, 4)},
        64: {80: _blocks(128, 64, 4, 3)},
        128: {80: _blocks(128, 64, 8, 3)},
    },
    4: {
        16: {80: _blocks(64, 32, 4, 3)},
        32: {80: _blocks(64, 32, 4, 3)},
        64: {80: _blocks(64, 32, 4, 3)},
    },
}
MANY = 512  # four tiles of 128 rows, each of which would decode all of W; not yet measured
# Key: tokens of a tile. Where `dot_scaled` is used, tcgen05 needs 128 rows.
PACKED = {
    16: {80: _blocks(32, 256, 4, 3), 100: _blocks(32, 128, 4, 4)},
    128: {80: _blocks(128, 64, 8, 3), 100: _blocks(128, 256, 8, 2), 120: _blocks(128, 256, 8, 2)},
}


def grouped_rows(
    a: Tensor, w: Packed, order: Order, top_k: int, precision: str, *, gather: bool, activate: bool
) -> Tensor:
    """`C[i] = A[i] W_e^T` for the sorted rows i of each expert e; as `grouped.grouped_rows`.

    Args:
        a: `t K` when `gather` (row i is its token), otherwise the sorted rows `n K`.
        w: a stack `e N K`.
        order: from `sort_by_expert`.
        top_k: pairs per token.
        precision: one of PRECISIONS; only matters for float32.
        activate: apply the squared ReLU.
    """
    rows = order.pairs.numel()
    return _rows(a, w, rows, a.dtype, order.tile_rows, precision, order, top_k, gather, activate)


def _rows(
    x: Tensor,
    w: Packed,
    rows: int,
    dtype: torch.dtype,
    tile: int,
    precision: str,
    order: Order | None = None,
    top_k: int = 1,
    gather: bool = False,
    activate: bool = False,
) -> Tensor:
    n, k = w.shape[-2:]
    codes, scales, strides = packed_parts(w)
    y = torch.empty(rows, n, device=x.device, dtype=dtype)
    config = by_arch(ROWS[x.dtype.itemsize][tile])
    tiles = cdiv(rows, tile) if order is None else order.tile_experts.numel()
    sort: tuple[Tensor | None, ...] = (None,) * 4
    if order is not None:
        sort = order.pairs, order.starts, order.tile_experts, order.tile_starts
    with on_device(x):
        _rows_kernel[(tiles * cdiv(n, config["ROWS"]),)](
            x,
            codes,
            scales,
            w.scale,
            y,
            *sort,
            rows,
            x.stride(0),
            *strides,
            N=n,
            K=k,
            TOP_K=top_k,
            SORTED=order is not None,
            GATHER=gather,
            ACTIVATE=activate,
            PRECISION=precision,
            TOKENS=tile,
            **config.kwargs,
        )
    return y


def _packed(x: Packed, w: Packed, rows: int, dtype: torch.dtype) -> Tensor:
    n, k = w.shape
    x_codes, x_scales = x.codes.flatten(0, -2), x.scales.flatten(0, -2).view(torch.uint8)
    x_codes, x_scales = unit_stride(x_codes), unit_stride(x_scales)
    codes, scales, strides = packed_parts(w)
    y = torch.empty(rows, n, device=x_codes.device, dtype=dtype)
    tile = next((t for t in PACKED if t >= rows), max(PACKED))
    config = by_arch(PACKED[tile])
    with on_device(x_codes):
        _packed_kernel[(cdiv(rows, tile) * cdiv(n, config["ROWS"]),)](
            x_codes,
            x_scales,
            x.scale,
            codes,
            scales,
            w.scale,
            y,
            rows,
            x_codes.stride(0),
            x_scales.stride(0),
            strides[1],
            strides[3],
            N=n,
            K=k,
            SCALED=tile == 128 and arch() >= 100,
            TOKENS=tile,
            **config.kwargs,
        )
    return y


@dataclass
class _Unscaled:
    """A packed matrix whose tensor scale is one: its values are exact in 16 bits."""

    codes: Tensor
    scales: Tensor
    scale: Tensor
    shape: tuple[int, ...]


@torch.no_grad()
def _decoded_once(x: Tensor, w: Packed, dtype: torch.dtype) -> Tensor:
    """Decode W without s_dec, multiply, then scale the float32 sums by s_dec."""
    plain = _Unscaled(w.codes, w.scales, torch.ones_like(w.scale), w.shape)
    values = nvfp4_dequantize(plain, x.dtype).t()
    if x.is_cuda:
        sums = torch.mm(x, values, out_dtype=torch.float32)
    else:
        sums = x.float() @ values.float()
    y = torch.empty(sums.shape, dtype=dtype, device=x.device)
    return torch.mul(sums, w.scale, out=y)


def nvfp4_matmul(
    x: Float[Tensor, "*rows k"] | Packed,
    w: Packed,
    dtype: torch.dtype | None = None,
    *,
    input_precision: str = "ieee",
) -> Float[Tensor, "*rows n"]:
    """x W^T with a packed W, summed in float32.

    Args:
        x: float32, bfloat16 or float16; or packed, with one scale.
        w: `n k`, with one scale.
        dtype: of the result; by default the dtype of x, or float32 if x is packed.
        input_precision: precision of float32 products: "ieee" (full), "tf32" or "tf32x3".

    Raises:
        ValueError: shapes that do not fit, an unknown `input_precision`, float64.
        RuntimeError: tensors on the CPU outside the interpreter.
    """
    given = (x,) if isinstance(x, Tensor) else (x.codes, x.scales.view(torch.uint8), x.scale)
    check_inputs("nvfp4_matmul", *given, w.codes, w.scales.view(torch.uint8), w.scale)
    dtype = dtype or (x.dtype if isinstance(x, Tensor) else torch.float32)
    if dtype not in FLOATS:
        known = ", ".join(map(str, FLOATS))
        raise ValueError(f"nvfp4_matmul: the kernel writes {known}, not {dtype}.")
    if input_precision not in PRECISIONS:
        known = ", ".join(repr(name) for name in PRECISIONS)
        raise ValueError(f"nvfp4_matmul: input_precision={input_precision!r} is none of {known}.")
    scales = w.scale.numel() * (1 if isinstance(x, Tensor) else x.scale.numel())
    if len(w.shape) != 2 or x.shape[-1] != w.shape[-1] or scales != 1:
        raise ValueError(
            f"nvfp4_matmul: x has shape {tuple(x.shape)} and w {tuple(w.shape)}, expected (.., k) "
            "and one matrix (n, k), each with one scale if it is packed."
        )
    *leading, k = x.shape
    n, rows = w.shape[0], torch.Size(leading).numel()
    if rows == 0:
        y = torch.empty(0, n, device=w.codes.device, dtype=dtype)
    elif not isinstance(x, Tensor):
        y = _packed(x, w, rows, dtype)
    elif rows == 1:
        y = matvec(unit_stride(x.reshape(rows, k)), w, dtype)
    elif rows >= MANY and x.dtype.itemsize == 2:
        y = _decoded_once(x.reshape(rows, k), w, dtype)
    else:
        choices = ROWS[x.dtype.itemsize]
        tile = next((t for t in choices if t >= rows), max(choices))
        y = _rows(unit_stride(x.reshape(rows, k)), w, rows, dtype, tile, input_precision)
    return y.view(*leading, n)
