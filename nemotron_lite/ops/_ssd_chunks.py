"""The forward arithmetic of `ssd`: one segment of chunks, and the walk over the segments.

Shapes inside a segment of c chunks of q tokens, with r = h / g heads per group:

    x, y, the scaled x      c b h q p  (head by head)    or  c b g q r p  (a group side by side)
    B, C                    c b g q n
    decay, mix              c b h q q
    states                  c+1 b h p n, the state before each chunk and after the last

A group's B and C are shared by its r heads, so products with them take the heads side by side as
one matrix of r*p columns. A state is laid out as the model stores it, head by head, p x n.

Exactness. The exponents s_l - s_r are formed in float64 and only then rounded, since in float32
the running sum s loses digits that the exponential brings back (1.6e-3 of error in dA was measured
under strong decay). dt_r is folded into the exponent as log dt_r, and D is added to the diagonal of
`mix`: neither costs a pass over memory. The exponent is clamped from below to keep subnormal
numbers out of the products, which would run 40 to 170 times slower; what that adds is a factor of
e^-60 of a token's contribution. Nothing above the diagonal is read: C B^T is zeroed there.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

RESET = -1e3  # added to the exponent at a document start; e^-1000 is 0 even in float64
SEGMENT_HEADS = 64  # chunks x rows x heads worked on at once, so that temporaries stay in cache


class Limits(NamedTuple):
    """What keeps exponents finite and products out of the subnormal range, for one dtype."""

    low: float  # least exponent inside a chunk
    high: float  # greatest one; only dt > e^40 could exceed it below the diagonal
    vanish: float  # decays of whole states below e^vanish are exactly zero
    least_dt: float  # stands in for dt = 0 in log dt


LIMITS = {
    torch.float32: Limits(-60.0, 40.0, -60.0, 1e-13),
    torch.float64: Limits(-300.0, 40.0, -300.0, 1e-60),
}


class Inputs(NamedTuple):
    """The arguments of `ssd` after validation, as given: any float dtype, any strides."""

    x: Tensor  # b t h p
    dt: Tensor  # b t h
    A: Tensor  # h
    B: Tensor  # b t g n
    C: Tensor  # b t g n
    D: Tensor | None  # h
    starts: Tensor | None  # b t, True at the first token of a document


class Segment(NamedTuple):
    """What the forward and the backward pass both need to know about one run of chunks."""

    x: Tensor  # c b g q r p, a view of the input
    dt: Tensor  # c b h q, float64
    B: Tensor  # c b g q n
    C: Tensor  # c b g q n
    scores: Tensor  # c b g q q: C B^T where token l sees token r, zero elsewhere
    same: Tensor | None  # c b 1 q q: l and r in one document; None when there is only one
    decay: Tensor  # c b h q q: exp(s_l - s_r) dt_r; above the diagonal meaningless, but finite
    into: Tensor  # c b h q: exp(s_l), how much of the state before the chunk reaches token l
    out_of: Tensor  # c b h q: exp(s_q - s_r), how much of token r's write outlives the chunk
    across: Tensor  # c b h: exp(s_q), how much of the state outlives the chunk

    @property
    def heads(self) -> Tensor:
        """x head by head, `c*b*h q p`, copied."""
        return self.by_head(self.x)

    def by_head(self, v: Tensor) -> Tensor:
        """`c b g q r p`, any strides and dtype -> `c*b*h q p`, copied."""
        chunks, batch, groups, chunk, shared, width = v.shape
        copy = self.B.new_empty(chunks, batch, groups, shared, chunk, width)
        return copy.copy_(v.transpose(3, 4)).view(-1, chunk, width)

    def grouped(self, per_token: Tensor) -> Tensor:
        """`c b h q` -> `c b g q r 1`, to scale what lies group by group."""
        return per_token.unflatten(2, (self.B.shape[2], -1)).transpose(3, 4).unsqueeze(-1)


def cut(tokens: int, size: int, chunk: int) -> list[tuple[int, int, int]]:
    """(first token, chunks, chunk length) of each segment; a ragged end is one short chunk.

    Args:
        tokens: t.
        size: rows x heads, which decides how many chunks fit into one segment.
        chunk: the chunk length q.
    """
    per_segment = max(1, SEGMENT_HEADS * 64 * 64 // (size * chunk * chunk))
    whole = tokens // chunk
    segments = [
        (first * chunk, min(per_segment, whole - first), chunk)
        for first in range(0, whole, per_segment)
    ]
    if tokens % chunk:
        segments.append((whole * chunk, 1, tokens % chunk))
    return segments


def segment(inputs: Inputs, first: int, chunks: int, chunk: int, wide: torch.dtype) -> Segment:
    """Everything about tokens [first, first + chunks * chunk) that does not depend on the state."""
    groups = inputs.B.shape[2]

    def part(v: Tensor) -> Tensor:
        """`b t ...` -> `c b q ...`, a view."""
        v = v.narrow(1, first, chunks * chunk)
        return v.unflatten(1, (chunks, chunk)).transpose(0, 1)

    limits = LIMITS[wide]
    dt = part(inputs.dt).transpose(2, 3).to(torch.float64)
    exponent = dt * inputs.A.to(torch.float64).unsqueeze(-1)
    documents = None
    if inputs.starts is not None:
        starts = part(inputs.starts)
        exponent = exponent.masked_fill(starts.unsqueeze(2), RESET)
        documents = starts.cumsum(-1)
    total = exponent.cumsum_(-1)
    # s_l - (s_r - log dt_r)
    columns = total - dt.clamp(min=limits.least_dt).log_()
    decay = (total.unsqueeze(-1) - columns.unsqueeze(-2)).to(wide)
    decay.clamp_(limits.low, limits.high).exp_()

    B = part(inputs.B).transpose(2, 3).to(wide).contiguous()
    C = part(inputs.C).transpose(2, 3).to(wide).contiguous()
    scores = torch.matmul(C, B.mT).tril_()
    same = None
    if documents is not None:
        same = (documents.unsqueeze(-1) == documents.unsqueeze(-2)).unsqueeze(2)
        scores.mul_(same)

    last = total[..., -1:]
    return Segment(
        x=part(inputs.x).unflatten(3, (groups, -1)).permute(0, 1, 3, 2, 4, 5),
        dt=dt,
        B=B,
        C=C,
        scores=scores,
        same=same,
        decay=decay,
        into=_fade(total, limits, wide),
        out_of=_fade(last - total, limits, wide),
        across=_fade(last.squeeze(-1), limits, wide),
    )


def _fade(exponent: Tensor, limits: Limits, wide: torch.dtype) -> Tensor:
    """exp in float64, with what is too small to matter made exactly zero, then rounded."""
    return torch.threshold(exponent, limits.vanish, -torch.inf).exp_().to(wide)


def mix(part: Segment, D: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`c*b*h q q`: how much of each token's x reaches each token's y without leaving the chunk.

    Args:
        out: where to write it; `part.decay` itself when it is not needed any more.
    """
    groups = part.scores.shape[2]
    decay = part.decay.unflatten(2, (groups, -1))
    result = torch.mul(decay, part.scores.unsqueeze(3), out=_like(out, decay))
    result = result.flatten(2, 3)
    if D is not None:
        result.diagonal(dim1=-2, dim2=-1).add_(D.to(result.dtype).unsqueeze(-1))
    return result.flatten(0, 2)


