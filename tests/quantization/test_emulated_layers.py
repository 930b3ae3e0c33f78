"""Quantized layers against the products of their quantized operands, written out in float64.

The slow definition quantizes each operand separately, with `impl="naive"` and with transposed
copies where a product sums along columns, and multiplies in float64. The layer must give its values
and both gradients up to the order of additions in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nemotron_lite import ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers import BiasedLinear, Experts
from nemotron_lite.ops.philox import random_halves
from nemotron_lite.quantization import emulated_layers, nvfp4
from nemotron_lite.quantization.emulated_layers import (
    CallSeeds,
    MXFP8Linear,
    NVFP4Experts,
    NVFP4Linear,
    StochasticSeeds,
)
from nemotron_lite.quantization.fp8 import quantize_mxfp8
from nemotron_lite.quantization.recipe import RECIPES, GemmRecipe, Operand
from tests.compare import relative_rms

FULL = GemmRecipe()
ABLATIONS = {
    name: RECIPES["nvfp4"].without(name).gemm for name in ("stochastic", "hadamard", "square")
}
CLOSE = 2e-6  # relative rms: float32 sums of at most a few hundred terms; measured 1e-7 to 3e-7


def operand(x: Tensor, how: Operand, bits: Tensor | None = None) -> Tensor:
    """x in float64 after quantization to NVFP4, blocks along the last dimension."""
    quantized = nvfp4.quantize(
        x,
        block=how.block,
        hadamard=how.hadamard,
        stochastic=how.stochastic,
        bits=bits if how.stochastic else None,
        impl="naive",
    )
    return quantized.dequantize(torch.float32).double()


def slow_linear(
    x: Tensor, w: Tensor, grad: Tensor, recipe: GemmRecipe, call: CallSeeds
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dW."""
    padded = -(-len(x) // 16) * 16
    y = operand(x.float(), recipe.activation) @ operand(w, recipe.weight).T
    bits = random_halves(call.dgrad, len(grad), -(-grad.shape[1] // 16) * 16)
    dx = operand(grad.float(), recipe.gradient, bits) @ operand(w.T.contiguous(), recipe.weight).T
    bits = random_halves(call.wgrad, grad.shape[1], padded)
    grad_by_token = nn.functional.pad(grad, (0, 0, 0, padded - len(grad))).T.contiguous()
    x_by_token = nn.functional.pad(x, (0, 0, 0, padded - len(x))).T.contiguous()
    # Transformed in the dtype of the activations, then quantized from float32.
    if recipe.gradient_along_tokens.hadamard:
        grad_by_token, x_by_token = (
            nvfp4.hadamard_transform(grad_by_token),
            nvfp4.hadamard_transform(x_by_token),
        )
    dw = (
        operand(grad_by_token.float(), replace(recipe.gradient_along_tokens, hadamard=False), bits)
        @ operand(x_by_token.float(), replace(recipe.activation_along_tokens, hadamard=False)).T
    )
    return y, dx, dw


def gradients(run: Callable[[], Tensor], grad: Tensor, *leaves: Tensor) -> list[Tensor]:
    y = run()
    y.backward(grad)
    return [y.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("recipe", [FULL, *ABLATIONS.values()], ids=["full", *ABLATIONS])
@pytest.mark.parametrize(("t", "d", "f"), [(1, 16, 16), (37, 40, 24), (64, 32, 72)])
def test_linear_equals_the_definition(recipe: GemmRecipe, t: int, d: int, f: int) -> None:
    torch.manual_seed(t)
    seeds = StochasticSeeds(seed=3)
    layer = NVFP4Linear(d, f, recipe=recipe, seeds=seeds, number=5)
    x = (torch.randn(t, d) * torch.randn(t, 1).exp()).requires_grad_()
    grad = torch.randn(t, f) * 1e-3
    found = gradients(lambda: layer(x), grad, x, layer.weight)
    expected = slow_linear(
        x.detach(), layer.weight.detach(), grad, recipe, StochasticSeeds(seed=3).next_call(5, "")
    )
    assert [relative_rms(a, b) < CLOSE for a, b in zip(found, expected, strict=True)] == [True] * 3
    plain = x.detach().double() @ layer.weight.detach().double().T
    assert 0.02 < relative_rms(found[0], plain) < 0.3  # four bits, not thirty-two


def test_linear_reads_bfloat16_under_autocast() -> None:
    layer = NVFP4Linear(48, 32, seeds=StochasticSeeds(1))
    x, grad = torch.randn(3, 20, 48, requires_grad=True), torch.randn(3, 20, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.backward(grad)  # inside: the products of the backward pass must not be cast either
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    rows, call = x.detach().bfloat16().flatten(0, 1), StochasticSeeds(1).next_call(0, "")
    expected = slow_linear(rows, layer.weight.detach(), grad.flatten(0, 1), FULL, call)
    assert relative_rms(layer.weight.grad, expected[2]) < CLOSE
    for found, exact in ((y, expected[0]), (x.grad, expected[1])):
        # Rounded to BF16 once: half a unit in the last place is up to 2^-8 of the value.
        torch.testing.assert_close(
            found.double().flatten(0, 1), exact, rtol=2**-8 + 1e-6, atol=1e-5
        )


@pytest.mark.parametrize("kind", [NVFP4Linear, MXFP8Linear])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_bias_is_added_to_the_quantized_product(kind: type, autocast: bool) -> None:
    original, x = BiasedLinear(32, 48), torch.randn(5, 32)
    torch.nn.init.normal_(original.bias)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        layer = kind.from_linear(original)
        assert layer.weight is original.weight and layer.bias is original.bias
        y = layer(x)
        layer.bias = None
        product = layer(x)
        assert y.dtype == product.dtype == (torch.bfloat16 if autocast else torch.float32)
        assert torch.equal(y, product + original.bias.to(y.dtype))
        grad = torch.randn(5, 48).to(y.dtype)
        y.backward(grad)
    torch.testing.assert_close(original.bias.grad, grad.float().sum(0), rtol=2**-7, atol=1e-2)


def test_mxfp8_linear_equals_the_definition() -> None:
    layer = MXFP8Linear(40, 24)
    x, grad = torch.randn(37, 40, requires_grad=True), torch.randn(37, 24)
    found = gradients(lambda: layer(x), grad, x, layer.weight)

    def quantized(v: Tensor) -> Tensor:
        return quantize_mxfp8(v.detach().contiguous()).dequantize().double()

    w = layer.weight
    y, dx = quantized(x) @ quantized(w).T, quantized(grad) @ quantized(w.T).T
    expected = y, dx, quantized(grad.T) @ quantized(x.T).T
    assert max(relative_rms(a, b) for a, b in zip(found, expected, strict=True)) < CLOSE
    plain = (x @ w.T).detach().double()
    assert 0.005 < relative_rms(found[0], plain) < 0.05


CONFIG = NemotronConfig(
    pattern="E", vocab_size=16, hidden_size=16, n_routed_experts=6, num_experts_per_tok=3,
    moe_intermediate_size=40, moe_latent_size=24,
)  # fmt: skip


def some_experts(t: int, busy: int = 5) -> tuple[Experts, Tensor, ops.Routing]:
    """Experts, tokens with outliers, and a routing in which some expert has no token."""
    torch.manual_seed(t)
    experts = Experts(CONFIG)
    for weight in experts.parameters():
        nn.init.normal_(weight, std=0.3)
    indices = torch.stack([torch.randperm(busy)[:3] for _ in range(t)])
    weights = torch.rand(t, 3).requires_grad_()
    z = (torch.randn(t, 24) * torch.randn(t, 1).exp()).requires_grad_()
    return experts, z, ops.Routing(weights, indices, torch.rand(t, 6))


def slow_product(
    x: list[Tensor], w: Tensor, grads: list[Tensor], recipe: GemmRecipe, call: CallSeeds
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """One product per expert: rows, weights and gradients by expert; y and dx by expert, dW."""
    padded = [-(-len(rows) // 16) * 16 for rows in x]
    starts = [sum(padded[:e]) for e in range(len(padded))]
    f = w.shape[1]
    dgrad = random_halves(call.dgrad, sum(padded), -(-f // 16) * 16)
    wgrad = random_halves(call.wgrad, sum(padded) // 16 * f, 16).view(-1, f, 16)
    y, dx, dw = [], [], torch.zeros(w.shape, dtype=torch.float64)
    for e, (rows, grad) in enumerate(zip(x, grads, strict=True)):
        if not len(rows):
            y.append(rows.new_zeros(0, f).double())
            dx.append(rows.double())
            continue
        first, chunks = starts[e], slice(starts[e] // 16, (starts[e] + padded[e]) // 16)
        y.append(operand(rows, recipe.activation) @ operand(w[e], recipe.weight).T)
        bits = dgrad[first : first + len(rows)]
        weight = operand(w[e].T.contiguous(), recipe.weight).T
        dx.append(operand(grad, recipe.gradient, bits) @ weight)
        padding = (0, 0, 0, padded[e] - len(rows))
        bits = wgrad[chunks].transpose(0, 1).flatten(1)
        left = nn.functional.pad(grad, padding).T.contiguous()
        right = nn.functional.pad(rows, padding).T.contiguous()
        dw[e] = (
            operand(left, recipe.gradient_along_tokens, bits)
            @ operand(right, recipe.activation_along_tokens).T
        )
    return y, dx, dw


@pytest.mark.parametrize("recipe", [FULL, *ABLATIONS.values()], ids=["full", *ABLATIONS])
@pytest.mark.parametrize("t", [1, 9, 50])
def test_each_product_of_the_experts_equals_the_definition(recipe: GemmRecipe, t: int) -> None:
    experts, z, routing = some_experts(t)
    by_expert = emulated_layers.TokensByExpert(routing.indices, 6)
    x = by_expert.scatter(z.detach(), 3).requires_grad_()
    real = torch.zeros(by_expert.num_rows, dtype=torch.bool)
    real[by_expert.row_of_pair] = True
    grad = torch.randn(by_expert.num_rows, 40) * real.unsqueeze(1)
    weight, call = experts.up_proj, CallSeeds("", 11, 12)
    found = gradients(
        lambda: emulated_layers._GroupedProduct.apply(x, weight, by_expert, recipe, call),
        grad,
        x,
        weight,
    )
    owner = by_expert.expert_of_block.repeat_interleave(16)
    mine = [torch.where(real & (owner == e))[0] for e in range(6)]
    assert len(mine[5]) == 0
    assert sum(map(len, mine)) == 3 * t
    y, dx, dw = slow_product(
        [x.detach()[rows] for rows in mine],
        weight.detach(),
        [grad[rows] for rows in mine],
        recipe,
        call,
    )
    order = torch.cat(mine)
    assert relative_rms(found[0][order], torch.cat(y)) < CLOSE
    assert relative_rms(found[1][order], torch.cat(dx)) < CLOSE
    assert relative_rms(found[2], dw) < CLOSE
    assert not found[0][~real].any()  # padding rows stay zero
    assert not found[2][5].any()  # an expert without tokens has no gradient


def test_experts_have_a_scale_each() -> None:
    """An outlier among one expert's tokens changes nothing for the others."""
    experts, z, routing = some_experts(20)
    chosen = torch.arange(20) % 2  # even tokens go to experts 0 to 2, odd ones to 3 to 5
    indices = torch.tensor([[0, 1, 2], [3, 4, 5]])[chosen]
    routing = ops.Routing(routing.weights.detach(), indices, routing.scores)
    layer = NVFP4Experts(experts)
    loud = z.detach().clone()
    loud[1] *= 1e4
    with torch.no_grad():
        before, after = layer(z.detach(), routing), layer(loud, routing)
    assert torch.equal(before[::2], after[::2])
    assert not torch.equal(before[3::2], after[3::2])


@pytest.fixture
def unquantized(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers, with quantizing switched off."""

    def unchanged(x: Tensor, **_: object) -> Tensor:
        return x

    monkeypatch.setattr(emulated_layers, "fake_quantize", unchanged)
    monkeypatch.setattr(emulated_layers, "fake_quantize_mxfp8", unchanged)


@pytest.mark.usefixtures("unquantized")
@pytest.mark.parametrize("kind", [NVFP4Linear, MXFP8Linear])
def test_without_rounding_it_is_a_linear_layer(kind: type) -> None:
    """Among other things: the Hadamard transforms of both operands of dW cancel."""
    plain = nn.Linear(24, 40, bias=False)
    x, grad = torch.randn(2, 21, 24, requires_grad=True), torch.randn(2, 21, 40)
    expected = gradients(lambda: plain(x), grad, x, plain.weight)
    x.grad, plain.weight.grad = None, None
    layer = kind.from_linear(plain)
    assert layer.weight is plain.weight
    found = gradients(lambda: layer(x), grad, x, layer.weight)
    assert max(relative_rms(a, b) for a, b in zip(found, expected, strict=True)) < CLOSE


@pytest.mark.usefixtures("unquantized")
@pytest.mark.parametrize("t", [1, 30])
def test_without_rounding_they_are_the_experts(t: int) -> None:
    experts, z, routing = some_experts(t)
    leaves = (z, routing.weights, experts.up_proj, experts.down_proj)
    grad = torch.randn(t, 24)
    expected = gradients(lambda: experts(z, routing), grad, *leaves)
    for leaf in leaves:
        leaf.grad = None
    layer = NVFP4Experts(experts)
    assert layer.up_proj is experts.up_proj
    found = gradients(lambda: layer(z, routing), grad, *leaves)
    assert max(relative_rms(a, b) for a, b in zip(found, expected, strict=True)) < CLOSE


def test_gradients_are_right_on_average_only_with_stochastic_rounding() -> None:
    """Small gradients beside a large one: nearest always loses them, stochastic rounding does not.

    The block's largest value is 6 times a power of two, so its scale is exact and clips nothing.
    """
    w = torch.eye(16)
    grad = torch.full((4, 16), 0.1)
    grad[:, 0] = 6.0
    x = torch.zeros(4, 16, requires_grad=True)
    sums = {}
    for name, recipe in (("stochastic", FULL), ("nearest", ABLATIONS["stochastic"])):
        layer = NVFP4Linear(16, 16, recipe=recipe)
        layer.weight.data.copy_(w)
        total = torch.zeros(4, 16)
        for i in range(400):
            layer.seeds.start_micro_batch(i)
            x.grad = None
            layer(x).backward(grad)
            total += x.grad
        sums[name] = total[:, 1:].mean() / 400
    assert sums["nearest"] == 0
    # 24,000 draws of 0.5 with probability 0.2: standard error 0.0013
    assert abs(sums["stochastic"] - 0.1) < 4 * 0.0013


def test_seeds_depend_on_their_position_in_the_run() -> None:
    seeds = StochasticSeeds(7)
    first = [seeds.next_call(0, "a"), seeds.next_call(0, "a"), seeds.next_call(1, "b")]
    seeds.start_micro_batch(1)
    second = [seeds.next_call(0, "a"), seeds.next_call(1, "b")]
    other_run = StochasticSeeds(8).next_call(0, "a")
    numbers = [seed for call in (*first, *second, other_run) for seed in call[1:]]
    assert len(set(numbers)) == 12
    assert all(0 <= seed < 2**63 for seed in numbers)
    seeds.start_micro_batch(0)
    with torch.no_grad():  # an evaluation in between takes no seeds
        seeds.next_call(0, "a")
    assert [seeds.next_call(0, "a"), seeds.next_call(0, "a"), seeds.next_call(1, "b")] == first


def test_layers_without_gradients() -> None:
    layer, x = NVFP4Linear(16, 32), torch.randn(5, 16, requires_grad=True)
    with torch.no_grad():
        alone = layer(x)
    assert torch.equal(layer(x).detach(), alone)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert x.grad is not None
    experts, z, routing = some_experts(4)
    layer = NVFP4Experts(experts).requires_grad_(False)
    layer(z, routing).sum().backward()
    assert layer.up_proj.grad is None
    assert z.grad is not None


def test_nan_and_infinity_are_refused_by_name() -> None:
    layer = NVFP4Linear(16, 16, name="backbone.layers.3.mixer.in_proj")
    x = torch.ones(2, 16, requires_grad=True)
    with pytest.raises(ValueError, match=r"the input of backbone\.layers\.3\.mixer\.in_proj"):
        layer(x / 0)
    with pytest.raises(ValueError, match=r"the gradient of backbone\.layers\.3\.mixer\.in_proj's"):
        layer(x).backward(torch.full((2, 16), float("nan")))


def test_a_bias_is_kept_and_added_after_the_product() -> None:
    linear = nn.Linear(16, 16)
    layer = NVFP4Linear.from_linear(linear)
    x = torch.randn(2, 16)
    assert layer.bias is linear.bias
    plain = NVFP4Linear.from_linear(nn.Linear(16, 16, bias=False))
    plain.weight = linear.weight
    torch.testing.assert_close(layer(x), plain(x) + linear.bias)
