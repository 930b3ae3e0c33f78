"""NVFP4 bit for bit: codes, scales, amax and values against a reference made with ml_dtypes.

Both implementations ("naive", the definition, and "cpu") are compared with it, on edge cases and
on millions of random values.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from nemotron_lite.quantization import nvfp4
from tests.compare import relative_rms
from tests.quantization.nvfp4 import reference as reference

IMPLS = ("naive", "cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = ("1x16", "16x16")
FLT_MAX = torch.finfo(torch.float32).max


def _same(q: nvfp4.QuantizedTensor, exact: reference.Quantized) -> None:
    assert np.array_equal(q.codes.numpy(), exact.codes)
    assert np.array_equal(q.scales.view(torch.uint8).numpy(), exact.scales)
    assert np.array_equal(q.scale.numpy(), exact.scale)
    values = q.dequantize().numpy()
    assert np.array_equal(values, exact.values)
    assert np.array_equal(np.signbit(values), np.signbit(exact.values))


def _heavy(*shape: int) -> Tensor:
    """Blocks whose sizes differ by many powers of ten: flushed, subnormal, ordinary scales."""
    rows, cols = shape
    sizes = torch.exp(4 * torch.randn(rows, -(-cols // 16))).repeat_interleave(16, 1)
    return torch.randn(shape) * sizes[:, :cols]


# Elements


def _around(points: Tensor) -> Tensor:
    """Each point and both of its neighbors in float32, with both signs."""
    up = torch.nextafter(points, torch.full_like(points, torch.inf))
    down = torch.nextafter(points, torch.full_like(points, -torch.inf))
    near = torch.cat([points, up, down])
    return torch.cat([near, -near])


def test_codes_are_those_of_ml_dtypes() -> None:
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    edges = torch.cat([grid, (grid[1:] + grid[:-1]) / 2, torch.tensor([5.5, 7, 7.5, 1e30, 1e-40])])
    v = torch.cat([_around(edges), 3 * torch.randn(2**20)])
    found = nvfp4.encode_e2m1(v)
    exact = v.clamp(-6, 6).numpy().astype(ml_dtypes.float4_e2m1fn)
    assert np.array_equal(found.numpy(), exact.view(np.uint8))
    assert found.unique().tolist() == list(range(16))
    every = torch.arange(16, dtype=torch.uint8)
    values = every.numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(nvfp4.decode_e2m1(every).numpy(), values)
    assert torch.equal(nvfp4.encode_e2m1(nvfp4.decode_e2m1(every)), every)


def test_block_scales_are_rounded_as_by_ml_dtypes() -> None:
    codes = np.arange(127, dtype=np.uint8)  # 0 to 448
    grid = torch.from_numpy(codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
    midpoints = (grid[1:] + grid[:-1]) / 2
    sizes = torch.exp(4 * torch.randn(2**20))
    v = torch.cat([_around(torch.cat([grid, midpoints])), sizes, torch.tensor([449.0, 1e30])])
    exact = v.clamp(-448, 448).numpy().astype(ml_dtypes.float8_e4m3fn)
    found = nvfp4.round_e4m3(v).view(torch.uint8)
    assert np.array_equal(found.numpy(), exact.view(np.uint8))


def test_scales_of_a_tensor_are_one_division_each() -> None:
    amax = torch.cat([torch.exp(8 * torch.randn(2**16)), torch.tensor([0.0, 1e-45, FLT_MAX])])
    for found, exact in zip(
        nvfp4.tensor_scales(amax), reference.tensor_scales(amax.numpy()), strict=True
    ):
        assert np.array_equal(found.numpy(), exact)


def test_the_even_column_is_in_the_low_half_of_a_byte() -> None:
    codes = torch.tensor([[1, 2, 3, 4], [15, 0, 7, 8]], dtype=torch.uint8)
    packed = nvfp4.pack_codes(codes)
    assert packed.tolist() == [[0x21, 0x43], [0x0F, 0x87]]
    assert torch.equal(nvfp4.unpack_codes(packed), codes)
    with pytest.raises(ValueError, match="3 columns of codes"):
        nvfp4.pack_codes(codes[:, :3])


# Tensors


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_million_values(dtype: torch.dtype, block: str, impl: str) -> None:
    for x in (torch.randn(1024, 512), _heavy(1024, 512).clamp(-6e4, 6e4)):
        x = x.to(dtype)
        exact = reference.quantize(x.float().numpy(), square=block == "16x16")
        _same(nvfp4.quantize(x, block=block, impl=impl), exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (16, 16), (17, 40), (33, 129), (80, 272)])
def test_sizes_that_do_not_fit(shape: tuple[int, int], block: str, impl: str) -> None:
    for seed in range(8):  # another amax each time
        torch.manual_seed(seed)
        x = _heavy(*shape)
        exact = reference.quantize(x.numpy(), square=block == "16x16")
        _same(nvfp4.quantize(x, block=block, impl=impl), exact)
        transposed = nvfp4.quantize(x.mT, block=block, impl=impl)
        _same(transposed, reference.quantize(x.T.numpy(), square=block == "16x16"))


@pytest.mark.parametrize("impl", IMPLS)
def test_extreme_sizes(impl: str) -> None:
    for largest in (0.0, 1e-45, 1e-40, 1.2e-38, 1e-30, 1.0, 1e30, FLT_MAX):
        x = (torch.rand(8, 64) * 2 - 1) * largest
        x[0, 3] = largest
        x[1, 16:32] *= 1e-6  # about where a block's scale is subnormal, then zero
        x[2, 16:32] *= 1e-7
        _same(nvfp4.quantize(x, impl=impl), reference.quantize(x.numpy()))
    x = torch.zeros(4, 32)
    q = nvfp4.quantize(x, impl=impl)
    assert not q.scales.float().any() and q.scale == 1 and torch.equal(q.dequantize(), x)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_given_amax_saturates(impl: str) -> None:
    x = _heavy(32, 64)
    amax = x.abs().amax() / 100
    q = nvfp4.quantize(x, amax=amax, impl=impl)
    _same(q, reference.quantize(x.numpy(), amax=amax.numpy()))
    assert q.dequantize().abs().max() <= amax * 1.0001 < x.abs().max() / 50
    assert q.scales.float().max() == 448


@pytest.mark.parametrize("impl", IMPLS)
def test_weak_blocks_are_subnormal_or_flushed(impl: str) -> None:
    """Scales below 2^-6 are subnormal; a block below 2^-10 / 448 of the largest is flushed."""
    x = torch.zeros(1, 48)
    x[0, 0], x[0, 16], x[0, 32] = 1.0, 2.0**-9 / 448 * 1.1, 2.0**-10 / 448 * 0.99
    q = nvfp4.quantize(x, impl=impl)
    assert q.scales.view(torch.uint8).tolist() == [[0x7E, 1, 0]]
    assert q.dequantize()[0, 32] == 0 and q.codes[0, 16] & 7 == 7
    assert q.dequantize()[0, 16] == 6 * 2.0**-9 * q.scale


def test_a_stack_has_a_scale_for_each_matrix() -> None:
    x = torch.randn(5, 20, 40) * torch.exp(3 * torch.randn(5, 1, 1))
    for impl in IMPLS:
        q = nvfp4.quantize(x, batch_dims=1, impl=impl)
        for i in range(5):
            exact = reference.quantize(x[i].numpy())
            assert np.array_equal(q.codes[i].numpy(), exact.codes)
            assert q.scale[i].item() == exact.scale.item()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(32, 48), (20, 37)])
def test_square_tiles_give_a_weight_and_its_transpose_the_same_values(shape, impl: str) -> None:
    w = torch.randn(shape)
    both = [nvfp4.fake_quantize(m, block="16x16", impl=impl) for m in (w, w.mT)]
    assert torch.equal(both[0], both[1].mT)
    plain = [nvfp4.fake_quantize(m, impl=impl) for m in (w, w.mT)]
    assert not torch.equal(plain[0], plain[1].mT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [-1, -2])
def test_fake_quantized_is_decoded(dim: int, dtype: torch.dtype) -> None:
    x = _heavy(48, 64).clamp(-6e4, 6e4).to(dtype)
    exact = reference.quantize((x if dim == -1 else x.mT).contiguous().float().numpy()).values
    exact = torch.from_numpy(exact).to(dtype)
    for impl in IMPLS:
        found = nvfp4.fake_quantize(x, dim=dim, impl=impl)
        assert found.dtype == dtype
        assert torch.equal(found if dim == -1 else found.mT, exact)


# Hadamard


def _matrix() -> Tensor:
    """diag(signs) H / 4 in float64, with H from its recursive definition."""
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(4):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    signs = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]  # Transformer Engine's
    return torch.diag(torch.tensor(signs, dtype=torch.float64)) @ h / 4


def test_the_hadamard_transform_is_orthonormal_with_the_fixed_signs() -> None:
    exact = _matrix()
    eye = torch.eye(16, dtype=torch.float64)
    torch.testing.assert_close(exact @ exact.T, eye, rtol=0, atol=0)
    assert torch.equal(nvfp4.hadamard_transform(eye), exact)
    x = torch.randn(6, 48, dtype=torch.float64)
    groups = (x.view(6, 3, 16) @ exact).view(6, 48)
    torch.testing.assert_close(nvfp4.hadamard_transform(x), groups, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(
        nvfp4.inverse_hadamard_transform(nvfp4.hadamard_transform(x)), x, rtol=0, atol=1e-14
    )
    along_rows = nvfp4.hadamard_transform(x.mT, dim=-2)
    torch.testing.assert_close(along_rows, nvfp4.hadamard_transform(x).mT, rtol=0, atol=0)
    wide = nvfp4.hadamard_transform(x.float())
    assert relative_rms(wide, groups) < 2e-7
    assert torch.equal(
        nvfp4.hadamard_transform(x.bfloat16()),
        nvfp4.hadamard_transform(x.bfloat16().float()).bfloat16(),
    )
    with pytest.raises(ValueError, match="is 20 long"):
        nvfp4.hadamard_transform(torch.randn(3, 20))


def test_the_hadamard_transform_cancels_in_a_weight_gradient() -> None:
    dy, x = torch.randn(64, 5, dtype=torch.float64), torch.randn(64, 7, dtype=torch.float64)
    product = nvfp4.hadamard_transform(dy, dim=0).T @ nvfp4.hadamard_transform(x, dim=0)
    torch.testing.assert_close(product, dy.T @ x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", IMPLS)
def test_quantizing_with_hadamard_quantizes_the_transformed_tensor(impl: str) -> None:
    for dtype in DTYPES:
        x = torch.randn(40, 37).to(dtype)
        padded = torch.nn.functional.pad(x, (0, 11))
        exact = reference.quantize(nvfp4.hadamard_transform(padded).float().numpy())
        q = nvfp4.quantize(x, hadamard=True, impl=impl)
        assert q.shape == (40, 48)
        _same(q, exact)


# Refusals


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_are_refused_by_name(dtype: torch.dtype, bad: float, impl: str) -> None:
    for block, hadamard in (("1x16", False), ("16x16", False), ("1x16", True)):
        x = torch.randn(20, 40).to(dtype)
        x[19, 39] = bad
        with pytest.raises(ValueError, match=r"layers\.3\.up\.weight holds NaN or infinity"):
            nvfp4.quantize(x, block=block, hadamard=hadamard, name="layers.3.up.weight", impl=impl)
        with pytest.raises(ValueError, match=r"the gradient holds NaN or infinity"):
            nvfp4.fake_quantize(x, dim=-2, hadamard=hadamard, name="the gradient", impl=impl)
    with pytest.raises(ValueError, match="amax of x holds NaN or infinity"):
        nvfp4.quantize(torch.ones(16), amax=torch.tensor(bad).abs(), name="x", impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_what_cannot_be_quantized_says_why(impl: str) -> None:
    x = torch.randn(4, 32)
    with pytest.raises(ValueError, match=r"w is torch.float64; expected float32"):
        nvfp4.quantize(x.double(), name="w", impl=impl)
    with pytest.raises(ValueError, match="block='2x8'"):
        nvfp4.quantize(x, block="2x8", impl=impl)
    with pytest.raises(ValueError, match=r"square tiles need\s+matrices"):
        nvfp4.quantize(x[0], block="16x16", impl=impl)
    with pytest.raises(ValueError, match="batch_dims=2"):
        nvfp4.quantize(x, batch_dims=2, impl=impl)
    with pytest.raises(ValueError, match=r"stochastic=True takes exactly one of seed and bits"):
        nvfp4.quantize(x, stochastic=True, impl=impl)
    with pytest.raises(ValueError, match=r"stochastic=False takes neither"):
        nvfp4.quantize(x, seed=3, impl=impl)
    with pytest.raises(ValueError, match=r"amax of shape \[4\]"):
        nvfp4.quantize(x, amax=torch.ones(4), impl=impl)
