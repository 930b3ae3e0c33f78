"""config.json: every spelling in, the hub's spelling out, and all refusals in one error."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_lite import ConfigError, NemotronConfig
from nemotron_lite.config import PRESETS
from nemotron_lite.hf_config import NO_CLAMP, from_hf, to_hf, without_dt_clamp
from tests.published import NANO, SUPER, ULTRA

PUBLISHED = SUPER


def published(**changes: Any) -> dict[str, Any]:
    """PUBLISHED with changes; a value of ... removes the key."""
    return {k: v for k, v in {**PUBLISHED, **changes}.items() if v is not ...}


NEW = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
OLD = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}


@pytest.mark.parametrize(("name", "file"), [("super", SUPER), ("nano", NANO), ("ultra", ULTRA)])
def test_the_released_files_are_the_presets(name: str, file: dict[str, Any]) -> None:
    """Field by field. What initializes is the training run's (0.014 in Super, 0.0099 in Ultra), not
    the 0.02 of the files."""
    found, preset = from_hf(file), PRESETS[name]
    unlike = {
        field.name
        for field in dataclasses.fields(preset)
        if getattr(found, field.name) != getattr(preset, field.name)
    }
    assert unlike == (set() if name == "nano" else {"initializer_range"})


def test_published_keys_are_written_back_unchanged() -> None:
    unread = {
        "rope_theta", "partial_rotary_factor", "expand", "moe_shared_expert_overlap", "use_cache",
        "num_logits_to_keep", "torch_dtype", "dtype", "transformers_version", "use_mamba_kernels",
    }  # fmt: skip
    for file in (SUPER, NANO):
        written = to_hf(from_hf(file))
        assert {k: v for k, v in file.items() if k not in unread} == {
            k: v for k, v in written.items() if k in file
        }
        ours = {"mtp_depths"} if file is SUPER else {"moe_latent_size", "num_nextn_predict_layers"}
        assert set(written) - set(file) == ours


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip_of_every_preset(name: str) -> None:
    config = PRESETS[name]
    assert NemotronConfig.from_hf(config.to_hf()) == config
    assert from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    "changes",
    [
        dict(time_step_limit=(0.01, math.inf)),
        dict(time_step_limit=(0.0, 0.5)),
        dict(eos_token_id=(2, 11)),
        dict(eos_token_id=(2,)),
        dict(mtp_depths=3),
        dict(mtp_pattern="", mtp_depths=0),
        dict(mtp_pattern="E*E", mtp_depths=1),
        dict(n_group=4, topk_group=2),
        dict(n_shared_experts=0, norm_topk_prob=False, use_conv_bias=False),
        dict(moe_latent_size=None, norm_eps=1e-6, num_key_value_heads=4),
        dict(pattern="-*-M", conv_kernel=3, rescale_prenorm_residual=False),
        dict(use_bias=True, mlp_bias=True),
        dict(attention_bias=True),
    ],
    ids=str,
)
def test_round_trip_of_changed_configs(changes: dict[str, Any]) -> None:
    config = PRESETS["lite"].replace(**changes)
    assert from_hf(to_hf(config)) == config
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config
    assert from_hf(without_dt_clamp(to_hf(config))) == config


@pytest.mark.parametrize("names", [NEW, OLD], ids=["new names", "old names"])
@pytest.mark.parametrize("key", ["layers_block_type", "layer_types"])
def test_layers_as_a_list(names: dict[str, str], key: str) -> None:
    layers = [names[kind] for kind in PRESETS["super"].pattern]
    hf = published(
        hybrid_override_pattern=...,
        mtp_hybrid_override_pattern=...,
        mtp_layers_block_type=[names["*"], names["E"]],
        **{key: layers},
    )
    assert from_hf(hf) == from_hf(SUPER)


def test_both_spellings_of_the_layers_may_be_there_if_they_agree() -> None:
    hf = published(layers_block_type=[NEW[kind] for kind in PRESETS["super"].pattern])
    assert from_hf(hf) == from_hf(SUPER)
    hf["layers_block_type"] = ["moe"] * 88
    with pytest.raises(ConfigError, match=r"contradict.*override_pattern.*layers_block_type"):
        from_hf(hf)
    with pytest.raises(ConfigError, match=r"MTP layers contradict.*'\*E'.*'\*'"):
        from_hf(published(mtp_layers_block_type=["full_attention"]))


@pytest.mark.parametrize(
    ("key", "other", "value"),
    [
        ("layer_norm_epsilon", "norm_eps", 1e-6),
        ("layer_norm_epsilon", "rms_norm_eps", 1e-6),
        ("head_dim", "attention_head_dim", 64),
        ("n_groups", "mamba_n_groups", 4),
        ("conv_kernel", "mamba_d_conv", 3),
        ("chunk_size", "mamba_chunk_size", 256),
        ("use_conv_bias", "mamba_conv_bias", False),
        ("time_step_min", "mamba_dt_min", 0.002),
        ("time_step_max", "mamba_dt_max", 0.2),
        ("time_step_floor", "mamba_dt_init_floor", 1e-5),
        ("n_routed_experts", "num_local_experts", 64),
    ],
)
def test_other_names_of_one_thing(key: str, other: str, value: Any) -> None:
    hf = published(**{"norm_eps": ..., key: ..., other: value})
    assert to_hf(from_hf(hf))[key] == value
    with pytest.raises(ConfigError) as error:
        from_hf(published(**{other: value}))
    assert f"{key}={PUBLISHED[key]!r}" in str(error.value)
    assert f"{other}={value!r}" in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["[0.0, Infinity]", '[0.0, {"__float__": "Infinity"}]', '[0, "Infinity"]', "[0.0, 1e308]"],
    ids=["hub", "transformers", "text", "Ultra"],
)
def test_every_spelling_of_infinity(text: str) -> None:
    hf = published(time_step_limit=json.loads(text))
    assert from_hf(hf).time_step_limit == (0.0, math.inf)
    hf["time_step_limit"][0] = 0.01
    assert from_hf(hf).time_step_limit == (0.01, math.inf)


def test_no_limit_means_no_clamp_whatever_time_step_min_says() -> None:
    config = from_hf(published(time_step_min=0.05))
    assert config.time_step_limit == (0.0, math.inf)
    assert config.time_step_min == 0.05  # of the initialization


def test_without_clamp_tells_transformers_and_remembers_the_start() -> None:
    hf = to_hf(PRESETS["super"])
    assert hf["time_step_min"] == 0.001
    quiet = without_dt_clamp(hf)
    assert quiet["time_step_min"] == NO_CLAMP
    assert from_hf(quiet) == PRESETS["super"]
    assert without_dt_clamp(quiet) == quiet
    assert hf["time_step_min"] == 0.001, "the argument stays as it is"
    limited = to_hf(PRESETS["super"].replace(time_step_limit=(0.01, 1.0)))
    assert without_dt_clamp(limited)["time_step_min"] == 0.01


def test_mtp_depths_are_super_s_where_the_file_does_not_say() -> None:
    assert from_hf(published()).mtp_depths == 2
    assert from_hf(published(mtp_depths=5)).mtp_depths == 5
    # transformers writes the default list of MTP layers for every model.
    without = published(num_nextn_predict_layers=0, mtp_layers_block_type=["full_attention", "moe"])
    assert (from_hf(without).mtp_pattern, from_hf(without).mtp_depths) == ("", 0)


def test_mtp_layers_default_to_transformers() -> None:
    assert from_hf(published(mtp_hybrid_override_pattern=...)).mtp_pattern == "*E"


def test_absent_keys_have_the_values_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    bare = {"hybrid_override_pattern": "ME*-", "vocab_size": 64, "hidden_size": 32}
    theirs = transformers.NemotronHConfig(**bare).to_dict()
    assert from_hf(bare) == from_hf(theirs)


def test_null_counts_as_absent() -> None:
    assert from_hf(published(n_group=None, bos_token_id=None)) == from_hf(SUPER)
    assert from_hf(published(num_key_value_heads=None)).num_key_value_heads == 32


@pytest.mark.parametrize(
    ("key", "value", "supported"),
    [
        ("attention_bias", "yes", "False"),
        ("mamba_proj_bias", True, "use_bias is False"),
        ("mtp_use_repeated_layer", False, "True"),
        ("tie_word_embeddings", True, "False"),
        ("residual_in_fp32", True, "False"),
        ("sliding_window", 4096, "None"),
        ("attention_dropout", 0.1, "0.0"),
        ("hidden_dropout", 0.1, "0.0"),
        ("mamba_hidden_act", "gelu", "'silu' or 'swish'"),
        ("mlp_hidden_act", "silu", "'relu2'"),
        ("model_type", "llama", "'nemotron_h'"),
        ("num_nextn_predict_layers", 2, "one MTP module"),
        ("num_hidden_layers", 87, "88 layers"),
        ("layers_block_type", ["mamba", "conv"], "linear_attention"),
        ("hybrid_override_pattern", ["M", "E"], "'MEM*E'"),
        ("mtp_hybrid_override_pattern", 5, "'*E'"),
        ("time_step_init_min", "0.001", "0.001"),
        ("mtp_depths", 0, "at least 1"),
        ("vocab_size", "131072", "whole number"),
        ("hidden_size", None, "whole number"),
        ("norm_topk_prob", 1, "True"),
        ("chunk_size", 128.0, "128"),
        ("routed_scaling_factor", "5", "1.0"),
        ("eos_token_id", "</s>", "token id"),
        ("eos_token_id", [], "token id"),
        ("time_step_limit", 3, "two numbers"),
        ("time_step_limit", [0.0, 1.0, 2.0], "two numbers"),
    ],
)
def test_what_is_not_built_is_refused(key: str, value: Any, supported: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_hf(published(**{key: value}))
    message = str(error.value)
    assert key in message
    assert repr(value) in message
    assert supported in message


def test_all_refusals_come_in_one_error() -> None:
    wrong = dict(mlp_bias=1, sliding_window=128, mlp_hidden_act="gelu", vocab_size=...)
    with pytest.raises(ConfigError) as error:
        from_hf(published(**wrong))
    for key in wrong:
        assert key in str(error.value)
    assert "squared-ReLU experts" in str(error.value), "says what is built"
    assert "kernels have a squared ReLU only" in str(error.value), "says why nothing else is"


def test_both_names_of_mamba_s_biases() -> None:
    """mlx-lm reads mamba_proj_bias, transformers use_bias."""
    config = from_hf(published(mamba_proj_bias=True, use_bias=True))
    assert config.use_bias
    assert to_hf(config)["mamba_proj_bias"] is True
    assert from_hf(published(mamba_proj_bias=False, use_bias=True)) == config
    assert to_hf(from_hf(SUPER))["mamba_proj_bias"] is False


def test_sizes_of_layers_that_are_nowhere_may_be_zero() -> None:
    """As in files that a converter filled with 0; with such a layer they are an error."""
    dense = published(
        hybrid_override_pattern="M-*-", num_hidden_layers=4, num_nextn_predict_layers=0
    )
    zeros = dict(
        n_routed_experts=0, num_experts_per_tok=0, moe_intermediate_size=0,
        moe_shared_expert_intermediate_size=0, moe_latent_size=None,
    )  # fmt: skip
    assert from_hf(dense | zeros).pattern == "M-*-"
    with pytest.raises(ConfigError, match="intermediate_size=0"):
        from_hf(dense | {"intermediate_size": 0})
    assert from_hf(published(intermediate_size=0)).n_routed_experts == 512
    with pytest.raises(ConfigError, match="n_routed_experts=0"):
        from_hf(published(**zeros))
    with pytest.raises(ConfigError, match="n_routed_experts=0"):  # the MTP module has experts
        from_hf(dense | zeros | {"num_nextn_predict_layers": 1})


def test_sizes_that_fit_no_model_are_the_config_s_own_error() -> None:
    with pytest.raises(ConfigError, match="num_experts_per_tok=600"):
        from_hf(published(num_experts_per_tok=600))


def test_a_file_without_layers_says_so() -> None:
    with pytest.raises(ConfigError, match=r"neither hybrid_override_pattern nor layers_block_type"):
        from_hf(published(hybrid_override_pattern=..., num_hidden_layers=...))


def test_layers_are_written_once_in_the_spelling_every_reader_knows() -> None:
    """Readers older than `layers_block_type` compute it, and cannot take it from the file."""
    written = to_hf(PRESETS["super"])
    assert "layers_block_type" not in written
    assert len(written["hybrid_override_pattern"]) == written["num_hidden_layers"]


# --- hostile values, Puzzle ---------------------------------------------------------------------

OTHER_KEYS = """layers_block_type mtp_layers_block_type layer_types time_step_limit
    time_step_init_min text_config block_configs rms_norm_eps num_local_experts mamba_d_conv"""
KEYS = sorted({*to_hf(PRESETS["super"]), *OTHER_KEYS.split()})
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
JSON: st.SearchStrategy[Any] = st.recursive(
    PLAIN | st.sampled_from([10**399, -(10**399), "M" * 500, "*E", "relu2", "Infinity"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=6), inner, max_size=3),
        inner.map(lambda value: {"__float__": value}),
    ),
    max_leaves=8,
)


@given(changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3))
@settings(max_examples=400, deadline=None)
def test_any_json_makes_a_config_or_a_short_config_error(changes: dict[str, Any]) -> None:
    try:
        found: Any = from_hf(published(**changes))
    except ConfigError as error:
        found = str(error)
        assert len(found) < 4000
    if not isinstance(found, str):
        assert from_hf(json.loads(json.dumps(to_hf(found)))) == found


PUZZLE = {
    "block_configs": (
        [
            {"block_type": "mamba"},
            {"block_type": "moe", "n_routed_experts": 512, "moe_intermediate_size": 2688},
            {"block_type": "moe", "n_routed_experts": 256, "moe_intermediate_size": 1280},
        ],
        ["block_configs", "n_routed_experts (256, 512)", "moe_intermediate_size (1280, 2688)"],
    ),
    "n_routed_experts": ([512, 256, 128, 64, 32, 16], ["_experts (16, 32, 64, 128, … 512)"]),
    "moe_intermediate_size": ([2688, 1280], ["moe_intermediate_size (1280, 2688)"]),
    "model_type": ("nemotron_h_puzzle", ["Puzzle"]),
}


@pytest.mark.parametrize("key", PUZZLE)
@pytest.mark.parametrize("nested", [False, True])
def test_sizes_per_layer_are_one_error_that_names_them(key: str, nested: bool) -> None:
    value, words = PUZZLE[key]
    whole = published(**{key: value})
    with pytest.raises(ConfigError) as error:
        from_hf({"text_config": whole, "vision_config": {}} if nested else whole)
    text = str(error.value)
    assert "does not build such models" in text
    assert all(word in text for word in words), text
    assert len(text) < 1000


def test_many_blocks_are_summed_up() -> None:
    blocks = [{"n_routed_experts": i, f"k{i}": 1} for i in range(30_000)]
    with pytest.raises(ConfigError, match="n_routed_experts") as error:
        from_hf(published(block_configs=blocks))
    assert len(str(error.value)) < 1000
