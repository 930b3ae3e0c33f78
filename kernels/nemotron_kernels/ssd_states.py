"""The states between chunks, in the forward pass, and their gradients, in the backward pass.

With S the state before a chunk of q tokens, S' the one after it and gS, gS' their gradients:

    S'  = exp(s_q) S   + sum_r exp(s_q - s_r) dt_r x_r (outer) B_r        first chunk to last
    gS  = exp(s_q) gS' + sum_l exp(s_l) gy_l (outer) C_l                  last chunk to first

Both are the same recurrence in two directions, so these kernels take a direction. There are two
ways to run it: one program loops over all chunks (`states_kernel` alone), or the additions of all
chunks are computed in parallel, followed by the recurrence element by element (`states_kernel`,
then `pass_kernel`). `loops_over_chunks` in ssd_common.py selects one.

Sums are float32. Stored states are rounded to the dtype of x, because they are operands of matrix
products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_kernels._compat import cdiv, next_power_of_2
from nemotron_kernels.ssd_common import (
    Inputs,
    config,
    documents,
    fade,
    loops_over_chunks,
    mm,
    padded,
    sizes,
    state_tile,
    steps_and_sums,
    strides,
    tile,
    wide,
)


@triton.jit
def states_kernel(
    u,
    us,
    dt,
    ds,
    A,
    v,
    vs,
    dt_bias,
    initial,
    seq,
    ss,
    out,
    keep,
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
    REVERSE: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """What chunks add to the state, or to its gradient (REVERSE: u is gy and v is C).

    LOOP: one program per row, head and block of p goes through all chunks in order and writes the
    state before each chunk. Otherwise there is also one program per chunk: it writes what the chunk
    adds to the state to `out`, and the factor on the old state to `keep`.
    """
    b, h = tl.program_id(2).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    g, first = h // R, tl.program_id(1) // H * BLOCK_P
    KIND: tl.constexpr = u.dtype.element_ty
    corner = (b * H + h) * P * N
    if initial is None or not LOOP:
        state = tl.zeros([BLOCK_P, PAD_N], tl.float32)
    else:
        at, inside = state_tile(initial + corner, first, P, N, BLOCK_P, 0, PAD_N)
        state = tl.load(at, mask=inside, other=0.0)
    start = tl.program_id(0)
    for i in range(start, chunks if LOOP else start + 1):
        c = wide(chunks - 1 - i if REVERSE else i)
        t0 = c * Q
        left = (T - t0).to(tl.int32)
        step, total, end = steps_and_sums(dt, ds, dt_bias, A, b, t0, h, left, Q, SOFTPLUS)
        doc = documents(seq, ss, b, t0, left, Q)
        final = tl.max(doc, 0)
        weight = fade(total, doc == 0) if REVERSE else fade(end - total, doc == final) * step
        ut = tile(u, us, b, t0, h, left, Q, P, BLOCK_P, first, KIND)
        vt = tile(v, vs, b, t0, g, left, Q, N, PAD_N, 0, KIND)
        added = mm(tl.trans((ut * weight[:, None]).to(KIND)), vt, PRECISION)
        kept = fade(end, final == 0)
        to, inside = state_tile(
            out + ((b * chunks + c) * H + h) * P * N, first, P, N, BLOCK_P, 0, PAD_N
        )
        if LOOP:
            tl.store(to, state, mask=inside)
            state = state * kept + added
        else:
            tl.store(to, added, mask=inside)
            tl.store(keep + (b * chunks + c) * H + h, kept)
    if LOOP:
        at, inside = state_tile(last + corner, first, P, N, BLOCK_P, 0, PAD_N)
        tl.store(at, state, mask=inside)


@triton.jit
def pass_kernel(
    added,
    keep,
    initial,
    out,
    last,
    chunks,
    H,
    size,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The recurrence from chunk to chunk: `out` gets the state before each chunk."""
    b, h = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    corner = (b * H + h) * size + e
    if initial is None:
        state = tl.zeros([BLOCK], tl.float32)
    else:
        state = tl.load(initial + corner, mask=inside, other=0.0)
    for i in range(0, chunks):
        c = wide(chunks - 1 - i if REVERSE else i)
        at = (b * chunks + c) * H + h
        tl.store(out + at * size + e, state, mask=inside)
        state = state * tl.load(keep + at) + tl.load(added + at * size + e, mask=inside, other=0.0)
    tl.store(last + corner, state, mask=inside)


def states(
    inputs: Inputs,
    u: Tensor,
    v: Tensor,
    initial: Tensor | None,
    chunk: int,
    precision: str,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """States before each chunk, `b c h p n` in the dtype of x, and the last one in float32.

    Forward: u is x, v is B and `initial` is the first state. Reverse: u is the gradient of y, v is
    C and `initial` is the gradient of the last state. The results are then the gradient of the
    state *after* each chunk, and that of the first state.
    """
    b, t, h, p = u.shape
    n, chunks = v.shape[3], cdiv(t, chunk)
    how = dict(config("states", inputs.x).kwargs)
    how["BLOCK_P"] = min(how["BLOCK_P"], padded(p))
    loop = loops_over_chunks(u, chunks, how["BLOCK_P"])
    out = u.new_empty(b, chunks, h, p, n, dtype=inputs.x.dtype)
    last = u.new_empty(b, h, p, n, dtype=torch.float32)
    added = out if loop else torch.empty_like(out, dtype=torch.float32)
    keep = None if loop else u.new_empty(b, chunks, h, dtype=torch.float32)
    states_kernel[1 if loop else chunks, h * cdiv(p, how["BLOCK_P"]), b](
        u,
        u.stride(),
        inputs.dt,
        inputs.dt.stride(),
        inputs.A,
        v,
        v.stride(),
        inputs.dt_bias,
        initial,
        inputs.seq_idx,
        strides(inputs.seq_idx),
        added,
        keep,
        last,
        t,
        chunks,
        h,
        PRECISION=precision,
        REVERSE=reverse,
        LOOP=loop,
        **{**how, **sizes(inputs, chunk)},
    )
    if not loop:
        how = dict(config("pass", inputs.x).kwargs)
        how["BLOCK"] = min(how["BLOCK"], next_power_of_2(p * n))
        pass_kernel[cdiv(p * n, how["BLOCK"]), h, b](
            added, keep, initial, out, last, chunks, h, p * n, REVERSE=reverse, **how
        )
    return out, last
