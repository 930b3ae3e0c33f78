"""Which tensors decay, what one step of AdamW does, and how gradients are clipped."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nemotron_lite.model import Nemotron
from nemotron_lite.train.optimizer import clip_gradients, make_optimizer, parameter_groups

RECIPE = dict(lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def test_matrices_decay_and_scales_do_not(model: Nemotron) -> None:
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, exempt = (
        {names[id(p)] for p in group["params"]} for group in parameter_groups(model, 0.1)
    )
    for name in exempt:
        assert name.endswith(("A_log", ".D", "dt_bias", "conv1d.bias")) or "norm" in name, name
    for ending in ("A_log", ".D", "dt_bias", "conv1d.bias", "norm_f.weight", "enorm.weight"):
        assert any(name.endswith(ending) for name in exempt), ending
    for ending in ("embeddings.weight", "experts.up_proj", "gate.weight", "in_proj.weight"):
        assert any(name.endswith(ending) for name in decayed), ending
    assert decayed | exempt == set(names.values())
    assert not decayed & exempt
    assert [g["weight_decay"] for g in parameter_groups(model, 0.1)] == [0.1, 0.0]


def test_frozen_parameters_are_left_out(model: Nemotron) -> None:
    model.backbone.requires_grad_(False)
    groups = parameter_groups(model, 0.1)
    kept = sum(p.numel() for group in groups for p in group["params"])
    assert kept == sum(p.numel() for p in [*model.mtp.parameters(), *model.lm_head.parameters()])


def test_three_steps_by_hand() -> None:
    layer = nn.Linear(3, 2).double()
    optimizer = make_optimizer(layer, **RECIPE)
    weights = {n: p.detach().clone() for n, p in layer.named_parameters()}
    m = {n: torch.zeros_like(w) for n, w in weights.items()}
    v = {n: torch.zeros_like(w) for n, w in weights.items()}
    for step in (1, 2, 3):
        for name, p in layer.named_parameters():
            p.grad = g = torch.randn_like(p)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            update = (m[name] / (1 - 0.9**step)) / ((v[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            decay = 0.1 if name == "weight" else 0.0
            weights[name] = weights[name] - 0.01 * (update + decay * weights[name])
        optimizer.step()
    for name, p in layer.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name])


def test_clipping_keeps_the_direction() -> None:
    a, b = torch.zeros(3, requires_grad=True), torch.zeros(1, requires_grad=True)
    a.grad, b.grad = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients([a, b], 10.0) == pytest.approx(5.0)
    assert a.grad.tolist() == [3.0, 0.0, 0.0]
    assert clip_gradients([a, b], 1.0) == pytest.approx(5.0)
    assert a.grad[0].item() == pytest.approx(0.6, rel=1e-5)
    assert b.grad.item() == pytest.approx(0.8, rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run(bad: float) -> None:
    a = torch.zeros(2, requires_grad=True)
    a.grad = torch.tensor([1.0, bad])
    with pytest.raises(
        FloatingPointError, match=r"gradient norm is (nan|inf), .*: lower the learning"
    ):
        clip_gradients([a], 1.0)
