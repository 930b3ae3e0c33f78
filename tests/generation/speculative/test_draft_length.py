"""Adaptive drafting where it pays and not elsewhere; costs by the ledger."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite import ledger
from nemotron_lite.config import NemotronConfig
from nemotron_lite.generation.options import SpeculationCosts
from nemotron_lite.generation.speculative.cost_model import (
    expected_acceptance_length,
    ledger_costs,
    speedup,
    weights_read,
)
from nemotron_lite.generation.speculative.draft_length import AdaptiveDraftLength

COSTS = SpeculationCosts(draft=0.15, verify=0.2, start=0.1)


def _simulate(
    rate: float,
    confidence: float,
    tokens: int = 2000,
    longest: int = 6,
    costs: SpeculationCosts = COSTS,
) -> tuple[float, float]:
    """(tokens per plain step, mean draft) of a drafter that is right with probability `rate`."""
    generator = torch.Generator().manual_seed(1)
    chooser = AdaptiveDraftLength(longest, costs)
    written, spent, drafted, passes = 0, 0.0, 0, 0
    while written < tokens:
        draft: list[float] = []
        while len(draft) < longest and chooser.wants_more(draft):
            draft.append(confidence)
        kept = 0
        while kept < len(draft) and torch.rand(1, generator=generator).item() < rate:
            kept += 1
        chooser.update(draft, kept)
        written, spent = written + kept + 1, spent + costs.of_pass(len(draft))
        drafted, passes = drafted + len(draft), passes + 1
    return written / spent, drafted / passes


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
    best = max(
        [1.0] + [speedup(expected_acceptance_length([rate] * k), k, COSTS) for k in range(1, 7)]
    )
    assert _simulate(rate, rate, tokens=4000)[0] > 0.93 * best


def test_short_texts() -> None:
    """Nothing is known at the first token, and there are few to learn from."""
    expensive = SpeculationCosts(draft=0.13, verify=0.11, start=0.62)
    best = max(speedup(expected_acceptance_length([0.9] * k), k, expensive) for k in range(1, 7))
    assert _simulate(0.9, 0.9, tokens=128, costs=expensive)[0] > 0.9 * best
    assert _simulate(0.0, 0.05, tokens=128, costs=expensive)[0] > 0.96
    assert AdaptiveDraftLength(4, expensive).wants_more([])


def test_a_text_that_becomes_predictable_is_noticed() -> None:
    chooser = AdaptiveDraftLength(4, COSTS)
    for _ in range(60):
        chooser.update([0.3] if chooser.wants_more([]) else [], 0)
    assert not chooser.drafting_pays
    drafts = 0
    for _ in range(400):
        on = chooser.wants_more([])
        chooser.update([0.9] if on else [], int(on))
        drafts += on
    assert chooser.drafting_pays
    assert drafts > 200


def test_confidence_decides_inside_a_draft() -> None:
    chooser = AdaptiveDraftLength(4, COSTS)
    for _ in range(50):
        chooser.update([0.95, 0.95], 2)
        chooser.update([0.1], 0)
    assert chooser.wants_more([]) and chooser.wants_more([0.95])
    assert chooser.wants_more([]) and not chooser.wants_more([0.1])


def test_costs_by_the_ledger() -> None:
    config = NemotronConfig.from_preset("super")
    one = weights_read(config, 1)
    state = 2 * config.mamba_inner_size * config.ssm_state_size * config.pattern.count("M")
    assert one == pytest.approx(ledger.parameters(config).active_without_embedding + state)
    # Few tokens use nearly disjoint experts; very many use all of them, each read once.
    two = weights_read(config, 2) - one
    routed = sum(
        r.active for r in ledger.parameters(config).rows if r.name == "experts" and not r.mtp
    )
    assert 0.9 * routed < two < routed
    assert weights_read(config, 10_000) < one + 25 * routed
    found = ledger_costs(config, 3)
    assert 0 < found.draft < 0.3 and 0 < found.verify < 1
    dense = ledger_costs(config.replace(n_routed_experts=22, num_experts_per_tok=22), 3)
    assert dense.verify == pytest.approx(0.0)


def test_arithmetic_of_a_pass() -> None:
    assert expected_acceptance_length([0.5, 0.5]) == 1.75
    assert COSTS.of_pass(0) == 1.0
    assert COSTS.of_pass(2) == pytest.approx(1.8)
    assert speedup(2.7, 2, COSTS) == pytest.approx(1.5)
    with pytest.raises(ValueError, match="no MTP module"):
        ledger_costs(NemotronConfig.from_preset("nano"))
    with pytest.raises(ValueError, match="draft_length=0"):
        ledger_costs(NemotronConfig.from_preset("super"), 0)
