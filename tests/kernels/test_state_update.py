"""The decoding step against one step of the definition; its stochastic rounding, bit by bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from nemotron_kernels import selective_state_update
from nemotron_kernels.ssd import ssd
from nemotron_kernels.state_update import round_to_half
from nemotron_lite import ops
from tests.compare import relative_rms
from tests.kernels import philox

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}


def _inputs(b: int, h: int, p: int, g: int, n: int, dtype=torch.float32) -> dict[str, torch.Tensor]:
    draw = {
        "state": torch.randn(b, h, p, n),
        "x": torch.randn(b, h, p),
        "dt": torch.randn(b, h) - 1,
        "A": -torch.rand(h) * 4,
        "B": torch.randn(b, g, n),
        "C": torch.randn(b, g, n),
        "D": torch.randn(h),
        "z": torch.randn(b, h, p),
        "dt_bias": torch.randn(h) - 2,
    }
    return {k: v if k in ("state", "A") else v.to(dtype) for k, v in draw.items()}


def _exact(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """The definition, in float64."""
    given = (state, x, dt, A, B, C, D, z, dt_bias)
    state, x, dt, A, B, C, D, z, bias = (None if v is None else v.double() for v in given)
    dt = dt if bias is None else dt + bias
    dt = F.softplus(dt, threshold=100) if dt_softplus else dt
    y, after = ops.ssd_step(state, x, dt, A, B, C, D=D, impl="naive")
    return y if z is None else y * F.silu(z), after


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("b", "h", "p", "g", "n"),
    [(1, 1, 1, 1, 1), (2, 4, 64, 2, 128), (3, 6, 5, 3, 17), (1, 2, 80, 1, 256), (2, 2, 7, 2, 8)],
)
def test_one_step(b: int, h: int, p: int, g: int, n: int, dtype: torch.dtype) -> None:
    inputs = _inputs(b, h, p, g, n, dtype)
    y_exact, exact = _exact(**inputs, dt_softplus=True)
    y = selective_state_update(**inputs, dt_softplus=True)
    assert y.dtype == dtype
    assert relative_rms(y, y_exact) < TOLERANCE[dtype]
    assert relative_rms(inputs["state"], exact) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("left_out", [("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")])
def test_optional_arguments(left_out: tuple[str, ...]) -> None:
    inputs = _inputs(2, 4, 6, 2, 10)
    for name in left_out:
        inputs.pop(name)
    inputs["dt"] = inputs["dt"].exp()
    y_exact, exact = _exact(**inputs)
    assert relative_rms(selective_state_update(**inputs), y_exact) < TOLERANCE[torch.float32]
    assert relative_rms(inputs["state"], exact) < TOLERANCE[torch.float32]


def test_small_steps_keep_their_digits() -> None:
    """softplus(-12) is 6e-6: log(1 + e) in float32 would lose half of its digits."""
    inputs = _inputs(2, 4, 6, 2, 10)
    inputs["dt"], inputs["dt_bias"] = torch.full((2, 4), -12.0), torch.zeros(4)
    inputs["state"].zero_()
    _, exact = _exact(**inputs, dt_softplus=True)
    selective_state_update(**inputs, dt_softplus=True)
    assert relative_rms(inputs["state"], exact) < TOLERANCE[torch.float32]


def test_arguments_of_mamba_ssm() -> None:
    """Values per head are expanded over channels and state; arguments are given by position."""
    inputs = _inputs(2, 4, 6, 2, 10)
    expanded = {k: v.clone() for k, v in inputs.items()}
    expected = selective_state_update(**inputs, dt_softplus=True)
    expanded["dt"] = expanded["dt"][..., None].expand(2, 4, 6)
    expanded["A"] = expanded["A"][:, None, None].expand(4, 6, 10)
    expanded["D"] = expanded["D"][:, None].expand(4, 6)
    expanded["dt_bias"] = expanded["dt_bias"][:, None].expand(4, 6)
    assert torch.equal(selective_state_update(*expanded.values(), True), expected)
    assert torch.equal(expanded["state"], inputs["state"])


def test_steps_and_skips_per_channel() -> None:
    inputs = _inputs(1, 2, 3, 1, 4)
    inputs |= {"dt": torch.rand(1, 2, 3), "D": torch.randn(2, 3), "dt_bias": torch.rand(2, 3)}
    parts = []
    for i in range(3):
        part = {k: v.clone() for k, v in inputs.items()}
        for k, axis in {"state": 2, "x": 2, "z": 2, "dt": 2, "D": 1, "dt_bias": 1}.items():
            part[k] = part[k].narrow(axis, i, 1)
        part |= {k: part[k].squeeze(-1) for k in ("dt", "D", "dt_bias")}
        parts.append((_exact(**part), part))
    y = selective_state_update(**inputs)
    torch.testing.assert_close(y, torch.cat([p[0][0] for p in parts], 2).float())
    torch.testing.assert_close(inputs["state"], torch.cat([p[0][1] for p in parts], 2).float())


def test_many_steps_equal_the_definition() -> None:
    inputs = _inputs(1, 4, 8, 2, 16)
    state, exact = inputs.pop("state"), None
    exact = state
    for _ in range(40):
        step = {**_inputs(1, 4, 8, 2, 16), "A": inputs["A"]}
        step.pop("state")
        y_exact, exact = _exact(exact, **step, dt_softplus=True)
        y = selective_state_update(state, **step, dt_softplus=True)
    assert relative_rms(state, exact) < 1e-5
    assert relative_rms(y, y_exact) < 1e-5


def test_many_steps_equal_the_scan() -> None:
    """Decoding continues from a prompt: 70 steps against the chunked kernel, bias and softplus."""
    t, h, p, g, n = 70, 4, 8, 2, 16
    x, dt = torch.randn(2, t, h, p), torch.randn(2, t, h) - 2
    B, C = torch.randn(2, t, g, n), torch.randn(2, t, g, n)
    A, D, bias = -torch.rand(h) * 4, torch.randn(h), torch.randn(h)
    start = torch.randn(2, h, p, n)
    whole, end = ssd(x, dt, A, B, C, D, start, dt_bias=bias, dt_softplus=True)
    state, steps = start.clone(), []
    for i in range(t):
        given = (x[:, i], dt[:, i], A, B[:, i], C[:, i], D)
        steps.append(selective_state_update(state, *given, dt_bias=bias, dt_softplus=True))
    assert relative_rms(state, end) < 1e-5
    assert relative_rms(torch.stack(steps, 1), whole) < 1e-5


def test_a_pool_of_slots_in_strided_memory() -> None:
    inputs = _inputs(3, 2, 4, 1, 6)
    expected = {k: v.clone() for k, v in inputs.items()}
    y_expected = selective_state_update(**expected)
    memory = torch.zeros(5, 2, 4, 9)
    pool, slots = memory[..., 2:8], torch.tensor([4, 0, 2], dtype=torch.int32)
    pool[slots.long()] = inputs.pop("state")
    y = selective_state_update(pool, **inputs, state_batch_indices=slots)
    assert torch.equal(y, y_expected)
    assert torch.equal(pool[slots.long()], expected["state"])
    assert (pool[[1, 3]] == 0).all()
    assert (memory[..., [0, 1, 8]] == 0).all()


def test_strided_inputs() -> None:
    inputs = _inputs(2, 4, 8, 2, 10)
    expected = {k: v.clone() for k, v in inputs.items()}
    y_expected = selective_state_update(**expected)
    packed = torch.randn(2, 100)
    for name, start in {"x": 3, "B": 40, "C": 61}.items():
        view = packed[:, start : start + inputs[name][0].numel()].view(inputs[name].shape)
        inputs[name] = view.copy_(inputs[name])
    inputs["z"] = inputs["z"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(selective_state_update(**inputs), y_expected)
    assert torch.equal(inputs["state"], expected["state"])


def test_the_reference_gives_the_known_answers() -> None:
    """Philox-4x32-10 of Random123's kat_vectors."""
    ones = 0xFFFFFFFF
    assert [hex(int(w)) for w in philox.philox([0, 0, 0, 0], (0, 0), 10)] == [
        "0x6627e8d5",
        "0xe169c58d",
        "0xbc57ac4c",
        "0x9b00dbd8",
    ]
    assert [hex(int(w)) for w in philox.philox([ones] * 4, (ones, ones), 10)] == [
        "0x408f276d",
        "0x41c83b0e",
        "0xa20bc7c6",
        "0x6d5451fd",
    ]


