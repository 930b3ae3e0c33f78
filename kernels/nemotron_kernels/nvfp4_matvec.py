"""One row times a packed matrix, for decoding a token: its time is that of reading the matrix.

    y   = (sum_k x_k e2m1(code_k) c_k) s_dec
    y_i = W_e x                                   for each pair i = (token, slot) of experts

A program takes a tile of W's rows and reads it once, 4.5 bits per weight, along all of k. It uses
no tensor core: each weight needs one multiplication and one addition, and decoding it costs more
than that. Both columns of a byte stay in the same thread. For this, x is split into even and odd
columns, and threads exchange nothing before the final sum.

From two rows on, tensor cores are faster: `nvfp4_gemm`, with a tile of 16 rows. This is calculated,
not measured, from the instructions of sm_90: 7.1 per weight here (8.5 with two rows, in an earlier
version), and 8.0 there for up to 16 rows.

`chosen_matvec` is the same for experts: every pair reads only the matrix of its own expert.
Source: reference sheet 4.1. Left out: splitting k over programs for matrices with few rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_kernels._compat import Config, by_arch, cdiv, on_device
from nemotron_kernels.nvfp4_decode import UNIT, Packed, decode_halves, packed_parts


def _name(kernel: Any) -> str:
    stage = "_activate" if kernel.constants["ACTIVATE"] else ""
    return "_nvfp4" + ("_chosen" if kernel.constants["CHOSEN"] else "") + "_matvec" + stage


@triton.jit(repr=_name)
def _matvec_kernel(
    x_ptr,
    codes_ptr,
    scales_ptr,
    scale_ptr,
    indices_ptr,
    y_ptr,
    stride_x,
    stride_ce,
    stride_cn,
    stride_se,
    stride_sn,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    CHOSEN: tl.constexpr,
    ACTIVATE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    down: tl.constexpr = (N + ROWS - 1) // ROWS
    filled: tl.constexpr = (K + 15) // 16 * 16
    pair = tl.program_id(0) // down
    n = tl.program_id(0) % down * ROWS + tl.arange(0, ROWS)
    k, byte, block = tl.arange(0, DEPTH), tl.arange(0, DEPTH // 2), tl.arange(0, DEPTH // 16)
    expert = tl.full([], 0, tl.int64)
    if CHOSEN:
        expert = tl.load(indices_ptr + pair).to(tl.int64)
        tl.device_assert((expert >= 0) & (expert < E), "expert index out of range")
    x_at = x_ptr + (pair // PAIRS_PER_ROW).to(tl.int64) * stride_x + k
    wide = n.to(tl.int64)[:, None]
    codes_at = codes_ptr + expert * stride_ce + wide * stride_cn + byte[None, :]
    scales_at = scales_ptr + expert * stride_se + wide * stride_sn + block[None, :]
    sums = tl.zeros([ROWS, DEPTH // 16, 8], dtype=tl.float32)
    for first in range(0, K, DEPTH):
        # The padding after column K may hold any codes; x is loaded as zero there.
        x = tl.load(x_at, mask=first + k < K, other=0.0).to(tl.float32)
        x_even, x_odd = tl.split(tl.reshape(x, [1, DEPTH // 16, 8, 2]))
        inside = (n < N)[:, None] & (first // 2 + byte < filled // 2)[None, :]
        codes = tl.load(codes_at, mask=inside, other=0)
        inside = (n < N)[:, None] & (first // 16 + block < filled // 16)[None, :]
        scales = tl.load(scales_at, mask=inside, other=0)
        even, odd = decode_halves(codes, scales, ROWS, DEPTH)
        sums += even.to(tl.float32) * x_even
        sums += odd.to(tl.float32) * x_odd
        x_at += DEPTH
        codes_at += DEPTH // 2
        scales_at += DEPTH // 16
    y = tl.sum(tl.reshape(sums, [ROWS, DEPTH // 2]), axis=1)
    y *= tl.load(scale_ptr + expert) * UNIT
    if ACTIVATE:
        y = tl.where(y < 0, 0.0, y)  # not maximum(): NaN must stay NaN
        y = y * y
    out = y_ptr + pair.to(tl.int64) * N + n
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=n < N)


MATVEC = {
    0: Config({"ROWS": 32, "DEPTH": 128}),
    80: Config({"ROWS": 8, "DEPTH": 1024}, num_warps=4, num_stages=2),
}


def matvec(x: Tensor, w: Packed, dtype: torch.dtype) -> Tensor:
    """`x W^T` for one row `1 K` and one matrix `N K`, in `dtype`."""
    return _launch(x, w, dtype, None, False)


def chosen_matvec(x: Tensor, w: Packed, indices: Tensor, *, activate: bool) -> Tensor:
    """`y[pair] = W_e x[row of pair]` for a stack `e N K`; then squared ReLU if `activate`.

    Args:
        x: `t K`, or a row for each pair.
        indices: `t k`, contiguous: the expert of each pair.
    """
    return _launch(x, w, x.dtype, indices, activate)


def _launch(
    x: Tensor, w: Packed, dtype: torch.dtype, indices: Tensor | None, activate: bool
) -> Tensor:
    n, k = w.shape[-2:]
    codes, scales, strides = packed_parts(w)
    pairs = 1 if indices is None else indices.numel()
    y = torch.empty(pairs, n, device=x.device, dtype=dtype)
    config = by_arch(MATVEC)
    with on_device(x):
        _matvec_kernel[(pairs * cdiv(n, config["ROWS"]),)](
            x,
            codes,
            scales,
            w.scale,
            indices,
            y,
            x.stride(0),
            *strides,
            E=1 if indices is None else w.shape[0],
            N=n,
            K=k,
            PAIRS_PER_ROW=pairs // x.shape[0],
            CHOSEN=indices is not None,
            ACTIVATE=activate,
            **config.kwargs,
        )
    return y
