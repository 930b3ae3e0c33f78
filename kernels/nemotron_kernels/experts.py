"""Routed experts: each token goes to its k experts, and their weighted outputs are summed.

    a_i = relu(W1_e z_t)^2          for each pair i = (token t, slot) with expert e
    o_t = sum_i p_i W2_e a_i        over the k pairs of token t

Many tokens: sort the pairs by expert (`sorting`), two grouped products (`grouped`), and one kernel
that sums each token's k outputs in the order of its slots. Activation and router weight are applied
while the values are in registers. The outputs are written to memory and read once. Adding them to
the tokens directly would need atomics, whose order, and so the last bits, change from run to run.

Few tokens (decoding): almost every expert has one row, so sorting is not worth its cost. One
program per pair and tile of rows reads the expert's matrix. When pairs share experts, the sorted
form is better, because it reads a matrix once for all of them. It is used from a quarter as many
pairs as experts; with uniform choices, 12 % of the pairs then repeat an expert. This threshold is
calculated, not measured.

Backward, from g = dL/do, with r = relu(h) = sqrt(a) so that only `a` is kept:

    u_i  = W2_e^T g_t            dp_i  = u_i . a_i            dh_i = 2 p_i u_i r_i
    dz_t = sum_i W1_e^T dh_i     dW1_e = sum_i dh_i z_t^T     dW2_e = sum_i p_i g_t a_i^T

Keeping `a` instead of h loses no precision: the square root halves the relative rounding error of
the square. In float16, a overflows where relu(h) > 256, as it does in PyTorch.

Source: reference sheet 4.1 (Nemotron 3 Super report 2.1.1). Left out: capacity limits, expert
parallelism, quantized weights.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_kernels._compat import (
    Config,
    by_arch,
    cdiv,
    check_inputs,
    on_device,
    unit_stride,
)
from nemotron_kernels.grouped import (
    PRECISIONS,
    grouped_outer,
    grouped_rows,
    grouped_rows_backward,
    tile_rows,
)
from nemotron_kernels.sorting import Order, sort_by_expert


@triton.jit
def _combine_kernel(
    rows_ptr,
    places_ptr,
    weights_ptr,
    out_ptr,
    tokens,
    TOP_K: tl.constexpr,
    WIDTH: tl.constexpr,
    SORTED: tl.constexpr,
    WEIGHTED: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """out[t] = sum_j w[t, j] rows[place of (t, j)], in float32 and in the order of the slots."""
    across: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    token = tl.program_id(0) // across * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    valid = token < tokens
    mask = valid[:, None] & (column < WIDTH)[None, :]
    sums = tl.zeros([TOKENS, COLUMNS], dtype=tl.float32)
    for j in range(TOP_K):
        pair = token.to(tl.int64) * TOP_K + j
        place = pair
        if SORTED:
            place = tl.load(places_ptr + pair, mask=valid, other=0).to(tl.int64)
        row = tl.load(rows_ptr + place[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
        row = row.to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights_ptr + pair, mask=valid, other=0.0).to(tl.float32)[:, None]
        sums += row
    out = out_ptr + token.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=mask)


def _matvec_name(kernel: Any) -> str:
    return "_matvec" + ("_activate" if kernel.constants["ACTIVATE"] else "_plain")


@triton.jit(repr=_matvec_name)
def _matvec_kernel(
    x_ptr,
    matrix_ptr,
    indices_ptr,
    y_ptr,
    stride_x,
    stride_e,
    stride_n,
    stride_k,
    E: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    ACTIVATE: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """y[pair] = matrix[expert of pair] x[row of pair], for one pair and one tile of its rows."""
    down: tl.constexpr = (N + ROWS - 1) // ROWS
    pair = tl.program_id(0) // down
    n = tl.program_id(0) % down * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, DEPTH)
    expert = tl.load(indices_ptr + pair).to(tl.int64)
    tl.device_assert((expert >= 0) & (expert < E), "expert index out of range")
    x_at = x_ptr + (pair // PAIRS_PER_ROW).to(tl.int64) * stride_x + k
    at = matrix_ptr + expert * stride_e
    at += n.to(tl.int64)[:, None] * stride_n + k.to(tl.int64)[None, :] * stride_k
    sums = tl.zeros([ROWS, DEPTH], dtype=tl.float32)
    for first in range(0, K, DEPTH):
        inside = first + k < K
        x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        matrix = tl.load(at, mask=(n < N)[:, None] & inside[None, :], other=0.0)
        sums += matrix.to(tl.float32) * x[None, :]
        x_at += DEPTH
        at += DEPTH * stride_k
    y = tl.sum(sums, axis=1)
    if ACTIVATE:
        y = tl.where(y < 0, 0.0, y)
        y = y * y
    out = y_ptr + pair.to(tl.int64) * N + n
    tl.store(out, y.to(y_ptr.dtype.element_ty), mask=n < N)


COMBINE = {
    0: Config({"TOKENS": 64, "COLUMNS": 256}),
    80: Config({"TOKENS": 1, "COLUMNS": 1024}, num_warps=4, num_stages=2),
}
MATVEC = {80: Config({"ROWS": 16, "DEPTH": 512}, num_warps=4, num_stages=2)}


def few_pairs(experts: int, top_k: int) -> int:
    """Up to this many (token, slot) pairs are not sorted; at least the pairs of one token."""
    return max(experts // 4, top_k)


def _combine(rows: Tensor, top_k: int, places: Tensor | None, weights: Tensor | None) -> Tensor:
    tokens, width = rows.shape[0] // top_k, rows.shape[1]
    out = torch.empty(tokens, width, device=rows.device, dtype=rows.dtype)
    config = by_arch(COMBINE)
    grid = cdiv(tokens, config["TOKENS"]) * cdiv(width, config["COLUMNS"])
    with on_device(rows):
        _combine_kernel[(grid,)](
            rows,
            rows if places is None else places,
            rows if weights is None else weights,
            out,
            tokens,
            TOP_K=top_k,
            WIDTH=width,
            SORTED=places is not None,
            WEIGHTED=weights is not None,
            **config.kwargs,
        )
    return out


def _matvec(x: Tensor, matrix: Tensor, indices: Tensor, activate: bool) -> Tensor:
    experts, n, k = matrix.shape
    pairs = indices.numel()
    y = torch.empty(pairs, n, device=x.device, dtype=x.dtype)
    config = by_arch(MATVEC)
    with on_device(x):
        _matvec_kernel[(pairs * cdiv(n, config["ROWS"]),)](
            x,
            matrix,
            indices,
            y,
            x.stride(0),
            *matrix.stride(),
            E=experts,
            N=n,
            K=k,
            PAIRS_PER_ROW=pairs // x.shape[0],
            ACTIVATE=activate,
            **config.kwargs,
        )
    return y


def _unsorted(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    active = _matvec(z, up, indices, activate=True)
    outputs = _matvec(active, down, indices, activate=False)
    return _combine(outputs, indices.shape[1], None, weights)


def _sorted(
    z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor, precision: str
) -> tuple[Tensor, Order, Tensor]:
    experts, top_k = up.shape[0], indices.shape[1]
    order = sort_by_expert(indices, experts, tile_rows(indices.numel(), experts, z.dtype))
    active = grouped_rows(
        z, up, order, top_k, precision, transposed=True, gather=True, activate=True
    )
    outputs = grouped_rows(active, down, order, top_k, precision, transposed=True, gather=False)
    return _combine(outputs, top_k, order.places, weights), order, active


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z, up, down, weights, indices, precision):  # type: ignore[no-untyped-def]
        out, order, active = _sorted(z, up, down, weights, indices, precision)
        ctx.save_for_backward(z, up, down, weights, active, *order[:-1])
        ctx.rows, ctx.precision = order.tile_rows, precision
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad):  # type: ignore[no-untyped-def]
        z, up, down, weights, active, *parts = ctx.saved_tensors
        order = Order._make((*parts, ctx.rows))
        (experts, top_k), shared = (up.shape[0], weights.shape[1]), (order, weights.shape[1])
        grad, precision = unit_stride(grad), ctx.precision
        need_z, need_up, need_down, need_weights = ctx.needs_input_grad[:4]
        grad_z = grad_up = grad_down = grad_weights = None
        if need_z or need_up or need_weights:
            grad_hidden, grad_pairs = grouped_rows_backward(
                grad, down, *shared, precision, active, weights
            )
            if need_weights:
                grad_weights = grad_pairs.view_as(weights).to(weights.dtype)
        if need_z:
            rows = grouped_rows(grad_hidden, up, *shared, precision, transposed=False, gather=False)
            grad_z = _combine(rows, top_k, order.places, None)
        if need_up:
            grad_up = grouped_outer(grad_hidden, z, *shared, precision, experts=experts)
        if need_down:
            grad_down = grouped_outer(
                active, grad, *shared, precision, experts=experts, weights=weights, transposed=True
            )
        return grad_z, grad_up, grad_down, grad_weights, None, None


def expert_mlp(
    z: Float[Tensor, "t l"],
    up: Float[Tensor, "e f l"],
    down: Float[Tensor, "e l f"],
    weights: Float[Tensor, "t k"],
    indices: Int[Tensor, "t k"],
    *,
    input_precision: str = "ieee",
) -> Float[Tensor, "t l"]:
    """The weighted sum of each token's chosen experts.

    Args:
        z: input of the experts; float32, bfloat16 or float16.
        up, down: the experts' matrices W1 and W2, of any strides; converted to the type of `z`.
        weights: from the router, used as they are (float32 stays float32).
        indices: from the router, int32 or int64, each from 0 to e - 1. This is checked only under
            TRITON_DEBUG=1, on the device: a check on the host would have to wait for the device.
        input_precision: precision of float32 products: "ieee" (full), "tf32" or "tf32x3".

    Returns:
        In the dtype of `z`; differentiable in z, up, down and weights. Every run gives the same
        bits.

    Raises:
        ValueError: shapes that do not fit, an unknown `input_precision`, float64.
        RuntimeError: tensors on the CPU outside the interpreter.
    """
    check_inputs("expert_mlp", z, up, down, weights, indices)
    _check_shapes(z, up, down, weights, indices)
    if input_precision not in PRECISIONS:
        known = ", ".join(repr(name) for name in PRECISIONS)
        raise ValueError(f"expert_mlp: input_precision={input_precision!r} is none of {known}.")
    if indices.numel() == 0:
        zero = sum(x[:0].sum().to(z.dtype) for x in (z, up, down, weights))
        return torch.zeros_like(z) + zero  # keeps the graph, so that all gradients are zero
    z, weights, indices = unit_stride(z), weights.contiguous(), indices.contiguous()
    up, down = up.to(z.dtype), down.to(z.dtype)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (z, up, down, weights)):
        return _Experts.apply(z, up, down, weights, indices, input_precision)
    if indices.numel() <= few_pairs(up.shape[0], indices.shape[1]):
        return _unsorted(z, up, down, weights, indices)
    return _sorted(z, up, down, weights, indices, input_precision)[0]


def _check_shapes(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> None:
    tokens, width = z.shape
    experts, hidden = up.shape[:2]
    expected = {
        "up": (up, (experts, hidden, width)),
        "down": (down, (experts, width, hidden)),
        "indices": (indices, (tokens, indices.shape[1])),
        "weights": (weights, tuple(indices.shape)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"expert_mlp: {name} has shape {tuple(tensor.shape)}, expected {shape} for z "
                f"{tuple(z.shape)}, up {tuple(up.shape)} and indices {tuple(indices.shape)}."
            )
