"""The forward arithmetic of `ssd`: one segment of chunks, and the walk over the segments.

Shapes inside a segment of c chunks of q tokens, with r = h / g heads per group:

    x, y                    c b g r q p  (head by head)  or  c b g q r p  (a group side by side)
    B, C                    c b g q n
    decay, mix              c b g r q q
    states                  c+1 b h p n: the state before each chunk, and after the last

A group's B and C are shared by its r heads, so products with them take the heads side by side as
one matrix of r*p columns. A state is laid out as the model stores it, head by head, p x n.

Exactness. The exponents s_l - s_r are formed in float64 and only then rounded, since in float32
the running sum s loses digits that the exponential brings back under strong decay. dt_r is folded
into the exponent as log dt_r, and D is added to the diagonal of `mix`: neither costs a pass over
memory. The exponent is clamped from below to keep subnormal numbers out of the products, which
processors handle many times slower; what that adds is a factor of e^-60 of a token's contribution.
Nothing above the diagonal is read: C B^T is zeroed there.

BF16 on a CPU, without gradients: `mix x` and `C S^T` are rounded to BF16 going in and coming out,
as y is anyway; its relative error goes from 1.7e-3 to 2.3e-3. They take a third of the time. What
reaches a state is rounded nowhere.

Speed. A segment is as many chunks as keep its temporaries in the cache, and temporaries are written
to the same memory segment after segment (`Scratch`), since the first touch of a fresh page can cost
more than the arithmetic done on it.
"""

from __future__ import annotations

import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

RESET = -1e3  # the exponent at a document start; e^-1000 is 0 even in float64
SEGMENT_HEADS = 64  # chunks x rows x heads of 64 x 64 entries that are worked on at once


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

    def rows(self, first: int, count: int) -> Inputs:
        """The same for `count` rows of the batch."""
        x, dt, B, C = (v.narrow(0, first, count) for v in (self.x, self.dt, self.B, self.C))
        starts = None if self.starts is None else self.starts.narrow(0, first, count)
        return Inputs(x, dt, self.A, B, C, self.D, starts)


class Run(NamedTuple):
    """A run of chunks of equal length."""

    first: int  # token
    chunks: int
    chunk: int  # tokens of each

    def of(self, v: Tensor) -> Tensor:
        """`b t ...` -> `c b q ...`, a view."""
        v = v.narrow(1, self.first, self.chunks * self.chunk)
        return v.unflatten(1, (self.chunks, self.chunk)).transpose(0, 1)

    def grouped(self, v: Tensor, groups: int) -> Tensor:
        """`b t h p` -> `c b g q r p`, a view."""
        return self.of(v).unflatten(3, (groups, -1)).transpose(2, 3)


