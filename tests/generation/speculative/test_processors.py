"""Processors with and without drafts: both see all tokens of their row, at every place."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nemotron_lite import Nemotron, SpeculationOptions, generate
from tests.generation.speculative.conftest import GREEDY, Guided

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
SPECULATIONS = [None, SpeculationOptions(draft_length=3, adaptive=False)]


@pytest.mark.parametrize("speculation", SPECULATIONS)
def test_processors_see_all_tokens_of_their_row(
    small: Nemotron, guided: Guided, speculation: SpeculationOptions | None
) -> None:
    """Greedy text under a rule that depends on all tokens; drafts are mostly right."""

    def rule(tokens: Any, logits: torch.Tensor) -> torch.Tensor:
        logits[(sum(tokens) + 3 * len(tokens)) % len(logits)] += 30.0
        return logits

    def ban(tokens: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(0, torch.tensor(sorted(set(tokens))), -math.inf)

    expected = []
    for prompt in PROMPTS:
        text = list(prompt)
        for _ in range(12):
            logits = small(torch.tensor([text])).logits[0, -1].detach()
            text.append(int(ban(text, rule(text, logits)).argmax()))
        expected.append(text[len(prompt) :])
    kind: dict[str, Any] = dict(logits_processors=[rule, ban], **GREEDY)
    with guided(small, PROMPTS, expected, 0.2):
        found = generate(small, PROMPTS, 12, speculation=speculation, **kind)
    assert found == expected
