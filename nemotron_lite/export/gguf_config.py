"""The sizes of a model as keys of a GGUF file, and the configs that have no place there.

llama.cpp has two architectures for this family. `nemotron_h_moe` has experts in every feed-forward
layer, `nemotron_h` in none. What a layer is follows from two lists with one number for each layer:

    layer    attention.head_count_kv    feed_forward_length
    M        0                          0
    *        the key heads              0
    E, -     0                          the width

The MTP module is one more layer behind the others, which holds both of its parts, attention and
experts (`nextn_predict_layers` = 1). Nothing in the file says how often to apply it; llama.cpp
drafts as many tokens as it is told to.

Attention without positions needs no key: these architectures never rotate queries and keys.

Source: the loader `src/models/nemotron-h.cpp` of llama.cpp, and trials with its build `xllamacpp`
2026.10. Left out: Puzzle's sizes per layer, which `NemotronConfig` does not describe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from nemotron_lite.config import NemotronConfig

WITH_EXPERTS, WITHOUT_EXPERTS = "nemotron_h_moe", "nemotron_h"
SIGMOID = 2  # the code of the router's function
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def architecture(config: NemotronConfig, mtp: bool) -> str:
    """The name of the architecture in the file."""
    return WITH_EXPERTS if "E" in _layers(config, mtp) else WITHOUT_EXPERTS


def config_problems(config: NemotronConfig, mtp: bool) -> list[str]:
    """Why a GGUF file cannot hold a model of these sizes, one sentence for each reason.

    Args:
        mtp: whether the MTP module is to be written.
    """
    layers = _layers(config, mtp)
    problems = []
    for kind, what in (("M", "a Mamba layer"), ("*", "an attention layer")):
        if kind not in config.pattern:
            problems.append(
                f"pattern={config.pattern!r} has no {kind!r}: llama.cpp's architecture needs "
                f"{what} for its cache"
            )
    if "E" in config.pattern and "-" in config.pattern:
        problems.append(
            f"pattern={config.pattern!r} has both 'E' and '-' layers: in a GGUF file all "
            "feed-forward layers have experts, or none has"
        )
    if mtp and config.mtp_pattern not in ("", "*E"):
        problems.append(
            f"mtp_pattern={config.mtp_pattern!r}: a GGUF file holds an MTP module of one attention "
            "and one expert layer, '*E'. Leave it out with mtp=False (--no-mtp)"
        )
    elif mtp and config.mtp_pattern and "-" in config.pattern and "E" not in config.pattern:
        problems.append(
            f"pattern={config.pattern!r} has '-' layers and the MTP module has experts: in a GGUF "
            "file all feed-forward layers have experts, or none has. Leave the module out with "
            "mtp=False (--no-mtp)"
        )
    if "E" in layers and not config.n_shared_experts:
        problems.append(
            "n_shared_experts=0: llama.cpp's architecture needs a shared expert in every 'E' layer"
        )
    if "E" in layers and config.topk_group < config.n_group:
        problems.append(
            f"n_group={config.n_group} with topk_group={config.topk_group}: llama.cpp's "
            "architecture chooses experts among all groups"
        )
    if "M" in config.pattern and config.time_step_limit != (0.0, math.inf):
        problems.append(
            f"time_step_limit={config.time_step_limit}: a GGUF file has no key for a clamp of dt"
        )
    if "M" in config.pattern and config.use_bias:
        problems.append("use_bias=True: llama.cpp's Mamba layers have no biases of projections")
    if config.mlp_bias and "E" in layers:
        only_mtp = " Leave the MTP module out with mtp=False (--no-mtp)"
        problems.append(
            "mlp_bias=True with 'E' layers: llama.cpp has such biases in '-' layers only, and none "
            f"in shared experts.{'' if 'E' in config.pattern else only_mtp}"
        )
    for name in ("norm_eps", "routed_scaling_factor"):
        value = getattr(config, name)
        if not SMALLEST <= value <= LARGEST:
            problems.append(f"{name}={value}: a GGUF file holds it in float32, which cannot")
    return problems


def write_config(writer: Any, config: NemotronConfig, mtp: bool) -> None:
    """Add the sizes to a `gguf.GGUFWriter`."""
    c, layers = config, _layers(config, mtp)
    feed_forward = c.moe_intermediate_size if "E" in layers else c.intermediate_size
    both = mtp and bool(c.mtp_pattern)  # the last layer is attention and experts
    kinds: Sequence[str] = [*c.pattern, *(["*E"] if both else [])]
    writer.add_block_count(len(kinds))
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length([feed_forward if kind[-1] in "E-" else 0 for kind in kinds])
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv([c.num_key_value_heads if kind[0] == "*" else 0 for kind in kinds])
    writer.add_key_length(c.head_dim)
    writer.add_value_length(c.head_dim)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_layer_norm_eps(c.norm_eps)  # of the norm behind the MTP module
    writer.add_ssm_conv_kernel(c.conv_kernel)
    writer.add_ssm_inner_size(c.mamba_inner_size)
    writer.add_ssm_state_size(c.ssm_state_size)
    writer.add_ssm_time_step_rank(c.mamba_num_heads)
    writer.add_ssm_group_count(c.n_groups)
    if "E" in layers:
        writer.add_expert_count(c.n_routed_experts)
        writer.add_expert_used_count(c.num_experts_per_tok)
        writer.add_expert_feed_forward_length(c.moe_intermediate_size)
        writer.add_expert_shared_count(c.n_shared_experts)
        writer.add_expert_shared_feed_forward_length(c.moe_shared_expert_intermediate_size)
        writer.add_expert_weights_norm(c.norm_topk_prob)
        writer.add_expert_weights_scale(c.routed_scaling_factor)
        writer.add_uint32(f"{writer.arch}.expert_gating_func", SIGMOID)
        if c.moe_latent_size is not None:
            writer.add_moe_latent_size(c.moe_latent_size)
    if both:
        writer.add_nextn_predict_layers(1)


def _layers(config: NemotronConfig, mtp: bool) -> str:
    return config.pattern + (config.mtp_pattern if mtp else "")
