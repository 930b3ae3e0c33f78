"""Balance: the loss against loops, the sign of the bias update, and which tokens count as load."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemotron_lite.layers import RouterStats
from nemotron_lite.model import Nemotron
from nemotron_lite.train.balance import (
    RouterBalance,
    expert_loads,
    max_violation,
    router_balance,
    sequence_balance_loss,
    update_biases,
)


def by_loops(scores: Tensor, top_k: int, mask: Tensor) -> Tensor:
    """The formula of reference sheet 4.3, computed with loops."""
    b, t, e = scores.shape
    losses = []
    for row in range(b):
        real = [i for i in range(t) if mask[row, i]]
        count, preference = [0] * e, [scores.new_zeros(())] * e
        for i in real:
            s = scores[row, i]
            for expert in s.detach().argsort(descending=True)[:top_k].tolist():
                count[expert] += 1
            for expert in range(e):
                preference[expert] = preference[expert] + s[expert] / s.sum() / len(real)
        f = [c / (top_k * len(real)) for c in count]
        losses.append(e * sum(fi * p for fi, p in zip(f, preference, strict=True)))
    return torch.stack(losses).mean()


def test_loss_and_gradient_against_loops() -> None:
    scores = torch.rand(3, 7, 6, dtype=torch.float64, requires_grad=True)
    everything = torch.ones(3, 7, dtype=torch.bool)
    some = everything.clone()
    some[0, 4:] = False
    some[2, ::2] = False
    for mask in (everything, some):
        expected = by_loops(scores, 2, mask)
        found = sequence_balance_loss(scores, 2, None if mask is everything else mask)
        torch.testing.assert_close(found, expected)
        (wanted,) = torch.autograd.grad(expected, scores)
        (gradient,) = torch.autograd.grad(found, scores)
        torch.testing.assert_close(gradient, wanted)


def test_loss_is_1_when_balanced_and_e_over_k_when_collapsed() -> None:
    e, k = 8, 2
    # token i prefers experts 2i and 2i + 1: all are used equally
    balanced = torch.full((1, 4, e), 1e-6)
    for i in range(4):
        balanced[0, i, 2 * i : 2 * i + 2] = 0.9
    assert sequence_balance_loss(balanced, k).item() == pytest.approx(1.0, rel=1e-4)
    collapsed = torch.full((1, 4, e), 1e-6)
    collapsed[..., :k] = 0.9
    assert sequence_balance_loss(collapsed, k).item() == pytest.approx(e / k, rel=1e-4)


def test_loads_of_a_router_used_twice_are_added_without_padding() -> None:
    scores = torch.zeros(2, 3, 4)
    first = RouterStats("mtp", scores, torch.tensor([[[0, 1]] * 3, [[2, 3]] * 3]))
    second = RouterStats("mtp", scores[:, :2], torch.tensor([[[0, 2]] * 2, [[0, 2]] * 2]))
    other = RouterStats("layer", scores, torch.tensor([[[3, 1]] * 3, [[3, 2]] * 3]))
    loads = expert_loads([other, first, second])
    assert loads["mtp"].tolist() == [3 + 4, 3, 3 + 4, 3]
    assert loads["layer"].tolist() == [0, 3, 3, 6]
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert expert_loads([first, second], mask)["mtp"].tolist() == [3 + 3, 3, 1 + 3, 1]
    assert max_violation(router_balance(loads)) == pytest.approx(6 / 3 - 1)


def test_bias_of_experts_with_low_load_grows_by_the_rate(model: Nemotron) -> None:
    name = "backbone.layers.1.mixer"
    bias = model.get_submodule(f"{name}.gate").e_score_correction_bias
    bias.copy_(torch.arange(8.0))
    load = torch.tensor([0, 10, 4, 4, 4, 4, 4, 2])  # mean 4
    update_biases(model, {name: load}, 1e-3)
    moved = torch.tensor([1, -1, 0, 0, 0, 0, 0, 1]) * 1e-3
    torch.testing.assert_close(bias, torch.arange(8.0) + moved, rtol=0, atol=1e-6)
    assert not model.backbone.layers[3].mixer.gate.e_score_correction_bias.any()
    with pytest.raises(AttributeError):
        update_biases(model, {"backbone.layers.0.mixer": load}, 1e-3)


def test_updates_bring_back_a_collapsed_router(model: Nemotron) -> None:
    """Every token chooses the same two experts; updates of the bias restore the balance."""
    for layer in (1, 3):
        model.backbone.layers[layer].mixer.gate.e_score_correction_bias[:2] = 0.5
    tokens = torch.randint(96, (4, 32))

    def loads() -> dict[str, Tensor]:
        with torch.no_grad():
            return expert_loads(model.forward_hidden(tokens, router_stats=True).router)

    assert max_violation(router_balance(loads())) == 8 / 2 - 1
    for _ in range(100):
        update_biases(model, loads(), 1e-2)
    assert max_violation(router_balance(loads())) < 1.0


def test_balance_of_each_router_from_its_loads() -> None:
    loads = {
        "even": torch.tensor([5, 5, 5, 5]),
        "collapsed": torch.tensor([10, 0, 10, 0]),
        "one": torch.tensor([0, 0, 0, 0, 0, 7]),
        "uneven": torch.tensor([1, 3]),
    }
    found = router_balance(loads)
    assert {name: balance.load for name, balance in found.items()} == {
        name: load.tolist() for name, load in loads.items()
    }
    assert found["even"][1:] == (0.0, 1.0, 0)
    assert found["collapsed"][1:] == (1.0, 0.5, 2)  # log 2 / log 4
    assert found["one"][1:] == (5.0, 0.0, 5)
    assert found["uneven"].max_vio == 0.5
    p = torch.tensor([0.25, 0.75])
    assert found["uneven"].entropy == pytest.approx(float(-(p * p.log2()).sum()), abs=1e-6)
    assert max_violation(found) == 5.0


def test_balance_without_tokens_experts_or_routers() -> None:
    assert router_balance({"a": torch.zeros(3, dtype=torch.int64)}) == {
        "a": RouterBalance([0, 0, 0], 0.0, 1.0, 3)
    }
    assert router_balance({"a": torch.tensor([4])}) == {"a": RouterBalance([4], 0.0, 1.0, 0)}
    assert router_balance({}) == {}
    assert max_violation({}) == 0.0
