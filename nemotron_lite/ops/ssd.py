"""State-space duality: the selective scan of a whole sequence as matrix products.

Written out, the recurrence of scan.py is one large lower-triangular matrix applied to x:

    y_l = sum_{r <= l} (C_l . B_r) exp(a_{r+1} + ... + a_l) dt_r x_r + D x_l,     a_t = dt_t A

This matrix is never built. Cut into chunks of q tokens, its blocks on the diagonal are small
products of the kind attention uses, and everything below them goes through the state:

    1. inside a chunk    y  = ((C B^T) * L) x           L_lr = exp(s_l - s_r) dt_r for r <= l
    2. chunk -> state    U  = sum_r exp(s_q - s_r) dt_r x_r (outer) B_r
    3. state -> state    S' = exp(s_q) S + U            one step per chunk instead of one per token
    4. state -> output   y += exp(s_l) S C_l

with s the running sum of a inside the chunk. Work and memory grow linearly with the sequence; the
same products read a prompt, train, and continue from a state that decoding left behind.

`_ssd_chunks.py` holds the forward arithmetic, `_ssd_backward.py` the hand-written gradient. What is
kept for the backward pass is one state per few chunks. Inputs of any float dtype are computed in
float32 (float64 stays float64), with one exception: where BF16 is read on a CPU without gradients,
the products that only y reads are in BF16. Decays and states are in float32 always.

Source: Dao and Gu 2024 (arXiv 2405.21060) section 6; reference sheet 2.3. Left out: second
derivatives, variable A within a head, and dt clamping (see scan.py).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_lite.backends.dispatch import choose, kernel
from nemotron_lite.ops import _ssd_chunks
from nemotron_lite.ops._ssd_backward import backward
from nemotron_lite.ops._ssd_chunks import Inputs
from nemotron_lite.ops.scan import (
    check_shapes,
    document_starts,
    selective_scan,
    state_dtype,
    step_sizes,
)

_KERNEL = kernel("ssd", "ssd")
CHUNK = 64  # tokens: work inside a chunk grows with q, traffic of states with 1/q; p is near 64


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
            dt = 0 leaves the state alone.
        A: decay rate per head, negative.
        B, C: write and read directions, one per group; g divides h.
        D: weight of the path around the state; none when None.
        initial_state: state before the first token; zeros when None.
        seq_idx: which document of a packed row each token belongs to. Where it changes, the state
            is reset to zero; `initial_state` belongs to the first document of the row.
        chunk_size: q; the result depends on it only by rounding. When None, 64 ("triton": what its
            tables say).
        dt_bias, dt_softplus: added to dt, and whether the sum goes through softplus, as in
            `step_sizes`. The kernel does both on the way, the other forms do them first.
        impl: "naive" (`selective_scan`), "torch" (chunked) or "triton" (chunked, one kernel).

    Returns:
        (y, state): y in the dtype of x, contiguous, and the state after the last token in float32
        (float64 when x is float64).

    Raises:
        ValueError: unknown `impl`, a chunk size below 1, or shapes that do not fit each other.
    """
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; it must be at least 1 token.")
    run = choose("ssd", impl, x, naive=_naive, torch=_chunked, triton=_KERNEL)
    return run(
        x, dt, A, B, C, D, initial_state, seq_idx, chunk_size,
        dt_bias=dt_bias, dt_softplus=dt_softplus,
    )  # fmt: skip


def _naive(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None, chunk: int | None,
    *, dt_bias: Tensor | None, dt_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dt = step_sizes(dt, dt_bias, dt_softplus)
    return selective_scan(x, dt, A, B, C, D=D, initial_state=initial_state, seq_idx=seq_idx)


def _chunked(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, initial_state: Tensor | None, seq_idx: Tensor | None, chunk: int | None,
    *, dt_bias: Tensor | None, dt_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dt = step_sizes(dt, dt_bias, dt_softplus)
    check_shapes(x, dt, A, B, C, D, initial_state, seq_idx)
    if initial_state is None:
        state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=state_dtype(x))
    else:
        state = initial_state.to(state_dtype(x))
    starts = None if seq_idx is None else document_starts(seq_idx)
    chunk = chunk or CHUNK
    arguments = (x, dt, A, B, C, D, starts, state)
    if torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in arguments):
        return _Ssd.apply(*arguments, chunk)
    y, last, _ = _ssd_chunks.forward(Inputs(*arguments[:-1]), state, chunk, keep_states=False)
    return y, last


class _Ssd(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, x, dt, A, B, C, D, starts, state, chunk
    ) -> tuple[Tensor, Tensor]:
        inputs = Inputs(x, dt, A, B, C, D, starts)
        y, last, before = _ssd_chunks.forward(inputs, state, chunk, keep_states=True)
        ctx.save_for_backward(*inputs, *before)
        ctx.chunk = chunk
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        count = len(Inputs._fields)
        inputs = Inputs(*saved[:count])
        grads = backward(inputs, list(saved[count:]), ctx.chunk, grad_y, grad_last)
        A = grads.A.to(inputs.A.dtype)
        D = None if inputs.D is None else grads.D.to(inputs.D.dtype)
        return grads.x, grads.dt, A, grads.B, grads.C, D, None, grads.state, None
