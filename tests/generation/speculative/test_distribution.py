"""Sampled speculation: the joint distribution of three tokens, against exact enumeration.

A model with five tokens has 125 continuations of length three, and their probabilities can be
written down: p(a) p(b | a) p(c | a b), each after temperature and filters. Thousands of rows with
the same prompt write three tokens by speculation, and a chi-square test compares the counts. So the
whole path is under test: drafts, verification, residual, bonus, rollback, random streams.

Two rules that look right and are not stand in the same test and have to fail it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nemotron_lite import SpeculationOptions, generate, ops
from nemotron_lite.generation.sampling import distribution
from nemotron_lite.generation.speculative import Statistics
from nemotron_lite.model import Nemotron
from tests.chi_square import chi_square, critical_value
from tests.generation.speculative.conftest import SMALL

V, ROWS = 5, 6000
PROMPT = [1, 3, 0, 2]
SETTINGS = [(0.5, None, None), (1.0, None, None), (1.0, None, 0.8), (2.0, 3, None), (1.5, 4, 0.9)]


@pytest.fixture(scope="module")
def five() -> Nemotron:
    return Nemotron(SMALL.replace(vocab_size=V, initializer_range=0.3), seed=8)


def _enumerate(model: Nemotron, temperature: float, top_k: int | None, top_p: float | None):
    """Probabilities of the V^3 continuations."""
    texts = torch.tensor([PROMPT + list(w) for w in itertools.product(range(V), repeat=3)])
    with torch.no_grad():
        logits = model(texts).logits[:, len(PROMPT) - 1 : -1]
    found = distribution(logits.flatten(0, 1), temperature, top_k, top_p).view(len(texts), 3, V)
    each = found.double().gather(2, texts[:, len(PROMPT) :, None])[..., 0]
    return each.prod(1)


def _counts(model: Nemotron, setting, **options) -> tuple[Tensor, Statistics]:
    temperature, top_k, top_p = setting
    rows, statistics = generate(
        model,
        [PROMPT] * ROWS,
        3,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=11,
        stop=(),
        speculation=SpeculationOptions(draft_length=2, **options),
        return_statistics=True,
    )
    a, b, c = torch.tensor(rows).T
    return torch.bincount(a * V * V + b * V + c, minlength=V**3), statistics


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_the_joint_distribution_of_three_tokens(five: Nemotron, setting) -> None:
    counts, statistics = _counts(five, setting, adaptive=False)
    value, cells = chi_square(counts, _enumerate(five, *setting))
    assert cells > 3
    assert value < critical_value(cells - 1)
    assert 0.05 < statistics.acceptance_rates[0] < 0.99, "both answers must occur"


def test_adaptive_drafts_keep_the_distribution(five: Nemotron) -> None:
    counts, statistics = _counts(five, SETTINGS[1], adaptive=True)
    value, cells = chi_square(counts, _enumerate(five, *SETTINGS[1]))
    assert value < critical_value(cells - 1)
    assert statistics.verifications > 0 and statistics.mean_draft < 2


def test_a_shortlist_of_drafts_keeps_the_distribution(five: Nemotron) -> None:
    counts, statistics = _counts(five, SETTINGS[1], adaptive=False, shortlist=(0, 2, 3))
    value, cells = chi_square(counts, _enumerate(five, *SETTINGS[1]))
    assert value < critical_value(cells - 1)
    assert 0.05 < statistics.acceptance_rates[0] < 0.99


def _keeps_p(p, q, drafts, uniforms, lengths=None):
    """After a rejection, all of p instead of what q left of it."""
    verdict = ops.verify(p, q, drafts, uniforms, lengths)
    rows = torch.arange(len(p))
    return ops.Verdict(verdict.accepted, ops.draw(p[rows, verdict.accepted], uniforms[:, -1]))


def _forgets_the_filters(p, q, drafts, uniforms, lengths=None):
    """Judges as if drafts had been drawn from a flat distribution."""
    return ops.verify(p, torch.full_like(q, 1 / V), drafts, uniforms, lengths)


@pytest.mark.parametrize("rule", [_keeps_p, _forgets_the_filters])
@pytest.mark.parametrize("setting", [SETTINGS[1], SETTINGS[4]], ids=str)
def test_a_biased_rule_fails_the_same_test(
    five: Nemotron, monkeypatch: pytest.MonkeyPatch, rule: Callable, setting
) -> None:
    from nemotron_lite.generation.speculative import loop

    class Biased:
        draw = staticmethod(ops.draw)
        verify = staticmethod(rule)

    monkeypatch.setattr(loop, "ops", Biased)
    counts, _ = _counts(five, setting, adaptive=False)
    value, cells = chi_square(counts, _enumerate(five, *setting))
    assert value > critical_value(cells - 1)
