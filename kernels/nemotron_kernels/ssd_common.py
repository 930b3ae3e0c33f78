"""Code that the SSD kernels share: decays, tiles, and the selection of configurations.

Decays. Everything about time is float32. s, the running sum of a_t = dt_t A inside a chunk, is kept
in units of log 2, so that a decay is one exp2. An exponent is masked before exp2, never after:
above the diagonal it is positive and may overflow, and inf * 0 is NaN. Decays below e^-60 are made
exactly zero; their products would be subnormal. A document start is a mask as well: tokens see each
other only inside one document.

softplus(v) = max(v, 0) + log(1 + e), e = exp(-|v|), is summed as 2 atanh(e / (2 + e)): on a GPU the
fast log loses three digits near 1, where it is needed for small steps.

Offsets are 64-bit up to the corner of a tile and 32-bit inside it. Operands of matrix products are
rounded to the dtype of x; sums are float32.

Source: Dao and Gu 2024 (arXiv 2405.21060) section 6.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_kernels._compat import (
    DOT_F32,
    INTERPRET,
    Config,
    by_arch,
    cdiv,
    next_power_of_2,
)

LOG2E = tl.constexpr(1.4426950408889634)
FLOOR = tl.constexpr(-86.5)  # log2 of e^-60


@triton.jit
def wide(i):
    """A loop's index in 64 bits; in the interpreter it is a plain int."""
    return tl.full([], 0, tl.int64) + i


@triton.jit
def softplus(v):
    """log(1 + exp(v)), precise to the last digits of float32 for small results too."""
    e = tl.exp2(-tl.abs(v) * LOG2E)
    z = e / (2.0 + e)
    w = z * z
    tail = w * (1 / 3 + w * (1 / 5 + w * (1 / 7 + w * (1 / 9 + w * (1 / 11 + w * (1 / 13))))))
    return tl.maximum(v, 0.0) + 2.0 * (z + z * tail)


@triton.jit
def raw_steps(dt, ds, dt_bias, b, t0, h, left, Q: tl.constexpr):
    """dt plus its bias for one chunk and head, before softplus."""
    q = tl.arange(0, Q)
    at = dt + b * ds[0] + t0 * ds[1] + h * ds[2] + q * ds[1]
    v = tl.load(at, mask=q < left, other=0.0).to(tl.float32)
    if dt_bias is not None:
        v += tl.load(dt_bias + h).to(tl.float32)
    return v


