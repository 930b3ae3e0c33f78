"""The chunked SSD in scratch memory, with a gradient written by hand: values, gradients and speed.

The four steps are those of `ops/ssd.py`. Here they are made fast: work is cut into blocks of a few
chunks whose temporaries stay in the CPU's caches, and autograd stores none of them.

Shapes inside a block of c chunks of q tokens, with r = h / g heads per group:

    x, y                    c b g r q p  (head by head)  or  c b g q r p  (a group side by side)
    B, C                    c b g q n
    decay, mix              c b g r q q
    states                  c+1 b h p n: the state before each chunk, and after the last

A group's B and C are shared by its r heads, so products with them take the heads side by side as
one matrix of r*p columns. A state is laid out as the model stores it, head by head, p x n.

Exactness. The exponents s_l - s_r are formed in float64 and only then rounded: in float32 the
running sum s loses digits under strong decay, and the exponential makes that loss visible. dt_r is
added to the exponent as log dt_r, and D to the diagonal of `mix`, so neither costs a pass over
memory. The exponent is clamped from below to keep subnormal numbers out of the products, which CPUs
multiply many times slower; what that adds is a factor of e^-60 of a token's contribution. Nothing
above the diagonal is read: C B^T is zeroed there.

BF16 on a CPU, without gradients: `mix x` and `C S^T` are products of BF16 numbers with BF16
results. y is rounded to BF16 anyway; its relative error grows from 1.7e-3 to 2.3e-3, and these
products take a third of the time. Nothing that reaches a state is rounded.

The backward pass. Autograd would store every temporary of the forward pass: several tensors of
q x q per head and chunk. Kept here is one state per block. Going through the blocks backwards, each
is computed again and differentiated at once. For one head and chunk, with M the q x q mix, S the
state before the chunk, S' the state after it, and gradients written g:

    y  = M x + e^s (C S^T)         M_lr = (C_l . B_r) L_lr + D [l = r],   L_lr = e^(s_l - s_r) dt_r
    S' = e^(s_q) S + sum_r w_r x_r (outer) B_r,                            w_r = e^(s_q - s_r) dt_r

    gM  = gy x^T                              gD = trace(gM)
    gx  = M^T gy + w (B gS'^T)
    gCB = sum over the heads of a group of gM * L, lower triangle
    gC  = gCB B   + (e^s gy) S                gB = gCB^T C + (w x) gS'
    gS  = e^(s_q) gS' + (e^s gy)^T C

The gradient of s needs care. Let P = gM * L * (C B^T), the gradient of the exponents. Entry (l, r)
depends on exactly the steps a_t = dt_t A with r < t <= l. An entry on the diagonal depends on none,
yet it is by far the largest under strong decay. The textbook form, a running sum of (row sum minus
column sum), adds it and subtracts it again, and leaves rounding noise in dA. Here the entries that
depend on a step are added up and nothing is subtracted: a product with a triangle of ones sums over
l >= t, a masked row sum over r < t. In the same way the write of token r depends on the steps after
r, and what token l reads from the state on the steps up to l:

    ga_t = sum_{l >= t > r} P_lr + sum_{l >= t} read_l + sum_{r < t} write_r + e^(s_q) (S . gS')
    gdt_t = A ga_t + (sum_l P_lt) / dt_t + e^(s_q - s_t) (x_t . gS' B_t)

Speed. A block has as many chunks as keep its temporaries in the CPU's caches. Temporaries are
written to the same memory block after block (`Scratch`), since the first touch of a fresh page can
cost more than the arithmetic done on it.

Source: Dao and Gu 2024 (arXiv 2405.21060) section 6; the gradient is differentiated here from the
forward equations. Left out: second derivatives.
"""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_lite.dtypes import exact_backward

RESET = -1e3  # the exponent at a document start; e^-1000 is 0 even in float64
# Tokens of a chunk: work inside it grows with q, traffic of states with 1/q. The sum is least where
# q is near p. Heads of 32 channels: 0.7 of the time with 32 tokens instead of 64.
CHUNK, LEAST_CHUNK = 64, 32
BLOCK_HEADS = 128  # chunks x rows x heads of 64 x 64 entries that are computed together


