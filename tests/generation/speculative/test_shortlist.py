"""Drafts from a shortlist of tokens: the same texts, the same distribution, and no other tokens."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite import SpeculationOptions, generate
from nemotron_lite.generation.options import SamplingOptions
from nemotron_lite.generation.speculative import Drafter, ledger_costs, shortlist
from nemotron_lite.generation.speculative.draft_length import FixedDraftLength
from nemotron_lite.model import Nemotron
from tests.generation.speculative.conftest import GREEDY

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


def test_greedy_texts_are_those_of_plain_decoding(small: Nemotron) -> None:
    plain = generate(small, PROMPTS, 30, **GREEDY)
    for tokens in (tuple(range(4)), tuple(sorted(set(plain[0])))):
        drafted = SpeculationOptions(draft_length=3, adaptive=False, shortlist=tokens)
        found, statistics = generate(
            small, PROMPTS, 30, speculation=drafted, return_statistics=True, **GREEDY
        )
        assert found == plain
        assert statistics.verifications


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_the_list_is_drafted_and_q_says_so(small: Nemotron, temperature: float) -> None:
    tokens = torch.tensor([2, 11, 28])
    options = SamplingOptions(temperature, top_p=None)
    with torch.inference_mode():
        drafts = {}
        for listed in (tokens, torch.arange(29), None):
            cache = small.empty_cache(1, mtp=True)
            drafter = Drafter(small, cache, options, listed)
            prompt = torch.tensor([[3, 1, 4]])
            drafter.add_prompt(small(prompt, cache).hidden, prompt, [3], 0)
            drafter.add_first_token(torch.tensor([5]))
            uniforms = None if not temperature else torch.tensor([[0.3, 0.6]]).double()
            draft = drafter.draft(uniforms, [FixedDraftLength(2)], [2])
            drafts[0 if listed is None else len(listed)] = draft
    short, whole, none = drafts[3], drafts[29], drafts[0]
    assert short is not None and whole is not None and none is not None
    assert set(short.tokens[0].tolist()) <= {2, 11, 28}
    assert torch.equal(whole.tokens, none.tokens)  # a list of everything is no list
    if temperature:
        assert short.q is not None and whole.q is not None and none.q is not None
        torch.testing.assert_close(short.q.sum(-1), torch.ones(1, 2).double())
        assert short.q[..., tokens].sum() == pytest.approx(2)
        torch.testing.assert_close(whole.q, none.q)
        # The first position has the same distribution, restricted and normalized again.
        expected = none.q[0, 0, tokens] / none.q[0, 0, tokens].sum()
        torch.testing.assert_close(short.q[0, 0, tokens], expected)


def test_the_most_frequent_tokens() -> None:
    texts = [[7, 7, 7, 1], [3, 3, 1, 9]]
    assert shortlist(texts, 2) in ((3, 7), (1, 7))
    assert shortlist(texts, 99) == (1, 3, 7, 9)


def test_a_shorter_head_is_cheaper_by_the_ledger(small: Nemotron) -> None:
    assert ledger_costs(small.config, drafted_tokens=4).draft < ledger_costs(small.config).draft
    assert ledger_costs(small.config, drafted_tokens=29) == ledger_costs(small.config)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "different tokens of 0 to 28"),
        ([1, 1], "different tokens of 0 to 28"),
        ([0, 29], "different tokens of 0 to 28"),
        ([-1, 2], r"shortlist=\(-1, 2\).*expected token ids"),
    ],
)
def test_what_does_not_fit_is_named(small: Nemotron, tokens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(small, PROMPTS, 4, speculation=SpeculationOptions(shortlist=tuple(tokens)))
    with pytest.raises(ValueError, match="leaves nothing to draft"):
        shortlist([[]], 3)
