"""What NVIDIA's released config.json files say, key by key: the outside reference for the presets.

Super and Nano as in the NVFP4 releases (transcribed in public repositories, which agree), without
`auto_map` and `quantization_config`. Ultra's file spells its layers as a list with the old names
and has no `num_hidden_layers`; of its numbers those are here that a public listing of the release
gives, with the size of its weights.
"""

from __future__ import annotations

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

ULTRA: dict[str, Any] = {
    "model_type": "nemotron_h",
    "layers_block_type": [
        {"M": "mamba", "E": "moe", "*": "attention"}[kind]
        for kind in (
            "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*"
            "EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
        )
    ],
    "num_hidden_layers": None, "vocab_size": 131072, "hidden_size": 8192,
    "num_attention_heads": 64, "num_key_value_heads": 2, "head_dim": 128,
    "mamba_num_heads": 256, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8,
    "conv_kernel": 4, "chunk_size": 128, "intermediate_size": 5120, "n_routed_experts": 512,
    "num_experts_per_tok": 22, "moe_intermediate_size": 5120, "moe_latent_size": 2048,
    "moe_shared_expert_intermediate_size": 10240, "num_nextn_predict_layers": 1,
    "mtp_layers_block_type": ["attention", "moe"], "max_position_embeddings": 262144,
}  # fmt: skip

# `total_size` of Ultra's model.safetensors.index.json: BF16, but for the selection biases.
ULTRA_BYTES = 1_121_049_257_984