class Limits(NamedTuple):
    """What keeps exponents finite and products out of the subnormal range, for one dtype."""

    low: float  # least exponent inside a chunk
    high: float  # greatest one; only dt > e^40 could exceed it below the diagonal
    vanish: float  # decays of whole states below e^vanish are exactly zero
    least_dt: float  # used instead of dt = 0 in log dt


LIMITS = {
    torch.float32: Limits(-60.0, 40.0, -60.0, 1e-13),
    torch.float64: Limits(-300.0, 40.0, -300.0, 1e-60),
}


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    starts: Tensor | None,
    state: Tensor,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.ssd` of inputs whose shapes were checked.

    Args:
        x, dt, A, B, C, D: as there; dt is a step size already.
        starts: `b t`, True at the first token of a document; None when there is only one.
        state: `b h p n` before the first token, in the dtype to compute in.
        chunk: tokens of a chunk; near p when None.
    """
    chunk = best_chunk(x.shape[-1]) if chunk is None else chunk
    given = (x, dt, A, B, C, D, starts, state)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in given):
        return _Ssd.apply(*given, chunk)
    y, last, _ = forward(Inputs(*given[:-1]), state, chunk, keep_states=False)
    return y, last


def best_chunk(head_dim: int) -> int:
    """Tokens of a chunk for heads of this many channels."""
    return min(CHUNK, max(LEAST_CHUNK, head_dim))


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x, dt, A, B, C, D, starts, state, chunk
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs(x, dt, A, B, C, D, starts)
        y, last, before = forward(inputs, state, chunk, keep_states=True)
        ctx.save_for_backward(*inputs, *before)
        ctx.chunk = chunk
        return y, last

    @staticmethod
    @once_differentiable
    @exact_backward
    def backward(  # type: ignore[override]
        ctx: Any, grad_y: Tensor, grad_last: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        count = len(Inputs._fields)
        inputs = Inputs(*saved[:count])
        grads = backward(inputs, list(saved[count:]), ctx.chunk, grad_y, grad_last)
        A = grads.A.to(inputs.A.dtype)
        D = None if inputs.D is None else grads.D.to(inputs.D.dtype)
        return grads.x, grads.dt, A, grads.B, grads.C, D, None, grads.state, None


class Inputs(NamedTuple):
    """The inputs of `ssd` after validation, as given: any float dtype, any strides."""

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


class ChunkRange(NamedTuple):
    """Some chunks of equal length that follow each other."""

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
    """Memory for temporaries, one buffer per name, kept from block to block and call to call.

    Buffers belong to a thread and a dtype. They have a few megabytes for any t, and grow when a
    call needs more. The caller gets a view of the requested size, so that the buffer of an earlier,
    larger call can be used for a smaller one. On devices other than the CPU they last for one call:
    those allocators cache memory themselves, and they know about streams. `narrow` is the dtype of
    products whose result goes only into y.
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
        """Uninitialized memory; what was taken under the same name before is overwritten."""
        key = (name, dtype or self.dtype)
        count = math.prod(shape)
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < count:
            with torch.inference_mode(False):  # one made inside could not be used outside
                buffer = torch.empty(count, dtype=key[1], device=self.device)
            self.buffers[key] = buffer
        return buffer[:count].view(shape)


class Block(NamedTuple):
    """What the forward and the backward pass both need of one block of chunks."""

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
        """v for a product whose result goes only into y: itself, or a rounded copy."""
        if v.dtype == self.scratch.narrow:
            return v
        return self.scratch.take(name, *v.shape, dtype=self.scratch.narrow).copy_(v)

    def by_group(self, v: Tensor, per_token: Tensor, name: str) -> Tensor:
        """`c b g q r p` times `c b h q`, as `c*b*g q r*p`."""
        result = self.scratch.take(name, *v.shape)
        torch.mul(v, self.grouped(per_token), out=result)
        return result.view(-1, v.shape[3], v.shape[4] * v.shape[5])

    def new_states(self, name: str) -> Tensor:
        """Uninitialized memory of `c+1 b h p n`."""
        chunks, batch, groups, _, shared, width = self.x.shape
        n = self.B.shape[-1]
        return self.scratch.take(name, chunks + 1, batch, groups * shared, width, n)

    def matrices(self, states: Tensor) -> Tensor:
        """`c b h p n` -> `c*b*g r*p n`: the states of a group's heads as one matrix."""
        return states.view(-1, self.x.shape[4] * self.x.shape[5], states.shape[-1])


def split(
    batch: int, tokens: int, heads: int, chunk: int
) -> list[tuple[int, int, list[ChunkRange]]]:
    """Split the work into (first row, rows, chunks in order); a ragged end is one short chunk."""
    most = max(1, BLOCK_HEADS * 64 * 64 // (heads * chunk * chunk))
    rows = max(1, min(batch, most))
    chunks, whole = most // rows, tokens // chunk
    ranges = [
        ChunkRange(first * chunk, min(chunks, whole - first), chunk)
        for first in range(0, whole, chunks)
    ]
    if tokens % chunk:
        ranges.append(ChunkRange(whole * chunk, 1, tokens % chunk))
    return [(row, min(rows, batch - row), ranges) for row in range(0, batch, rows)]


def prepare(inputs: Inputs, chunk_range: ChunkRange, scratch: Scratch) -> Block:
    """Everything about a block of chunks that does not depend on the state."""
    _, chunks, chunk = chunk_range
    wide = scratch.dtype
    batch, _, heads, _ = inputs.x.shape
    groups, n = inputs.B.shape[2:]
    limits = LIMITS[wide]

    dt = chunk_range.of(inputs.dt).transpose(2, 3).to(torch.float64)
    total = dt * inputs.A.to(torch.float64).unsqueeze(-1)
    same = None
    if inputs.starts is not None:
        starts = chunk_range.of(inputs.starts)
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
    B.copy_(chunk_range.of(inputs.B).transpose(2, 3))
    C.copy_(chunk_range.of(inputs.C).transpose(2, 3))
    scores = scratch.take("scores", chunks, batch, groups, chunk, chunk)
    flat = scores.view(-1, chunk, chunk)
    torch.bmm(C.view(-1, chunk, n), B.view(-1, chunk, n).mT, out=flat).tril_()
    if same is not None:
        scores.mul_(same)

    last = total[..., -1:]
    return Block(
        x=chunk_range.grouped(inputs.x, groups),
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
    """exp in float64; what is too small to matter becomes exactly zero; then rounded."""
    return torch.threshold(exponent, limits.vanish, -torch.inf).exp_().to(wide)


def mixing_matrix(block: Block, D: Tensor | None, out: Tensor) -> Tensor:
    """`c*b*h q q`: how much of each token's x reaches each token's y without leaving the chunk.

    Args:
        out: where to write it; `block.decay` itself when that is not needed any more.
    """
    torch.mul(block.decay, block.scores.unsqueeze(3), out=out)
    if D is not None:
        diagonal = out.flatten(2, 3).diagonal(dim1=-2, dim2=-1)
        diagonal.add_(D.to(out.dtype).unsqueeze(-1))
    return out.view(-1, *out.shape[-2:])


def written(block: Block) -> Tensor:
    """`c*b*g q r*p`: x scaled to what it adds to the state at the end of its chunk."""
    return block.by_group(block.x, block.out_of * block.dt.to(block.out_of.dtype), "written")


def carry_states(block: Block, scaled: Tensor, state: Tensor) -> Tensor:
    """`c+1 b h p n`: the state before each chunk of the block, and after the last.

    Args:
        scaled: from `written`.
        state: `b h p n`, before the block.
    """
    states = block.new_states("states")
    states[0].copy_(state)
    torch.bmm(scaled.mT, block.B.flatten(0, 2), out=block.matrices(states[1:]))
    each = states.unbind(0)
    for c, keep in enumerate(block.across[..., None, None].unbind(0)):
        each[c + 1].addcmul_(each[c], keep)
    return states


def read(block: Block, states: Tensor) -> Tensor:
    """`c*b*g q r*p`: the state before each chunk, read with each token's C."""
    C = block.narrow(block.C.flatten(0, 2), "C")
    rows = block.narrow(block.matrices(states[:-1]), "rows")
    out = block.scratch.take("read", C.shape[0], C.shape[1], rows.shape[1], dtype=C.dtype)
    return torch.bmm(C, rows.mT, out=out)


def combine(block: Block, heads: Tensor, groups: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write `heads` (head by head) plus `scale * groups` (group by group).

    Args:
        heads: `c*b*h q p`.
        groups: `c*b*g q r*p`.
        scale: `c b h q`.
        out: `c b g q r p`, a view of the result.
    """
    chunks, batch, g, chunk, shared, width = out.shape
    by_head = heads.view(chunks, batch, g, shared, chunk, width).transpose(3, 4)
    scale = block.grouped(scale).to(groups.dtype)
    torch.addcmul(by_head, groups.view(out.shape), scale, out=out)


def forward(
    inputs: Inputs, state: Tensor, chunk: int, keep_states: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """y, the last state and, with `keep_states`, the state before each block."""
    batch, tokens, heads, _ = inputs.x.shape
    narrows = inputs.x.is_cpu and inputs.x.dtype == torch.bfloat16 and not keep_states
    scratch = Scratch(state.dtype, inputs.x.device, torch.bfloat16 if narrows else None)
    y = torch.empty_like(inputs.x, memory_format=torch.contiguous_format)
    last = torch.empty_like(state, memory_format=torch.contiguous_format)
    before: list[Tensor] = []
    for row, rows, ranges in split(batch, tokens, heads, chunk):
        local, now = inputs.rows(row, rows), state.narrow(0, row, rows)
        answer = y.narrow(0, row, rows)
        for chunk_range in ranges:
            if keep_states:
                before.append(now)
            block = prepare(local, chunk_range, scratch)
            states = carry_states(block, written(block), now)
            now = states[-1].clone()
            x = block.by_head(block.x, "heads")
            mixed = block.narrow(mixing_matrix(block, inputs.D, block.decay), "mix")
            inside = torch.bmm(mixed, x, out=scratch.take("inside", *x.shape, dtype=x.dtype))
            target = chunk_range.grouped(answer, inputs.B.shape[2])
            combine(block, inside, read(block, states), block.into, target)
        last.narrow(0, row, rows).copy_(now)
    return y, last, before


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
    """The gradients of all inputs, block by block from the last to the first.

    Args:
        inputs: of the forward pass.
        before: the state before each block, from the forward pass.
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
    for row, rows, ranges in reversed(split(batch, tokens, heads, chunk)):
        local, now = inputs.rows(row, rows), grad_state.narrow(0, row, rows)
        for chunk_range in reversed(ranges):
            block = prepare(local, chunk_range, scratch)
            gx, gy = (chunk_range.grouped(v.narrow(0, row, rows), groups) for v in (x, grad_y))
            gdt, gB, gC = (
                chunk_range.of(v.narrow(0, row, rows)).transpose(2, 3) for v in (dt, B, C)
            )
            grads = Gradients(gx, gdt, A, gB, gC, D, now)
            now = _backward_of_block(inputs, block, remaining.pop(), gy, grads)
        state.narrow(0, row, rows).copy_(now)
    return Gradients(x, dt, A, B, C, D, state)


def _backward_of_block(
    inputs: Inputs, block: Block, state: Tensor, gy: Tensor, grads: Gradients
) -> Tensor:
    """Fill `grads` for one block; returns the gradient of the state before it."""
    take, wide = block.scratch.take, state.dtype
    B, C = block.B.flatten(0, 2), block.C.flatten(0, 2)
    gy_heads = block.by_head(gy, "gy_heads")
    gy_into = block.by_group(gy, block.into, "gy_into")

    # Inside the chunks
    mix = mixing_matrix(block, inputs.D, take("mix", *block.decay.shape))
    gx_heads = torch.bmm(mix.mT, gy_heads, out=take("inside", *gy_heads.shape))
    exponents = take("g_mix", *mix.shape)
    torch.bmm(gy_heads, block.by_head(block.x, "heads").mT, out=exponents)
    exponents = exponents.view(block.decay.shape)
    grads.D.add_(_diagonal(exponents).sum((0, 1, 3), dtype=torch.float64))
    exponents.mul_(block.decay)
    g_scores = torch.sum(exponents, 3, out=take("g_scores", *block.scores.shape)).tril_()
    if block.same is not None:
        g_scores.mul_(block.same)
    exponents.mul_(block.scores.unsqueeze(3))
    diagonal = _diagonal(exponents)
    own = diagonal.clone()
    diagonal.zero_()
    ones = torch.ones_like(mix[0]).triu_().expand(mix.shape)
    from_here = torch.bmm(ones, exponents.view(mix.shape), out=mix).view(block.decay.shape)
    columns = from_here[..., 0, :].flatten(2, 3) + own
    spanning = from_here.tril_(-1).sum(-1).flatten(2, 3)

    # Through the states
    scaled = written(block)
    states = carry_states(block, scaled, state)
    answers = read(block, states)
    g_states = block.new_states("g_states")
    g_states[-1].copy_(grads.state)
    torch.bmm(gy_into.mT, C, out=block.matrices(g_states[:-1]))
    each = g_states.unbind(0)
    for c, keep in reversed(list(enumerate(block.across[..., None, None].unbind(0)))):
        each[c].addcmul_(each[c + 1], keep)
    after = block.matrices(g_states[1:])
    g_written = torch.bmm(B, after.mT, out=take("g_written", *scaled.shape))

    g_scores = g_scores.view(-1, *g_scores.shape[-2:])
    g_map = take("g_map", *B.shape)
    torch.bmm(g_scores, B, out=g_map).baddbmm_(gy_into, block.matrices(states[:-1]))
    grads.C.copy_(g_map.view(block.C.shape))
    torch.bmm(g_scores.mT, C, out=g_map).baddbmm_(scaled, after)
    grads.B.copy_(g_map.view(block.B.shape))
    combine(block, gx_heads, g_written, block.out_of * block.dt.to(wide), grads.x)

    # What is left is one number per token and head
    reads = _per_token(answers.mul_(gy_into).view(gy.shape))
    direct = _per_token(g_written.view(gy.shape).mul_(block.x)) * block.out_of
    writes = direct * block.dt
    whole = states[:-1].mul_(g_states[1:]).sum((3, 4), dtype=wide) * block.across
    g_steps = reads.flip(-1).cumsum_(-1).flip(-1).add_(spanning)
    g_steps.add_(writes.cumsum(-1).sub_(writes)).add_(whole.unsqueeze(-1))
    grads.A.add_((g_steps * block.dt).sum((0, 1, 3)))
    g_dt = g_steps * inputs.A.to(torch.float64).unsqueeze(-1)
    g_dt.add_(columns / block.dt.clamp(min=LIMITS[wide].least_dt)).add_(direct)
    grads.dt.copy_(g_dt)
    return each[0].clone()


def _diagonal(squares: Tensor) -> Tensor:
    """`c b g r q q` -> `c b h q`, a view of the diagonals."""
    return squares.flatten(2, 3).diagonal(dim1=-2, dim2=-1)


def _per_token(products: Tensor) -> Tensor:
    """`c b g q r p` summed over p, as `c b h q` in float64."""
    return products.sum(-1).transpose(3, 4).flatten(2, 3).to(torch.float64)
