"""States in float16: the bits of the kernel, unbiased, less drift than rounding to nearest."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nemotron_lite import ops
from nemotron_lite.ops.stochastic_rounding import (
    RoundingSeeds,
    round_to_float16,
    stochastic_round_to_float16,
)
from tests.kernels import philox


def hard_numbers() -> torch.Tensor:
    """Numbers at every exponent of float16, of both signs; exact values; zeros; numbers just
    below a power of two."""
    scale = torch.exp2(torch.linspace(-26, 15.9, 2**14 - 64))
    edges = torch.tensor(
        [0.0, 2.0**-24, 2.0**-14, 2.0**-14 - 2.0**-30, 1.0, 2.0 - 2.0**-23, 1024.5, 65504.0] * 8
    )
    x = torch.cat([scale * (1 + torch.rand(scale.shape)).clamp(max=1.99), edges])
    return x.clamp(max=65504.0) * torch.where(torch.rand(x.shape) < 0.5, -1.0, 1.0)


def test_the_bits_are_those_of_the_kernel() -> None:
    x, random = hard_numbers(), torch.randint(0, 2**16, (2**14,))
    found = stochastic_round_to_float16(x, random)
    expected = philox.round_to_half(x.numpy(), random.numpy())
    assert np.array_equal(found.numpy().view(np.int16), expected.view(np.int16))
    rows = x.view(2, 8, 4, 256)[..., :250]
    bits = philox.random_halves(2**40 + 7, 64, 250, 5)
    expected = philox.round_to_half(rows.reshape(64, 250).numpy(), bits)
    assert np.array_equal(round_to_float16(rows, 2**40 + 7).view(64, 250).numpy(), expected)


def test_the_result_is_a_neighbor_or_the_exact_value() -> None:
    x = hard_numbers()
    found, nearest = round_to_float16(x.view(64, -1), 3).view(-1), x.half()
    infinity = torch.tensor(float("inf"), dtype=torch.float16)
    above = torch.where(nearest >= x, nearest, torch.nextafter(nearest, infinity))
    below = torch.where(nearest <= x, nearest, torch.nextafter(nearest, -infinity))
    assert ((found == above) | (found == below)).all()
    assert 0.22 < (found != nearest).float().mean() < 0.28  # uniform distances: a quarter
    assert torch.equal(round_to_float16(nearest.float().view(64, -1), 9).view(-1), nearest)
    assert torch.equal(round_to_float16(x, None), nearest)


@pytest.mark.parametrize("scale", [1.0, 2.0**-18])
def test_unbiased(scale: float) -> None:
    """The mean over all 2^16 random numbers is exactly the number itself."""
    random = torch.arange(2**16)
    for x in scale * torch.tensor([1.0, 1.0 + 2**-11, 1.3, 1.9999, -1.7]):
        mean = stochastic_round_to_float16(x.expand(2**16), random).double().mean()
        # Below 2^-14, float32 is finer than 2^-16 of a step, and that part may be truncated.
        allowed = 0.0 if scale == 1 else 2.0**-16 * 2.0**-24
        assert abs(float(mean - x.double())) <= allowed


def test_nan_infinity_and_numbers_too_large() -> None:
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.tensor([1e6, -7e4, -0.0])])
    found = stochastic_round_to_float16(x, torch.full((8,), 2**16 - 1))
    assert found[:3].isnan().all()
    assert found[3:7].tolist() == [np.inf, -np.inf, np.inf, -np.inf]
    assert found[7] == 0


def test_each_write_has_its_own_bits_and_they_are_reproducible() -> None:
    seeds = {
        RoundingSeeds(seed, layer, writes).next()
        for seed in range(3)
        for layer in range(3)
        for writes in range(50)
    }
    assert len(seeds) == 450
    assert all(0 <= seed < 2**63 for seed in seeds)
    one, other = RoundingSeeds(5, 2), RoundingSeeds(5, 2)
    assert [one.next() for _ in range(9)] == [other.next() for _ in range(9)]
    assert RoundingSeeds(None, 0).next() is None


def steps(
    state: torch.Tensor, seeds: RoundingSeeds | None, count: int
) -> tuple[torch.Tensor, float]:
    """`count` small writes into a state that hardly decays: (state, mean of the last y)."""
    draw = torch.Generator().manual_seed(0)
    b, h, p, n = state.shape
    A = torch.full((h,), -1e-3)
    for _ in range(count):
        x = 1 + 0.1 * torch.randn(b, h, p, generator=draw, dtype=torch.float64)
        B = 1 + 0.1 * torch.randn(b, 1, n, generator=draw, dtype=torch.float64)
        x, B = (v if state.dtype == torch.float64 else v.float() for v in (x, B))
        dt = torch.full((b, h), 1e-2, dtype=x.dtype)
        seed = None if seeds is None else seeds.next()
        y, state = ops.ssd_step(state, x, dt, A.to(x.dtype), B, torch.ones_like(B), seed=seed)
    return state, float(y.mean())


def test_many_steps_drift_less_than_with_rounding_to_nearest() -> None:
    """Writes of 1/50 step into a state near 64; rounding to nearest loses all of them."""
    start = torch.full((2, 2, 8, 32), 64.0)
    exact, y = steps(start.double(), None, 400)
    error = {}
    for name, seeds in (("nearest", RoundingSeeds(None, 0)), ("stochastic", RoundingSeeds(0, 0))):
        state, found = steps(start.half(), seeds, 400)
        assert state.dtype == torch.float16
        error[name] = abs(float((state.double() - exact).mean()))
        assert abs(found - y) / abs(y) < 0.06
    # 1,024 numbers; each is the sum of 400 errors of at most one step of 1/16, with a standard
    # deviation below half a step. The mean must be within four of its own standard deviations.
    assert error["stochastic"] < 4 * 0.5 / 16 * (400 / 1024) ** 0.5
    assert error["stochastic"] < error["nearest"] / 20


@pytest.mark.parametrize("seed", [None, 11])
def test_one_step_is_the_exact_step_rounded_once(seed: int | None) -> None:
    state = torch.randn(2, 4, 8, 24).half()
    x, dt, A = torch.randn(2, 4, 8), torch.rand(2, 4), -torch.rand(4)
    B, C = torch.randn(2, 2, 2, 24)
    y_exact, exact = ops.ssd_step(state.float(), x, dt, A, B, C, impl="naive")
    for impl in ("naive", "torch", "cpu"):
        before = state.clone()
        y, after = ops.ssd_step(before, x, dt, A, B, C, seed=seed, impl=impl)
        assert after.dtype == torch.float16
        assert (after is before) == (impl == "cpu")
        torch.testing.assert_close(y, y_exact, atol=1e-5, rtol=1e-5)
        # The sums differ in their last bit, so a few numbers are rounded to the other neighbor.
        assert (after == round_to_float16(exact, seed)).float().mean() > 0.99
        assert (after.float() - exact).abs().max() < 2.0**-9 * exact.abs().max()


def test_a_seed_for_other_dtypes_is_refused() -> None:
    parts = torch.randn(1, 2, 3), torch.rand(1, 2), -torch.rand(2), *torch.randn(2, 1, 1, 4)
    with pytest.raises(ValueError, match=r"torch\.float32 with seed=3"):
        ops.ssd_step(torch.zeros(1, 2, 3, 4), *parts, seed=3)
    with pytest.raises(ValueError, match=r"torch\.bfloat16.*or float16"):
        ops.ssd_step(torch.zeros(1, 2, 3, 4).bfloat16(), *parts)
    with pytest.raises(ValueError, match="seed=-1; expected 0 to"):
        round_to_float16(torch.zeros(4), -1)
