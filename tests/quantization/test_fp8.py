"""FP8 and MXFP8 bit for bit against ml_dtypes' casts and exact arithmetic on exponents."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch

from nemotron_lite.quantization import fp8

E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_scale_for_the_tensor(dtype: torch.dtype) -> None:
    for seed in range(8):  # another amax each time
        torch.manual_seed(seed)
        x = (torch.randn(64, 100) * torch.exp(3 * torch.randn(64, 1))).to(dtype)
        wide = x.float().numpy()
        scale = np.abs(wide).max() / np.float32(448)
        codes = np.clip(wide / scale, -448, 448).astype(E4M3)
        q = fp8.quantize_fp8(x)
        assert q.scale.item() == scale
        assert np.array_equal(q.codes.view(torch.uint8).numpy(), codes.view(np.uint8))
        assert np.array_equal(q.dequantize().numpy(), codes.astype(np.float32) * scale)
        assert torch.equal(fp8.fake_quantize_fp8(x), q.dequantize(dtype))


def test_a_given_scale_saturates_and_zeros_have_one() -> None:
    x = torch.tensor([1.0, -500.0, 3e38])
    assert fp8.quantize_fp8(x, scale=torch.tensor(1.0)).dequantize().tolist() == [1, -448, 448]
    zeros = fp8.quantize_fp8(torch.zeros(3))
    assert zeros.scale == 1 and not zeros.dequantize().any()


def _mxfp8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes and exponents; x has whole blocks of 32."""
    blocks = x.reshape(x.shape[0], -1, 32)
    largest = np.abs(blocks).max(-1) * np.float32(1 / 448)
    exponent = np.full(largest.shape, -127)
    for place, size in np.ndenumerate(largest):
        if size > 0:
            mantissa, e = math.frexp(float(size))
            exponent[place] = max(-127, e - (mantissa == 0.5))
    scaled = np.ldexp(blocks.astype(np.float64), -exponent[..., None]).astype(np.float32)
    return scaled.astype(E4M3).reshape(x.shape), exponent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_power_of_two_for_each_32(dtype: torch.dtype) -> None:
    x = (torch.randn(40, 96) * torch.exp(3 * torch.randn(40, 1))).to(dtype)
    x[0, :32], x[1, 32:64] = 0, 448 * 2.0**-5  # a block of zeros; exactly a power of two
    codes, exponent = _mxfp8(x.float().numpy())
    q = fp8.quantize_mxfp8(x)
    assert np.array_equal(q.scales.numpy(), (exponent + 127).astype(np.uint8))
    assert np.array_equal(q.codes.view(torch.uint8).numpy(), codes.view(np.uint8))
    powers = q.scales.numpy().view(E8M0).astype(np.float32).repeat(32, 1)
    values = torch.from_numpy(codes.astype(np.float32) * powers).to(dtype)
    assert torch.equal(q.dequantize(dtype), values)
    assert torch.equal(fp8.fake_quantize_mxfp8(x), values)
    assert torch.equal(fp8.fake_quantize_mxfp8(x.mT.contiguous(), dim=-2), values.mT)


def test_nothing_is_clipped() -> None:
    """The exponent is rounded up, so the largest code is at most 448 and above 224."""
    q = fp8.quantize_mxfp8(torch.randn(200, 32) * torch.exp(5 * torch.randn(200, 1)))
    largest = q.codes.float().abs().amax(1)
    assert ((largest > 208) & (largest <= 448)).all()


def test_rows_are_padded_to_whole_blocks() -> None:
    x = torch.randn(3, 37)
    q = fp8.quantize_mxfp8(x)
    assert q.codes.shape == (3, 64) and q.scales.shape == (3, 2)
    padded = fp8.quantize_mxfp8(torch.nn.functional.pad(x, (0, 27)))
    assert torch.equal(q.dequantize(), padded.dequantize()[:, :37])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_are_refused_by_name(bad: float) -> None:
    for quantize in (fp8.quantize_fp8, fp8.quantize_mxfp8, fp8.fake_quantize_mxfp8):
        with pytest.raises(ValueError, match="k_cache holds NaN or infinity"):
            quantize(torch.tensor([[1.0, bad]]), name="k_cache")
        with pytest.raises(ValueError, match=r"w is torch.float64"):
            quantize(torch.ones(1, 2, dtype=torch.float64), name="w")
    with pytest.raises(ValueError, match=r"x: scale=0\.0; expected a positive"):
        fp8.quantize_fp8(torch.ones(2), scale=torch.tensor(0.0), name="x")