@triton.jit
def steps_and_sums(dt, ds, dt_bias, A, b, t0, h, left, Q: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Step sizes of one chunk and head, the running sum of a, and its last value.

    Tokens after the end of the sequence have step 0, so they do not change the state.
    """
    q = tl.arange(0, Q)
    step = raw_steps(dt, ds, dt_bias, b, t0, h, left, Q)
    if SOFTPLUS:
        step = softplus(step)
    step = tl.where(q < left, step, 0.0)
    total = tl.cumsum(step * (tl.load(A + h).to(tl.float32) * LOG2E), 0)
    return step, total, tl.sum(tl.where(q == Q - 1, total, 0.0), 0)


@triton.jit
def documents(seq, ss, b, t0, left, Q: tl.constexpr):
    """For each token, how many documents begin in this chunk at or before it."""
    q = tl.arange(0, Q)
    begun = tl.zeros([Q], tl.int32)
    if seq is not None:
        at = seq + b * ss[0] + t0 * ss[1] + q * ss[1]
        known = (q < left) & (q + t0 > 0)
        now = tl.load(at, mask=known, other=0)
        before = tl.load(at - ss[1], mask=known, other=0)
        begun = tl.cumsum((now != before).to(tl.int32), 0)
    return begun


@triton.jit
def fade(exponent, alive):
    """2^exponent where `alive`, and zero elsewhere; exactly zero below e^-60."""
    return tl.exp2(tl.where(alive & (exponent > FLOOR), exponent, float("-inf")))


@triton.jit
def tile(
    ptr,
    strides,
    b,
    t0,
    h,
    left,
    Q: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    first,
    KIND: tl.constexpr,
):
    """Load Q tokens x BLOCK columns, starting at column `first`, of one head; zero outside.

    The tensor is `b t h p`, of any strides.
    """
    q = tl.arange(0, Q)
    w = first + tl.arange(0, BLOCK)
    at = ptr + b * strides[0] + t0 * strides[1] + h * strides[2]
    at += q[:, None] * strides[1] + w[None, :] * strides[3]
    return tl.load(at, mask=(q[:, None] < left) & (w[None, :] < WIDTH), other=0.0).to(KIND)


@triton.jit
def state_tile(
    at,
    first,
    P: tl.constexpr,
    N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    first_n,
    BLOCK_N: tl.constexpr,
):
    """Addresses and mask of a tile of the p x n state `at`, from row `first`, column `first_n`."""
    p = first + tl.arange(0, BLOCK_P)[:, None]
    n = first_n + tl.arange(0, BLOCK_N)[None, :]
    return at + p * N + n, (p < P) & (n < N)


@triton.jit
def mm(a, b, PRECISION: tl.constexpr):
    """Matrix product in float32; PRECISION says how float32 operands are multiplied."""
    if DOT_F32:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


class Inputs(NamedTuple):
    """The arguments of `ssd` after validation; any strides."""

    x: Tensor  # b t h p
    dt: Tensor  # b t h
    A: Tensor  # h
    B: Tensor  # b t g n
    C: Tensor  # b t g n
    D: Tensor | None  # h
    dt_bias: Tensor | None  # h
    initial: Tensor | None  # b h p n, float32, contiguous
    seq_idx: Tensor | None  # b t
    softplus: bool


# Keys: kernel, bytes per element of x, architecture. Q is the default chunk; HEADS and block sizes
# are upper bounds. Architecture 0 is the interpreter: few programs, big blocks. The entries were
# chosen from the compiler's output: few or no spills, shared memory large enough, wgmma on sm_90.
# The device script times the alternatives.
_Table = dict[int, dict[int, Config]]
CONFIGS: dict[str, _Table] = {
    "fused": {
        2: {
            0: Config({"Q": 64, "BLOCK_P": 256}),
            80: Config({"Q": 64, "BLOCK_P": 32}, num_warps=8),
            90: Config({"Q": 64, "BLOCK_P": 64}, num_warps=8),
            120: Config({"Q": 64, "BLOCK_P": 32}, num_warps=8),
        },
        4: {
            0: Config({"Q": 64, "BLOCK_P": 256}),
            80: Config({"Q": 32, "BLOCK_P": 16}, num_warps=8),
        },
    },
    "states": {
        2: {
            0: Config({"BLOCK_P": 256}),
            80: Config({"BLOCK_P": 64}, num_warps=8),
        },
        4: {
            0: Config({"BLOCK_P": 256}),
            80: Config({"BLOCK_P": 32}, num_warps=8),
        },
    },
    "pass": {
        2: {0: Config({"BLOCK": 1 << 16}), 80: Config({"BLOCK": 1024})},
        4: {0: Config({"BLOCK": 1 << 16}), 80: Config({"BLOCK": 1024})},
    },
    "scan": {
        2: {
            0: Config({"Q": 64, "HEADS": 256}),
            80: Config({"Q": 64, "HEADS": 4}, num_warps=8),
            90: Config({"Q": 64, "HEADS": 4}, num_warps=4),
            100: Config({"Q": 64, "HEADS": 4}, num_warps=8),
        },
        4: {
            0: Config({"Q": 64, "HEADS": 256}),
            80: Config({"Q": 32, "HEADS": 4}, num_warps=8),
        },
    },
    "grad_bc": {
        2: {
            0: Config({"HEADS": 256, "BLOCK_N": 256}),
            80: Config({"HEADS": 16, "BLOCK_N": 32}, num_warps=8),
            90: Config({"HEADS": 16, "BLOCK_N": 128}, num_warps=8),
            100: Config({"HEADS": 16, "BLOCK_N": 64}, num_warps=8),
            120: Config({"HEADS": 16, "BLOCK_N": 32}, num_warps=8),
        },
        4: {
            0: Config({"HEADS": 256, "BLOCK_N": 256}),
            80: Config({"HEADS": 16, "BLOCK_N": 32}, num_warps=8),
        },
    },
    "grad_x": {
        2: {
            0: Config({"Q": 64, "HEADS": 256}),
            80: Config({"Q": 64, "HEADS": 4}, num_warps=8),
        },
        4: {
            0: Config({"Q": 64, "HEADS": 256}),
            80: Config({"Q": 32, "HEADS": 4}, num_warps=8),
        },
    },
}

# Other configurations that the device script times. Triton 3.4 to 3.7.0 is known to compile some
# kernels of this kind wrongly for sm_90; another number of warps avoided the error.
ALTERNATIVES: dict[str, tuple[Config, ...]] = {
    "fused": (
        Config({"Q": 64, "BLOCK_P": 32}, num_warps=4),
        Config({"Q": 64, "BLOCK_P": 64}, num_warps=8, num_stages=1),
        Config({"Q": 128, "BLOCK_P": 64}, num_warps=8),
    ),
    "states": (
        Config({"BLOCK_P": 64}, num_warps=4),
        Config({"BLOCK_P": 64}, num_warps=8, num_stages=3),
        Config({"BLOCK_P": 32}, num_warps=4),
    ),
    "scan": (
        Config({"Q": 64, "HEADS": 4}, num_warps=8),
        Config({"Q": 64, "HEADS": 16}, num_warps=4),
        Config({"Q": 128, "HEADS": 4}, num_warps=8),
    ),
    "grad_bc": (
        Config({"HEADS": 16, "BLOCK_N": 64}, num_warps=8),
        Config({"HEADS": 16, "BLOCK_N": 32}, num_warps=4),
        Config({"HEADS": 8, "BLOCK_N": 128}, num_warps=8, num_stages=1),
    ),
    "grad_x": (
        Config({"Q": 64, "HEADS": 4}, num_warps=4),
        Config({"Q": 64, "HEADS": 8}, num_warps=8, num_stages=1),
        Config({"Q": 32, "HEADS": 4}, num_warps=4),
    ),
}

INTERPRETED_PROCESSORS = 2  # stands in for the GPU's multiprocessors where there is no GPU


def config(kernel: str, x: Tensor) -> Config:
    """The configuration of `kernel` for the dtype of x on the current device."""
    return by_arch(CONFIGS[kernel][x.element_size()])


FEW_CHUNKS = 4  # up to this number, more launches cost more than they save


@lru_cache
def _processors(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def processors(x: Tensor) -> int:
    """Multiprocessors of the GPU of x; the number of an H100 if x is on the CPU (dry run)."""
    if x.is_cuda:
        return _processors(x.get_device())
    return INTERPRETED_PROCESSORS if INTERPRET else 132


def loops_over_chunks(x: Tensor, chunks: int, block_p: int) -> bool:
    """Whether each program of the pass over states loops over all chunks (else one per chunk).

    The loop reads and writes one state less per chunk, but there are only b * h * (blocks of p)
    programs, and each computes its chunks one after another. An estimate for chunks of 64 tokens on
    an H100 (p 64, n 128): the memory traffic of the three passes takes about 37 ns per chunk and
    head. The loop has a latency of about 1.5 us per chunk, for all programs at the same time. So
    from about 40 programs on, a third of the multiprocessors, the latency does not matter. With few
    chunks the loop is faster too, because it saves a launch. This was not measured separately.
    """
    programs = x.shape[0] * x.shape[2] * cdiv(x.shape[3], block_p)
    return chunks <= FEW_CHUNKS or 3 * programs >= processors(x)


def heads_per_program(x: Tensor, groups: int, programs: int, most: int) -> int:
    """How many heads of a group one program takes: up to `most`, if all multiprocessors have work.

    Args:
        programs: how many programs there are if each takes a whole group.
    """
    shared = x.shape[2] // groups
    wanted = min(most, max(1, shared * programs // processors(x)))
    return max(d for d in range(1, shared + 1) if shared % d == 0 and d <= wanted)


def padded(size: int) -> int:
    """The width of a block for `size` columns: a power of two, at least 16 for matrix products."""
    return max(16, next_power_of_2(size))


def sizes(inputs: Inputs, chunk: int) -> dict[str, int | bool]:
    """The constants that all kernels with tiles of p and n have in common."""
    n = inputs.B.shape[3]
    return {
        "R": inputs.x.shape[2] // inputs.B.shape[2],
        "P": inputs.x.shape[3],
        "N": n,
        "PAD_N": padded(n),
        "Q": chunk,
        "SOFTPLUS": inputs.softplus,
    }


def strides(x: Tensor | None) -> tuple[int, ...]:
    """The strides of x; zeros for None, which kernels do not read."""
    return (0, 0) if x is None else x.stride()
