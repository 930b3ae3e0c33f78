"""The controller drafts where it pays and stops where it does not; prices come from the ledger."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite import ledger
from nemotron_lite.config import NemotronConfig
from nemotron_lite.generation.speculative.cost_model import (
    Costs,
    costs,
    expected_length,
    pass_weights,
    speedup,
)
from nemotron_lite.generation.speculative.draft_length import Adaptive

PRICES = Costs(draft=0.15, verify=0.2, start=0.1)


def _simulate(
    rate: float, confidence: float, tokens: int = 2000, longest: int = 6, costs: Costs = PRICES
) -> tuple[float, float]:
    """(tokens per plain step, mean draft) of a drafter that is right with probability `rate`."""
    dice = torch.Generator().manual_seed(1)
    controller = Adaptive(longest, costs)
    written, spent, drafted, rounds = 0, 0.0, 0, 0
    while written < tokens:
        trail: list[float] = []
        while len(trail) < longest and controller.wants(trail):
            trail.append(confidence)
        kept = 0
        while kept < len(trail) and torch.rand(1, generator=dice).item() < rate:
            kept += 1
        controller.learn(trail, kept)
        written, spent = written + kept + 1, spent + costs.round(len(trail))
        drafted, rounds = drafted + len(trail), rounds + 1
    return written / spent, drafted / rounds


@pytest.mark.parametrize("confidence", [0.05, 0.9])
def test_poor_drafts_cost_next_to_nothing(confidence: float) -> None:
    """Whether the drafter knows that it is poor or not."""
    for rate in (0.0, 0.1, 0.2):
        gain, mean = _simulate(rate, confidence)
        assert gain > 0.97
        assert mean < 0.1


def test_good_drafts_are_long_and_pay() -> None:
    gain, mean = _simulate(0.95, 0.9)
    assert mean > 5
    assert gain > 1.6


@pytest.mark.parametrize("rate", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_nearly_as_good_as_the_best_fixed_length(rate: float) -> None:
    best = max([1.0] + [speedup(expected_length([rate] * k), k, PRICES) for k in range(1, 7)])
    assert _simulate(rate, rate, tokens=4000)[0] > 0.93 * best


def test_short_texts() -> None:
    """Nothing is known at the first token, and there are few to learn from."""
    dear = Costs(draft=0.13, verify=0.11, start=0.62)
    best = max(speedup(expected_length([0.9] * k), k, dear) for k in range(1, 7))
    assert _simulate(0.9, 0.9, tokens=128, costs=dear)[0] > 0.9 * best
    assert _simulate(0.0, 0.05, tokens=128, costs=dear)[0] > 0.96
    assert Adaptive(4, dear).wants([])


def test_a_text_that_becomes_predictable_is_noticed() -> None:
    controller = Adaptive(4, PRICES)
    for _ in range(60):
        controller.learn([0.3] if controller.wants([]) else [], 0)
    assert not controller.pays
    drafts = 0
    for _ in range(400):
        on = controller.wants([])
        controller.learn([0.9] if on else [], int(on))
        drafts += on
    assert controller.pays
    assert drafts > 200


def test_confidence_decides_inside_a_draft() -> None:
    controller = Adaptive(4, PRICES)
    for _ in range(50):
        controller.learn([0.95, 0.95], 2)
        controller.learn([0.1], 0)
    assert controller.wants([]) and controller.wants([0.95])
    assert controller.wants([]) and not controller.wants([0.1])


def test_the_ledger_s_prices() -> None:
    config = NemotronConfig.from_preset("super")
    one = pass_weights(config, 1)
    state = 2 * config.mamba_inner_size * config.ssm_state_size * config.pattern.count("M")
    assert one == pytest.approx(ledger.parameters(config).active_without_embedding + state)
    # Few tokens wake nearly disjoint experts; very many wake all of them, once.
    two = pass_weights(config, 2) - one
    routed = sum(
        r.active for r in ledger.parameters(config).rows if r.name == "experts" and not r.mtp
    )
    assert 0.9 * routed < two < routed
    assert pass_weights(config, 10_000) < one + 25 * routed
    found = costs(config, 3)
    assert 0 < found.draft < 0.3 and 0 < found.verify < 1
    dense = costs(config.replace(n_routed_experts=22, num_experts_per_tok=22), 3)
    assert dense.verify == pytest.approx(0.0)


def test_arithmetic_of_a_round() -> None:
    assert expected_length([0.5, 0.5]) == 1.75
    assert PRICES.round(0) == 1.0
    assert PRICES.round(2) == pytest.approx(1.8)
    assert speedup(2.7, 2, PRICES) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="no MTP module"):
        costs(NemotronConfig.from_preset("nano"))
    with pytest.raises(ValueError, match="draft_length=0"):
        costs(NemotronConfig.from_preset("super"), 0)
