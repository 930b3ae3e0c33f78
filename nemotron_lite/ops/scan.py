"""The selective scan: the recurrence at the heart of a Mamba-2 layer, one token at a time.

Each head keeps a state S of p x n numbers. Every token first lets the state fade, then writes into
it, then reads from it:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t        fade and write
    y_t = S_t C_t + D x_t                                   read, and a path around the state

A < 0 is one number per head, so the fade is one number per head and token. What makes the scan
*selective* is that dt, B and C are computed from the token itself: a large dt forgets the past and
writes this token, dt = 0 leaves the state alone. B and C belong to groups: head i reads group
i // (h / g), as query heads share keys in grouped attention.

`selective_scan` is the definition that every faster form is tested against: a Python loop that
autograd can follow. `ssd_step` is one turn of the loop, for decoding; its fast form touches the
state in three passes and writes it in place. `ssd` (in ssd.py) gets the same numbers for a whole
sequence out of matrix products.

dt arrives after its softplus, or with the bias and the softplus still to be applied (`step_sizes`);
it is not clamped here (reference sheet 2.4: the models are trained without a clamp). Source:
reference sheet 2.2 step 7 and 2.5; Dao and Gu 2024 (arXiv 2405.21060). Left out: a D per channel,
and a gate inside the scan; Nemotron 3 gates in the norm that follows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.backends.dispatch import cast, choose, kernel
from nemotron_lite.ops.stochastic_rounding import round_half

_KERNEL = kernel("state_update", "selective_state_update")


def selective_scan(
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    *,
    D: Float[Tensor, "h"] | None = None,
    initial_state: Float[Tensor, "b h p n"] | None = None,
    seq_idx: Int[Tensor, "b t"] | None = None,
) -> tuple[Float[Tensor, "b t h p"], Float[Tensor, "b h p n"]]:
    """Run the recurrence over t tokens, exactly as written at the top of this file.

    Args:
        x: what is written to the state.
        dt: step size per token and head, after softplus (>= 0).
        A: decay rate per head, negative.
        B, C: write and read directions, one per group; g divides h.
        D: weight of the path around the state; none when None.
        initial_state: state before the first token; zeros when None.
        seq_idx: which document of a packed row each token belongs to. Where it changes, the state
            is reset to zero; `initial_state` belongs to the first document of the row.

    Returns:
        (y, state): y in the dtype of x, and the state after the last token in float32 (float64 when
        x is float64). Everything in between is computed in the dtype of the state.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_shapes(x, dt, A, B, C, D, initial_state, seq_idx)
    wide = state_dtype(x)
    shared = x.shape[2] // B.shape[2]
    inputs, steps = x.to(wide), dt.to(wide)
    writes = B.to(wide).repeat_interleave(shared, dim=2)
    reads = C.to(wide).repeat_interleave(shared, dim=2)
    fade = torch.exp(steps * A.to(wide))
    if seq_idx is not None:
        fade = fade.masked_fill(document_starts(seq_idx).unsqueeze(-1), 0.0)
    if initial_state is None:
        state = inputs.new_zeros(x.shape[0], *x.shape[2:], B.shape[3])
    else:
        state = initial_state.to(wide)
    outputs = []
    # unbind, not [:, t]: the gradient of a slice is a full-size tensor of zeros, once per token
    tokens = (part.unbind(1) for part in (fade, (steps.unsqueeze(-1) * inputs), writes, reads))
    for keep, write, key, query in zip(*tokens, strict=True):
        state = keep[..., None, None] * state + write.unsqueeze(-1) * key.unsqueeze(-2)
        outputs.append((state * query.unsqueeze(-2)).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(inputs)
    if D is not None:
        y = y + D.to(wide).unsqueeze(-1) * inputs
    return y.to(x.dtype), state


def ssd_step(
    state: Float[Tensor, "b h p n"],
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    *,
    D: Float[Tensor, "h"] | None = None,
    dt_bias: Float[Tensor, "h"] | None = None,
    dt_softplus: bool = False,
    seed: int | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "b h p"], Float[Tensor, "b h p n"]]:
    """One token of the recurrence, for decoding.

    Args:
        state: the state before this token. impl="torch" overwrites it and returns it; impl="naive"
            leaves it alone and returns a new one.
        x, dt, A, B, C, D: as in `selective_scan`, without the time axis.
        dt_bias, dt_softplus: what makes step sizes of dt, where that is still to be done, as in
            `step_sizes`; the kernel does it on the way.
        seed: for a state in float16: the bits it is rounded with (half_state.py), new ones for
            every layer and token; None rounds to nearest.
        impl: "naive" (one turn of `selective_scan`); "torch" or "triton" (in place; for inference,
            since autograd cannot differentiate through an overwritten state).

    Returns:
        (y, state): y in the dtype of x; the arithmetic and the new state are in the state's dtype
        ("naive": float32, or float64 when x is float64). A state in float16 is updated in float32;
        y is read before it is rounded.

    Raises:
        ValueError: unknown `impl`, shapes that do not fit each other, a state in bfloat16, or a
            seed for a state that is not rounded.
    """
    half = state.dtype == torch.float16
    if state.dtype == torch.bfloat16 or (seed is not None and not half):
        raise ValueError(
            f"ssd_step: a state in {state.dtype} with seed={seed}; expected float32 or float64 "
            "without a seed, or float16."
        )
    run = choose("ssd_step", impl, x, naive=_naive_step, torch=_fast_step, triton=_triton_step)
    if not half:
        return run(state, x, dt, A, B, C, D, dt_bias, dt_softplus)
    if run is _triton_step:
        return run(state, x, dt, A, B, C, D, dt_bias, dt_softplus, seed)
    y, new = run(state.float(), x, dt, A, B, C, D, dt_bias, dt_softplus)
    rounded = round_half(new.float(), seed)
    return y, rounded if run is _naive_step else state.copy_(rounded)