def _like(out: Tensor | None, other: Tensor) -> Tensor | None:
    return None if out is None else out.view(other.shape)


def written(part: Segment) -> Tensor:
    """`c*b*g q r*p`: x scaled to what it adds to the state at the end of its chunk."""
    scale = part.out_of * part.dt.to(part.out_of.dtype)
    return (part.x * part.grouped(scale)).flatten(4).flatten(0, 2)


def walk(part: Segment, scaled: Tensor, state: Tensor) -> Tensor:
    """`c+1 b h p n`: the state before each chunk of the segment, and after the last.

    Args:
        scaled: from `written`.
        state: `b h p n`, before the segment.
    """
    chunks = part.B.shape[0]
    states = state.new_empty(chunks + 1, *state.shape)
    states[0].copy_(state)
    width, n = scaled.shape[-1], part.B.shape[-1]
    torch.bmm(scaled.mT, part.B.flatten(0, 2), out=states[1:].view(-1, width, n))
    keep = part.across[..., None, None].unbind(0)
    each = states.unbind(0)
    for c in range(chunks):
        each[c + 1].addcmul_(each[c], keep[c])
    return states


def read(part: Segment, states: Tensor) -> Tensor:
    """`c*b*g q r*p`: what the state before each chunk answers to each of its C."""
    width = states.shape[2] * states.shape[3] // part.C.shape[2]
    rows = states[:-1].reshape(-1, width, states.shape[-1])
    return torch.bmm(part.C.flatten(0, 2), rows.mT)


def spread(part: Segment, grouped: Tensor, out: Tensor) -> None:
    """Write `c*b*g q n` into `b t g n`."""
    chunks, _, _, chunk, _ = part.B.shape
    target = out.unflatten(1, (chunks, chunk)).transpose(0, 1).transpose(2, 3)
    target.copy_(grouped.view(part.B.shape))


def combine(part: Segment, heads: Tensor, groups: Tensor, scale: Tensor, out: Tensor) -> None:
    """Add `heads` (head by head) and `scale * groups` (group by group) into `out`, `b t h p`."""
    chunks, batch, g, chunk, r, p = part.x.shape
    target = out.unflatten(1, (chunks, chunk)).transpose(0, 1).unflatten(3, (g, r))
    side_by_side = groups.view(chunks, batch, g, chunk, r, p)
    by_head = heads.view(chunks, batch, g, r, chunk, p).transpose(3, 4)
    target = target.transpose(2, 3)
    if out.dtype == heads.dtype:
        torch.addcmul(by_head, side_by_side, part.grouped(scale), out=target)
    else:
        target.copy_(torch.addcmul(by_head, side_by_side, part.grouped(scale)))


def forward(
    inputs: Inputs, state: Tensor, chunk: int, keep_states: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, the last state and, where asked, the state before each segment."""
    batch, tokens, heads, _ = inputs.x.shape
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    before: list[Tensor] = []
    for first, chunks, length in cut(tokens, batch * heads, chunk):
        if keep_states:
            before.append(state)
        part = segment(inputs, first, chunks, length, state.dtype)
        states = walk(part, written(part), state)
        local = torch.bmm(mix(part, inputs.D, out=part.decay), part.heads)
        target = y.narrow(1, first, chunks * length)
        combine(part, local, read(part, states), part.into, target)
        state = states[-1].clone()
    return y, state, before
