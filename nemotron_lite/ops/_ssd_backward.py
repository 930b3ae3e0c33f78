"""The backward arithmetic of `ssd`, by hand.

Autograd would store every temporary of the forward pass: several tensors of q x q per head and
chunk. Kept here is one state per segment; walking the segments backwards, each is computed anew and
differentiated at once. For one head and chunk, with M the q x q mix, S the state before the chunk,
S' the state after it, and gradients written g:

    y  = M x + e^s (C S^T)           M_lr = (C_l . B_r) L_lr + D [l = r],   L_lr = e^(s_l - s_r) dt_r
    S' = e^(s_q) S + sum_r w_r x_r (outer) B_r,                             w_r = e^(s_q - s_r) dt_r

    gM  = gy x^T                              gD = trace(gM)
    gx  = M^T gy + w (B gS'^T)
    gCB = sum over the heads of a group of gM * L, lower triangle
    gC  = gCB B   + (e^s gy) S                gB = gCB^T C + (w x) gS'
    gS  = e^(s_q) gS' + (e^s gy)^T C

The gradient of s needs care. Let P = gM * L * (C B^T), the gradient of the exponents. Entry (l, r)
depends on exactly the steps a_t = dt_t A with r < t <= l. On the diagonal there is none, yet it is
by far the largest entry under strong decay: it is taken out before rows and columns are summed,
because row sum minus column sum would otherwise cancel to noise. In the same way the write of token
r, w_r, depends on the steps after r, and what token l reads on the steps up to l:

    ga_t = sum_{l >= t} (rows_l(P) - columns_l(P) + read_l) + sum_{r < t} write_r + whole
    gdt_t = A ga_t + (column_t(P) + P_tt) / dt_t + e^(s_q - s_t) (x_t . B_t gS'^T)

These sums over tokens are taken in float64; they are small.

Source: differentiated here from the forward equations. Left out: second derivatives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nemotron_lite.ops import _ssd_chunks as chunks_of
from nemotron_lite.ops._ssd_chunks import LIMITS, Inputs, Segment


class Gradients(NamedTuple):
    """One gradient per differentiable argument of `ssd`."""

    x: Tensor
    dt: Tensor
    A: Tensor  # float64
    B: Tensor
    C: Tensor
    D: Tensor | None  # float64
    state: Tensor  # of the initial state


def backward(
    inputs: Inputs, before: list[Tensor], chunk: int, grad_y: Tensor, grad_state: Tensor
) -> Gradients:
    """Walk the segments backwards.

    Args:
        inputs: as the forward pass saw them.
        before: the state before each segment.
        chunk: the forward pass's chunk length.
        grad_y: `b t h p`.
        grad_state: `b h p n`, of the last state; in the state's dtype.
    """
    batch, tokens, heads, _ = inputs.x.shape

    def empty(v: Tensor) -> Tensor:
        return torch.empty_like(v, memory_format=torch.contiguous_format)

    grad_A = inputs.A.new_zeros(heads, dtype=torch.float64)
    grads = Gradients(
        x=empty(inputs.x),
        dt=empty(inputs.dt),
        A=grad_A,
        B=empty(inputs.B),
        C=empty(inputs.C),
        D=None if inputs.D is None else torch.zeros_like(grad_A),
        state=grad_state,
    )
    segments = chunks_of.cut(tokens, batch * heads, chunk)
    for (first, chunks, length), state in zip(reversed(segments), reversed(before), strict=True):
        part = chunks_of.segment(inputs, first, chunks, length, state.dtype)
        span = chunks * length
        local = Gradients(
            *(v.narrow(1, first, span) for v in grads[:2]),
            grads.A,
            *(v.narrow(1, first, span) for v in grads[3:5]),
            grads.D,
            grad_state,
        )
        grad_state = _segment_backward(
            inputs, part, state, grad_y.narrow(1, first, span), local
        )
    return grads._replace(state=grad_state)


def _segment_backward(
    inputs: Inputs, part: Segment, state: Tensor, grad_y: Tensor, grads: Gradients
) -> Tensor:
    """Fill `grads` for one segment; the gradient of the state before it comes back."""
    chunks, batch, groups, chunk, _, width = part.x.shape
    wide = state.dtype
    gy = grad_y.unflatten(1, (chunks, chunk)).transpose(0, 1)
    gy = gy.unflatten(3, (groups, -1)).transpose(2, 3)  # c b g q r p, a view
    gy_heads = part.by_head(gy)
    gy_into = (gy * part.grouped(part.into)).flatten(4).flatten(0, 2)
    x_heads = part.heads
    B, C = part.B.flatten(0, 2), part.C.flatten(0, 2)

    # Inside the chunks
    gx_heads = torch.bmm(chunks_of.mix(part, inputs.D).mT, gy_heads)
    g_mix = torch.bmm(gy_heads, x_heads.mT).view(part.decay.shape)
    if grads.D is not None:
        grads.D.add_(g_mix.diagonal(dim1=-2, dim2=-1).sum((0, 1, 3), dtype=torch.float64))
    exponents = g_mix.mul_(part.decay).unflatten(2, (groups, -1))
    g_scores = exponents.sum(3).tril_()
    if part.same is not None:
        g_scores.mul_(part.same)
    g_scores = g_scores.flatten(0, 2)
    exponents = exponents.mul_(part.scores.unsqueeze(3)).flatten(2, 3)
    diagonal = exponents.diagonal(dim1=-2, dim2=-1)
    own = diagonal.clone()
    diagonal.zero_()
    # from_here[t, r] = sum_{l >= t} P_lr; its first row sums whole columns
    from_here = torch.matmul(torch.ones_like(exponents[0, 0, 0]).triu_(), exponents)
    columns = from_here[..., 0, :].clone()
    across = from_here.tril_(-1).sum(-1)

    # Through the states
    scaled = chunks_of.written(part)
    states = chunks_of.walk(part, scaled, state)
    answers = chunks_of.read(part, states)
    g_states = state.new_empty(chunks + 1, *state.shape)
    g_states[-1].copy_(grads.state)
    after = g_states[1:].view(*_matrices(part))
    torch.bmm(gy_into.mT, C, out=g_states[:-1].view(*_matrices(part)))
    keep = part.across[..., None, None].unbind(0)
    each = g_states.unbind(0)
    for c in reversed(range(chunks)):
        each[c].addcmul_(each[c + 1], keep[c])
    g_written = torch.bmm(B, after.mT)

    g_C = torch.baddbmm(torch.bmm(g_scores, B), gy_into, states[:-1].view(*_matrices(part)))
    g_B = torch.baddbmm(torch.bmm(g_scores.mT, C), scaled, after)
    chunks_of.spread(part, g_B, grads.B)
    chunks_of.spread(part, g_C, grads.C)
    scale = part.out_of * part.dt.to(wide)
    chunks_of.combine(part, gx_heads, g_written, scale, grads.x)

    # What is left is one number per token and head
    reads = _inner(part, gy_into, answers)
    direct = _inner(part, part.x.flatten(4).flatten(0, 2), g_written) * part.out_of
    writes = direct * part.dt
    whole = (states[:-1] * g_states[1:]).sum((3, 4)).to(torch.float64) * part.across
    g_steps = reads.flip(-1).cumsum_(-1).flip(-1).add_(across)
    g_steps.add_(writes.cumsum(-1).sub_(writes)).add_(whole.unsqueeze(-1))
    g_dt = g_steps * inputs.A.to(torch.float64).unsqueeze(-1)
    g_dt.add_((columns + own).div_(part.dt.clamp(min=LIMITS[wide].least_dt))).add_(direct)
    grads.A.add_((g_steps * part.dt).sum((0, 1, 3)))
    grads.dt.unflatten(1, (chunks, chunk)).transpose(0, 1).transpose(2, 3).copy_(g_dt)
    return each[0]


def _matrices(part: Segment) -> tuple[int, int, int]:
    """The shape of one state per chunk, seen as one matrix per group: `c*b*g r*p n`."""
    chunks, batch, groups, _, shared, width = part.x.shape
    return chunks * batch * groups, shared * width, part.B.shape[-1]


def _inner(part: Segment, left: Tensor, right: Tensor) -> Tensor:
    """Inner products over p of two `c*b*g q r*p`, as `c b h q` in float64."""
    chunks, batch, groups, chunk, shared, width = part.x.shape
    product = (left * right).view(chunks, batch, groups, chunk, shared, width).sum(-1)
    return product.transpose(3, 4).flatten(2, 3).to(torch.float64)
