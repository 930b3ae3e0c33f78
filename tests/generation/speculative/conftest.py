"""Small models for the tests of speculation, and a drafter that is right as often as a test wants.

The MTP module of a random model predicts no better than chance, so hardly any draft would be
accepted and nothing that happens after an acceptance would be tested. `guided` corrects this. With
it the drafter proposes the text that plain decoding writes, except for a share of tokens that it
changes at random. Everything else, its cache included, works as it does without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch

from nemotron_lite.config import NemotronConfig
from nemotron_lite.generation.speculative.drafter import Drafter
from nemotron_lite.model import Nemotron

SMALL = NemotronConfig(
    pattern="ME*M", vocab_size=29, hidden_size=16,
    num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    mamba_num_heads=2, mamba_head_dim=8, ssm_state_size=4, n_groups=1, chunk_size=16,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, moe_latent_size=8,
    moe_shared_expert_intermediate_size=8, intermediate_size=8,
    mtp_pattern="*E", mtp_depths=2, initializer_range=0.5,
)  # fmt: skip

GREEDY = dict(temperature=0, stop=())

Guided = Callable[[Nemotron, list[list[int]], list[list[int]], float], AbstractContextManager[None]]


@pytest.fixture(scope="session")
def small() -> Nemotron:
    return Nemotron(SMALL, dtype=torch.float64, seed=3)


@pytest.fixture
def guided(monkeypatch: pytest.MonkeyPatch) -> Guided:
    """Inside, the drafter proposes `texts`; each token is wrong with probability `wrong`."""

    @contextmanager
    def context(
        model: Nemotron, prompts: list[list[int]], texts: list[list[int]], wrong: float
    ) -> Iterator[None]:
        truth = [p + t for p, t in zip(prompts, texts, strict=True)]
        generator = torch.Generator().manual_seed(0)
        choose = Drafter._choose

        def oracle(self, logits, uniforms, j):
            _, q, confidence = choose(self, logits, uniforms, j)
            tokens = []
            for row, start in enumerate(self.cache.lengths.tolist()):
                place = start + 1 + j
                known = truth[row][place] if place < len(truth[row]) else 0
                miss = torch.rand(1, generator=generator).item() < wrong
                tokens.append((known + miss) % model.config.vocab_size)
            return torch.tensor(tokens), q, confidence

        with monkeypatch.context() as patch:
            patch.setattr(Drafter, "_choose", oracle)
            yield

    return context
