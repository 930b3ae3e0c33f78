"""BF16 prompts on a CPU: experts are padded and multiplied in batches; values and shapes.

Padding must change nothing: the products equal those of one expert after another, for any loads,
also with experts that no token chose.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemotron_lite.backends import cpu_experts
from nemotron_lite.ops import expert_mlp


def inputs(t: int, e: int = 12, k: int = 3, busy: int | None = None, f: int = 24, latent: int = 16):
    torch.manual_seed(t)
    odds = torch.rand(e) ** 3  # experts get unequal numbers of tokens
    odds[busy:] = 0
    indices = torch.stack([torch.multinomial(odds + 1e-9, k) for _ in range(t)])
    z = torch.randn(t, latent)
    up, down = torch.randn(e, f, latent) / 4, torch.randn(e, latent, f) / 5
    return [x.bfloat16() for x in (z, up, down, torch.rand(t, k))], indices


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of every batched product."""
    shapes: list[tuple[int, ...]] = []
    bmm = torch.bmm

    def spy(x: Tensor, y: Tensor, **options: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return bmm(x, y, **options)

    monkeypatch.setattr(torch, "bmm", spy)
    return shapes


@pytest.mark.parametrize("busy", [None, 4])  # 4: most experts get no token
@pytest.mark.parametrize("together", [1, 3, 5, 12])
@pytest.mark.parametrize("t", [64, 131])
def test_batches_equal_float64_up_to_rounding(
    monkeypatch: pytest.MonkeyPatch,
    batches: list[tuple[int, ...]],
    t: int,
    together: int,
    busy: int | None,
) -> None:
    (z, up, down, weights), indices = inputs(t, busy=busy)
    monkeypatch.setattr(cpu_experts, "TOGETHER", {torch.bfloat16: together})
    exact = expert_mlp(*(x.double() for x in (z, up, down, weights)), indices, impl="naive")
    with torch.inference_mode():
        found = expert_mlp(z, up, down, weights, indices)
        one_by_one = cpu_experts._sorted_forward(z, up, down, weights, indices)
    assert max(experts for experts, _, _ in batches) == min(
        together, busy or 12, len(indices.unique())
    )
    error = (found.double() - exact).norm() / exact.norm()
    assert error <= 1.05 * (one_by_one.double() - exact).norm() / exact.norm()
    assert error < 8e-3


def test_numbers_of_rows_are_rounded_up_so_that_few_shapes_are_compiled(
    batches: list[tuple[int, ...]],
) -> None:
    for t in (64, 77, 90, 103):
        (z, up, down, weights), indices = inputs(t)
        with torch.inference_mode():
            expert_mlp(z, up, down, weights, indices)
    assert batches
    assert all(rows % cpu_experts.PADDED_ROWS == 0 for _, rows, _ in batches)


@pytest.mark.parametrize("case", ["few pairs", "float32"], ids=str)
def test_other_calls_do_not_use_batches(batches: list[tuple[int, ...]], case: str) -> None:
    (z, up, down, weights), indices = inputs(20 if case == "few pairs" else 80)
    if case == "float32":
        z, up, down, weights = (x.float() for x in (z, up, down, weights))
    with torch.no_grad():
        expert_mlp(z, up, down, weights, indices)
    assert batches == ([(60, 1, 16), (60, 1, 24)] if case == "few pairs" else [])


@pytest.mark.parametrize("busy", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("together", [1, 3, 12])
def test_gradients_in_batches_equal_naive(
    monkeypatch: pytest.MonkeyPatch,
    batches: list[tuple[int, ...]],
    together: int,
    dtype: torch.dtype,
    busy: int | None,
) -> None:
    given, indices = inputs(70, busy=busy)
    monkeypatch.setattr(cpu_experts, "TOGETHER", {dtype: together})
    exact_inputs = [x.double().requires_grad_() for x in given]
    exact = expert_mlp(*exact_inputs, indices, impl="naive")
    grad = torch.randn(exact.shape).bfloat16()
    wanted = torch.autograd.grad(exact, exact_inputs, grad.double())
    tuned = [x.detach().to(dtype).requires_grad_() for x in given]
    found = torch.autograd.grad(expert_mlp(*tuned, indices), tuned, grad.to(dtype))
    assert max(experts for experts, _, _ in batches) == min(together, len(indices.unique()))
    for a, b in zip(found, wanted, strict=True):
        error = (a.double() - b).norm() / b.norm()
        assert error < (1e-6 if dtype == torch.float32 else 2e-2)
        if busy is not None and a.ndim == 3:  # matrices of idle experts
            assert torch.equal(a.flatten(1).any(1), b.flatten(1).any(1))
