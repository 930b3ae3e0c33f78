"""The quantizer's kernels against the definition: every bit of codes, scales and values.

The definition itself is compared with independent references in
tests/quantization/nvfp4/test_format.py. Values are compared as bits, so the sign of zero counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from nemotron_kernels import nvfp4_dequantizer, nvfp4_tile
from nemotron_kernels.nvfp4_quantizer import nvfp4_amax, nvfp4_fake_quantize, nvfp4_quantize
from nemotron_kernels.nvfp4_rounding import (
    decode_e4m3,
    round_e2m1,
    round_e4m3,
    round_stochastically,
)
from nemotron_lite.quantization import nvfp4
from tests.kernels import philox
from tests.kernels.test_overflow import PROJECTION, TOKENS, _program

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = ("1x16", "16x16")
FLT_MAX = torch.finfo(torch.float32).max


def _heavy(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks of very different magnitude: scales are zero, subnormal and normal."""
    sizes = torch.exp(4 * torch.randn(*shape[:-1], -(-shape[-1] // 16)))
    x = torch.randn(shape) * sizes.repeat_interleave(16, -1)[..., : shape[-1]]
    # The Hadamard transform can make values four times as large, still finite in float16.
    return x.clamp(-1e4, 1e4).to(dtype)


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32 if x.element_size() == 4 else torch.int16)


def _same(found: nvfp4.QuantizedTensor, exact: nvfp4.QuantizedTensor) -> None:
    assert torch.equal(found.codes, exact.codes)
    assert torch.equal(found.scales.view(torch.uint8), exact.scales.view(torch.uint8))
    assert torch.equal(_bits(found.scale), _bits(exact.scale))
    assert found.shape == exact.shape and found.block == exact.block


def _compare(x: Tensor, **how) -> None:
    """quantize, fake_quantize in both directions, and dequantize, through the dispatch."""
    exact = nvfp4.quantize(x, **how, impl="naive")
    _same(nvfp4.quantize(x, **how, impl="triton"), exact)
    for dtype in DTYPES:
        values = exact.dequantize(dtype, impl="torch")
        assert torch.equal(_bits(exact.dequantize(dtype, impl="triton")), _bits(values))
    for dim in (-1, -2)[: x.ndim]:
        fake = [nvfp4.fake_quantize(x, dim=dim, **how, impl=i) for i in ("naive", "triton")]
        assert fake[0].dtype == fake[1].dtype == x.dtype
        assert torch.equal(*map(_bits, fake))


# Rounding


@triton.jit
def _rounding_kernel(
    scale_ptr, v_ptr, halves_ptr, e4m3_ptr, wide_ptr, nearest_ptr, chance_ptr, N: tl.constexpr
):
    i = tl.arange(0, N)
    e4m3 = round_e4m3(tl.load(scale_ptr + i))
    tl.store(e4m3_ptr + i, e4m3)
    tl.store(wide_ptr + i, decode_e4m3(e4m3))
    v = tl.load(v_ptr + i)
    code, value = round_e2m1(tl.abs(v))
    tl.store(nearest_ptr + 2 * i, code.to(tl.float32))
    tl.store(nearest_ptr + 2 * i + 1, value)
    code, value = round_stochastically(v, tl.load(halves_ptr + i))
    tl.store(chance_ptr + 2 * i, code.to(tl.float32))
    tl.store(chance_ptr + 2 * i + 1, value)


def _around(points: Tensor) -> Tensor:
    """Each point and its two neighbors in float32."""
    up = torch.nextafter(points, torch.full_like(points, torch.inf))
    return torch.cat([points, up, torch.nextafter(points, torch.full_like(points, -torch.inf))])


def test_rounding_at_every_edge_and_at_random() -> None:
    n = 2**20
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    edges = _around(torch.cat([codes, (codes[1:] + codes[:-1]) / 2])).clamp(min=0)
    scale = torch.cat([edges, torch.tensor([1e-45, 449, 1e30]), torch.exp(4 * torch.randn(n))])[:n]
    grid = torch.tensor(nvfp4.E2M1_VALUES[:8])
    edges = _around(torch.cat([grid, (grid[1:] + grid[:-1]) / 2])).clamp(-6, 6)
    v = torch.cat([edges, -edges, torch.tensor([1e-45]), 3 * torch.randn(n).clamp(-2, 2)])[:n]
    halves = torch.randint(0, 65536, (n,), dtype=torch.int32)
    e4m3, wide = torch.empty(n, dtype=torch.uint8), torch.empty(n)
    nearest, chance = torch.empty(n, 2), torch.empty(n, 2)
    _rounding_kernel[(1,)](scale, v, halves, e4m3, wide, nearest, chance, N=n)
    assert torch.equal(e4m3, nvfp4.round_e4m3(scale).view(torch.uint8))
    assert torch.equal(wide, nvfp4.round_e4m3(scale).float())
    for found, exact in (
        (nearest, nvfp4.encode_e2m1(v.abs())),
        (chance, nvfp4.encode_e2m1_stochastic(v, halves.long()) & 7),
    ):
        assert torch.equal(found[:, 0], exact.float())
        assert torch.equal(found[:, 1], nvfp4.decode_e2m1(exact))


# Tensors


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (16, 16), (33, 129), (300, 272)])
def test_to_nearest(shape: tuple[int, int], dtype: torch.dtype, block: str) -> None:
    _compare(_heavy(*shape, dtype=dtype), block=block)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hadamard", [False, True])
