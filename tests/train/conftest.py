"""A tiny model with every kind of layer, and a text that it learns in seconds."""

from __future__ import annotations

import numpy as np
import pytest

from nemotron_lite.config import NemotronConfig
from nemotron_lite.data import ConcatenatedDocuments, concatenate_documents
from nemotron_lite.model import Nemotron

TINY = NemotronConfig(
    pattern="ME*E", vocab_size=96, hidden_size=32,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=8,
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=24, moe_latent_size=16,
    moe_shared_expert_intermediate_size=32, mtp_pattern="*E", mtp_depths=2,
)  # fmt: skip


@pytest.fixture
def model() -> Nemotron:
    return Nemotron(TINY, seed=0)


@pytest.fixture(scope="session")
def text() -> ConcatenatedDocuments:
    """200 documents of unequal length that count up from a random token, which is easy to learn."""
    generator = np.random.default_rng(0)
    documents = []
    for _ in range(200):
        start, length = generator.integers(1, 96), generator.integers(5, 60)
        documents.append(np.array([0, *((start + np.arange(length)) % 95 + 1), 0]))
    return ConcatenatedDocuments(*concatenate_documents(documents))
