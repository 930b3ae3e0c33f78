"""Recomputing blocks changes no bit of a run, and keeps much less in memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.layers import Block
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig, train
from nemotron_lite.train.balance import expert_loads


@pytest.mark.parametrize("precision", ["fp32", "bf16", "nvfp4"])
def test_losses_weights_and_biases_are_equal_bit_for_bit(
    model: Nemotron, text: ConcatenatedDocuments, precision: str
) -> None:
    """NVFP4 rounds gradients stochastically: the recomputed pass must not shift its seeds."""
    other = copy.deepcopy(model)
    recipe: dict[str, Any] = dict(
        steps=2, batch_size=2, seq_len=24, lr=1e-2, gradient_accumulation_steps=2,
        precision=precision,
    )  # fmt: skip
    a = train(model, text, TrainConfig(**recipe), progress=False).history
    config = TrainConfig(gradient_checkpointing=True, **recipe)
    b = train(other, text, config, progress=False).history
    times = ("seconds", "tokens_per_second")
    for x, y in zip(a, b, strict=True):
        assert {k: v for k, v in x.items() if k not in times} == {
            k: v for k, v in y.items() if k not in times
        }
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    assert not any(m.recompute for m in other.modules() if isinstance(m, Block))


def kept_bytes(model: Nemotron, tokens: torch.Tensor, recompute: bool) -> int:
    """Bytes of activations that autograd keeps between the forward and the backward pass."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = recompute
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.forward_hidden(tokens, mtp_depths=2, router_stats=True)
    assert out.hidden.requires_grad
    return sum(kept.values())


def test_only_the_inputs_of_blocks_are_kept(model: Nemotron) -> None:
    tokens = torch.randint(0, 96, (2, 64))
    usual = kept_bytes(model, tokens, recompute=False)
    less = kept_bytes(model, tokens, recompute=True)
    assert less < usual / 3


def test_routers_are_counted_once(model: Nemotron) -> None:
    tokens = torch.randint(0, 96, (2, 16))
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = True
    out = model.forward_hidden(tokens, mtp_depths=2, router_stats=True)
    before = expert_loads(out.router)
    (out.hidden.sum() + sum(s.scores.sum() for s in out.router)).backward()
    after = expert_loads(out.router)
    assert len(out.router) == 4
    for name, load in before.items():
        assert torch.equal(load, after[name])
        assert int(load.sum()) % 2 == 0


def test_it_has_no_effect_without_gradients(model: Nemotron) -> None:
    tokens = torch.randint(0, 96, (1, 16))
    with torch.no_grad():
        expected = model(tokens).logits
        for module in model.modules():
            if isinstance(module, Block):
                module.recompute = True
        assert torch.equal(model(tokens).logits, expected)
