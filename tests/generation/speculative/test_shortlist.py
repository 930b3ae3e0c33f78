"""Drafts from a shortlist of tokens: the same texts, the same law, and nothing off the list."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite import generate
from nemotron_lite.generation.sampling import Filters
from nemotron_lite.generation.speculative import Drafter, Statistics, costs, shortlist
from nemotron_lite.generation.speculative.draft_length import Fixed
from nemotron_lite.model import Nemotron

PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]


def test_greedy_texts_are_those_of_plain_decoding(small: Nemotron) -> None:
    plain = generate(small, PROMPTS, 30)
    told = Statistics()
    for tokens in (torch.arange(4), torch.tensor(sorted(set(plain[0])))):
        found = generate(
            small, PROMPTS, 30, draft="mtp", draft_length=3, adaptive=False, shortlist=tokens,
            statistics=told,
        )  # fmt: skip
        assert found == plain
    assert told.verifications


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_the_list_is_drafted_and_q_says_so(small: Nemotron, temperature: float) -> None:
    tokens = torch.tensor([2, 11, 28])
    filters = Filters(temperature)
    with torch.inference_mode():
        drafts = {}
        for listed in (tokens, torch.arange(29), None):
            cache = small.empty_cache(1, mtp=True)
            drafter = Drafter(small, cache, filters, listed)
            prompt = torch.tensor([[3, 1, 4]])
            drafter.read_prompt(small(prompt, cache).hidden, prompt, [3], 0)
            drafter.start(torch.tensor([5]))
            uniforms = None if not temperature else torch.tensor([[0.3, 0.6]]).double()
            drafts[0 if listed is None else len(listed)] = drafter.draft(uniforms, [Fixed(2)], [2])
    short, whole, none = drafts[3], drafts[29], drafts[0]
    assert short is not None and whole is not None and none is not None
    assert set(short.tokens[0].tolist()) <= {2, 11, 28}
    assert torch.equal(whole.tokens, none.tokens)  # a list of everything is no list
    if temperature:
        assert short.q is not None and whole.q is not None and none.q is not None
        torch.testing.assert_close(short.q.sum(-1), torch.ones(1, 2).double())
        assert short.q[..., tokens].sum() == pytest.approx(2)
        torch.testing.assert_close(whole.q, none.q)
        # The first place is the same law, restricted and renormalised.
        expected = none.q[0, 0, tokens] / none.q[0, 0, tokens].sum()
        torch.testing.assert_close(short.q[0, 0, tokens], expected)


def test_the_most_frequent_tokens() -> None:
    texts = [[7, 7, 7, 1], [3, 3, 1, 9]]
    assert shortlist(texts, 2).tolist() in ([3, 7], [1, 7])
    assert shortlist(texts, 99).tolist() == [1, 3, 7, 9]


def test_a_shorter_head_is_cheaper_by_the_ledger(small: Nemotron) -> None:
    assert costs(small.config, drafted_tokens=4).draft < costs(small.config).draft
    assert costs(small.config, drafted_tokens=29) == costs(small.config)


@pytest.mark.parametrize("tokens", [[], [1, 1], [0, 29], [-1, 2]])
def test_what_does_not_fit_is_named(small: Nemotron, tokens: list[int]) -> None:
    with pytest.raises(ValueError, match="different tokens of 0 to 28"):
        generate(small, PROMPTS, 4, draft="mtp", shortlist=torch.tensor(tokens, dtype=torch.int64))
    with pytest.raises(ValueError, match="nothing to draft"):
        shortlist([[]], 3)
