"""Stochastic rounding: the result is a neighbor, the mean is right, and clipping changes the mean.

With 16 random bits for a number, a test can try all 65,536 values. This gives the exact expectation
without statistics. Only the bits that come from a seed are tested with statistics.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from nemotron_lite.quantization import nvfp4
from tests.kernels import philox
from tests.quantization.nvfp4 import reference as reference

IMPLS = ("naive", "cpu")
GRID = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _neighbors(v: Tensor) -> tuple[Tensor, Tensor]:
    """The largest grid value at or below v and the smallest at or above it."""
    below = GRID[torch.searchsorted(GRID, v, right=True) - 1]
    above = GRID[torch.searchsorted(GRID, v, right=False)]
    return below, above


def _round_stochastic(v: Tensor, bits: Tensor) -> Tensor:
    return nvfp4.decode_e2m1(nvfp4.encode_e2m1_stochastic(v, bits))


def test_always_one_of_the_two_neighbors() -> None:
    v = torch.cat([torch.rand(2**18) * 12 - 6, torch.randn(2**16).clamp(-6, 6), GRID, -GRID / 8])
    below, above = _neighbors(v)
    for bits in (0, 65535, 32767, 32768):
        found = _round_stochastic(v, torch.full(v.shape, bits))
        assert ((found == below) | (found == above)).all()
    lowest = _round_stochastic(v, torch.zeros(v.shape, dtype=torch.int64))
    highest = _round_stochastic(v, torch.full(v.shape, 65535))
    assert (lowest == below).float().mean() > 0.99 and (highest == above).float().mean() > 0.99


def test_values_on_the_grid_stay() -> None:
    bits = torch.arange(65536).repeat(len(GRID), 1)
    v = GRID[:, None].expand_as(bits)
    assert torch.equal(_round_stochastic(v, bits), v)


def test_the_expectation_over_all_bits_is_the_value() -> None:
    v = torch.cat(
        [torch.tensor([0.25, -0.25, 1.125, 2.5, -3.7, 5, 0.001]), torch.rand(57) * 12 - 6]
    )
    bits = torch.arange(65536).repeat(len(v), 1)
    mean = _round_stochastic(v[:, None].expand_as(bits), bits).double().mean(1)
    below, above = _neighbors(v)
    # 65,536 dithers in the middle of their intervals: right to half of one of them.
    assert ((mean - v).abs() <= (above - below) * 2.0**-17).all()


def test_beyond_the_largest_it_is_clipped_with_any_bits() -> None:
    bits = torch.arange(65536)
    for v in (6.0, 6.2, 100.0, -6.2):
        assert (_round_stochastic(torch.full((65536,), v), bits).abs() == 6).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_codes_of_given_bits_are_those_of_exact_arithmetic(impl: str) -> None:
    """Up where the distance from below, plus the dither, reaches a step; in float64."""
    x, bits = torch.randn(64, 96), torch.randint(0, 65536, (64, 96))
    q = nvfp4.quantize(x, stochastic=True, bits=bits, impl=impl)
    nearest = reference.quantize(x.numpy())
    assert np.array_equal(q.scales.view(torch.uint8).numpy(), nearest.scales)
    factor = (q.scales.float() * q.scale).repeat_interleave(16, 1)
    v = (x * (1 / factor)).clamp(-6, 6)
    below, above = _neighbors(v)
    distance = (v.double() - below) / (above - below).clamp(min=0.5)
    up = distance + (2 * bits.double() + 1) / 2**17 >= 1
    found = nvfp4.decode_e2m1(nvfp4.unpack_codes(q.codes))
    differs = found != torch.where(up, above, below)
    # Where the sum is within float32's rounding of 1 (v / step + dither has up to 3 bits before
    # the point) the two may differ.
    assert (distance + (2 * bits.double() + 1) / 2**17 - 1).abs()[differs].lt(2.0**-20).all()
    assert differs.float().mean() < 1e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_a_seed_gives_bits_by_the_position_of_the_number(impl: str) -> None:
    x = torch.randn(3, 20, 37)
    seed = 2**40 + 5
    bits = torch.from_numpy(philox.random_halves(seed, 60, 48, 5).astype(np.int64)).view(3, 20, 48)
    for hadamard in (False, True):
        given = {"stochastic": True, "hadamard": hadamard, "impl": impl}
        one = nvfp4.quantize(x, seed=seed, **given)
        other = nvfp4.quantize(x, bits=bits if hadamard else bits[..., :37], **given)
        assert torch.equal(one.codes, other.codes)
        again, next_seed = (nvfp4.quantize(x, seed=s, **given) for s in (seed, seed + 1))
        assert torch.equal(one.codes, again.codes) and not torch.equal(one.codes, next_seed.codes)


def test_both_implementations_use_the_same_random_bits() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for shape in ((40, 64), (33, 50), (2, 17, 40)):
            x = torch.randn(shape).to(dtype)
            for dim in (-1, -2):
                for hadamard in (False, True):
                    given = {"dim": dim, "stochastic": True, "seed": 9, "hadamard": hadamard}
                    found = [nvfp4.fake_quantize(x, **given, impl=impl) for impl in IMPLS]
                    assert torch.equal(*found)


def test_the_mean_of_many_draws_is_the_value_unless_it_is_clipped() -> None:
    draws, x = 64, torch.randn(64, 1024)
    q = nvfp4.quantize(x)
    factor = (q.scales.float() * q.scale).repeat_interleave(16, 1)
    v = (x / factor).double()
    mean = torch.zeros_like(v)
    for seed in range(draws):
        mean += (nvfp4.fake_quantize(x, stochastic=True, seed=seed) / factor).double() / draws
    clipped = v.abs() > 6
    below, above = (side.double() for side in _neighbors(v.float().clamp(-6, 6)))
    deviation = ((v - below) * (above - v) / draws).sqrt()
    free = ~clipped & (deviation > 1e-3)
    z = (mean - v)[free] / deviation[free]
    assert free.sum() > 60_000
    assert abs(float(z.mean())) < 4 / len(z) ** 0.5  # 4 standard errors
    assert abs(float(z.square().mean()) - 1) < 4 * (2 / len(z)) ** 0.5

    # The block's scale is rounded to nearest, so it is rounded down in about half of the blocks.
    # Their largest number then lies above 6, by up to 1/16, and the excess is lost in every draw.
    assert 0.45 < clipped.unflatten(1, (-1, 16)).any(-1).float().mean() < 0.6
    assert 0.03 < clipped.float().mean() < 0.04
    torch.testing.assert_close(mean[clipped].abs(), torch.full_like(mean[clipped], 6))
    lost = (v.abs() - mean.abs())[clipped] / 2  # in steps, which are 2 from 4 to 6
    assert lost.max() <= 6 / 16 / 2 * (1 + 1e-6)
    assert 0.05 < lost.mean() < 0.09
