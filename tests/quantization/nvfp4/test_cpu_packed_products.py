"""Decoding by tables gives the bits of the definition, and products in stripes the same sums."""

from __future__ import annotations

import threading

import pytest
import torch

from nemotron_lite import ops
from nemotron_lite.quantization import nvfp4
from nemotron_lite.quantization.fp8 import FP8Tensor
from nemotron_lite.quantization.nvfp4 import cpu_packed_products
from nemotron_lite.quantization.nvfp4.cpu_packed_products import (
    EncodedMatrix,
    multiply,
    multiply_experts,
)
from nemotron_lite.quantization.nvfp4.e2m1 import decode_e2m1, unpack_codes
from tests.compare import relative_rms


def random_matrix(format: str, *shape: int) -> EncodedMatrix:
    """Random bytes: all codes and all finite scales, also those that no quantizer would write."""
    stack, rows, cols = shape[:-2], shape[-2], shape[-1]
    blocks = -(-cols // 16)
    # Scales down to float32's subnormals and up to where a sum of products still is finite.
    scale = torch.exp2(torch.empty(stack).uniform_(-40, 10))
    if format == "fp8":
        codes = torch.randint(0, 256, shape, dtype=torch.uint8)
        codes[codes & 0x7F == 0x7F] = 0  # NaN
        return EncodedMatrix(codes.view(torch.float8_e4m3fn), scale, cols)
    codes = torch.randint(0, 256, (*stack, rows, blocks * 8), dtype=torch.uint8)
    scales = torch.randint(0, 127, (*stack, rows, blocks), dtype=torch.uint8)
    return EncodedMatrix(codes, scale, cols, scales.view(torch.float8_e4m3fn))


def by_definition(w: EncodedMatrix) -> torch.Tensor:
    if w.scales is None:
        each = w.scale.view(*w.scale.shape, *[1] * (w.codes.ndim - w.scale.ndim))
        return w.codes.float() * each
    shape = (*w.codes.shape[:-1], w.cols)
    return nvfp4.QuantizedTensor(w.codes, w.scales, w.scale, shape).dequantize()


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int32)


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
@pytest.mark.parametrize("shape", [(5, 16), (33, 37), (3, 20, 48), (1, 1), (700, 512)])
def test_the_bits_are_those_of_the_definition(format: str, shape: tuple[int, ...]) -> None:
    w = random_matrix(format, *shape)
    expected = bits(by_definition(w))
    with torch.inference_mode():
        assert torch.equal(bits(w.decode()), expected)
    assert torch.equal(bits(w.decode(keep=True)), expected)
    if len(shape) == 3:
        chosen = torch.tensor([2, 0, 2, 1])
        assert torch.equal(bits(w.select(chosen).decode()), expected.view(shape)[chosen])
        assert torch.equal(bits(w.select(1).decode()), expected.view(shape)[1])


def test_every_byte_under_every_scale() -> None:
    """All 256 bytes times all 127 finite scales of a block, and both zeros, bit by bit."""
    codes = torch.arange(256, dtype=torch.uint8).view(-1, 8).repeat(127, 1)
    scales = torch.arange(127, dtype=torch.uint8).repeat_interleave(32).view(-1, 1)
    w = EncodedMatrix(codes, torch.tensor(0.37), 16, scales.view(torch.float8_e4m3fn))
    values = decode_e2m1(unpack_codes(codes)) * (scales.view(torch.float8_e4m3fn).float() * 0.37)
    assert torch.equal(bits(w.decode()), bits(values))
    everything = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    found, expected = cpu_packed_products.decode_e4m3(everything), everything.float()
    assert torch.equal(bits(found), bits(expected)), "NaN included"
    assert FP8Tensor(everything[:126], torch.tensor(2.0)).dequantize().equal(found[:126] * 2)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
@pytest.mark.parametrize("rows", [(), (1,), (3, 20)])
def test_stripes_are_one_product(
    format: str, rows: tuple[int, ...], grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_packed_products, "STRIPE", 7 * 40)
    w, x = random_matrix(format, 61, 40), torch.randn(*rows, 40, dtype=torch.float64)
    exact = x @ by_definition(w).double().mT
    with torch.set_grad_enabled(grad):
        assert relative_rms(multiply(x, w), exact) < 1e-12, "no stripe has overwritten another"
        assert relative_rms(multiply(x.float(), w), exact) < 1e-6
        half = multiply(x.bfloat16(), w)
    assert half.dtype == torch.bfloat16
    assert relative_rms(half, exact) < 1e-2


@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_experts_few_and_many(format: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    up, down = random_matrix(format, 12, 24, 40), random_matrix(format, 12, 40, 24)
    z = torch.randn(tokens, 40, dtype=torch.float64)
    indices = torch.stack([torch.randperm(12)[:4] for _ in range(tokens)])
    weights = torch.rand(tokens, 4)
    plain = [by_definition(m).double() for m in (up, down)]
    exact = ops.expert_mlp(z, *plain, weights.double(), indices, impl="naive")
    for stripe in (cpu_packed_products.STRIPE, 24 * 40 * 3, 24 * 40 - 1):
        monkeypatch.setattr(cpu_packed_products, "STRIPE", stripe)
        with torch.inference_mode():
            assert relative_rms(multiply_experts(z, up, down, weights, indices), exact) < 1e-12
            single = multiply_experts(z.float(), up, down, weights, indices)
        assert relative_rms(single, exact) < 1e-6


def test_threads_do_not_share_a_stripe() -> None:
    """Threads that run at the same time do not overwrite each other's stripes."""
    cases = [(random_matrix("nvfp4", 300, 64), torch.randn(2, 64)) for _ in range(4)]
    expected = [x @ by_definition(w).mT for w, x in cases]
    wrong = []

    def work(number: int) -> None:
        w, x = cases[number]
        with torch.inference_mode():
            for _ in range(50):
                if relative_rms(multiply(x, w), expected[number]) > 1e-5:
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_buffer_made_in_inference_mode_works_outside_of_it() -> None:
    w, x = random_matrix("nvfp4", 8, 32), torch.randn(1, 32)
    cpu_packed_products.scratch.kept.clear()
    with torch.inference_mode():
        inside = multiply(x, w).clone()
    with torch.no_grad():
        assert torch.equal(multiply(x, w), inside)


def test_the_buffer_follows_what_is_asked_for() -> None:
    """It grows to the largest stripe so far, and a request beyond the limit leaves it alone."""
    cpu, scratch = torch.device("cpu"), cpu_packed_products._ScratchBuffers()
    with torch.inference_mode():
        sizes = []
        for count in (7, 300, 40, cpu_packed_products.MOST_KEPT, cpu_packed_products.MOST_KEPT + 1):
            assert scratch((count,), cpu).shape == (count,)
            sizes.append(scratch.kept[cpu].numel())
    assert sizes == [7, 300, 300, cpu_packed_products.MOST_KEPT, cpu_packed_products.MOST_KEPT]


def test_a_stripe_of_another_size_does_not_outlive_its_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a thread keeps after small stripes does not limit the next, larger ones."""
    w, x = random_matrix("nvfp4", 61, 48), torch.randn(2, 48)
    expected = x @ by_definition(w).mT
    monkeypatch.setattr(cpu_packed_products, "scratch", cpu_packed_products._ScratchBuffers())
    for stripe in (48, 7 * 48, cpu_packed_products.STRIPE):
        monkeypatch.setattr(cpu_packed_products, "STRIPE", stripe)
        with torch.inference_mode():
            assert relative_rms(multiply(x, w), expected) < 1e-6