def test_stochastic_rounding_and_hadamard(dtype: torch.dtype, block: str, hadamard: bool) -> None:
    for shape in ((50, 40), (19, 300)):
        x = _heavy(*shape, dtype=dtype)
        _compare(x, block=block, hadamard=hadamard, stochastic=True, seed=2**40 + 9)
        if hadamard:
            _compare(x, block=block, hadamard=True)
        bits = torch.randint(0, 65536, shape)
        q = [
            nvfp4.quantize(x, block=block, hadamard=hadamard, stochastic=True, bits=bits, impl=i)
            for i in ("naive", "triton")
        ]
        _same(*q)
        given = {"stochastic": True, "bits": bits, "hadamard": hadamard, "dim": -2}
        fake = [nvfp4.fake_quantize(x, **given, impl=i) for i in ("naive", "triton")]
        assert torch.equal(*map(_bits, fake))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_values(dtype: torch.dtype) -> None:
    x = torch.randn(1024, 1024).to(dtype)
    _same(nvfp4.quantize(x, impl="triton"), nvfp4.quantize(x, impl="naive"))


def test_extreme_sizes() -> None:
    for largest, dtype in itertools.product((0.0, 1e-45, 1e-38, 1e-30, 1e30, FLT_MAX), DTYPES):
        x = ((torch.rand(8, 64) * 2 - 1) * largest).to(dtype)
        x[1, 16:32] *= 1e-6  # sizes at which a block's scale is subnormal, then zero
        x[2, 16:32] *= 1e-7
        if x.isfinite().all():
            _compare(x)
            _compare(x, stochastic=True, seed=1)


def test_zeros_keep_their_signs() -> None:
    x = torch.tensor([[0.0, -0.0, -1e-20, 1.0] * 8])
    _compare(x)
    assert nvfp4.fake_quantize(x, impl="triton").signbit()[0, :4].tolist() == [0, 1, 1, 0]


def test_a_given_amax_saturates() -> None:
    x = _heavy(32, 64)
    _compare(x, amax=x.abs().amax() / 100)


@pytest.mark.parametrize("batch_dims", [0, 1, 2])
@pytest.mark.parametrize("shape", [(3, 5, 37), (2, 20, 48)])
def test_tensors_of_a_batch(shape: tuple[int, ...], batch_dims: int) -> None:
    x = _heavy(*shape)
    _compare(x, batch_dims=batch_dims)
    if batch_dims == 1:
        _compare(x, batch_dims=1, block="16x16")
        _compare(x, batch_dims=1, hadamard=True, stochastic=True, seed=4)


def test_one_row() -> None:
    _compare(_heavy(37))
    _compare(_heavy(1, 4096))


