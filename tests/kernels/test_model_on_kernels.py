"""A model on a GPU uses the kernels by default, in every layer.

There is no GPU here. A patch makes `dispatch` take every tensor for a GPU tensor, and the kernels
run in the interpreter. The results are compared with those of the same model without the patch,
which uses the CPU implementations.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from nemotron_lite.backends import dispatch, triton
from nemotron_lite.config import NemotronConfig
from nemotron_lite.model import Nemotron

CONFIG = NemotronConfig(
    pattern="ME*", vocab_size=61, hidden_size=32,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=16,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, moe_latent_size=16,
    moe_shared_expert_intermediate_size=24, routed_scaling_factor=2.5, initializer_range=0.3,
)  # fmt: skip
READING = {"rms_norm", "causal_conv1d", "ssd", "gated_rms_norm", "route", "expert_mlp"}
STEPPING = READING - {"causal_conv1d", "ssd"} | {"causal_conv1d_step", "ssd_step"}


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Makes `dispatch` take all tensors for GPU tensors; the names of the kernels called."""
    found: set[str] = set()

    def watched(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **options: Any) -> Any:
            found.add(name)
            return kernel(*given, **options)

        return call

    for name, kernel in vars(triton).copy().items():
        if inspect.isfunction(kernel):
            monkeypatch.setattr(triton, name, watched(name, kernel))
    monkeypatch.setattr(dispatch, "_on_gpu", lambda _: True)
    monkeypatch.setattr(dispatch, "_capable", lambda _: True)
    return found


@pytest.fixture
def model() -> Nemotron:
    return Nemotron(CONFIG, dtype=torch.float32, seed=1)


def _tokens(b: int, t: int) -> torch.Tensor:
    return torch.randint(CONFIG.vocab_size, (b, t), generator=torch.Generator().manual_seed(t))


def _learned(model: Nemotron, **options: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    logits = model(_tokens(2, 19), **options).logits
    logits.float().square().mean().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **grads}


@pytest.mark.parametrize("documents", [False, True])
def test_logits_and_every_gradient(
    model: Nemotron, used: set[str], documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With concatenated documents too, in which a document number is used twice."""
    seq_idx = torch.tensor([[0] * 6 + [1] * 2 + [0] * 11, [4] * 19])
    options = {"seq_idx": seq_idx} if documents else {}
    on_gpu = _learned(model, **options)
    assert used == READING
    monkeypatch.setattr(dispatch, "_on_gpu", lambda _: False)
    used.clear()
    on_cpu = _learned(model, **options)
    assert not used
    assert set(on_gpu) == set(on_cpu)
    for name, value in on_cpu.items():
        scale = value.abs().max()
        torch.testing.assert_close(
            on_gpu[name] / scale, value / scale, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m
        )


def test_a_prompt_of_ragged_rows_and_the_tokens_after_it(
    model: Nemotron, used: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, prompt, more = torch.tensor([7, 3]), _tokens(2, 7), _tokens(2, 3)

    def decode() -> list[torch.Tensor]:
        state = model.empty_cache(2)
        with torch.no_grad():
            first = model(prompt, state, lengths=lengths).logits
            rest = [model(more[:, i : i + 1], state).logits for i in range(3)]
        return [first[0], first[1, :3], *rest]

    on_gpu = decode()
    assert used == READING | STEPPING
    monkeypatch.setattr(dispatch, "_on_gpu", lambda _: False)
    for found, expected in zip(on_gpu, decode(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