def _naive_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dt = step_sizes(dt, dt_bias, dt_softplus)
    x, dt, B, C = (part.unsqueeze(1) for part in (x, dt, B, C))
    y, state = selective_scan(x, dt, A, B, C, D=D, initial_state=state)
    return y.squeeze(1), state


def _fast_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    dt = step_sizes(dt, dt_bias, dt_softplus)
    batch, heads, width = x.shape
    groups, n = B.shape[1:]
    if state.shape != (batch, heads, width, n) or C.shape != B.shape or heads % groups:
        check_shapes(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, state, None)
    narrow, wide = x.dtype, state.dtype
    x, dt, B, C = x.to(wide), dt.to(wide), B.to(wide), C.to(wide)
    # Splitting an axis is always a view, so this writes through to the caller's state.
    grouped = state.unflatten(1, (groups, -1))
    fade = torch.exp(dt * A).view(batch, groups, -1, 1, 1)
    write = (x * dt.unsqueeze(-1)).reshape(batch, groups, -1, width, 1)
    grouped.mul_(fade).addcmul_(write, B.reshape(batch, groups, 1, 1, n))
    # The heads of a group share C: one row times one matrix, with the state as the columns.
    rows = state.reshape(batch * groups, -1, n)
    y = torch.bmm(C.reshape(-1, 1, n), rows.mT).view(batch, heads, width)
    if D is not None:
        y.addcmul_(x, D.to(wide).unsqueeze(-1))
    return y.to(narrow), state


def _triton_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    dt_bias: Tensor | None, dt_softplus: bool, seed: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = _KERNEL(state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, seed=seed)
    return y, state


def step_sizes(
    dt: Float[Tensor, "*bt h"], dt_bias: Float[Tensor, "h"] | None, dt_softplus: bool
) -> Float[Tensor, "*bt h"]:
    """softplus(dt + bias) in float32 or better; dt itself where neither is asked for.

    A dt of minus infinity, which marks padding, becomes a step of exactly zero.

    Raises:
        ValueError: a bias of another shape than one number per head.
    """
    if dt_bias is None and not dt_softplus:
        return dt
    if dt_bias is not None and dt_bias.shape != dt.shape[-1:]:
        raise ValueError(
            f"dt_bias has shape {tuple(dt_bias.shape)}; {dt.shape[-1]} heads need "
            f"({dt.shape[-1]},)."
        )
    dt = cast(dt, state_dtype(dt))
    if dt_bias is not None:
        dt = dt + cast(dt_bias, dt.dtype)
    return F.softplus(dt) if dt_softplus else dt


def state_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else: a state is never half precision."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def number_documents(seq_idx: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """The same documents counted 0, 1, 2 ... along each row, `b t`.

    A number that returns later in a row (0, 1, 0) is a new document. Operations that look at more
    than the token before compare these numbers, so that all of them part rows at the same places.
    """
    return document_starts(seq_idx).cumsum(1)


def document_starts(seq_idx: Int[Tensor, "b t"]) -> Tensor:
    """True where a token belongs to another document than the token before it, `b t`."""
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


def check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    """Compare every argument with the shape that x and B imply.

    Raises:
        ValueError: names the argument, its shape and the shape that would fit.
    """
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(
            f"x must be (b, t, h, p) and B (b, t, g, n); got {tuple(x.shape)} and {tuple(B.shape)}."
        )
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    if h % g:
        raise ValueError(f"{h} heads do not split into {g} groups: g must divide h.")
    expected = {
        "dt": (dt, (b, t, h)),
        "A": (A, (h,)),
        "B": (B, (b, t, g, n)),
        "C": (C, (b, t, g, n)),
        "D": (D, (h,)),
        "initial_state": (initial_state, (b, h, p, n)),
        "seq_idx": (seq_idx, (b, t)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; x {tuple(x.shape)} with {g} groups of "
                f"states of size {n} needs {shape}."
            )