def test_any_memory_layout() -> None:
    """Transposes, slices, every second row and column. Memory between them is not read."""
    wide = torch.full((2, 45, 90), torch.nan)
    x = torch.randn(2, 40, 80)
    wide[:, 2:42, 7:87] = x
    spread = x.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, ::2, ::2]
    for view in (wide[:, 2:42, 7:87], x.mT.contiguous().mT, spread, x[:, :4].permute(1, 0, 2)):
        _compare(view, stochastic=True, seed=3)
        _compare(view, batch_dims=1, block="16x16")
    out = nvfp4.fake_quantize(x, dim=-2, impl="triton")
    assert out.is_contiguous(), "columns are transposed in registers, not in memory"
    q = nvfp4.quantize(x, impl="naive")
    half = dataclasses.replace(
        q, codes=q.codes[:, ::2, :24], scales=q.scales[:, ::2, :3], shape=(2, 20, 48)
    )
    assert torch.equal(half.dequantize(impl="triton"), half.dequantize(impl="torch"))


def test_empty_tensors() -> None:
    for shape in ((0, 16), (4, 0)):
        x = torch.empty(shape)
        _same(nvfp4.quantize(x, impl="triton"), nvfp4.quantize(x, impl="naive"))
        assert nvfp4.fake_quantize(x, impl="triton").shape == shape
        assert nvfp4_amax(x) == 0
        codes, scales, scale = nvfp4_quantize(x, torch.tensor(5.0))
        assert codes.numel() == scales.numel() == 0
        assert scale == nvfp4.tensor_scales(torch.tensor(5.0))[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_amax_shows_nan_and_infinity_wherever_they_are(dtype: torch.dtype) -> None:
    x = _heavy(2, 300, 150, dtype=dtype)
    assert torch.equal(nvfp4_amax(x, batch_dims=1), x.float().abs().amax((1, 2)))
    for place, bad in itertools.product(((1, 0, 0), (1, 299, 149)), (torch.nan, -torch.inf)):
        sick = x.clone()
        sick[place] = bad
        found = nvfp4_amax(sick, batch_dims=1)
        assert found[0].isfinite() and (found[1].isnan() if bad != bad else found[1].isinf())
        assert not nvfp4_amax(sick, hadamard=True).isfinite()


def test_every_byte_with_every_scale_is_decoded() -> None:
    """All pairs of codes and a scale: NaN, negative scales and both zeros included."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1).view(256 * 32, 8)
    scales = torch.arange(256, dtype=torch.uint8).repeat_interleave(32)[:, None]
    q = nvfp4.QuantizedTensor(
        codes, scales.view(torch.float8_e4m3fn), torch.tensor(0.3), (256 * 32, 16)
    )
    for dtype in DTYPES:
        found, exact = (q.dequantize(dtype, impl=i) for i in ("triton", "torch"))
        assert torch.equal(found.isnan(), exact.isnan())
        known = ~exact.isnan()
        assert torch.equal(_bits(found)[known], _bits(exact)[known])


def test_a_seed_may_be_on_the_device() -> None:
    x, seed = torch.randn(20, 48), 2**33 + 1
    amax = nvfp4_amax(x)
    found = nvfp4_fake_quantize(x, amax, seed=torch.tensor([seed]))
    assert torch.equal(found, nvfp4_fake_quantize(x, amax, seed=seed))


# Refusals


def test_wrong_inputs_are_refused() -> None:
    x = torch.randn(4, 32)
    x[2, 2] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.3 holds NaN or infinity"):
        nvfp4.quantize(x, name="layers.3", impl="triton")
    with pytest.raises(ValueError, match="dy holds NaN or infinity"):
        nvfp4.fake_quantize(x, dim=-2, name="dy", impl="triton")
    with pytest.raises(ValueError, match="amax of w holds NaN or infinity"):
        nvfp4.quantize(torch.ones(4), amax=torch.tensor(torch.inf), name="w", impl="triton")
    with pytest.raises(ValueError, match=r"w is torch.float64; expected float32"):
        nvfp4.quantize(x.double(), name="w", impl="triton")
    x, one = torch.ones(4, 32), torch.ones(())
    with pytest.raises(ValueError, match="block='4x4'"):
        nvfp4_quantize(x, one, block="4x4")
    with pytest.raises(ValueError, match=r"amax is torch.float32 of shape \(3,\)"):
        nvfp4_quantize(x, torch.ones(3))
    with pytest.raises(ValueError, match="square tiles need matrices"):
        nvfp4_quantize(x, torch.ones(4), block="16x16")
    with pytest.raises(ValueError, match="seed and bits were both given"):
        nvfp4_quantize(x, one, seed=1, bits=x.long())
    with pytest.raises(ValueError, match="seed=-1"):
        nvfp4_quantize(x, one, seed=-1)
    with pytest.raises(ValueError, match=r"bits have shape \(4, 31\)"):
        nvfp4_fake_quantize(x, one, bits=torch.ones(4, 31, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"writes torch.float32.*not torch.float64"):
        nvfp4.quantize(x).dequantize(torch.float64, impl="triton")
    assert nvfp4.quantize(x).dequantize(torch.float64).dtype == torch.float64


def test_a_kernel_forced_on_cpu_tensors_is_refused() -> None:
    script = (
        "import torch; from nemotron_lite.quantization import nvfp4\n"
        "x = torch.ones(2, 16)\n"
        "q = nvfp4.quantize(x)\n"
        "for call in (lambda: nvfp4.quantize(x, impl='triton'),\n"
        "             lambda: nvfp4.fake_quantize(x, impl='triton'),\n"
        "             lambda: q.dequantize(impl='triton')):\n"
        "    try: call()\n"
        "    except RuntimeError as error: print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == ["nvfp4_amax"] * 2 + ["nvfp4_dequantize"]
    assert all("runs on an NVIDIA GPU" in line and "impl='auto'" in line for line in lines)


# Addresses


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fake", [False, True])
def test_a_million_tokens(transposed: bool, fake: bool) -> None:
    """The last tile of the last of three matrices, along rows and along columns."""
    x, byte, i = torch.zeros(1), torch.zeros(1, dtype=torch.uint8), torch.zeros(1).int()
    m, k = (PROJECTION, TOKENS) if transposed else (TOKENS, PROJECTION)
    strides = (TOKENS * PROJECTION, *((1, PROJECTION) if transposed else (PROJECTION, 1)))
    tiles = -(-m // 64) * -(-k // 128)
    shared = {"ROWS": 64, "COLUMNS": 128}
    with _program(3 * tiles - 1):
        nvfp4_tile._nvfp4_amax[(1,)](
            x, i, m, k, *strides, STACKED=True, TRANSPOSED=transposed, HADAMARD=True, **shared
        )
        for rounding in (1, 2):
            nvfp4_tile._quantize_kernel[(1,)](
                x,
                x,
                i,
                byte,
                byte,
                x,
                x,
                7,
                1,
                m,
                k,
                k,
                k,
                k,
                *strides,
                *strides,
                *strides,
                STACKED=True,
                TRANSPOSED=transposed,
                SQUARE=True,
                HADAMARD=True,
                ROUNDING=rounding,
                FAKE=fake,
                NATIVE=False,
                **shared,
            )
    with _program(3 * tiles - 1):
        nvfp4_dequantizer._nvfp4_dequantize[(1,)](
            byte, byte, x, x, 3 * m, k, m, k // 2, k // 16, WHOLE=False, **shared
        )


def test_a_seed_gives_the_bits_of_the_reference() -> None:
    """0.3 is 0.6 of a step above 0, so it is rounded up if the dither is at least 0.4."""
    x = torch.full((9, 40), 0.3)
    x[:, ::16] = 6.0
    codes, _, _ = nvfp4_quantize(x, torch.tensor(6.0), seed=77)
    halves = philox.random_halves(77, 9, 48, 5)[:, :40].astype(np.float64)
    up = torch.from_numpy((2 * halves + 1) / 2**17 + float(x[0, 1]) * 2 >= 1)
    up[:, ::16] = True
    assert torch.equal(nvfp4.unpack_codes(codes)[:, :40] > 0, up)
