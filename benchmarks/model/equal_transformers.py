"""Plain transformers that read as many parameters per token as a model of ours.

The question: what does a hybrid model gain over a transformer of the same active size? Two classes
of the package transformers answer it, with random weights:

    dense    Qwen3: attention and a gated MLP in every layer
    moe      Qwen3-MoE: attention and a mixture of experts, as many experts as ours and as many per
             token

`equal_config` chooses the sizes. Width, vocabulary, heads, key-value heads and head width are ours.
One layer of a transformer has two mixers, so it has half as many layers as our pattern has
characters. Then the width of the MLP, or of one expert, is chosen so that the active parameters are
ours within 3 %: embedding, head and all that a token reads, counted as `ledger.parameters` counts
(`active`). If no width of 16 or more fits, there are fewer layers.

The parameters are counted from the tensors of the built model, not from a formula. Left out: equal
quality. These models are compared in speed only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nemotron_lite import NemotronConfig, ledger

KINDS = ("dense", "moe")
TOLERANCE = 0.03
STEPS = (64, 32, 16, 8, 4, 2, 1)  # the width is a multiple of the largest that fits
LEAST_WIDTH = 16


@dataclass(frozen=True)
class Sizes:
    """A transformer of equal active size."""

    kind: str  # one of KINDS
    layers: int
    width: int  # of the MLP, or of one expert
    active: int  # parameters that a token reads
    total: int
    wanted: int  # active parameters of our model

    def to_record(self) -> dict[str, Any]:
        """As a record has it."""
        return {
            "layers": self.layers, "mlp_width": self.width, "parameters": self.total,
            "active_parameters": self.active, "of_our_active": self.active / self.wanted,
        }  # fmt: skip


def equal_sizes(config: NemotronConfig, kind: str) -> Sizes:
    """Layers and width of a transformer with the active parameters of `config`.

    Raises:
        ValueError: an unknown kind, or no sizes fit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}.")
    wanted = ledger.parameters(config).active
    for layers in range(max(1, config.num_layers // 2), 0, -1):
        # Active parameters are a linear function of the width.
        first, second = (count(build(config, kind, layers, w, "meta"))[0] for w in (1, 2))
        slope = second - first
        exact = (wanted - first) / slope + 1
        for step in STEPS:
            width = step * round(exact / step)
            if width >= LEAST_WIDTH and abs(slope * (width - exact)) <= TOLERANCE * wanted:
                active, total = count(build(config, kind, layers, width, "meta"))
                return Sizes(kind, layers, width, active, total, wanted)
    raise ValueError(
        f"no {kind} transformer of width {config.hidden_size} has {wanted:,} active parameters "
        f"within {TOLERANCE:.0%}: embedding, head and one layer have more."
    )


def build_equal(config: NemotronConfig, sizes: Sizes, seed: int = 0) -> nn.Module:
    """The transformer with random weights, in float32, ready to be timed.

    Matrices have variance 1/fan_in and router rows a standard deviation of 1/sqrt(d), as those of
    the other models (`peers`), so tokens are spread over all experts.
    """
    torch.manual_seed(seed)
    model = build(config, sizes.kind, sizes.layers, sizes.width, "cpu")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim > 1:
                value.normal_(0, 1.0 if "embed" in name else value.shape[-1] ** -0.5)
            else:
                value.uniform_(0.5, 1.5)
    return model.eval()


def build(config: NemotronConfig, kind: str, layers: int, width: int, device: str) -> nn.Module:
    """A Qwen3 model of given sizes, not initialized for use."""
    from transformers import (
        Qwen3Config,
        Qwen3ForCausalLM,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

    fields: dict[str, Any] = dict(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads, head_dim=config.head_dim,
        intermediate_size=width, max_position_embeddings=131_072, tie_word_embeddings=False,
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_ids[0],
        pad_token_id=config.pad_token_id,
    )  # fmt: skip
    with torch.device(device):
        if kind == "dense":
            return Qwen3ForCausalLM._from_config(
                Qwen3Config(**fields), attn_implementation="sdpa", dtype=torch.float32
            )
        fields |= dict(
            moe_intermediate_size=width, num_experts=config.n_routed_experts,
            num_experts_per_tok=config.num_experts_per_tok, norm_topk_prob=True,
        )  # fmt: skip
        return Qwen3MoeForCausalLM._from_config(
            Qwen3MoeConfig(**fields),
            attn_implementation="sdpa",
            experts_implementation="grouped_mm",
            dtype=torch.float32,
        )


def count(model: Any) -> tuple[int, int]:
    """(parameters that a token reads, all parameters): of the experts only those chosen."""
    active = total = 0
    for name, value in model.named_parameters():
        total += value.numel()
        if ".experts." in name:
            chosen, experts = model.config.num_experts_per_tok, model.config.num_experts
            active += value.numel() * chosen // experts
        else:
            active += value.numel()
    return active, total
