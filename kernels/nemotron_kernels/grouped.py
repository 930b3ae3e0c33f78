"""Matrix products of rows sorted by expert, each block of rows with its own expert's matrix.

    rows:     C[i] = A[i] B_e            for the rows i of expert e      (`grouped_rows`)
    weights:  C_e  = sum_i S[i]^T G[i]   over the rows i of expert e     (`grouped_outer`)

`grouped_rows` is used for the two products of the forward pass, and for the two of the backward
pass whose result is rows. Its *stage* is what it does with the result while it is in registers:

    PLAIN       C = A B
    ACTIVATE    C = relu(A B)^2
    BACKWARD    C = 2 w sqrt(a) (A B),  and  sum over columns of a (A B), the weight's gradient,
                where a = relu(h)^2 was kept, so sqrt(a) = relu(h)

Rows are read without a copy: a row of A is either a sorted row or the token it came from, so no
sorted copy of the tokens is written. `grouped_outer` does the same for G, and can scale each row of
G by its router weight.

Accumulation is in float32. For float32 operands `precision` says how the product is formed: "ieee"
is exact and runs without tensor cores; "tf32" (10 bits of mantissa) and "tf32x3" use tensor
cores, and are never the default.

Each program writes its own part of the result, so there are no atomics, and every run gives the
same bits.
Source: the grouped products of MegaBlocks and of Triton's tutorial 8, for a tile map that never
leaves the device. Left out: tensor memory accelerator, persistent programs.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_kernels._compat import DOT_F32, Config, by_arch, cdiv, on_device
from nemotron_kernels.sorting import Order

PLAIN, ACTIVATE, BACKWARD = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PRECISIONS = ("ieee", "tf32", "tf32x3")


@triton.jit
def _dot(a, b, sums, PRECISION: tl.constexpr):
    if DOT_F32:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision=PRECISION)


def _rows_name(kernel: Any) -> str:
    stage = ("plain", "activate", "backward")[kernel.constants["STAGE"]]
    return f"_grouped_rows_{stage}"


def _outer_name(kernel: Any) -> str:
    return "_grouped_outer" + ("_weighted" if kernel.constants["WEIGHTED"] else "")


@triton.jit(repr=_rows_name)
def _grouped_rows_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    active_ptr,
    weights_ptr,
    partial_ptr,
    pairs_ptr,
    starts_ptr,
    tile_experts_ptr,
    tile_starts_ptr,
    stride_a,
    stride_be,
    stride_bk,
    stride_bn,
    stride_partial,
    N: tl.constexpr,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    STAGE: tl.constexpr,
    GATHER: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    tile = tl.program_id(0) // across  # neighbours share their rows, and their expert's matrix
    column = tl.program_id(0) % across
    expert = tl.load(tile_experts_ptr + tile)
    if expert < 0:
        return
    place = tl.load(tile_starts_ptr + tile) + tl.arange(0, ROWS)
    inside = place < tl.load(starts_ptr + expert + 1)
    pair = tl.load(pairs_ptr + place, mask=inside, other=0)
    if GATHER:
        row = (pair // TOP_K).to(tl.int64)
    else:
        row = tl.where(inside, place, 0).to(tl.int64)
    n = column * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    # Rows after the expert's last one read row 0: they are computed, but never stored.
    a_at = a_ptr + row[:, None] * stride_a + k[None, :]
    b_at = b_ptr + expert.to(tl.int64) * stride_be
    b_at += k.to(tl.int64)[:, None] * stride_bk + n.to(tl.int64)[None, :] * stride_bn
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(0, K, DEPTH):
        if K % DEPTH == 0:
            a = tl.load(a_at)
            b = tl.load(b_at, mask=(n < N)[None, :], other=0.0)
        else:
            a = tl.load(a_at, mask=(first + k < K)[None, :], other=0.0)
            b = tl.load(b_at, mask=(first + k < K)[:, None] & (n < N)[None, :], other=0.0)
        sums = _dot(a, b, sums, PRECISION)
        a_at += DEPTH
        b_at += DEPTH * stride_bk

    out = place.to(tl.int64)[:, None] * N + n[None, :]
    mask = inside[:, None] & (n < N)[None, :]
    if STAGE == ACTIVATE:
        sums = tl.where(sums < 0, 0.0, sums)  # not maximum(): NaN must stay NaN
        sums = sums * sums
    if STAGE == BACKWARD:
        active = tl.load(active_ptr + out, mask=mask, other=0.0).to(tl.float32)
        weight = tl.load(weights_ptr + pair, mask=inside, other=0.0).to(tl.float32)
        share = tl.sum(sums * active, axis=1)
        at = partial_ptr + column.to(tl.int64) * stride_partial + pair
        tl.store(at, share, mask=inside)
        sums = sums * tl.sqrt(active) * (2.0 * weight)[:, None]
    tl.store(c_ptr + out, sums.to(c_ptr.dtype.element_ty), mask=mask)


@triton.jit(repr=_outer_name)
def _grouped_outer_kernel(
    s_ptr,
    g_ptr,
    weights_ptr,
    c_ptr,
    pairs_ptr,
    starts_ptr,
    stride_g,
    stride_cm,
    stride_cn,
    M: tl.constexpr,
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    down: tl.constexpr = (M + ROWS - 1) // ROWS
    across: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    expert = tl.program_id(0) // (down * across)
    m = tl.program_id(0) // across % down * ROWS + tl.arange(0, ROWS)
    n = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(starts_ptr + expert)
    stop = tl.load(starts_ptr + expert + 1)
    sums = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in range(start, stop, DEPTH):
        place = first + tl.arange(0, DEPTH)
        inside = place < stop
        pair = tl.load(pairs_ptr + place, mask=inside, other=0)
        s_at = s_ptr + place.to(tl.int64)[:, None] * M + m[None, :]
        s = tl.load(s_at, mask=inside[:, None] & (m < M)[None, :], other=0.0)
        g_at = g_ptr + (pair // TOP_K).to(tl.int64)[:, None] * stride_g + n[None, :]
        g = tl.load(g_at, mask=inside[:, None] & (n < N)[None, :], other=0.0)
        if WEIGHTED:
            weight = tl.load(weights_ptr + pair, mask=inside, other=0.0).to(tl.float32)
            g = (g.to(tl.float32) * weight[:, None]).to(g.dtype)
        sums = _dot(tl.trans(s), g, sums, PRECISION)
    # For an expert without tokens the loop does not run, and the gradient is the initial zero.
    at = c_ptr + expert.to(tl.int64) * (M * N)
    at += m.to(tl.int64)[:, None] * stride_cm + n.to(tl.int64)[None, :] * stride_cn
    mask = (m < M)[:, None] & (n < N)[None, :]
    tl.store(at, sums.to(c_ptr.dtype.element_ty), mask=mask)


def _blocks(columns: int, depth: int, warps: int, stages: int) -> Config:
    return Config({"COLUMNS": columns, "DEPTH": depth}, num_warps=warps, num_stages=stages)


# Keys: bytes per element, then rows of a tile. With few rows the time is that of reading the
# matrices, so blocks are deep and many loads are in flight. With many rows tensor cores matter; on
# Hopper they need 64 rows and 4 warps. sm_120 has 99 KiB of shared memory per program, the others
# 163 KiB or more.
ROWS = {
    2: {
        16: {80: _blocks(64, 128, 4, 4)},
        32: {80: _blocks(64, 128, 4, 3)},
        64: {80: _blocks(128, 64, 4, 4), 120: _blocks(128, 64, 4, 3)},
        128: {80: _blocks(128, 64, 8, 4), 90: _blocks(128, 64, 8, 3)},
    },
    4: {
        16: {80: _blocks(64, 32, 4, 3)},
        32: {80: _blocks(64, 32, 4, 3)},
        64: {80: _blocks(64, 32, 4, 3)},
    },
}
OUTER = {
    2: {80: Config({"ROWS": 128, "COLUMNS": 128, "DEPTH": 64}, num_warps=8, num_stages=2)},
    4: {80: Config({"ROWS": 64, "COLUMNS": 64, "DEPTH": 32}, num_warps=8, num_stages=2)},
}


def tile_rows(pairs: int, experts: int, dtype: torch.dtype) -> int:
    """Rows of a tile: about the rows of one expert, so that few tiles are mostly empty."""
    choices = ROWS[dtype.itemsize]
    share = cdiv(pairs, experts)
    return next((rows for rows in choices if rows >= share), max(choices))


def grouped_rows(
    a: Tensor,
    b: Tensor,
    order: Order,
    top_k: int,
    precision: str,
    *,
    transposed: bool,
    gather: bool,
    activate: bool = False,
) -> Tensor:
    """`C[i] = A[i] B_e` over sorted rows; `B_e = b[e]`, or `b[e].T` when `transposed`.

    Args:
        a: `t K` when `gather` (row i is its token), otherwise the sorted rows `n K`.
        b: `e K N`, or `e N K` when `transposed`; any strides.
        order: from `sort_by_expert`.
        top_k: pairs per token.
        precision: one of PRECISIONS; only matters for float32.
        activate: apply the squared ReLU.

    Returns:
        `n N`, in the type of `a`.
    """
    c, _ = _rows(a, b, order, top_k, precision, transposed, gather, activate, None, None)
    return c


def grouped_rows_backward(
    grad: Tensor,
    b: Tensor,
    order: Order,
    top_k: int,
    precision: str,
    active: Tensor,
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Backward of the second matrix and the activation: `(dh, dweights)`.

    Args:
        grad: `t K`, the gradient of the weighted sum.
        b: `e K N`: the experts' second matrices.
        active: `n N`, relu(h)^2 of the sorted rows.
        weights: `t k`, the router's.

    Returns:
        dh `n N` in the type of `grad`; dweights, one float32 per pair, in the order of the pairs.
    """
    c, partial = _rows(grad, b, order, top_k, precision, False, True, False, active, weights)
    assert partial is not None
    return c, partial.sum(0)


