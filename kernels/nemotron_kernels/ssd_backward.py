"""SSD backward in Triton: every gradient of the chunked scan.

The forward pass keeps nothing but its inputs. The states before each chunk, S, are computed again,
and the gradients of the states after each chunk, gS', by the same recurrence from the last chunk to
the first (ssd_states.py). M is the q x q matrix of one head and chunk, and g marks gradients:

    y  = M x + exp(s) (C S^T)         M_lr = (C_l . B_r) L_lr dt_r + D [l = r]
    S' = exp(s_q) S + sum_r w_r x_r (outer) B_r
    with L_lr = exp(s_l - s_r) for r <= l and w_r = exp(s_q - s_r) dt_r

    gM = gy x^T                       gscores = sum over the heads of a group of gM * L * dt
    gC = gscores B   + exp(s) gy S    gB = gscores^T C + w x gS'           (`grad_bc_kernel`)
    gx = M^T gy + w (B gS'^T)         gD = sum of gy * x                   (`grad_x_kernel`)

B and C belong to a group of heads. A program of `grad_bc_kernel` takes the heads of a group one
after another and keeps the sums. There are no atomic additions, so results repeat bit for bit.

The gradient of s needs care. Let P = gM * scores * L * dt, the gradient of the exponents. Entry
(l, r) depends on exactly the steps a_t with r < t <= l. Diagonal entries depend on none, but under
strong decay they are by far the largest. The textbook form, a running sum of (row sum minus column
sum), adds and subtracts them, and their rounding error remains in dA. Here only the entries that
depend on a step are summed:

    ga_t  = sum_{l >= t > r} P_lr + sum_{l >= t} read_l + sum_{r < t} write_r + exp(s_q) (S . gS')
    gdt_t = A ga_t + (sum_l P_lt) / dt_t + exp(s_q - s_t) (x_t . gS' B_t)
    gA    = sum_t dt_t ga_t

`grad_x_kernel` works on the transposes, r x l, so that the sum over l >= t runs along the rows of a
tile, which one warp holds. It runs last and finishes gdt (through softplus) with what
`grad_bc_kernel` left in `reads`.

Left out: second derivatives, and computing only the gradients that are needed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_kernels._compat import cdiv
from nemotron_kernels.ssd_common import (
    LOG2E,
    Inputs,
    config,
    documents,
    fade,
    heads_per_program,
    mm,
    padded,
    raw_steps,
    sizes,
    state_tile,
    steps_and_sums,
    strides,
    tile,
)
from nemotron_kernels.ssd_states import states


@triton.jit
def grad_bc_kernel(
    x,
    xs,
    dt,
    ds,
    A,
    B,
    bs,
    C,
    cs,
    dt_bias,
    seq,
    ss,
    gy,
    gys,
    before,
    after,
    gB,
    gC,
    reads,
    T,
    chunks,
    H,
    G,
    splits,
    R: tl.constexpr,
    P: tl.constexpr,
    PAD_P: tl.constexpr,
    N: tl.constexpr,
    PAD_N: tl.constexpr,
    Q: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """gB and gC of one chunk, group and block of n, summed over HEADS heads of the group."""
    b, c = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    parts = G * splits
    block, part = tl.program_id(2) // parts, (tl.program_id(2) % parts).to(tl.int64)
    h0, first = part * HEADS, block * BLOCK_N
    g, t0 = h0 // R, c * Q
    left = (T - t0).to(tl.int32)
    KIND: tl.constexpr = x.dtype.element_ty
    q, n = tl.arange(0, Q), first + tl.arange(0, BLOCK_N)
    Bt = tile(B, bs, b, t0, g, left, Q, N, BLOCK_N, first, KIND)
    Ct = tile(C, cs, b, t0, g, left, Q, N, BLOCK_N, first, KIND)
    doc = documents(seq, ss, b, t0, left, Q)
    final = tl.max(doc, 0)
    sees = (q[:, None] >= q[None, :]) & (doc[:, None] == doc[None, :])
    scores = tl.zeros([Q, Q], tl.float32)
    sum_b = tl.zeros([Q, BLOCK_N], tl.float32)
    sum_c = tl.zeros([Q, BLOCK_N], tl.float32)
    for i in range(0, HEADS):
        h = h0 + i
        step, total, end = steps_and_sums(dt, ds, dt_bias, A, b, t0, h, left, Q, SOFTPLUS)
        xt = tile(x, xs, b, t0, h, left, Q, P, PAD_P, 0, KIND)
        gyt = tile(gy, gys, b, t0, h, left, Q, P, PAD_P, 0, KIND)
        seen = fade(total[:, None] - total[None, :], sees) * step[None, :]
        scores += mm(gyt, tl.trans(xt), PRECISION) * seen
        corner = ((b * chunks + c) * H + h) * P * N
        at, inside = state_tile(before + corner, 0, P, N, PAD_P, first, BLOCK_N)
        state = tl.load(at, mask=inside, other=0.0)
        at, inside = state_tile(after + corner, 0, P, N, PAD_P, first, BLOCK_N)
        gstate = tl.load(at, mask=inside, other=0.0)
        read = fade(total, doc == 0)[:, None] * mm(gyt, state, PRECISION)
        sum_c += read
        weight = fade(end - total, doc == final) * step
        sum_b += weight[:, None] * mm(xt, gstate, PRECISION)
        whole = tl.sum(tl.sum(state.to(tl.float32) * gstate.to(tl.float32), 1), 0)
        from_here = tl.cumsum(tl.sum(read * Ct.to(tl.float32), 1), 0, reverse=True)
        to = reads + ((block * tl.num_programs(1) + b) * H + h) * T + t0 + q
        tl.store(to, from_here + whole * fade(end, final == 0), mask=q < left)
    scores = scores.to(KIND)
    sum_c += mm(scores, Bt, PRECISION)
    sum_b += mm(tl.trans(scores), Ct, PRECISION)
    row = ((part % splits) * tl.num_programs(1) + b) * T + t0
    to = (row * G + g) * N + q[:, None] * (G * N) + n[None, :]
    inside = (q[:, None] < left) & (n[None, :] < N)
    tl.store(gB + to, sum_b, mask=inside)
    tl.store(gC + to, sum_c, mask=inside)


@triton.jit
def grad_x_kernel(
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
    gy,
    gys,
    after,
    reads,
    gx,
    gxs,
    gdt,
    gds,
    sums,
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
    BLOCKS_N: tl.constexpr,
):
    """gx and gdt of one chunk for HEADS heads, and the chunk's part of gA, gD and the bias's."""
    b, c = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    h0 = tl.program_id(2).to(tl.int64) * HEADS
    g, t0 = h0 // R, c * Q
    left = (T - t0).to(tl.int32)
    KIND: tl.constexpr = x.dtype.element_ty
    q, p = tl.arange(0, Q), tl.arange(0, PAD_P)
    Bt = tile(B, bs, b, t0, g, left, Q, N, PAD_N, 0, KIND)
    Ct = tile(C, cs, b, t0, g, left, Q, N, PAD_N, 0, KIND)
    scores = mm(Bt, tl.trans(Ct), PRECISION)  # r x l
    doc = documents(seq, ss, b, t0, left, Q)
    final = tl.max(doc, 0)
    seen = (q[:, None] <= q[None, :]) & (doc[:, None] == doc[None, :])
    for i in range(0, HEADS):
        h = h0 + i
        step, total, end = steps_and_sums(dt, ds, dt_bias, A, b, t0, h, left, Q, SOFTPLUS)
        xt = tile(x, xs, b, t0, h, left, Q, P, PAD_P, 0, KIND)
        gyt = tile(gy, gys, b, t0, h, left, Q, P, PAD_P, 0, KIND)
        weighted = scores * fade(total[None, :] - total[:, None], seen)
        out = mm((weighted * step[:, None]).to(KIND), gyt, PRECISION)
        exponents = weighted * mm(xt, tl.trans(gyt), PRECISION)
        own = tl.sum(exponents, 1)
        # The mask below removes the diagonal too. But without this mask, the kernel with seq_idx
        # spills registers on sm_90.
        exponents = tl.where(q[:, None] < q[None, :], exponents * step[:, None], 0.0)
        from_here = tl.cumsum(exponents, 1, reverse=True)
        steps = tl.sum(tl.where(q[:, None] < q[None, :], from_here, 0.0), 0)

        at, inside = state_tile(
            after + ((b * chunks + c) * H + h) * P * N, 0, P, N, PAD_P, 0, PAD_N
        )
        gstate = tl.load(at, mask=inside, other=0.0)
        lives = fade(end - total, doc == final)
        kept = lives[:, None] * mm(Bt, tl.trans(gstate), PRECISION)
        x32 = xt.to(tl.float32)
        out += kept * step[:, None]
        direct = tl.sum(kept * x32, 1)
        writes = direct * step
        steps += tl.cumsum(writes, 0) - writes
        for block in range(0, BLOCKS_N):
            row = ((block * tl.num_programs(1) + b) * H + h) * T + t0
            steps += tl.load(reads + row + q, mask=q < left, other=0.0)

        gy32 = gyt.to(tl.float32)
        if D is not None:
            out += tl.load(D + h).to(tl.float32) * gy32
        to = gx + b * gxs[0] + t0 * gxs[1] + h * gxs[2] + q[:, None] * gxs[1] + p[None, :] * gxs[3]
        tl.store(to, out, mask=(q[:, None] < left) & (p[None, :] < P))
        grad = tl.load(A + h).to(tl.float32) * steps + own + direct
        if SOFTPLUS:
            raw = raw_steps(dt, ds, dt_bias, b, t0, h, left, Q)
            grad /= 1.0 + tl.exp2(-raw * LOG2E)
        tl.store(gdt + b * gds[0] + t0 * gds[1] + h * gds[2] + q * gds[1], grad, mask=q < left)
        # The last element of a cumsum replaces tl.sum: Triton 3.7.1 for sm_100 does not compile the
        # sum of a vector that is itself the sum of the rows of a matrix product.
        to = sums + ((b * chunks + c) * H + h) * 3 + 0 * q
        grad = tl.where(q < left, grad, 0.0)
        tl.store(to, tl.cumsum(steps * step, 0), mask=q == Q - 1)
        tl.store(to + 1, tl.cumsum(tl.sum(gy32 * x32, 1), 0), mask=q == Q - 1)
        tl.store(to + 2, tl.cumsum(grad, 0), mask=q == Q - 1)


class Gradients(NamedTuple):
    """One gradient per differentiable argument of `ssd`."""

    x: Tensor
    dt: Tensor
    A: Tensor  # float64, as are D and dt_bias
    B: Tensor
    C: Tensor
    D: Tensor
    dt_bias: Tensor
    initial: Tensor  # float32


def backward(
    inputs: Inputs, gy: Tensor, glast: Tensor | None, chunk: int, precision: str
) -> Gradients:
    """All gradients of `ssd`.

    Args:
        inputs: those of the forward pass.
        gy: gradient of y, `b t h p`, any strides.
        glast: gradient of the last state, `b h p n`, float32 and contiguous; zero when None.
        chunk, precision: as for the forward pass; the chunk may be another one.
    """
    x, dt, A, B, C, D, dt_bias, initial, seq, _ = inputs
    b, t, h, p = x.shape
    groups, n = B.shape[2:]
    chunks = cdiv(t, chunk)
    before, _ = states(inputs, x, B, initial, chunk, precision, reverse=False)
    after, ginitial = states(inputs, gy, C, glast, chunk, precision, reverse=True)
    times = (dt, dt.stride(), A, B, B.stride(), C, C.stride())
    row = (seq, strides(seq), gy, gy.stride())
    common = {**sizes(inputs, chunk), "PAD_P": padded(p), "PRECISION": precision}

    how = dict(config("grad_bc", x).kwargs)
    how["BLOCK_N"] = min(how["BLOCK_N"], padded(n))
    blocks = cdiv(n, how["BLOCK_N"])
    heads = heads_per_program(x, groups, chunks * b * groups * blocks, how["HEADS"])
    splits = h // groups // heads
    kind = B.dtype if splits == 1 else torch.float32
    gB, gC = (x.new_empty(splits, b, t, groups, n, dtype=kind) for _ in range(2))
    reads = x.new_empty(blocks, b, h, t, dtype=torch.float32)
    grad_bc_kernel[chunks, b, groups * splits * blocks](
        x,
        x.stride(),
        *times,
        dt_bias,
        *row,
        before,
        after,
        gB,
        gC,
        reads,
        t,
        chunks,
        h,
        groups,
        splits,
        **{**how, **common, "HEADS": heads},
    )

    gx = torch.empty_like(x, memory_format=torch.contiguous_format)
    gdt = torch.empty_like(dt, memory_format=torch.contiguous_format)
    sums = x.new_empty(b, chunks, h, 3, dtype=torch.float32)
    how = dict(config("grad_x", x).kwargs)
    heads = heads_per_program(x, groups, chunks * b * groups, how["HEADS"])
    grad_x_kernel[chunks, b, h // heads](
        x,
        x.stride(),
        *times,
        D,
        dt_bias,
        *row,
        after,
        reads,
        gx,
        gx.stride(),
        gdt,
        gdt.stride(),
        sums,
        t,
        chunks,
        h,
        BLOCKS_N=blocks,
        **{**how, **common, "HEADS": heads},
    )
    gA, gD, gbias = sums.sum((0, 1), dtype=torch.float64).unbind(-1)
    gB, gC = (v[0] if splits == 1 else v.sum(0).to(B.dtype) for v in (gB, gC))
    return Gradients(gx, gdt, gA, gB, gC, gD, gbias, ginitial)
