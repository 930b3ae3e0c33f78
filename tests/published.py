"""What is published of each model of the family: config.json key by key, and numbers of parameters.

The outside reference for presets, ledger and config.json. Values are facts about the releases, put
down here key by key; `auto_map` and `quantization_config` are left out. `RELATIVES` says of each
where it is from and how sure it is:

- `whole_file`: the released config.json, as a tool of NVIDIA's carries it. Without it, the sizes
  are those that NVIDIA's training code gives for the release, with the other keys of the nearest
  file: what has no effect on a weight (chunk_size, time steps) is then unconfirmed.
- `parameters`: of the weights that were released, MTP module and selection biases included. A
  whole number is known to the unit. A text is what was published, in billions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

_COMMON: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 131072, "num_attention_heads": 32, "num_key_value_heads": 2, "head_dim": 128,
    "attention_bias": False, "attention_dropout": 0.0, "sliding_window": None,
    "rope_theta": 10000, "partial_rotary_factor": 1.0,
    "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
    "conv_kernel": 4, "use_conv_bias": True, "chunk_size": 128, "expand": 2,
    "mamba_hidden_act": "silu", "mamba_proj_bias": False, "mamba_ssm_cache_dtype": "float32",
    "use_mamba_kernels": True,
    "time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 0.0001,
    "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
    "mlp_hidden_act": "relu2", "mlp_bias": False, "use_bias": False,
    "layer_norm_epsilon": 1e-05, "norm_eps": 1e-05, "initializer_range": 0.02,
    "residual_in_fp32": False, "rescale_prenorm_residual": True, "tie_word_embeddings": False,
    "use_cache": True, "num_logits_to_keep": 1, "hidden_dropout": 0.0,
    "max_position_embeddings": 262144, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip

SUPER: dict[str, Any] = _COMMON | {
    "hybrid_override_pattern": (
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
    ),
    "num_hidden_layers": 88,
    "hidden_size": 4096,
    "mamba_num_heads": 128,
    "intermediate_size": 2688,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "moe_intermediate_size": 2688,
    "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376,
    "moe_shared_expert_overlap": False,
    "routed_scaling_factor": 5.0,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
    "dtype": "bfloat16",
    "transformers_version": "4.57.6",
}

NANO: dict[str, Any] = _COMMON | {
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "num_hidden_layers": 52,
    "hidden_size": 2688,
    "mamba_num_heads": 64,
    "intermediate_size": 1856,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "routed_scaling_factor": 2.5,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.53.2",
}

_NAMES = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}

# Spells its layers as a list with the old names, has no num_hidden_layers, and a number for
# infinity that float32 does not have.
ULTRA: dict[str, Any] = _COMMON | {
    "layers_block_type": [
        _NAMES[kind]
        for kind in (
            "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*"
            "EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
        )
    ],
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "mamba_num_heads": 256,
    "intermediate_size": 5120,
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "moe_intermediate_size": 5120,
    "moe_latent_size": 2048,
    "moe_shared_expert_intermediate_size": 10240,
    "moe_shared_expert_overlap": False,
    "routed_scaling_factor": 5.0,
    "num_nextn_predict_layers": 1,
    "mtp_layers_block_type": ["attention", "moe"],
    "time_step_limit": [0.0, 1e308],
    "dtype": "bfloat16",
    "transformers_version": "4.57.6",
}

# `total_size` of Ultra's model.safetensors.index.json: BF16, but for the selection biases.
ULTRA_BYTES = 1_121_049_257_984

LIGHTNING: dict[str, Any] = {
    key: value
    for key, value in NANO.items()
    if key not in ("hybrid_override_pattern", "torch_dtype")
} | {
    "layers_block_type": [_NAMES[kind] for kind in NANO["hybrid_override_pattern"]],
    "max_position_embeddings": 1048576,
    "moe_latent_size": None,
    "moe_shared_expert_overlap": True,
    "num_nextn_predict_layers": 1,
    "mtp_layers_block_type": ["attention", "moe"],
    "dtype": "bfloat16",
    "transformers_version": "5.8.1",
}

# Nemotron-H and Nano v2: dense layers, and older names of the head's width and of the epsilon.
_DENSE: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 131072, "num_key_value_heads": 8, "attention_head_dim": 128,
    "attention_bias": False, "attention_dropout": 0.0, "sliding_window": None,
    "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
    "conv_kernel": 4, "use_conv_bias": True, "chunk_size": 128, "expand": 2,
    "mamba_hidden_act": "silu", "mamba_proj_bias": False, "use_mamba_kernels": True,
    "time_step_min": 0.001, "time_step_max": 0.1, "time_step_floor": 0.0001,
    "time_step_limit": [0.0, math.inf], "time_step_rank": 256,
    "mlp_hidden_act": "relu2", "mlp_bias": False, "use_bias": False,
    "layer_norm_epsilon": 1e-05, "rms_norm_eps": 1e-05, "initializer_range": 0.02,
    "residual_in_fp32": False, "rescale_prenorm_residual": True, "tie_word_embeddings": False,
    "use_cache": True, "num_logits_to_keep": 1, "hidden_dropout": 0.0,
    "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "torch_dtype": "bfloat16",
}  # fmt: skip

H_8B: dict[str, Any] = _DENSE | {
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "num_hidden_layers": 52, "hidden_size": 4096, "num_attention_heads": 32,
    "mamba_num_heads": 128, "intermediate_size": 21504,
}  # fmt: skip

H_47B: dict[str, Any] = _DENSE | {
    "hybrid_override_pattern": (
        "M-M-M-M-M-M-M-M-M*-M-M-M-M-M-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-M-M---MM---M-M*-"
        "M-M-M-M-M-"
    ),
    "num_hidden_layers": 98, "hidden_size": 8192, "num_attention_heads": 64,
    "mamba_num_heads": 256, "ssm_state_size": 256, "intermediate_size": 30720,
}  # fmt: skip

H_56B: dict[str, Any] = _DENSE | {
    "hybrid_override_pattern": (
        "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-"
        "M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
    ),
    "num_hidden_layers": 118, "hidden_size": 8192, "num_attention_heads": 64,
    "mamba_num_heads": 256, "ssm_state_size": 256, "intermediate_size": 32768,
    "time_step_rank": 512,
}  # fmt: skip

NANO_9B_V2: dict[str, Any] = _DENSE | {
    "hybrid_override_pattern": "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    "num_hidden_layers": 56, "hidden_size": 4480, "num_attention_heads": 40,
    "mamba_num_heads": 128, "mamba_head_dim": 80, "intermediate_size": 15680,
    "head_dim": 128, "max_position_embeddings": 131072,
}  # fmt: skip

NANO_12B_V2: dict[str, Any] = _DENSE | {
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    "num_hidden_layers": 62, "hidden_size": 5120, "num_attention_heads": 40,
    "mamba_num_heads": 128, "mamba_head_dim": 80, "intermediate_size": 20480,
    "head_dim": 128, "max_position_embeddings": 131072,
}  # fmt: skip

NANO_4B: dict[str, Any] = _DENSE | {
    "hybrid_override_pattern": "M-M-M-MM-M-M*-M-M*-M-M-M*-M-M-MM*-MMM-M-M-",
    "num_hidden_layers": 42, "hidden_size": 3136, "num_attention_heads": 40,
    "mamba_num_heads": 96, "mamba_head_dim": 80, "intermediate_size": 12544,
    "head_dim": 128, "chunk_size": 256, "max_position_embeddings": 262144,
}  # fmt: skip


@dataclass(frozen=True)
class Relative:
    """One release.

    Attributes:
        file: keys of config.json.
        parameters: as the module's docstring says.
        miniature: a part of the pattern that has everything that is special about it.
        source: where the keys and the number are from.
        whole_file: whether `file` is the released one.
        tensors: in the released files, where the number is known.
    """

    file: dict[str, Any]
    parameters: int | str
    miniature: str
    source: str
    whole_file: bool = False
    tensors: int | None = None


_CONFIGS = "github.com/ai-dynamo/aiconfigurator, aic-core/src/aiconfigurator_core/model_configs"
_BRIDGE = "github.com/NVIDIA-NeMo/Megatron-Bridge"
_SIZES = f"{_BRIDGE}, models/nemotronh/nemotron_h_provider.py"
_CARDS = f"{_BRIDGE}, examples/model_verification_cards"

RELATIVES = {
    "Nemotron-H 8B": Relative(
        H_8B, 8_100_852_736, "M-M-M-M*-M",
        "github.com/NVIDIA/TensorRT-LLM, test_modeling_nemotron_h.py; number: a public count of "
        "the released tensors, not NVIDIA's own",
    ),
    "Nemotron-H 47B": Relative(
        H_47B, "47", "M---MM---M-M*-M",
        f"{_SIZES}; github.com/NVIDIA/Megatron-LM, Nemotron-H-47B-Reasoning-128K.sh; model card",
    ),
    "Nemotron-H 56B": Relative(
        H_56B, "56", "M-M-M-M*-M", f"{_CONFIGS}; model card", whole_file=True
    ),
    "Nemotron Nano 9B v2": Relative(
        NANO_9B_V2, 8_888_227_328, "M-MM-M-M-M*-M",
        f"{_SIZES}; number: the Hub's own count of the safetensors",
    ),
    "Nemotron Nano 12B v2": Relative(
        NANO_12B_V2, "12.31", "M-M*-M-M",
        f"{_SIZES}; number: model lists that give two decimals",
    ),
    "Nemotron 3 Nano 4B": Relative(
        NANO_4B, 3_973_556_832, "-MM*-MMM-M",
        f"{_CARDS}; sizes: tests of other loaders, which agree", tensors=263,
    ),
    "Nemotron 3 Nano 30B-A3B": Relative(
        NANO, 31_577_940_288, "MEM*EME",
        f"{_CONFIGS}; number: the Hub's 31,577,937,344 and the selection biases", whole_file=True,
    ),
    "Nemotron 3 Super 120B-A12B": Relative(
        SUPER, 123_611_033_088, "MEM*EME", f"{_CONFIGS}; {_CARDS}", whole_file=True, tensors=42_683
    ),
    "Nemotron 3 Ultra 550B-A55B": Relative(
        ULTRA, 560_524_603_904, "MEM*EME",
        f"{_CONFIGS}; number: `ULTRA_BYTES`, which are two of each but for the selection biases",
        whole_file=True,
    ),
    "Nemotron 3.5 Lightning 30B-A3B": Relative(
        LIGHTNING, 32_913_266_240, "MEM*EME", f"{_CONFIGS}; {_CARDS}", whole_file=True, tensors=6513
    ),
}  # fmt: skip
