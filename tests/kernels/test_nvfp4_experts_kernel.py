"""The packed experts' kernels against a loop over tokens in float64 with the decoded matrices.

Tolerances are those of the plain experts' kernels: relative rms 1e-6 in float32, 1e-3 in float16.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from triton.runtime.errors import InterpreterError

from nemotron_kernels import nvfp4_experts
from nemotron_kernels.nvfp4_experts import nvfp4_expert_mlp
from nemotron_lite import ops
from nemotron_lite.quantization import nvfp4
from tests.compare import relative_rms
from tests.kernels.interpreter import overflow_is_an_error

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def _indices(t: int, e: int, k: int) -> torch.Tensor:
    return torch.stack([torch.randperm(e)[:k] for _ in range(t)])


def _stack(e: int, rows: int, cols: int) -> nvfp4.QuantizedTensor:
    sizes = torch.rand(e, 1, 1) + 0.5  # so that no two experts have the same scale
    return nvfp4.quantize(torch.randn(e, rows, cols) * sizes / cols**0.5, batch_dims=1)


def _inputs(t: int, e: int, k: int, width: int = 60, hidden: int = 100):
    return (
        torch.randn(t, width),
        _stack(e, hidden, width),
        _stack(e, width, hidden),
        torch.rand(t, k),
    )


def _exact(z, up, down, weights, indices) -> torch.Tensor:
    wide = [part.dequantize(torch.float64) for part in (up, down)]
    return ops.expert_mlp(z.double(), *wide, weights.double(), indices, impl="naive")


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("t", "e", "k", "width", "hidden"),
    [
        (5, 10, 3, 60, 100),
        (123, 16, 3, 60, 100),  # tiles of 32 rows
        (90, 4, 2, 64, 128),  # of 64, and no tail anywhere
        (150, 3, 2, 60, 100),  # of 128 in 16 bits
        (37, 12, 4, 130, 33),
    ],
)
def test_many_tokens(t, e, k, width, hidden, dtype) -> None:
    inputs, indices = _inputs(t, e, k, width, hidden), _indices(t, e, k)
    z = inputs[0].to(dtype)
    found = nvfp4_expert_mlp(z, *inputs[1:], indices)
    assert found.dtype == dtype
    assert relative_rms(found, _exact(z, *inputs[1:], indices)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("t", "e", "k"), [(1, 8, 2), (1, 12, 5), (2, 40, 5), (4, 16, 1)])
def test_few_tokens_are_not_sorted(t, e, k, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvfp4_experts, "sort_by_expert", lambda *_: pytest.fail("sorted"))
    inputs, indices = _inputs(t, e, k, 61, 150), _indices(t, e, k)
    z = inputs[0].to(dtype)
    found = nvfp4_expert_mlp(z, *inputs[1:], indices)
    assert found.dtype == dtype
    assert relative_rms(found, _exact(z, *inputs[1:], indices)) < TOLERANCE[dtype]


@pytest.mark.parametrize("t", [2, 40])
def test_exact_sums_are_bit_equal_to_pytorch(t: int) -> None:
    """Integers and powers of two, so small that sums of squares are exact too."""

    def small(*shape: int) -> nvfp4.QuantizedTensor:
        codes = torch.tensor([0, 2, 10], dtype=torch.uint8)[torch.randint(0, 3, shape)]  # 0, 1, -1
        scales = torch.tensor([1.0, 2.0])[torch.randint(0, 2, (*shape[:-1], shape[-1] // 16))]
        scale = torch.tensor([0.5, 1.0, 2.0])[torch.arange(shape[0]) % 3]
        parts = nvfp4.pack_codes(codes), scales.to(torch.float8_e4m3fn), scale
        return nvfp4.QuantizedTensor(*parts, shape)

    e, k = 12, 3
    z = torch.randint(-2, 3, (t, 32)).float()
    weights = torch.tensor([0.25, 0.5, 1.0])[torch.randint(0, 3, (t, k))]
    given = z, small(e, 48, 32), small(e, 32, 48), weights, _indices(t, e, k)
    exact = nvfp4.expert_mlp(*given, impl="cpu")
    assert exact.abs().max() > 100
    assert torch.equal(nvfp4.expert_mlp(*given, impl="triton"), exact)


def test_experts_without_tokens_and_all_to_one() -> None:
    inputs = _inputs(40, 16, 2)
    for indices in (3 * _indices(40, 5, 2), torch.tensor([[15, 15]]).repeat(40, 1)):
        assert relative_rms(nvfp4_expert_mlp(*inputs, indices), _exact(*inputs, indices)) < 1e-6
    none = nvfp4_expert_mlp(inputs[0][:0], *inputs[1:3], inputs[3][:0], indices[:0])
    assert none.shape == (0, 60)


def _without(stack: nvfp4.QuantizedTensor, experts: list[int]) -> nvfp4.QuantizedTensor:
    """`w` with NaN in all tensors of these experts."""
    scales, scale = stack.scales.view(torch.uint8).clone(), stack.scale.clone()
    scales[experts], scale[experts] = 0x7F, float("nan")
    return dataclasses.replace(stack, scales=scales.view(torch.float8_e4m3fn), scale=scale)


@pytest.mark.parametrize("t", [1, 30])
def test_only_the_chosen_experts_are_read(t: int) -> None:
    z, up, down, weights = _inputs(t, 20, 3)
    indices = 2 * _indices(t, 10, 3)
    idle = [e for e in range(20) if e not in indices]
    found = nvfp4_expert_mlp(z, _without(up, idle), _without(down, idle), weights, indices)
    assert len(idle) >= 10 and torch.equal(found, nvfp4_expert_mlp(z, up, down, weights, indices))


def test_a_nan_stays_with_its_token() -> None:
    """Tiles are padded with zeros; the row after an expert's last one is the next expert's."""
    (z, up, down, weights), indices = _inputs(25, 8, 2), _indices(25, 8, 2)
    z[3] = float("nan")
    y = nvfp4_expert_mlp(z, up, down, weights, indices)
    assert y[3].isnan().all() and y[:3].isfinite().all() and y[4:].isfinite().all()


@pytest.mark.parametrize("t", [1, 23])
def test_strided_inputs(t: int) -> None:
    """Slices of wider tensors, every second matrix of a stack, every second row, int32 indices."""
    (z, up, down, weights), indices = _inputs(t, 9, 3), _indices(t, 9, 3)

    def apart(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]

    def spread(stack: nvfp4.QuantizedTensor) -> nvfp4.QuantizedTensor:
        parts = stack.codes, stack.scales.view(torch.uint8)
        codes, scales = (p.repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2] for p in parts)
        assert not codes.is_contiguous()
        scales = scales.view(torch.float8_e4m3fn)
        return dataclasses.replace(stack, codes=codes, scales=scales)

    given = torch.cat([torch.ones(t, 5), z, torch.ones(t, 3)], 1)[:, 5:-3]
    found = nvfp4_expert_mlp(given, spread(up), spread(down), apart(weights), apart(indices.int()))
    assert torch.equal(found, nvfp4_expert_mlp(z, up, down, weights, indices))
    assert relative_rms(found, _exact(z, up, down, weights, indices)) < 1e-6


def test_gradients_of_tokens_and_router() -> None:
    (z, up, down, weights), indices = _inputs(12, 6, 2), _indices(12, 6, 2)
    grads = []
    for impl in ("cpu", "triton"):
        leaves = [v.clone().requires_grad_() for v in (z, weights)]
        y = nvfp4.expert_mlp(leaves[0], up, down, leaves[1], indices, impl=impl)
        y.square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for one, other in zip(*grads, strict=True):
        assert relative_rms(other, one) < 1e-6


@pytest.mark.parametrize("wrong", [-1, 8])
def test_debugging_catches_an_index_out_of_range(wrong: int) -> None:
    with overflow_is_an_error(), pytest.raises(InterpreterError, match="out of range"):
        nvfp4_expert_mlp(*_inputs(1, 8, 2), torch.tensor([[wrong, 2]]))


def test_wrong_inputs_say_what_was_expected() -> None:
    (z, up, down, weights), indices = _inputs(6, 4, 2), _indices(6, 4, 2)
    with pytest.raises(ValueError, match=r"down has shape \(4, 100, 60\), expected \(4, 60, 100\)"):
        nvfp4_expert_mlp(z, up, up, weights, indices)
    with pytest.raises(ValueError, match=r"up has shape \(4, 100, 60\), expected \(4, 100, 59\)"):
        nvfp4_expert_mlp(z[:, 1:], up, down, weights, indices)
    with pytest.raises(ValueError, match=r"up.scale has shape \(\), expected \(4,\)"):
        nvfp4_expert_mlp(z, dataclasses.replace(up, scale=torch.ones(())), down, weights, indices)
    with pytest.raises(ValueError, match=r"weights has shape \(6, 1\), expected \(6, 2\)"):
        nvfp4_expert_mlp(z, up, down, weights[:, 1:], indices)
    with pytest.raises(ValueError, match="input_precision='fp8' is none of 'ieee', 'tf32'"):
        nvfp4_expert_mlp(z, up, down, weights, indices, input_precision="fp8")
    with pytest.raises(ValueError, match=r"not torch.float64"):
        nvfp4_expert_mlp(z.double(), up, down, weights, indices)
    with pytest.raises(ValueError, match=r"are torch.float32, expected int32 or int64"):
        nvfp4_expert_mlp(z, up, down, weights, indices.float())