def _rows(
    a: Tensor,
    b: Tensor,
    order: Order,
    top_k: int,
    precision: str,
    transposed: bool,
    gather: bool,
    activate: bool,
    active: Tensor | None,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    pairs, depth = order.pairs.numel(), a.shape[1]
    columns = b.shape[1 if transposed else 2]
    config = by_arch(ROWS[a.dtype.itemsize][order.tile_rows])
    across = cdiv(columns, config["COLUMNS"])
    c = torch.empty(pairs, columns, device=a.device, dtype=a.dtype)
    partial = None
    if active is not None:
        partial = torch.empty(across, pairs, device=a.device, dtype=torch.float32)
    stride_k, stride_n = (b.stride(2), b.stride(1)) if transposed else (b.stride(1), b.stride(2))
    stage = BACKWARD if active is not None else ACTIVATE if activate else PLAIN
    with on_device(a):
        _grouped_rows_kernel[(order.tile_experts.numel() * across,)](
            a,
            b,
            c,
            c if active is None else active,  # pointers that only the backward stage reads
            order.pairs if weights is None else weights,
            c if partial is None else partial,
            order.pairs,
            order.starts,
            order.tile_experts,
            order.tile_starts,
            a.stride(0),
            b.stride(0),
            stride_k,
            stride_n,
            pairs,
            N=columns,
            K=depth,
            TOP_K=top_k,
            STAGE=stage.value,
            GATHER=gather,
            PRECISION=precision,
            ROWS=order.tile_rows,
            **config.kwargs,
        )
    return c, partial


def grouped_outer(
    rows: Tensor,
    tokens: Tensor,
    order: Order,
    top_k: int,
    precision: str,
    *,
    experts: int,
    weights: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """`C_e = sum_i w_i rows[i]^T tokens[token of i]`, the gradient of an expert's matrix.

    Args:
        rows: `n M`, sorted.
        tokens: `t N`; gathered.
        weights: `t k` factors of the pairs, or None for 1.
        transposed: return `C_e^T`.

    Returns:
        `e M N`, or `e N M` when `transposed`, in the type of `rows`.
    """
    m, n = rows.shape[1], tokens.shape[1]
    shape = (experts, n, m) if transposed else (experts, m, n)
    c = torch.empty(shape, device=rows.device, dtype=rows.dtype)
    stride_m, stride_n = (1, m) if transposed else (n, 1)
    config = by_arch(OUTER[rows.dtype.itemsize])
    grid = experts * cdiv(m, config["ROWS"]) * cdiv(n, config["COLUMNS"])
    with on_device(rows):
        _grouped_outer_kernel[(grid,)](
            rows,
            tokens,
            order.pairs if weights is None else weights,
            c,
            order.pairs,
            order.starts,
            tokens.stride(0),
            stride_m,
            stride_n,
            M=m,
            N=n,
            TOP_K=top_k,
            WEIGHTED=weights is not None,
            PRECISION=precision,
            **config.kwargs,
        )
    return c
