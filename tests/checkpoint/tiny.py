"""Sizes and values of the checkpoints that these tests write: small, with random values."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from nemotron_lite import NemotronConfig

TINY = NemotronConfig(
    pattern="MEM*-E", vocab_size=128, hidden_size=32,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8,
    mamba_num_heads=8, mamba_head_dim=8, ssm_state_size=16, n_groups=2, chunk_size=16,
    n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, moe_latent_size=16,
    moe_shared_expert_intermediate_size=40, intermediate_size=48, routed_scaling_factor=2.5,
    mtp_pattern="*E", mtp_depths=2,
)  # fmt: skip


@torch.no_grad()
def randomize(named: Iterable[tuple[str, Tensor]], seed: int) -> None:
    """Give every parameter and buffer a random value, so that a mistake is seen.

    A new model hides most mistakes: norms are ones, D is one, biases are zero, and router scores
    are so close that rounding decides between two experts. Here all of them are random, and step
    sizes are between 1e-4, which transformers would clamp, and 3.
    """
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in named:
        normal = torch.randn(tensor.shape, generator=draw)
        if name.endswith("A_log"):
            value = torch.empty(tensor.shape).uniform_(-0.7, math.log(16), generator=draw)
        elif name.endswith("dt_bias"):
            value = torch.empty(tensor.shape).uniform_(-9.0, 1.0, generator=draw)
        elif name.endswith("D"):
            value = 0.5 + normal
        elif "norm" in name:
            value = 1 + 0.3 * normal
        elif name.endswith("e_score_correction_bias"):
            value = 0.3 * normal
        elif name.endswith("conv1d.weight"):
            value = 0.5 * normal
        elif name.endswith("bias"):
            value = 0.3 * normal
        elif name.endswith("embeddings.weight"):
            value = normal
        elif name.endswith("gate.weight"):
            value = 1.5 * normal / math.sqrt(tensor.shape[-1])
        else:
            value = normal / math.sqrt(tensor.shape[-1])
        tensor.copy_(value)