class Scratch:
    """Memory for temporaries, one buffer per name, kept from segment to segment and call to call.

    Buffers belong to a thread, a dtype and a device. They hold a few megabytes, whatever t is.
    Elsewhere than on a CPU they last for one call: those allocators cache memory themselves, and
    know about streams. `narrow` is the dtype of products that only y reads.
    """

    _kept = threading.local()

    def __init__(
        self, dtype: torch.dtype, device: torch.device, narrow: torch.dtype | None = None
    ) -> None:
        self.dtype, self.device, self.narrow = dtype, device, narrow or dtype
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        if device.type == "cpu":
            self.buffers = self._kept.__dict__.setdefault("buffers", self.buffers)

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised memory; what was taken under the same name before is overwritten."""
        key = (name, dtype or self.dtype)
        count = math.prod(shape)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < count:
            with torch.inference_mode(False):  # a buffer made inside would be barred outside
                buffer = torch.empty(count, dtype=key[1], device=self.device)
            self.buffers[key] = buffer
        return buffer[:count].view(shape)


class Segment(NamedTuple):
    """What the forward and the backward pass both need to know about one run of chunks."""

    x: Tensor  # c b g q r p, a view of the input
    dt: Tensor  # c b h q, float64
    B: Tensor  # c b g q n
    C: Tensor  # c b g q n
    scores: Tensor  # c b g q q: C B^T where token l sees token r, zero elsewhere
    same: Tensor | None  # c b 1 q q: l and r in one document; None when there is only one
    decay: Tensor  # c b g r q q: exp(s_l - s_r) dt_r; above the diagonal meaningless, but finite
    into: Tensor  # c b h q: exp(s_l), how much of the state before the chunk reaches token l
    out_of: Tensor  # c b h q: exp(s_q - s_r), how much of token r's write outlives the chunk
    across: Tensor  # c b h: exp(s_q), how much of the state outlives the chunk
    scratch: Scratch

    def grouped(self, per_token: Tensor) -> Tensor:
        """`c b h q` -> `c b g q r 1`, to scale what lies group by group."""
        return per_token.unflatten(2, (self.B.shape[2], -1)).transpose(3, 4).unsqueeze(-1)

    def by_head(self, v: Tensor, name: str) -> Tensor:
        """`c b g q r p`, any strides and dtype -> `c*b*h q p`, copied; narrow."""
        chunks, batch, groups, chunk, shared, width = v.shape
        shape, narrow = (chunks, batch, groups, shared, chunk, width), self.scratch.narrow
        copy = self.scratch.take(name, *shape, dtype=narrow)
        return copy.copy_(v.transpose(3, 4)).view(-1, chunk, width)

    def narrow(self, v: Tensor, name: str) -> Tensor:
        """v as a product that only y reads takes it: itself, or a copy of fewer digits."""
        if v.dtype == self.scratch.narrow:
            return v
        return self.scratch.take(name, *v.shape, dtype=self.scratch.narrow).copy_(v)

    def by_group(self, v: Tensor, per_token: Tensor, name: str) -> Tensor:
        """`c b g q r p` times `c b h q`, as `c*b*g q r*p`."""
        result = self.scratch.take(name, *v.shape)
        torch.mul(v, self.grouped(per_token), out=result)
        return result.view(-1, v.shape[3], v.shape[4] * v.shape[5])

    def new_states(self, name: str) -> Tensor:
        """Room for `c+1 b h p n`."""
        chunks, batch, groups, _, shared, width = self.x.shape
        n = self.B.shape[-1]
        return self.scratch.take(name, chunks + 1, batch, groups * shared, width, n)

    def matrices(self, states: Tensor) -> Tensor:
        """`c b h p n` -> `c*b*g r*p n`: the states of a group's heads as one matrix."""
        return states.view(-1, self.x.shape[4] * self.x.shape[5], states.shape[-1])