@pytest.mark.parametrize(
    ("b", "h", "p", "n", "seed", "rounds"),
    [(1, 2, 64, 128, 7, 5), (2, 3, 5, 17, 2**40 + 3, 5), (1, 1, 33, 8, 0, 10), (2, 2, 9, 1, 1, 3)],
)
def test_the_same_bits_as_the_reference(
    b: int, h: int, p: int, n: int, seed: int, rounds: int
) -> None:
    inputs = _inputs(b, h, p, 1, n)
    half = inputs.pop("state").half()
    wide = half.float()
    y = selective_state_update(wide, **inputs)
    y_half = selective_state_update(half, **inputs, seed=seed, philox_rounds=rounds)
    random = philox.random_halves(seed, b * h * p, n, rounds).reshape(half.shape)
    assert np.array_equal(half.numpy(), philox.round_to_half(wide.numpy(), random))
    assert torch.equal(y, y_half)  # read before rounding


def test_a_seed_on_the_device_gives_the_same_bits() -> None:
    inputs = _inputs(1, 2, 5, 1, 17)
    first = inputs.pop("state").half()
    second = first.clone()
    selective_state_update(first, **inputs, seed=2**33 + 1)
    selective_state_update(second, **inputs, seed=torch.tensor([2**33 + 1]))
    assert torch.equal(first, second)


