"""SSD forward in Triton: outputs by chunks, in one kernel or in three passes.

For one head and one chunk of q tokens, with s the running sum of a_t = dt_t A inside the chunk, S
the state before the chunk and S' the one after it:

    y_l = sum_{r <= l} (C_l . B_r) exp(s_l - s_r) dt_r x_r  +  exp(s_l) S C_l  +  D x_l
    S'  = exp(s_q) S + sum_r exp(s_q - s_r) dt_r x_r (outer) B_r

There are two variants with the same arithmetic:

- fused: one program per row, head and block of p loops over all chunks with the state in registers.
  Each input is read once and no state is written to memory, but chunks are computed one by one;
- three passes: what each chunk adds to the state, the recurrence from chunk to chunk
  (ssd_states.py), then the outputs. All chunks run in parallel, but states are written and read.

`ssd._variant` selects one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_kernels._compat import cdiv
from nemotron_kernels.ssd_common import (
    Inputs,
    config,
    documents,
    fade,
    heads_per_program,
    mm,
    padded,
    sizes,
    state_tile,
    steps_and_sums,
    strides,
    tile,
    wide,
)
from nemotron_kernels.ssd_states import states


@triton.jit
def fused_kernel(
    x,
    xs,
    dt,
    ds,
    A,
    B,
    bs,
    C,
    cs,
    D,
    dt_bias,
    initial,
    seq,
    ss,
    y,
    ys,
    last,
    T,
    chunks,
    H,
    R: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PAD_N: tl.constexpr,
    Q: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """All chunks of one row, head and block of p. The state is kept transposed, n x p."""
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    g, first = h // R, tl.program_id(0) * BLOCK_P
    KIND: tl.constexpr = x.dtype.element_ty
    q, p = tl.arange(0, Q), first + tl.arange(0, BLOCK_P)
    corner = (b * H + h) * P * N
    if initial is None:
        state = tl.zeros([PAD_N, BLOCK_P], tl.float32)
    else:
        at, inside = state_tile(initial + corner, first, P, N, BLOCK_P, 0, PAD_N)
        state = tl.trans(tl.load(at, mask=inside, other=0.0))
    for c in range(0, chunks):
        t0 = wide(c) * Q
        left = (T - t0).to(tl.int32)
        step, total, end = steps_and_sums(dt, ds, dt_bias, A, b, t0, h, left, Q, SOFTPLUS)
        doc = documents(seq, ss, b, t0, left, Q)
        final = tl.max(doc, 0)
        xt = tile(x, xs, b, t0, h, left, Q, P, BLOCK_P, first, KIND)
        Bt = tl.trans(tile(B, bs, b, t0, g, left, Q, N, PAD_N, 0, KIND))
        Ct = tile(C, cs, b, t0, g, left, Q, N, PAD_N, 0, KIND)
        sees = (q[:, None] >= q[None, :]) & (doc[:, None] == doc[None, :])
        mix = mm(Ct, Bt, PRECISION) * fade(total[:, None] - total[None, :], sees) * step[None, :]
        out = mm(mix.to(KIND), xt, PRECISION)
        out += fade(total, doc == 0)[:, None] * mm(Ct, state.to(KIND), PRECISION)
        x32 = xt.to(tl.float32)
        if D is not None:
            out += tl.load(D + h).to(tl.float32) * x32
        to = y + b * ys[0] + t0 * ys[1] + h * ys[2] + q[:, None] * ys[1] + p[None, :] * ys[3]
        tl.store(to, out, mask=(q[:, None] < left) & (p[None, :] < P))
        written = x32 * (fade(end - total, doc == final) * step)[:, None]
        state = state * fade(end, final == 0) + mm(Bt, written.to(KIND), PRECISION)
    at, inside = state_tile(last + corner, first, P, N, BLOCK_P, 0, PAD_N)
    tl.store(at, tl.trans(state), mask=inside)


@triton.jit
def scan_kernel(
    x,
    xs,
    dt,
    ds,
    A,
    B,
    bs,
    C,
    cs,
    D,
    dt_bias,
    seq,
    ss,
    states,
    y,
    ys,
    T,
    chunks,
    H,
    R: tl.constexpr,
    P: tl.constexpr,
    PAD_P: tl.constexpr,
    N: tl.constexpr,
    PAD_N: tl.constexpr,
    Q: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
):
    """The outputs of one chunk for HEADS heads of a group, which share C B^T."""
    b, c = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    h0 = tl.program_id(2).to(tl.int64) * HEADS
    g, t0 = h0 // R, c * Q
    left = (T - t0).to(tl.int32)
    KIND: tl.constexpr = x.dtype.element_ty
    q, p = tl.arange(0, Q), tl.arange(0, PAD_P)
    Bt = tile(B, bs, b, t0, g, left, Q, N, PAD_N, 0, KIND)
    Ct = tile(C, cs, b, t0, g, left, Q, N, PAD_N, 0, KIND)
    scores = mm(Ct, tl.trans(Bt), PRECISION)
    doc = documents(seq, ss, b, t0, left, Q)
    sees = (q[:, None] >= q[None, :]) & (doc[:, None] == doc[None, :])
    for i in range(0, HEADS):
        h = h0 + i
        step, total, _ = steps_and_sums(dt, ds, dt_bias, A, b, t0, h, left, Q, SOFTPLUS)
        xt = tile(x, xs, b, t0, h, left, Q, P, PAD_P, 0, KIND)
        at, inside = state_tile(
            states + ((b * chunks + c) * H + h) * P * N, 0, P, N, PAD_P, 0, PAD_N
        )
        state = tl.load(at, mask=inside, other=0.0).to(KIND)
        mix = scores * fade(total[:, None] - total[None, :], sees) * step[None, :]
        out = mm(mix.to(KIND), xt, PRECISION)
        out += fade(total, doc == 0)[:, None] * mm(Ct, tl.trans(state), PRECISION)
        if D is not None:
            out += tl.load(D + h).to(tl.float32) * xt.to(tl.float32)
        to = y + b * ys[0] + t0 * ys[1] + h * ys[2] + q[:, None] * ys[1] + p[None, :] * ys[3]
        tl.store(to, out, mask=(q[:, None] < left) & (p[None, :] < P))


def forward_fused(inputs: Inputs, chunk: int, precision: str) -> tuple[Tensor, Tensor]:
    """(y, last state) with one program per row, head and block of p."""
    x, dt, A, B, C, D, dt_bias, initial, seq, _ = inputs
    b, t, h, p = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    last = x.new_empty(b, h, p, B.shape[3], dtype=torch.float32)
    how = dict(config("fused", x).kwargs)
    how["BLOCK_P"] = min(how["BLOCK_P"], padded(p))
    how = {**how, **sizes(inputs, chunk)}
    fused_kernel[cdiv(p, how["BLOCK_P"]), h, b](
        x,
        x.stride(),
        dt,
        dt.stride(),
        A,
        B,
        B.stride(),
        C,
        C.stride(),
        D,
        dt_bias,
        initial,
        seq,
        strides(seq),
        y,
        y.stride(),
        last,
        t,
        cdiv(t, chunk),
        h,
        PRECISION=precision,
        **how,
    )
    return y, last


def forward_three(inputs: Inputs, chunk: int, precision: str) -> tuple[Tensor, Tensor]:
    """(y, last state) in three passes, with the state before each chunk in memory."""
    x, dt, A, B, C, D, dt_bias, initial, seq, _ = inputs
    b, t, h, p = x.shape
    chunks = cdiv(t, chunk)
    before, last = states(inputs, x, B, initial, chunk, precision, reverse=False)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    how = dict(config("scan", x).kwargs)
    groups = B.shape[2]
    heads = heads_per_program(x, groups, chunks * b * groups, how["HEADS"])
    how = {**how, **sizes(inputs, chunk), "HEADS": heads}
    scan_kernel[chunks, b, h // heads](
        x,
        x.stride(),
        dt,
        dt.stride(),
        A,
        B,
        B.stride(),
        C,
        C.stride(),
        D,
        dt_bias,
        seq,
        strides(seq),
        before,
        y,
        y.stride(),
        t,
        chunks,
        h,
        PAD_P=padded(p),
        PRECISION=precision,
        **how,
    )
    return y, last