def cut(batch: int, tokens: int, heads: int, chunk: int) -> list[tuple[int, int, list[Run]]]:
    """Split the work into (first row, rows, runs in order); a ragged end is one short chunk."""
    room = max(1, SEGMENT_HEADS * 64 * 64 // (heads * chunk * chunk))
    rows = max(1, min(batch, room))
    chunks, whole = room // rows, tokens // chunk
    runs = [
        Run(first * chunk, min(chunks, whole - first), chunk) for first in range(0, whole, chunks)
    ]
    if tokens % chunk:
        runs.append(Run(whole * chunk, 1, tokens % chunk))
    return [(row, min(rows, batch - row), runs) for row in range(0, batch, rows)]


def segment(inputs: Inputs, run: Run, scratch: Scratch) -> Segment:
    """Everything about a run of chunks that does not depend on the state."""
    _, chunks, chunk = run
    wide = scratch.dtype
    batch, _, heads, _ = inputs.x.shape
    groups, n = inputs.B.shape[2:]
    limits = LIMITS[wide]

    dt = run.of(inputs.dt).transpose(2, 3).to(torch.float64)
    total = dt * inputs.A.to(torch.float64).unsqueeze(-1)
    same = None
    if inputs.starts is not None:
        starts = run.of(inputs.starts)
        total.masked_fill_(starts.unsqueeze(2), RESET)
        document = starts.cumsum(-1)
        same = (document.unsqueeze(-1) == document.unsqueeze(-2)).unsqueeze(2)
    total.cumsum_(-1)
    # s_l - (s_r - log dt_r)
    columns = total - dt.clamp(min=limits.least_dt).log_()
    square = (chunks, batch, heads, chunk, chunk)
    exponents = scratch.take("exponents", *square, dtype=torch.float64)
    torch.sub(total.unsqueeze(-1), columns.unsqueeze(-2), out=exponents)
    decay = scratch.take("decay", *square)
    decay.copy_(exponents).clamp_(limits.low, limits.high).exp_()

    B = scratch.take("B", chunks, batch, groups, chunk, n)
    C = scratch.take("C", chunks, batch, groups, chunk, n)
    B.copy_(run.of(inputs.B).transpose(2, 3))
    C.copy_(run.of(inputs.C).transpose(2, 3))
    scores = scratch.take("scores", chunks, batch, groups, chunk, chunk)
    flat = scores.view(-1, chunk, chunk)
    torch.bmm(C.view(-1, chunk, n), B.view(-1, chunk, n).mT, out=flat).tril_()
    if same is not None:
        scores.mul_(same)

    last = total[..., -1:]
    return Segment(
        x=run.grouped(inputs.x, groups),
        dt=dt,
        B=B,
        C=C,
        scores=scores,
        same=same,
        decay=decay.unflatten(2, (groups, -1)),
        into=_fade(total, limits, wide),
        out_of=_fade(last - total, limits, wide),
        across=_fade(last.squeeze(-1), limits, wide),
        scratch=scratch,
    )


def _fade(exponent: Tensor, limits: Limits, wide: torch.dtype) -> Tensor:
    """exp in float64, with what is too small to matter made exactly zero, then rounded."""
    return torch.threshold(exponent, limits.vanish, -torch.inf).exp_().to(wide)


def mix(part: Segment, D: Tensor | None, out: Tensor) -> Tensor:
    """`c*b*h q q`: how much of each token's x reaches each token's y without leaving the chunk.

    Args:
        out: where to write it; `part.decay` itself when that is not needed any more.
    """
    torch.mul(part.decay, part.scores.unsqueeze(3), out=out)
    if D is not None:
        diagonal = out.flatten(2, 3).diagonal(dim1=-2, dim2=-1)
        diagonal.add_(D.to(out.dtype).unsqueeze(-1))
    return out.view(-1, *out.shape[-2:])


def written(part: Segment) -> Tensor:
    """`c*b*g q r*p`: x scaled to what it adds to the state at the end of its chunk."""
    return part.by_group(part.x, part.out_of * part.dt.to(part.out_of.dtype), "written")


def walk(part: Segment, scaled: Tensor, state: Tensor) -> Tensor:
    """`c+1 b h p n`: the state before each chunk of the segment, and after the last.

    Args:
        scaled: from `written`.
        state: `b h p n`, before the segment.
    """
    states = part.new_states("states")
    states[0].copy_(state)
    torch.bmm(scaled.mT, part.B.flatten(0, 2), out=part.matrices(states[1:]))
    each = states.unbind(0)
    for c, keep in enumerate(part.across[..., None, None].unbind(0)):
        each[c + 1].addcmul_(each[c], keep)
    return states


def read(part: Segment, states: Tensor) -> Tensor:
    """`c*b*g q r*p`: what the state before each chunk answers to each of its C."""
    C = part.narrow(part.C.flatten(0, 2), "C")
    rows = part.narrow(part.matrices(states[:-1]), "rows")
    out = part.scratch.take("read", C.shape[0], C.shape[1], rows.shape[1], dtype=C.dtype)
    return torch.bmm(C, rows.mT, out=out)


def combine(part: Segment, heads: Tensor, groups: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write `heads` (head by head) plus `scale * groups` (group by group).

    Args:
        heads: `c*b*h q p`.
        groups: `c*b*g q r*p`.
        scale: `c b h q`.
        out: `c b g q r p`, a view of the result.
    """
    chunks, batch, g, chunk, shared, width = out.shape
    by_head = heads.view(chunks, batch, g, shared, chunk, width).transpose(3, 4)
    scale = part.grouped(scale).to(groups.dtype)
    torch.addcmul(by_head, groups.view(out.shape), scale, out=out)


def forward(
    inputs: Inputs, state: Tensor, chunk: int, keep_states: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, the last state and, where asked, the state before each segment."""
    batch, tokens, heads, _ = inputs.x.shape
    rounds = inputs.x.is_cpu and inputs.x.dtype == torch.bfloat16 and not keep_states
    scratch = Scratch(state.dtype, inputs.x.device, torch.bfloat16 if rounds else None)
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    last = torch.empty_like(state, memory_format=torch.contiguous_format)
    before: list[Tensor] = []
    for row, rows, runs in cut(batch, tokens, heads, chunk):
        local, now = inputs.rows(row, rows), state.narrow(0, row, rows)
        answer = y.narrow(0, row, rows)
        for run in runs:
            if keep_states:
                before.append(now)
            part = segment(local, run, scratch)
            states = walk(part, written(part), now)
            now = states[-1].clone()
            x = part.by_head(part.x, "heads")
            mixed = part.narrow(mix(part, inputs.D, part.decay), "mix")
            inside = torch.bmm(mixed, x, out=scratch.take("inside", *x.shape, dtype=x.dtype))
            target = run.grouped(answer, inputs.B.shape[2])
            combine(part, inside, read(part, states), part.into, target)
        last.narrow(0, row, rows).copy_(now)
    return y, last, before
