"""State-space duality: the selective scan of a whole sequence as matrix products.

Written out, the recurrence of scan.py is one large lower-triangular matrix applied to x:

    y_l = sum_{r <= l} (C_l . B_r) exp(a_{r+1} + ... + a_l) dt_r x_r + D x_l,     a_t = dt_t A

This matrix is never built. Split into chunks of q tokens, its blocks on the diagonal are small
products of the kind attention uses, and everything below them goes through the state:

    1. inside a chunk    y  = ((C B^T) * L) (dt x)      L_lr = exp(s_l - s_r) for r <= l
    2. chunk -> state    U  = sum_r exp(s_q - s_r) dt_r x_r (outer) B_r
    3. state -> state    S' = exp(s_q) S + U            one step per chunk instead of one per token
    4. state -> output   y += exp(s_l) S C_l

with s the running sum of a inside the chunk. Work and memory grow linearly with the sequence. The
same products serve training, prefill, and continuing from a state that decoding left behind.

`chunked_scan` below is these four steps in plain PyTorch. The fast form, with scratch memory and a
gradient written by hand, is `backends/cpu_ssd.py`. Inputs of any float dtype are computed in
float32 (float64 stays float64), with one exception in the fast form: where BF16 is read on a CPU
without gradients, the products whose results go only into y are in BF16. Decays and states are
always in float32.

Source: Dao and Gu 2024 (arXiv 2405.21060) section 6; reference sheet 2.3. Left out: variable A
within a head, and dt clamping (see scan.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.backends import cpu_ssd, traceable, triton
from nemotron_lite.backends.dispatch import choose
from nemotron_lite.dtypes import wide_dtype, without_autocast
from nemotron_lite.masks import document_starts
from nemotron_lite.ops.scan import check_shapes, selective_scan, step_sizes


def chunked_scan(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    *,
    D: Float[Tensor, "h"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
    seq_idx: Int[Tensor, "b t"] | None = None,
    chunk_size: int = 64,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """`selective_scan` by the four steps above; arguments and results are the same.

    The end of a sequence that does not fill its chunk is padded with dt = 0, which changes no
    state. Exponents are formed in float64: in float32 their sums would lose digits. Any
    `chunk_size` gives the same numbers up to rounding; 64 is about the head width p.
    """
    check_shapes(x, dt, A, B, C, D, initial_state, seq_idx)
    (b, t, h, p), (g, n), wide = x.shape, B.shape[2:], wide_dtype(x)
    count = -(-t // chunk_size)

    def chunks(v: Tensor) -> Tensor:  # b t ... -> b c q ...
        padded = F.pad(v, [0, 0] * (v.ndim - 2) + [0, count * chunk_size - t])
        return padded.unflatten(1, (count, chunk_size))

    writes = chunks(x.to(wide) * dt.to(wide).unsqueeze(-1))  # dt x: b c q h p
    keys, queries = (chunks(v.to(wide)).repeat_interleave(h // g, dim=3) for v in (B, C))
    s = chunks(dt.double() * A.double()).cumsum(2)  # b c q h
    total = s[:, :, -1:]

    # In each chunk, document 0 is the one that was open before it: only its tokens read the state
    # from before the chunk.
    starts = torch.zeros_like(dt[..., 0]) if seq_idx is None else document_starts(seq_idx)
    document = chunks(starts.long()).cumsum(2)  # b c q
    from_before, in_last = document == 0, document == document[:, :, -1:]
    visible = (document.unsqueeze(3) == document.unsqueeze(2)).tril()  # b c l r

    def decay(exponent: Tensor, where: Tensor) -> Tensor:
        return exponent.masked_fill(~where.unsqueeze(-1), -math.inf).exp().to(wide)

    # 1. inside a chunk
    scores = torch.einsum("bclhn,bcrhn->bclrh", queries, keys)
    L = decay(s.unsqueeze(3) - s.unsqueeze(2), visible)  # b c l r h
    y = torch.einsum("bclrh,bcrhp->bclhp", scores * L, writes)

    # 2. chunk -> state: what is left of a chunk's writes at its end
    added = torch.einsum("bcrh,bcrhp,bcrhn->bchpn", decay(total - s, in_last), writes, keys)

    # 3. state -> state: one step per chunk
    kept = decay(total, from_before[:, :, -1:])[:, :, 0, :, None, None]  # b c h 1 1
    state = x.new_zeros(b, h, p, n, dtype=wide) if initial_state is None else initial_state.to(wide)
    before = []
    for keep, add in zip(kept.unbind(1), added.unbind(1), strict=True):
        before.append(state)
        state = keep * state + add

    # 4. state -> output
    if before:
        states = torch.stack(before, dim=1)  # b c h p n
        y = y + torch.einsum("bclh,bchpn,bclhn->bclhp", decay(s, from_before), states, queries)
    y = y.flatten(1, 2)[:, :t].contiguous()
    if D is not None:
        y = y + D.to(wide).unsqueeze(-1) * x.to(wide)
    return y.to(x.dtype), state


def ssd(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    *,
    D: Float[Tensor, "h"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
    seq_idx: Int[Tensor, "b t"] | None = None,
    chunk_size: int | None = None,
    dt_bias: Float[Tensor, "h"] | None = None,
    dt_softplus: bool = False,
    impl: str = "auto",
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """`selective_scan` over t tokens, by chunks.

    Args:
        x: what is written to the state; any strides, any t (a ragged end is one shorter chunk).
        dt: step size per token and head, >= 0; or what becomes one by `dt_bias` and `dt_softplus`.
            dt = 0 does not change the state.
        A: decay rate per head, negative.
        B, C: write and read directions, one per group; g divides h.
        D: weight of the path around the state; none when None.
        initial_state: state before the first token; zeros when None.
        seq_idx: which document each token belongs to, where a row holds several. Where it changes,
            the state is reset to zero; `initial_state` belongs to the first document of the row.
        chunk_size: q; the result depends on it only by rounding. When None, 64 ("triton": what its
            tables say).
        dt_bias, dt_softplus: added to dt, and whether the sum goes through softplus, as in
            `step_sizes`. "triton" does both inside its kernel, the other forms do them first.
        impl: "naive" (`selective_scan`), "torch" (`chunked_scan`), "cpu" (chunked, gradient written
            by hand), "traced" (chunked, without a loop) or "triton" (chunked, one kernel).

    Returns:
        (y, state): y in the dtype of x, contiguous, and the state after the last token in float32
        (float64 when x is float64).

    Raises:
        ValueError: unknown `impl`, a chunk size below 1, or shapes that do not fit each other.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1 token.")
    run = choose(
        "ssd", impl, x, naive=_naive, torch=_torch, cpu=_cpu, traced=_traced, triton=_triton
    )
    given = Inputs(x, dt, A, B, C, D, initial_state, seq_idx, chunk_size, dt_bias, dt_softplus)
    return without_autocast(run, x)(given)


