"""The selective scan: the recurrence at the heart of a Mamba-2 layer, one token at a time.

Each head keeps a state S of p x n numbers. Every token first lets the state decay, then writes into
it, then reads from it:

    S_t = exp(dt_t A) S_{t-1} + dt_t x_t (outer) B_t        decay and write
    y_t = S_t C_t + D x_t                                   read, and a path around the state

A < 0 is one number per head, so the decay is one number per head and token. What makes the scan
*selective* is that dt, B and C are computed from the token itself: a large dt forgets what came
before and writes this token; dt = 0 keeps the state. B and C belong to groups: head i reads
group i // (h / g), as query heads share keys in grouped attention.

`selective_scan` is the definition that every faster form is tested against: a Python loop that
autograd can follow. `ssd_step` is one step of the loop, for decoding. `ssd` (in ssd.py) gets the
same numbers for a whole sequence out of matrix products.

dt arrives after its softplus, or with the bias and the softplus still to be applied (`step_sizes`);
it is not clamped here (reference sheet 2.4: the models are trained without a clamp). Source:
reference sheet 2.2 step 7 and 2.5; Dao and Gu 2024 (arXiv 2405.21060). Left out: a D per channel,
and a gate inside the scan; Nemotron 3 gates in the norm that follows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.backends import cpu_ssd_step, triton
from nemotron_lite.backends.dispatch import choose
from nemotron_lite.dtypes import cast, wide_dtype, without_autocast
from nemotron_lite.masks import document_starts
from nemotron_lite.ops.stochastic_rounding import round_to_float16


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
        seq_idx: which document each token belongs to, where a row holds several. Where it changes,
            the state is reset to zero; `initial_state` belongs to the first document of the row.

    Returns:
        (y, state): y in the dtype of x, and the state after the last token in float32 (float64 when
        x is float64). Everything in between is computed in the dtype of the state.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    check_shapes(x, dt, A, B, C, D, initial_state, seq_idx)
    wide = wide_dtype(x)
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
        state: the state before this token. "cpu", "traced" and "triton" overwrite it and return it;
            "naive" and "torch" do not change it and return a new one.
        x, dt, A, B, C, D: as in `selective_scan`, without the time axis.
        dt_bias, dt_softplus: what makes step sizes of dt, if dt is not one yet, as in `step_sizes`;
            "triton" does this inside its kernel.
        seed: only for a state in float16: chooses the random bits of stochastic rounding
            (stochastic_rounding.py), a new seed for every layer and token. None rounds to nearest.
        impl: "naive" (one step of `selective_scan`), "torch" (the equation written out), "traced"
            (the same, in place), "cpu" or "triton" (in place, for inference: autograd cannot
            differentiate through an overwritten state).

    Returns:
        (y, state): y in the dtype of x; the arithmetic and the new state are in the state's dtype
        ("naive" and "torch": float32, or float64 when x is float64). A state in float16 is updated
        in float32, y is read, and then the state is rounded.

    Raises:
        ValueError: unknown `impl`, shapes that do not fit each other, a state in bfloat16, or a
            seed for a state that is not rounded.
    """
    if state.dtype == torch.bfloat16 or (seed is not None and state.dtype != torch.float16):
        raise ValueError(
            f"ssd_step: a state in {state.dtype} with seed={seed}; expected float32 or float64 "
            "without a seed, or float16."
        )
    run = choose(
        "ssd_step",
        impl,
        x,
        naive=_naive_step,
        torch=_torch_step,
        cpu=cpu_step,
        traced=_traced_step,
        triton=triton.ssd_step,
    )
    return without_autocast(run, x)(state, x, dt, A, B, C, D, dt_bias, dt_softplus, seed)


def _naive_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seed: int | None,
) -> tuple[Tensor, Tensor]:
    dt = step_sizes(dt, dt_bias, dt_softplus)
    x, dt, B, C = (part.unsqueeze(1) for part in (x, dt, B, C))
    y, new = selective_scan(x, dt, A, B, C, D=D, initial_state=state)
    return y.squeeze(1), _rounded_as(state, new, seed)


def _torch_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seed: int | None,
) -> tuple[Tensor, Tensor]:
    dt = step_sizes(dt, dt_bias, dt_softplus)
    check_shapes(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, state, None)
    wide, heads = wide_dtype(x), x.shape[1] // B.shape[1]
    inputs, dt, A = x.to(wide), dt.to(wide), A.to(wide)
    B, C = (v.to(wide).repeat_interleave(heads, dim=1) for v in (B, C))
    decay = torch.exp(dt * A)[..., None, None]
    new = decay * state.to(wide) + torch.einsum("bh,bhp,bhn->bhpn", dt, inputs, B)
    y = torch.einsum("bhpn,bhn->bhp", new, C)
    if D is not None:
        y = y + D.to(wide).unsqueeze(-1) * inputs
    return y.to(x.dtype), _rounded_as(state, new, seed)


def _traced_step(state: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    y, new = _torch_step(state, *others)
    return y, state.copy_(new)


def _rounded_as(state: Tensor, new: Tensor, seed: int | None) -> Tensor:
    """The new state, rounded if the old one is in float16."""
    return round_to_float16(new.float(), seed) if state.dtype == torch.float16 else new


def cpu_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ssd_step` where autocast is off: in place, without gradients."""
    dt = step_sizes(dt, dt_bias, dt_softplus)
    groups, n = B.shape[1:]
    if state.shape != (*x.shape, n) or C.shape != B.shape or x.shape[1] % groups:
        check_shapes(x[:, None], dt[:, None], A, B[:, None], C[:, None], D, state, None)
    if state.dtype != torch.float16:
        return cpu_ssd_step.ssd_step(state, x, dt, A, B, C, D)
    y, new = cpu_ssd_step.ssd_step(state.float(), x, dt, A, B, C, D)
    return y, state.copy_(round_to_float16(new, seed))


def step_sizes(
    dt: Float[Tensor, "*bt h"], dt_bias: Float[Tensor, "h"] | None, dt_softplus: bool
) -> Float[Tensor, "*bt h"]:
    """softplus(dt + bias) in float32 or better; dt itself without a bias and a softplus.

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
    dt = cast(dt, wide_dtype(dt))
    if dt_bias is not None:
        dt = dt + cast(dt_bias, dt.dtype)
    return F.softplus(dt) if dt_softplus else dt


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
