"""Expert MLPs: every form against the loop over tokens, values and gradients."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite.backends import cpu_experts
from nemotron_lite.ops import expert_mlp, squared_relu
from tests.compare import errors


def _inputs(t: int, e: int = 6, k: int = 3, f: int = 10, latent: int = 8, busy: int | None = None):
    torch.manual_seed(t)
    indices = torch.stack([torch.randperm(busy or e)[:k] for _ in range(t)])
    return [
        torch.randn(t, latent).double(),
        torch.randn(e, f, latent).double(),
        torch.randn(e, latent, f).double(),
        torch.rand(t, k).double(),
    ], indices


@pytest.mark.parametrize("busy", [None, 3])  # 3: half of the experts get no token
@pytest.mark.parametrize("t", [1, 2, 5, 6, 40, 150])
@pytest.mark.parametrize("impl", ["torch", "cpu", "traced"])
def test_every_form_equals_naive(impl: str, t: int, busy: int | None) -> None:
    inputs, indices = _inputs(t, busy=busy)
    found = errors(
        lambda *v: expert_mlp(*v, indices, impl=impl),
        lambda *v: expert_mlp(*v, indices, impl="naive"),
        inputs,
    )
    assert max(found) < 1e-6, found


@pytest.mark.parametrize("copied", [0, 3_000_000])  # 0: pairs are sorted, however few they are
@pytest.mark.parametrize("t", [1, 5, 6, 40])
def test_without_gradients(t: int, copied: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_experts, "COPIED", copied)
    (z, up, down, weights), indices = _inputs(t)
    exact = expert_mlp(z, up, down, weights, indices, impl="naive")
    before = z.clone()
    with torch.no_grad():
        for impl in ("auto", "traced"):
            found = expert_mlp(z, up, down, weights, indices, impl=impl)
            torch.testing.assert_close(found, exact)
    assert torch.equal(z, before)


def test_naive_equals_the_formula() -> None:
    (z, up, down, weights), indices = _inputs(2)
    found = expert_mlp(z, up, down, weights, indices, impl="naive")
    for token in range(2):
        total = torch.zeros(8, dtype=torch.float64)
        for weight, e in zip(weights[token], indices[token].tolist(), strict=True):
            hidden = (up[e] * z[token]).sum(1)
            total += weight * (down[e] * hidden.clamp(min=0) ** 2).sum(1)
        torch.testing.assert_close(found[token], total)


@pytest.mark.parametrize("impl", ["torch", "cpu", "traced"])
def test_gradients_against_numbers(impl: str) -> None:
    inputs, indices = _inputs(4, f=3, latent=2)
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *v: expert_mlp(*v, indices, impl=impl), leaves)


def test_squared_relu() -> None:
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert torch.equal(squared_relu(x), torch.tensor([0.0, 0.0, 9.0]))


@pytest.mark.parametrize("impl", ["torch", "cpu", "traced"])
def test_bfloat16_tokens_with_float32_weights(impl: str) -> None:
    """Mixed precision: activations in bfloat16, weights kept in float32."""
    (z, up, down, weights), indices = _inputs(12)
    low = [
        z.bfloat16().requires_grad_(),
        up.float().requires_grad_(),
        down.float().requires_grad_(),
    ]
    y = expert_mlp(*low, weights.float(), indices, impl=impl)
    y.sum().backward()
    exact = expert_mlp(z, up, down, weights, indices, impl="naive")
    assert y.dtype == torch.bfloat16 and low[1].grad.dtype == torch.float32
    assert (y.double() - exact).norm() / exact.norm() < 0.02
