"""SSM states in float16 with stochastic rounding: half the memory, and no error on average.

A state is read, updated in float32 and written back at every token. So it is rounded again and
again, and errors in one direction add up:

    h^_t = h_t + sum_i ( prod_{j>i} exp(dt_j A) ) eps_i

With rounding to nearest, a write of less than half a step into a large state is lost every time.
Stochastic rounding rounds up with a probability equal to the distance to the number below, in
steps. This makes eps_i zero on average, and the sum of many stays small. Nemotron 3's report serves
Super this way: with rounding to nearest, float16 made answers a third longer; with stochastic
rounding it did not (reference sheet 6.7).

The bits are those of the kernel (`nemotron_kernels.state_update`), for the same float32 numbers:

- each number gets 16 random bits from Philox-4x32 of five rounds (`philox.random_halves`), rows
  counted over batch, heads and channels;
- in float16's normal range 13 bits of float32 must be dropped: 13 random bits are added below the
  last bit that is kept, and the rest is truncated, which is exact;
- below 2^-14 float16 has a fixed step of 2^-24, and the distance is counted in 2^-16 of a step;
- a number that float16 can represent does not change; beyond 65,504 is infinite, NaN stays NaN.

It saves memory, and on a GPU memory traffic; on a CPU the random bits cost more time than it saves.
Left out: INT16 and INT8 states with block scales, which the report finds no better.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import torch
from jaxtyping import Float16, Float32, Int
from torch import Tensor

from nemotron_lite.ops.philox import random_halves

SMALLEST_NORMAL = 2.0**-14
_KEPT = ~0x1FFF  # float32's bits but the last 13


@dataclass
class RoundingSeeds:
    """The seeds of one layer's writes: a new one for each write, the same in every repetition.

    Attributes:
        seed: of the state, 0 to 2^64 - 1; None rounds to nearest.
        layer: index of the layer in the model.
        writes: number of seeds given out so far.
    """

    seed: int | None
    layer: int
    writes: int = 0

    def next(self) -> int | None:
        """The seed of the next write, 63 bits; None where it is rounded to nearest.

        Raises:
            RuntimeError: while a program is compiled or exported. `torch.compile` in its default
                mode then runs this step as it is.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "a cache with ssm_dtype=torch.float16 hashes a new seed for every write, which "
                "cannot be compiled: use a cache in float32 (ssm_dtype=None), or torch.compile "
                "without fullgraph=True."
            )
        self.writes += 1
        if self.seed is None:
            return None
        place = struct.pack("<3Q", self.seed, self.layer, self.writes)
        (word,) = struct.unpack("<Q", hashlib.blake2b(place, digest_size=8).digest())
        return word >> 1


def round_to_float16(x: Float32[Tensor, "*rows n"], seed: int | None) -> Float16[Tensor, "*rows n"]:
    """x in float16: stochastic rounding with `seed` (0 to 2^63 - 1), or to nearest for None.

    Raises:
        ValueError: a seed out of range.
    """
    if seed is None:
        return x.to(torch.float16)
    flat = x.reshape(-1, x.shape[-1])
    random = random_halves(seed, *flat.shape, device=x.device)
    return stochastic_round_to_float16(flat, random).view(x.shape)


def stochastic_round_to_float16(
    x: Float32[Tensor, "*shape"], random: Int[Tensor, "*shape"]
) -> Float16[Tensor, "*shape"]:
    """x in float16: one of its neighbours, chosen by `random`, integers of 0 .. 65535."""
    cut = (x.contiguous().view(torch.int32) + (random >> 3).int()).bitwise_and_(_KEPT)
    rounded = cut.view(torch.float32)
    size = x.abs()
    small = size < SMALLEST_NORMAL
    if bool(small.any()):
        steps = (size * 2.0**24 + random.float() * 2.0**-16).floor_()
        rounded = torch.where(small, torch.copysign(steps * 2.0**-24, x), rounded)
    # Adding random bits to a NaN with all bits set would make it a number.
    return torch.where(x.isnan(), x, rounded).to(torch.float16)
