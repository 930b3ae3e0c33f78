"""The backward arithmetic of `ssd`, by hand.

Autograd would store every temporary of the forward pass: several tensors of q x q per head and
chunk. Kept here is one state per segment; walking the segments backwards, each is computed anew and
differentiated at once. For one head and chunk, with M the q x q mix, S the state before the chunk,
S' the state after it, and gradients written g:

    y  = M x + e^s (C S^T)         M_lr = (C_l . B_r) L_lr + D [l = r],   L_lr = e^(s_l - s_r) dt_r
    S' = e^(s_q) S + sum_r w_r x_r (outer) B_r,                            w_r = e^(s_q - s_r) dt_r

    gM  = gy x^T                              gD = trace(gM)
    gx  = M^T gy + w (B gS'^T)
    gCB = sum over the heads of a group of gM * L, lower triangle
    gC  = gCB B   + (e^s gy) S                gB = gCB^T C + (w x) gS'
    gS  = e^(s_q) gS' + (e^s gy)^T C

The gradient of s needs care. Let P = gM * L * (C B^T), the gradient of the exponents. Entry (l, r)
depends on exactly the steps a_t = dt_t A with r < t <= l. On the diagonal there is none, yet it is
by far the largest entry under strong decay. The textbook form, a running sum of (row sum minus
column sum), adds it and takes it away again, and leaves rounding noise in dA.
Here the entries that span a step are added up and nothing is subtracted: a product with a triangle
of ones sums over l >= t, a masked row sum over r < t. In the same way the write of token r depends
on the steps after r, and what token l reads from the state on the steps up to l:

    ga_t = sum_{l >= t > r} P_lr + sum_{l >= t} read_l + sum_{r < t} write_r + e^(s_q) (S . gS')
    gdt_t = A ga_t + (sum_l P_lt) / dt_t + e^(s_q - s_t) (x_t . gS' B_t)

Source: differentiated here from the forward equations. Left out: second derivatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_lite.ops import _ssd_chunks as fwd
from nemotron_lite.ops._ssd_chunks import LIMITS, Inputs, Scratch, Segment


class Gradients(NamedTuple):
    """One gradient per differentiable argument of `ssd`."""

    x: Tensor
    dt: Tensor
    A: Tensor  # float64
    B: Tensor
    C: Tensor
    D: Tensor  # float64
    state: Tensor  # of the initial state


def backward(
    inputs: Inputs, before: list[Tensor], chunk: int, grad_y: Tensor, grad_state: Tensor
) -> Gradients:
    """Walk the segments backwards.

    Args:
        inputs: as the forward pass saw them.
        before: the state before each segment, from the forward pass.
        chunk: the forward pass's chunk length.
        grad_y: `b t h p`.
        grad_state: `b h p n`, of the last state; in the state's dtype.
    """
    batch, tokens, heads, _ = inputs.x.shape
    groups = inputs.B.shape[2]
    scratch = Scratch(grad_state.dtype, inputs.x.device)
    x, dt, B, C = (
        torch.empty_like(v, memory_format=torch.contiguous_format)
        for v in (inputs.x, inputs.dt, inputs.B, inputs.C)
    )
    A, D = (inputs.A.new_zeros(heads, dtype=torch.float64) for _ in range(2))
    state = torch.empty_like(grad_state, memory_format=torch.contiguous_format)
    remaining = list(before)
    for row, rows, runs in reversed(fwd.cut(batch, tokens, heads, chunk)):
        local, now = inputs.rows(row, rows), grad_state.narrow(0, row, rows)
        for run in reversed(runs):
            part = fwd.segment(local, run, scratch)
            gx, gy = (run.grouped(v.narrow(0, row, rows), groups) for v in (x, grad_y))
            gdt, gB, gC = (run.of(v.narrow(0, row, rows)).transpose(2, 3) for v in (dt, B, C))
            grads = Gradients(gx, gdt, A, gB, gC, D, now)
            now = _segment(inputs, part, remaining.pop(), gy, grads)
        state.narrow(0, row, rows).copy_(now)
    return Gradients(x, dt, A, B, C, D, state)


def _segment(inputs: Inputs, part: Segment, state: Tensor, gy: Tensor, grads: Gradients) -> Tensor:
    """Fill `grads` for one segment; the gradient of the state before it comes back."""
    take, wide = part.scratch.take, state.dtype
    B, C = part.B.flatten(0, 2), part.C.flatten(0, 2)
    gy_heads = part.by_head(gy, "gy_heads")
    gy_into = part.by_group(gy, part.into, "gy_into")

    # Inside the chunks
    mix = fwd.mix(part, inputs.D, take("mix", *part.decay.shape))
    gx_heads = torch.bmm(mix.mT, gy_heads, out=take("inside", *gy_heads.shape))
    exponents = take("g_mix", *mix.shape)
    torch.bmm(gy_heads, part.by_head(part.x, "heads").mT, out=exponents)
    exponents = exponents.view(part.decay.shape)
    grads.D.add_(_diagonal(exponents).sum((0, 1, 3), dtype=torch.float64))
    exponents.mul_(part.decay)
    g_scores = torch.sum(exponents, 3, out=take("g_scores", *part.scores.shape)).tril_()
    if part.same is not None:
        g_scores.mul_(part.same)
    exponents.mul_(part.scores.unsqueeze(3))
    diagonal = _diagonal(exponents)
    own = diagonal.clone()
    diagonal.zero_()
    ones = torch.ones_like(mix[0]).triu_().expand(mix.shape)
    from_here = torch.bmm(ones, exponents.view(mix.shape), out=mix).view(part.decay.shape)
    columns = from_here[..., 0, :].flatten(2, 3) + own
    spanning = from_here.tril_(-1).sum(-1).flatten(2, 3)

    # Through the states
    scaled = fwd.written(part)
    states = fwd.walk(part, scaled, state)
    answers = fwd.read(part, states)
    g_states = part.new_states("g_states")
    g_states[-1].copy_(grads.state)
    torch.bmm(gy_into.mT, C, out=part.matrices(g_states[:-1]))
    each = g_states.unbind(0)
    for c, keep in reversed(list(enumerate(part.across[..., None, None].unbind(0)))):
        each[c].addcmul_(each[c + 1], keep)
    after = part.matrices(g_states[1:])
    g_written = torch.bmm(B, after.mT, out=take("g_written", *scaled.shape))

    g_scores = g_scores.view(-1, *g_scores.shape[-2:])
    g_map = take("g_map", *B.shape)
    torch.bmm(g_scores, B, out=g_map).baddbmm_(gy_into, part.matrices(states[:-1]))
    grads.C.copy_(g_map.view(part.C.shape))
    torch.bmm(g_scores.mT, C, out=g_map).baddbmm_(scaled, after)
    grads.B.copy_(g_map.view(part.B.shape))
    fwd.combine(part, gx_heads, g_written, part.out_of * part.dt.to(wide), grads.x)

    # What is left is one number per token and head
    reads = _per_token(answers.mul_(gy_into).view(gy.shape))
    direct = _per_token(g_written.view(gy.shape).mul_(part.x)) * part.out_of
    writes = direct * part.dt
    whole = states[:-1].mul_(g_states[1:]).sum((3, 4), dtype=wide) * part.across
    g_steps = reads.flip(-1).cumsum_(-1).flip(-1).add_(spanning)
    g_steps.add_(writes.cumsum(-1).sub_(writes)).add_(whole.unsqueeze(-1))
    grads.A.add_((g_steps * part.dt).sum((0, 1, 3)))
    g_dt = g_steps * inputs.A.to(torch.float64).unsqueeze(-1)
    g_dt.add_(columns / part.dt.clamp(min=LIMITS[wide].least_dt)).add_(direct)
    grads.dt.copy_(g_dt)
    return each[0].clone()


def _diagonal(squares: Tensor) -> Tensor:
    """`c b g r q q` -> `c b h q`, a view of the diagonals."""
    return squares.flatten(2, 3).diagonal(dim1=-2, dim2=-1)


def _per_token(products: Tensor) -> Tensor:
    """`c b g q r p` summed over p, as `c b h q` in float64."""
    return products.sum(-1).transpose(3, 4).flatten(2, 3).to(torch.float64)
