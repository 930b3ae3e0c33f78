"""One decoding step of the selective scan, for a batch, with the state updated in place.

    S <- exp(dt A) S + dt x (outer) B          y = S C + D x          y * silu(z) when z is given

A program takes a few rows of one head's p x n state. It is bound by the traffic of the state, which
is read and written once: 8 bytes per number in float32, 4 in float16. Everything else (x, B, C, y)
is p + 2n numbers, compared with p * n.

**A state in float16** halves the traffic and the memory, but the state is rounded again at every
token. Rounding to nearest always makes the same error for the same numbers: a small update of a
large state is lost each time, and the errors accumulate. Stochastic rounding rounds up with a
probability equal to the distance to the number below, so the expected state is the exact one.
Nemotron 3's report finds that float16 with rounding to nearest makes answers a third longer, and
stochastic rounding does not (reference sheet 6.7). Giving a `seed` selects it:

- The bits come from Philox-4x32, a counter turned into random bits by a few rounds (5, as in the
  report). It keeps no state, and the same seed gives the same bits for all block sizes.
  The counter of number n in row r of the state is r * ceil(n_total / 8) + n // 8; its four words of
  32 bits serve eight numbers, the low half for the even one.
- In float16's normal range 13 bits of float32 are removed: 13 random bits are added below the last
  kept bit, and the rest is truncated, which is exact. Below 2^-14 float16 has a fixed step of
  2^-24; there the distance counts in 2^-16 of a step.
- Beyond 65,504 the result is infinite, as in any conversion; NaN stays NaN.

y is read from the state before rounding. Source: mamba_ssm's `selective_state_update`, with the
same names and order of arguments, so that this can replace it. Left out: gradients (a step has
none), Mamba-1's A with a rate per state number, bfloat16 states.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_kernels._compat import (
    Config,
    by_arch,
    cdiv,
    check_inputs,
    check_rows,
    next_power_of_2,
    on_device,
    unit_stride,
)
from nemotron_kernels.ssd_common import softplus

CONFIGS = {
    0: Config({"TILE": 2**14}),
    80: Config({"TILE": 2048}, num_warps=4),
}
PHILOX_ROUNDS = 5


@triton.jit
def random_halves(
    seed, row, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, ROUNDS: tl.constexpr
):
    """16 random bits for each number of BLOCK_P rows; `row` is the index in the whole state."""
    counter = row[:, None] * ((N + 7) // 8) + tl.arange(0, BLOCK_N // 8)[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter, ROUNDS)
    # join puts its second argument into the last place: words 0 2 | 1 3 become 0 1 2 3.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    words = tl.reshape(words, (BLOCK_P, BLOCK_N // 2)).to(tl.uint32, bitcast=True)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCK_P, BLOCK_N))


@triton.jit
def round_to_half(value, random):
    """Round float32 to float16 stochastically, with 16 random bits in `random`."""
    bits = value.to(tl.uint32, bitcast=True)
    cut = ((bits + (random >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
    # Fixed point below 2^-14, in steps of 2^-24.
    steps = tl.floor(tl.abs(value) * 16777216.0 + random.to(tl.float32) * (1.0 / 65536.0))
    small = tl.where(value < 0, -steps, steps) * (1.0 / 16777216.0)
    rounded = tl.where(tl.abs(value) < 6.103515625e-05, small, cut)
    return tl.where(value == value, rounded, value).to(tl.float16)


@triton.jit(do_not_specialize=["seed"])
def _state_update(
    state_ptr,
    x_ptr,
    dt_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    index_ptr,
    seed,
    out_ptr,
    heads,
    heads_per_group,
    state_b,
    state_h,
    state_p,
    x_b,
    x_h,
    dt_b,
    dt_h,
    dt_p,
    A_h,
    A_p,
    B_b,
    B_g,
    C_b,
    C_g,
    D_h,
    D_p,
    z_b,
    z_h,
    bias_h,
    bias_p,
    out_b,
    out_h,
    P: tl.constexpr,
    N: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    SEEDED: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    head = tl.program_id(1).to(tl.int64)
    b = tl.program_id(2).to(tl.int64)
    group = head // heads_per_group
    slot = b
    if index_ptr is not None:
        slot = tl.load(index_ptr + b).to(tl.int64)
    rows, columns = p < P, n < N
    mask = rows[:, None] & columns[None, :]

    place = state_ptr + slot * state_b + head * state_h + p[:, None].to(tl.int64) * state_p + n
    state = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + b * x_b + head * x_h + p, mask=rows, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + b * dt_b + head * dt_h + p * dt_p, mask=rows, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + head * bias_h + p * bias_p, mask=rows, other=0.0).to(tl.float32)
    if SOFTPLUS:
        dt = softplus(dt)
    A = tl.load(A_ptr + head * A_h + p * A_p, mask=rows, other=0.0).to(tl.float32)
    B = tl.load(B_ptr + b * B_b + group * B_g + n, mask=columns, other=0.0).to(tl.float32)
    C = tl.load(C_ptr + b * C_b + group * C_g + n, mask=columns, other=0.0).to(tl.float32)

    state = state * tl.exp(dt * A)[:, None] + (dt * x)[:, None] * B[None, :]
    y = tl.sum(state * C[None, :], axis=1)
    if D_ptr is not None:
        D = tl.load(D_ptr + head * D_h + p * D_p, mask=rows, other=0.0)
        y += D.to(tl.float32) * x
    if z_ptr is not None:
        z = tl.load(z_ptr + b * z_b + head * z_h + p, mask=rows, other=0.0).to(tl.float32)
        y *= z / (1.0 + tl.exp(-z))
    if SEEDED:
        if seed.dtype.is_ptr():
            seed = tl.load(seed)
        row = (b * heads + head) * P + p
        kept = round_to_half(state, random_halves(seed, row, N, BLOCK_P, BLOCK_N, ROUNDS))
        tl.store(place, kept, mask=mask)
    else:
        tl.store(place, state.to(state_ptr.dtype.element_ty), mask=mask)
    tl.store(out_ptr + b * out_b + head * out_h + p, y.to(out_ptr.dtype.element_ty), mask=rows)


def selective_state_update(
    state: Float[Tensor, "slots h p n"],
    x: Float[Tensor, "b h p"],
    dt: Float[Tensor, "b h"] | Float[Tensor, "b h p"],
    A: Float[Tensor, "h"] | Float[Tensor, "h p n"],
    B: Float[Tensor, "b g n"],
    C: Float[Tensor, "b g n"],
    D: Float[Tensor, "h"] | Float[Tensor, "h p"] | None = None,
    z: Float[Tensor, "b h p"] | None = None,
    dt_bias: Float[Tensor, "h"] | Float[Tensor, "h p"] | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Int[Tensor, "b"] | None = None,
    *,
    seed: int | Int[Tensor, "1"] | None = None,
    philox_rounds: int = PHILOX_ROUNDS,
) -> Float[Tensor, "b h p"]:
    """Advance `state` by one token, in place, and return y.

    Args:
        state: float32 or float16, overwritten. One row per sequence, or a pool of slots.
        x: this token's input to each head.
        dt: step size per head, or per channel as in mamba_ssm; before bias and softplus.
        A: decay rate per head, negative; or mamba_ssm's expanded form, equal along n.
        B, C: write and read directions, one per group; g divides h.
        D: weight of the direct path from x to y, D x.
        z: gate; y is multiplied by silu(z).
        dt_bias: added to dt.
        dt_softplus: whether dt (plus bias) goes through softplus.
        state_batch_indices: the slot of each sequence, all different. By default, sequence i has
            slot i.
        seed: for a float16 state: round stochastically, with these 64 bits. Take a new seed for
            every step and layer. A tensor of one element is read on the device, as a captured CUDA
            graph needs. None rounds to nearest.
        philox_rounds: rounds of the generator: 10 is usual, 5 is what the model report uses.

    Returns:
        y in the dtype of x, computed in float32 from the state before rounding.

    Raises:
        RuntimeError: CPU tensors outside the interpreter.
        ValueError: shapes that do not fit, a state of another dtype, a seed for a float32 state,
            more than 65,535 sequences.
    """
    op = "selective_state_update"
    on_gpu_seed = seed if isinstance(seed, Tensor) else None
    check_inputs(op, state, x, dt, A, B, C, D, z, dt_bias, state_batch_indices, on_gpu_seed)
    dt, A, D, dt_bias = _per_channel(op, x, dt, A, D, dt_bias, B)
    _check(op, state, x, B, C, z, state_batch_indices, seed, philox_rounds)
    batch, heads, width = x.shape
    check_rows(op, batch)
    groups, n = B.shape[1:]
    x, B, C = unit_stride(x), unit_stride(B), unit_stride(C)
    z = None if z is None else unit_stride(z)
    indices = None if state_batch_indices is None else state_batch_indices.contiguous()
    out = torch.empty((batch, heads, width), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    config = by_arch(CONFIGS)
    block_n = max(8, next_power_of_2(n))
    block_p = min(max(1, config["TILE"] // block_n), next_power_of_2(width))
    with on_device(x):
        _state_update[cdiv(width, block_p), heads, batch](
            state,
            x,
            dt,
            A,
            B,
            C,
            D,
            z,
            dt_bias,
            indices,
            seed,
            out,
            heads,
            heads // groups,
            *state.stride()[:3],
            *x.stride()[:2],
            *dt.stride(),
            *A.stride()[:2],
            *B.stride()[:2],
            *C.stride()[:2],
            *((0, 0) if D is None else D.stride()),
            *((0, 0) if z is None else z.stride()[:2]),
            *((0, 0) if dt_bias is None else dt_bias.stride()),
            *out.stride()[:2],
            P=width,
            N=n,
            SOFTPLUS=dt_softplus,
            SEEDED=seed is not None,
            ROUNDS=philox_rounds,
            BLOCK_P=block_p,
            BLOCK_N=block_n,
            num_warps=config.num_warps,
            enable_fp_fusion=config.fp_fusion,
        )
    return out


def _per_channel(
    op: str, x: Tensor, dt: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None, B: Tensor
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """dt, A, D and dt_bias as views with a channel axis; its stride is 0 if they are per head."""
    if x.ndim != 3 or B.ndim != 3:
        raise ValueError(
            f"{op}: x must be (b, h, p) and B (b, g, n); got {tuple(x.shape)} and "
            f"{tuple(B.shape)}. Mamba-1 states, which have no heads, are not supported."
        )
    batch, heads, width = x.shape
    n = B.shape[2]
    if A.shape == (heads, width, n) and (n == 1 or A.stride(2) == 0):
        A = A[..., 0]
    elif A.shape == (heads,):
        A = A[:, None].expand(heads, width)
    else:
        raise ValueError(
            f"{op}: A has shape {tuple(A.shape)}, strides {A.stride()}; expected ({heads},), or "
            f"that expanded to ({heads}, {width}, {n}): one rate for all of a channel's states."
        )
    widened = []
    for name, value, shape in (
        ("dt", dt, (batch, heads)),
        ("D", D, (heads,)),
        ("dt_bias", dt_bias, (heads,)),
    ):
        if value is not None and value.shape == shape:
            value = value.unsqueeze(-1).expand(*shape, width)
        if value is not None and value.shape != (*shape, width):
            raise ValueError(
                f"{op}: {name} has shape {tuple(value.shape)}; expected {shape} or "
                f"{(*shape, width)}."
            )
        widened.append(value)
    steps, skip, bias = widened
    assert steps is not None
    return steps, A, skip, bias


def _check(
    op: str,
    state: Tensor,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    indices: Tensor | None,
    seed: int | Tensor | None,
    rounds: int,
) -> None:
    batch, heads, width = x.shape
    groups, n = B.shape[1:]
    if heads % groups:
        raise ValueError(f"{op}: {heads} heads do not split into {groups} groups.")
    slots = batch if indices is None else state.shape[0]
    expected = {
        "state": (state, (slots, heads, width, n)),
        "B": (B, (batch, groups, n)),
        "C": (C, (batch, groups, n)),
        "z": (z, (batch, heads, width)),
        "state_batch_indices": (indices, (batch,)),
    }
    for name, (value, shape) in expected.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; expected {shape}.")
    if state.dtype not in (torch.float32, torch.float16):
        raise ValueError(f"{op}: the state is {state.dtype}; expected float32 or float16.")
    if state.stride(-1) != 1 and n > 1:
        raise ValueError(
            f"{op}: the state is updated in place and has strides {state.stride()}; its last axis "
            "must have 1."
        )
    if seed is not None and state.dtype == torch.float32:
        raise ValueError(
            f"{op}: seed={seed!r}, but a float32 state is not rounded; pass seed=None."
        )
    if isinstance(seed, int) and not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed={seed}; expected 0 to 2^63 - 1.")
    if isinstance(seed, Tensor) and (seed.numel() != 1 or seed.dtype != torch.int64):
        raise ValueError(
            f"{op}: seed is {seed.dtype} of shape {tuple(seed.shape)}; expected one int64."
        )
    if not 1 <= rounds <= 10:
        raise ValueError(f"{op}: philox_rounds={rounds}; expected 1 to 10.")