@triton.jit
def _round(x_ptr, random_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    random = tl.load(random_ptr + i).to(tl.uint32)
    tl.store(out_ptr + i, round_to_half(tl.load(x_ptr + i), random))


def _rounded(x: torch.Tensor, random: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=torch.float16)
    _round[(1,)](x.contiguous(), random.to(torch.int32), out, BLOCK=x.numel())
    return out


def _hard_numbers() -> torch.Tensor:
    """Numbers at every exponent of float16, of both signs; exact values; zeros; numbers just
    below a power of two."""
    scale = torch.exp2(torch.linspace(-26, 15.9, 2**14 - 64))
    edges = torch.tensor(
        [0.0, 2.0**-24, 2.0**-14, 2.0**-14 - 2.0**-30, 1.0, 2.0 - 2.0**-23, 1024.5, 65504.0] * 8
    )
    x = torch.cat([scale * (1 + torch.rand(scale.shape)).clamp(max=1.99), edges])
    return x.clamp(max=65504.0) * torch.where(torch.rand(x.shape) < 0.5, -1.0, 1.0)


def test_rounding_gives_a_neighbor_and_equals_the_reference() -> None:
    x = _hard_numbers()
    random = torch.randint(0, 2**16, x.shape)
    found = _rounded(x, random)
    assert np.array_equal(found.numpy(), philox.round_to_half(x.numpy(), random.numpy()))
    nearest = x.half()
    infinity = torch.tensor(float("inf"), dtype=torch.float16)
    above = torch.where(nearest >= x, nearest, torch.nextafter(nearest, infinity))
    below = torch.where(nearest <= x, nearest, torch.nextafter(nearest, -infinity))
    assert ((found == above) | (found == below)).all()
    assert 0.22 < (found != nearest).float().mean() < 0.28  # uniform distances: a quarter


@pytest.mark.parametrize("scale", [1.0, 2.0**-18])
def test_rounding_is_unbiased(scale: float) -> None:
    """The mean over all 2^16 random numbers is exactly the number itself."""
    random = torch.arange(2**16)
    for x in scale * torch.tensor([1.0, 1.0 + 2**-11, 1.3, 1.9999, -1.7]):
        mean = _rounded(x.expand(2**16), random).double().mean()
        step = scale * 2.0**-10 if scale == 1 else 2.0**-24
        # Below 2^-14, float32 is finer than 2^-16 of a step, and that part may be truncated.
        allowed = 0.0 if scale == 1 else 2.0**-16 * step
        assert abs(float(mean - x.double())) <= allowed


def test_rounding_of_nan_and_of_numbers_too_large() -> None:
    """A GPU gives NaN with all bits set; a carry in the addition would make it zero."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)
    x = torch.cat([bits.view(torch.float32), torch.tensor([1e6, -7e4, -0.0])])
    with np.errstate(invalid="ignore"):  # numpy warns of the signalling NaN
        found = _rounded(x, torch.full((8,), 2**16 - 1))
    assert found[:3].isnan().all()
    assert found[3:7].tolist() == [np.inf, -np.inf, np.inf, -np.inf]
    assert found[7] == 0


def test_a_small_write_is_not_lost_on_average() -> None:
    """64 writes of 1/4 step: to nearest, the state never changes; stochastically, it does."""
    shape = (1, 1, 32, 64)
    step = 2.0**-10
    inputs = {
        "x": torch.ones(1, 1, 32), "dt": torch.ones(1, 1), "A": torch.zeros(1),
        "B": torch.full((1, 1, 64), step / 4), "C": torch.ones(1, 1, 64),
    }  # fmt: skip
    nearest, stochastic = torch.ones(shape).half(), torch.ones(shape).half()
    for seed in range(64):
        selective_state_update(nearest, **inputs)
        selective_state_update(stochastic, **inputs, seed=seed)
    assert (nearest == 1).all()
    expected = 1 + 64 / 4 * step
    # Each write moves by one step with probability 1/4: 2,048 sums of 64 such writes.
    deviation = step * (64 * (1 / 4) * (3 / 4) / 2048) ** 0.5
    assert abs(float(stochastic.double().mean()) - expected) < 4 * deviation


def test_wrong_inputs_are_refused() -> None:
    inputs = _inputs(2, 4, 6, 2, 10)

    def refused(match: str, **changed) -> None:
        with pytest.raises(ValueError, match=match):
            selective_state_update(**{**inputs, **changed})

    refused(
        r"state has shape \(3, 4, 6, 10\); expected \(2, 4, 6, 10\)", state=torch.zeros(3, 4, 6, 10)
    )
    refused(r"dt has shape \(2, 3\); expected \(2, 4\) or \(2, 4, 6\)", dt=torch.zeros(2, 3))
    refused("one rate for all", A=-torch.rand(4, 6, 10))
    refused("4 heads do not split into 3 groups", B=torch.zeros(2, 3, 10), C=torch.zeros(2, 3, 10))
    refused(r"C has shape", C=torch.zeros(2, 2, 9))
    refused("Mamba-1", x=torch.zeros(2, 24))
    refused(r"torch\.bfloat16; expected float32 or float16", state=inputs["state"].bfloat16())
    refused("last axis must have 1", state=torch.zeros(2, 4, 10, 6).mT)
    refused("seed=3, but a float32 state", seed=3)
    half = inputs["state"].half()
    refused("expected 0 to", state=half, seed=-1)
    refused("expected one int64", state=half, seed=torch.tensor([1.0]))
    refused("philox_rounds=11", state=half, seed=1, philox_rounds=11)
