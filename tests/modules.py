"""A small model with every kind of layer, for the tests of the model as a torch module."""

from __future__ import annotations

import torch

from nemotron_lite.config import NemotronConfig
from nemotron_lite.model import Nemotron

EVERY_KIND = NemotronConfig(
    pattern="M*E-", mtp_pattern="*E", mtp_depths=2, vocab_size=64, hidden_size=32,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, mamba_num_heads=4, mamba_head_dim=8,
    ssm_state_size=16, n_groups=2, n_routed_experts=8, num_experts_per_tok=2,
    moe_intermediate_size=16, moe_latent_size=16, moe_shared_expert_intermediate_size=32,
    intermediate_size=32, routed_scaling_factor=2.5, initializer_range=0.2,
)  # fmt: skip


def every_kind(seed: int = 0, **changes: object) -> Nemotron:
    """Mamba, attention, a mixture of experts, an MLP, and an MTP module."""
    model = Nemotron(EVERY_KIND.replace(**changes), seed=seed).eval()
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if name.endswith("_proj.bias"):  # they start at zero
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(number))
    return model


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Ids of the vocabulary of `every_kind`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(64, (rows, length), generator=generator)