class Inputs(NamedTuple):
    """The arguments of `ssd`, in the order in which `backends.triton.ssd` takes them."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    initial_state: Tensor | None
    seq_idx: Tensor | None
    chunk: int | None
    dt_bias: Tensor | None
    dt_softplus: bool

    def steps(self) -> Tensor:
        """dt after its bias and its softplus."""
        return step_sizes(self.dt, self.dt_bias, self.dt_softplus)


def _naive(v: Inputs) -> tuple[Tensor, Tensor]:
    return selective_scan(
        v.x, v.steps(), v.A, v.B, v.C, D=v.D, initial_state=v.initial_state, seq_idx=v.seq_idx
    )


def _torch(v: Inputs) -> tuple[Tensor, Tensor]:
    size = {} if v.chunk is None else {"chunk_size": v.chunk}
    return chunked_scan(
        v.x,
        v.steps(),
        v.A,
        v.B,
        v.C,
        D=v.D,
        initial_state=v.initial_state,
        seq_idx=v.seq_idx,
        **size,
    )


def _cpu(v: Inputs) -> tuple[Tensor, Tensor]:
    dt, wide = v.steps(), wide_dtype(v.x)
    check_shapes(v.x, dt, v.A, v.B, v.C, v.D, v.initial_state, v.seq_idx)
    if v.initial_state is None:
        state = v.x.new_zeros(v.x.shape[0], *v.x.shape[2:], v.B.shape[3], dtype=wide)
    else:
        state = v.initial_state.to(wide)
    starts = None if v.seq_idx is None else document_starts(v.seq_idx)
    return cpu_ssd.ssd(v.x, dt, v.A, v.B, v.C, v.D, starts, state, v.chunk)


def _traced(v: Inputs) -> tuple[Tensor, Tensor]:
    dt, wide = v.steps(), wide_dtype(v.x)
    check_shapes(v.x, dt, v.A, v.B, v.C, v.D, v.initial_state, v.seq_idx)
    starts = None if v.seq_idx is None else document_starts(v.seq_idx)
    given = v.x, dt, v.A, v.B, v.C, v.D, v.initial_state, starts
    return traceable.ssd(*given, wide, v.chunk)


def _triton(v: Inputs) -> tuple[Tensor, Tensor]:
    return triton.ssd(*v)
