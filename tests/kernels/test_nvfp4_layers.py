"""Training in NVFP4 with the quantizer's kernels: the layers' values and gradients, bit for bit.

`choose` is patched to take the "triton" implementation, as for tensors on a GPU. So each of the
five operands of a layer goes through a kernel. Only the quantizer differs from a run on the CPU,
and it gives the same bits, with stochastic rounding too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemotron_lite import ops
from nemotron_lite.backends import dispatch, triton
from nemotron_lite.quantization.emulated_layers import NVFP4Experts, NVFP4Linear, StochasticSeeds
from tests.quantization.test_emulated_layers import ABLATIONS, FULL, some_experts

LADDER = {"full": FULL, **ABLATIONS}


def _learn(module: torch.nn.Module, x: torch.Tensor, *options: Any) -> list[torch.Tensor]:
    """The output and the gradients of x and the weights."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x, *options)
    y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    return [y.detach(), x.grad, *[p.grad.clone() for p in module.parameters()]]


def _both(make, x: torch.Tensor, *options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = _learn(make(), x, *options)
    launched: list[str] = []  # kernels of the quantizer

    def record(name: str) -> None:
        launch = getattr(triton, name)

        def call(*args: Any, **options: Any) -> Any:
            launched.append(name)
            return launch(*args, **options)

        monkeypatch.setattr(triton, name, call)

    for name in ("nvfp4_amax", "nvfp4_fake_quantize"):
        record(name)
    choose = dispatch.choose

    def choose_triton(op: str, impl: str, x: torch.Tensor, **implementations: Any) -> Any:
        return choose(op, "triton", x, **implementations)

    monkeypatch.setattr("nemotron_lite.quantization.nvfp4.choose", choose_triton)
    on_gpu = _learn(make(), x, *options)
    assert set(launched) == {"nvfp4_amax", "nvfp4_fake_quantize"} and len(launched) >= 10
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("recipe", LADDER.values(), ids=LADDER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_linear_layer(dtype, recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(24, 40) / 6

    def make() -> NVFP4Linear:
        layer = NVFP4Linear(40, 24, recipe=recipe, seeds=StochasticSeeds(3))
        layer.weight.data.copy_(weight)
        return layer

    _both(make, torch.randn(2, 21, 40).to(dtype), monkeypatch=monkeypatch)


def test_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, z, routing = some_experts(37)
    routing = ops.Routing(routing.weights.detach(), routing.indices, routing.scores)

    def make() -> NVFP4Experts:
        return NVFP4Experts(experts, seeds=StochasticSeeds(4))

    _both(make, z.detach(), routing, monkeypatch=monkeypatch)
