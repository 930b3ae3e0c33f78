"""Products with packed weights equal products with the decoded matrices, in each implementation."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite import ops
from nemotron_lite.quantization import nvfp4
from nemotron_lite.quantization.nvfp4 import cpu_packed_products
from tests.compare import relative_rms


def _stack(*shape: int) -> nvfp4.QuantizedTensor:
    return nvfp4.quantize(torch.randn(*shape) / shape[-1] ** 0.5, batch_dims=1)


def _experts(t: int, e: int, k: int, width: int = 24, hidden: int = 40):
    indices = torch.stack([torch.randperm(e)[:k] for _ in range(t)])
    matrices = _stack(e, hidden, width), _stack(e, width, hidden)
    return torch.randn(t, width), *matrices, torch.rand(t, k), indices


@pytest.mark.parametrize("impl", ["naive", "cpu"])
@pytest.mark.parametrize("cols", [16, 37, 64])
@pytest.mark.parametrize("rows", [(), (3,), (2, 5)])
def test_the_decoded_matrix_is_multiplied(rows, cols: int, impl: str) -> None:
    x, w = torch.randn(*rows, cols), nvfp4.quantize(torch.randn(21, cols))
    exact = x.double() @ w.dequantize(torch.float64).T
    found = nvfp4.matmul(x, w, impl=impl)
    assert found.shape == (*rows, 21) and found.dtype == torch.float32
    assert relative_rms(found, exact) < 1e-6
    packed = nvfp4.quantize(x)
    exact = packed.dequantize(torch.float64) @ w.dequantize(torch.float64).T
    assert relative_rms(nvfp4.matmul(packed, w, impl=impl), exact) < 1e-6


@pytest.mark.parametrize("impl", ["naive", "cpu"])
def test_dtypes_of_the_result(impl: str) -> None:
    x, w = torch.randn(4, 32), nvfp4.quantize(torch.randn(8, 32), block="16x16")
    exact = nvfp4.matmul(x.bfloat16().double(), w, impl=impl)
    assert exact.dtype == torch.float64
    for given in (torch.bfloat16, torch.float16):
        assert nvfp4.matmul(x.to(given), w, impl=impl).dtype == given
    wide = nvfp4.matmul(x.bfloat16(), w, dtype=torch.float32, impl=impl)
    assert wide.dtype == torch.float32 and relative_rms(wide, exact) < 1e-6
    narrow = nvfp4.matmul(nvfp4.quantize(x), w, dtype=torch.bfloat16, impl=impl)
    assert narrow.dtype == torch.bfloat16


@pytest.mark.parametrize("impl", ["naive", "cpu"])
def test_experts_are_those_of_the_decoded_matrices(impl: str) -> None:
    z, up, down, weights, indices = _experts(9, 6, 2)
    plain = [q.dequantize(torch.float64) for q in (up, down)]
    exact = ops.expert_mlp(z.double(), *plain, weights, indices, impl="naive")
    found = nvfp4.expert_mlp(z, up, down, weights, indices, impl=impl)
    assert relative_rms(found, exact) < 1e-6
    assert nvfp4.expert_mlp(z.half(), up, down, weights, indices, impl=impl).dtype == torch.half


def test_gradients_of_what_is_not_packed() -> None:
    x, w = torch.randn(3, 20), nvfp4.quantize(torch.randn(8, 20))
    z, up, down, weights, indices = _experts(5, 4, 2)
    for impl in ("naive", "cpu"):
        leaf = x.clone().requires_grad_()
        nvfp4.matmul(leaf, w, impl=impl).sum().backward()
        torch.testing.assert_close(leaf.grad, w.dequantize().sum(0).expand(3, 20))
        leaves = [v.double().requires_grad_() for v in (z, weights)]
        torch.autograd.gradcheck(
            lambda a, b, impl=impl: nvfp4.expert_mlp(a, up, down, b, indices, impl=impl), leaves
        )


def test_only_the_chosen_experts_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = _experts(2, 30, 3)
    decoded = []
    whole = cpu_packed_products.EncodedMatrix.decode

    def decode(self, **options):
        decoded.append(self.codes.shape)
        return whole(self, **options)

    monkeypatch.setattr(cpu_packed_products.EncodedMatrix, "decode", decode)
    nvfp4.expert_mlp(*inputs, impl="cpu")
    chosen = inputs[-1].unique().numel()
    assert chosen < 30
    assert sorted(decoded) == sorted([(40, 16)] * chosen + [(24, 24)] * chosen)
    decoded.clear()
    with torch.inference_mode():
        nvfp4.expert_mlp(*inputs, impl="cpu")
    assert decoded == [(6, 40, 16), (6, 24, 24)], "a few pairs in one call"


def test_what_does_not_fit_says_so() -> None:
    w = nvfp4.quantize(torch.randn(8, 32))
    with pytest.raises(ValueError, match=r"x has shape \[4, 31\] and w \[8, 32\] with 1 scale"):
        nvfp4.matmul(torch.randn(4, 31), w)
    with pytest.raises(ValueError, match=r"w \[2, 8, 32\] with 2 scale"):
        nvfp4.matmul(torch.randn(4, 32), _stack(2, 8, 32))
    with pytest.raises(ValueError, match="has 4 scales, one for each tensor of a batch"):
        nvfp4.matmul(_stack(4, 32), w)
    with pytest.raises(ValueError, match="matmul has no implementation 'fast'"):
        nvfp4.matmul(torch.randn(4, 32), w, impl="fast")
    z, up, down, weights, indices = _experts(3, 4, 2)
    with pytest.raises(ValueError, match=r"down \[4, 40, 24\].* expected \[e, f, l\] and"):
        nvfp4.expert_mlp(z, up, up, weights, indices)
    whole = nvfp4.quantize(up.dequantize())
    with pytest.raises(ValueError, match="quantize with batch_dims=1"):
        nvfp4.expert_mlp(z, whole, down, weights, indices)
