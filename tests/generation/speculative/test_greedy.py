"""Greedy speculation writes what plain greedy decoding writes: many models, prompts and lengths.

210 cases in float64 and as many in float32, each a random model with one or eight ragged prompts
and drafts of 1 to 7 tokens, with drafters that are mostly right, sometimes right, and left as they
are. In exact arithmetic the tokens are equal; in floating point the verification of several tokens
rounds differently from a step, and where the two best logits nearly tie it may choose the other.
Such a row is excluded: at the first difference the two tokens' logits must be closer than rounding
explains. Ties are counted, and there may be few.
"""

from __future__ import annotations

import pytest
import torch

from nemotron_lite import GenerationOptions, SpeculationOptions, generate
from nemotron_lite.model import Nemotron
from tests.cache_oracles import WAYS
from tests.generation.speculative.conftest import GREEDY, SMALL, Guided

LENGTH = 12
TIE = {torch.float64: 1e-11, torch.float32: 1e-4}  # of logits with a spread of about one
CASES = 84  # in each precision: all draft lengths with both batch sizes, twice over
PATTERNS = ("ME*M", "M*", "*EM", "MM-*E")


def _is_tie(
    model: Nemotron, prompt: list[int], plain: list[int], found: list[int], margin: float
) -> bool:
    place = next(i for i, (a, b) in enumerate(zip(plain, found, strict=True)) if a != b)
    exact = Nemotron(model.config, dtype=torch.float64)
    exact.load_state_dict(model.state_dict())
    logits = exact(torch.tensor([prompt + plain[:place]])).logits[0, -1]
    return float((logits[plain[place]] - logits[found[place]]).abs()) < margin * float(logits.std())


def _prompts(seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    rows = 8 if seed % 6 == 0 else 1
    sizes = torch.randint(1, 10, (rows,), generator=generator).tolist()
    return [torch.randint(SMALL.vocab_size, (n,), generator=generator).tolist() for n in sizes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_same_tokens(guided: Guided, dtype: torch.dtype) -> None:
    ties, accepted, rows, cases = 0, 0, 0, 0
    for seed in range(CASES):
        config = SMALL.replace(pattern=PATTERNS[seed % 4])
        model = Nemotron(config, seed=seed, dtype=dtype)
        prompts, k = _prompts(seed), seed % 7 + 1
        plain = generate(model, prompts, LENGTH, **GREEDY)
        speculation = SpeculationOptions(draft_length=k, adaptive=seed % 5 == 0)
        with guided(model, prompts, plain, (0.1, 0.5)[seed % 2]):
            found, statistics = generate(
                model, prompts, LENGTH, speculation=speculation, return_statistics=True, **GREEDY
            )
        for prompt, a, b in zip(prompts, plain, found, strict=True):
            rows += 1
            if a != b:
                assert _is_tie(model, prompt, a, b, TIE[dtype]), (seed, k, a, b)
                ties += 1
        accepted += sum(statistics.accepted)
        cases += 1
    assert cases == CASES
    assert accepted > 2 * rows, "hardly anything was accepted, so the test shows nothing"
    most = 0 if dtype == torch.float64 else rows // 50
    assert ties <= most, f"{ties} of {rows} rows were excluded because of a tie"


def test_without_help_the_module_drafts_and_the_text_is_the_same() -> None:
    """The module's own predictions, of which a few are right here."""
    accepted = 0
    for seed in range(20):
        model = Nemotron(SMALL.replace(vocab_size=6), seed=seed, dtype=torch.float64)
        prompts = [[token % 6 for token in row] for row in _prompts(seed)]
        speculation = SpeculationOptions(draft_length=3, adaptive=False)
        found, statistics = generate(
            model, prompts, 15, speculation=speculation, return_statistics=True, **GREEDY
        )
        assert found == generate(model, prompts, 15, **GREEDY)
        accepted += sum(statistics.accepted)
    assert accepted > 20


def test_a_wrong_acceptance_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would see a rule that believes one draft too many."""
    from nemotron_lite.generation.speculative import loop

    honest = loop._verify_greedy

    def gullible(logits, drafts, lengths):
        accepted, _ = honest(logits, drafts, lengths)
        more = [min(n + 1, length) for n, length in zip(accepted, lengths, strict=True)]
        best = logits.argmax(-1)
        return more, [int(best[row, n]) for row, n in enumerate(more)]

    model = Nemotron(SMALL, seed=0, dtype=torch.float64)
    plain = generate(model, [[1, 2, 3]], LENGTH, **GREEDY)
    monkeypatch.setattr(loop, "_verify_greedy", gullible)
    speculation = SpeculationOptions(adaptive=False)
    assert generate(model, [[1, 2, 3]], LENGTH, speculation=speculation, **GREEDY) != plain


@pytest.mark.parametrize("way", WAYS)
def test_both_ways_of_going_back_write_the_same(small: Nemotron, guided: Guided, way: str) -> None:
    from nemotron_lite.generation.prefill import pad_right
    from nemotron_lite.generation.speculative import SpeculativeDecoding

    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    plain = generate(small, prompts, 20, **GREEDY)
    options = GenerationOptions(
        max_new_tokens=20, speculation=SpeculationOptions(adaptive=False), **GREEDY
    )
    with guided(small, prompts, plain, 0.3), WAYS[way]():
        run = SpeculativeDecoding(small, *pad_right(prompts), options)
        for _ in run.passes():
            pass
    assert [row.tokens for row in run.rows] == plain
    assert run.statistics.acceptance_length > 2
