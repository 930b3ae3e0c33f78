"""config.json: reading and writing the sizes of a model in Hugging Face's format.

The same model has had several spellings since its first release, and programs disagree about which
keys they read. This module knows all spellings, so that `NemotronConfig` needs only one:

    layers      "MEM*E" (`hybrid_override_pattern`, the hub) or a list of names
                (`layers_block_type`, transformers 5), old names (mamba, attention) or new ones
                (linear_attention, full_attention)
    norm eps    `layer_norm_epsilon`, `norm_eps` or `rms_norm_eps`
    infinity    bare `Infinity` (the hub), `{"__float__": "Infinity"}` (transformers 5), or a number
                beyond float32, in which dt is computed (1e+308 in Ultra's file)
    mamba_*     the names of Mamba-2 before Nemotron (`mamba_d_conv`, `mamba_n_groups`, ...)

Rules:

* A missing key has the default value of transformers, because the program that wrote the file
  relied on it. Pattern, vocabulary and width have no default and are required.
* A key that requires something that is not built (tied embeddings, a sliding window, another
  activation) is an error. One error names all such keys, and says why.
* Two spellings of the same key must agree.
* A key that has no effect (`rope_theta`, `expand`, `use_cache`, ...) is ignored. The sizes of
  experts and dense layers have none where there is no such layer, and may be 0 there.
* Sizes that differ from layer to layer (NVIDIA's Puzzle releases) are an error that names them.

In a multimodal release (Nemotron VL and Omni) the sizes of the text model are in an object inside,
`text_config` or, in older files, `llm_config`. `text_part` finds it; the configs of the other parts
(`vision_config`, `audio_config`, ...) are not read.

Two keys are easy to misunderstand. `time_step_min` belongs to the initialization. It never limits
dt here, while transformers (5.23) clamps dt with it in prefill and not in decode; see
`without_dt_clamp`. And `num_nextn_predict_layers` is the number of MTP modules in the file. It is 1
for Super, which was trained to predict two more tokens with this one module. The number of depths
has no key on the hub: we write `mtp_depths`, and assume 2 if it is missing.

Three keys give linear layers a bias: `attention_bias`, `mlp_bias` (dense layers, shared experts and
latent projections) and `use_bias` (Mamba's projections). No release has one. transformers (5.23)
builds the last two and ignores `attention_bias`: it drops the biases of q, k, v and o that NVIDIA's
own code has. `mamba_proj_bias` is what mlx-lm reads in the place of `use_bias`.

Sources: reference sheet 1.2, 1.3, 2.4, 10.2; transformers 5.23 `NemotronHConfig`. Left out: the
dtype of the weights (`dtype`, `quantization_config`), which `checkpoint` reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from nemotron_lite.arguments import shown
from nemotron_lite.config import LARGEST_FLOAT32, MOST_EOS_TOKENS, ConfigError, NemotronConfig

LAYER_LETTERS = {
    "linear_attention": "M", "mamba": "M",
    "full_attention": "*", "attention": "*",
    "moe": "E",
    "mlp": "-",
}  # fmt: skip

# The MTP depths of a file that has an MTP module but no `mtp_depths`: Super's (report 2.1.2).
DEFAULT_MTP_DEPTHS = 2

# With this `time_step_min`, transformers does not clamp in prefill. Not 0: it takes the logarithm.
NO_CLAMP = 1e-30

# Field: (its spellings in config.json, starting with the one we write; the default value).
_FIELDS: dict[str, tuple[tuple[str, ...], Any]] = {
    "num_attention_heads": (("num_attention_heads",), 32),
    "num_key_value_heads": (("num_key_value_heads",), 8),
    "head_dim": (("head_dim", "attention_head_dim"), 128),
    "attention_bias": (("attention_bias",), False),
    "mamba_num_heads": (("mamba_num_heads",), 128),
    "mamba_head_dim": (("mamba_head_dim",), 64),
    "ssm_state_size": (("ssm_state_size",), 128),
    "n_groups": (("n_groups", "mamba_n_groups"), 8),
    "conv_kernel": (("conv_kernel", "mamba_d_conv"), 4),
    "chunk_size": (("chunk_size", "mamba_chunk_size"), 128),
    "use_conv_bias": (("use_conv_bias", "mamba_conv_bias"), True),
    "use_bias": (("use_bias",), False),
    "time_step_min": (("time_step_min", "mamba_dt_min"), 0.001),
    "time_step_max": (("time_step_max", "mamba_dt_max"), 0.1),
    "time_step_floor": (("time_step_floor", "mamba_dt_init_floor"), 1e-4),
    "n_routed_experts": (("n_routed_experts", "num_local_experts"), 8),
    "num_experts_per_tok": (("num_experts_per_tok",), 2),
    "moe_intermediate_size": (("moe_intermediate_size",), 7688),
    "n_shared_experts": (("n_shared_experts",), 1),
    "moe_shared_expert_intermediate_size": (("moe_shared_expert_intermediate_size",), 7688),
    "n_group": (("n_group",), 1),
    "topk_group": (("topk_group",), 1),
    "norm_topk_prob": (("norm_topk_prob",), True),
    "routed_scaling_factor": (("routed_scaling_factor",), 1.0),
    "intermediate_size": (("intermediate_size",), 21_504),
    "mlp_bias": (("mlp_bias",), False),
    "norm_eps": (("layer_norm_epsilon", "norm_eps", "rms_norm_eps"), 1e-5),
    "initializer_range": (("initializer_range",), 0.02),
    "rescale_prenorm_residual": (("rescale_prenorm_residual",), True),
    "max_position_embeddings": (("max_position_embeddings",), 4096),
    "bos_token_id": (("bos_token_id",), 1),
    "pad_token_id": (("pad_token_id",), 0),
}

# Where multimodal releases have the config of their text model; the newest name first.
TEXT_KEYS = ("text_config", "llm_config")

# Keys of configs whose layers have sizes of their own, one entry for each layer.
_PER_LAYER = ("block_configs", "mtp_block_configs", "per_layer_config", "layer_configs")

MOST_PROBLEMS = 12  # that one error lists
_WITHOUT_MTP = ". To leave it out, set num_nextn_predict_layers to 0 and load with mtp='drop'"

# Keys with one value that is built, which is that of every release: the values (the first is the
# one we write), and why there is no other.
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tie_word_embeddings": (
        (False,), "the head is a matrix of its own; a copy of the embedding does, as lm_head.weight"
    ),
    "residual_in_fp32": (
        (False,), "the residual stream has the dtype of the weights; with False, load in float32"
    ),
    "sliding_window": ((None,), "attention reads all tokens before it"),
    "attention_dropout": ((0.0,), "there is no dropout; it does not change what a model says"),
    "hidden_dropout": ((0.0,), "there is no dropout; it does not change what a model says"),
    "mamba_hidden_act": (("silu", "swish"), "the convolution's kernels have this activation only"),
    "mlp_hidden_act": (("relu2",), "the experts' kernels have a squared ReLU only"),
}  # fmt: skip

# Sizes of layers that a pattern may be without.
_SIZES_OF = {
    "E": (
        "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size",
        "moe_shared_expert_intermediate_size",
    ),
    "-": ("intermediate_size",),
}  # fmt: skip


def from_hf(config: Mapping[str, Any]) -> NemotronConfig:
    """Read the contents of a `config.json`.

    Args:
        config: the parsed file, or `NemotronHConfig.to_dict()`.

    Raises:
        ConfigError: keys that are missing, contradict each other or require something that is not
            supported (all of them are listed), or sizes that do not fit together.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(
            f"config is a {type(config).__name__}; expected the dict of a config.json."
        )
    config = text_part(config)
    _refuse_sizes_per_layer(config)
    config = {key: _plain_floats(value) for key, value in config.items()}
    problems: list[str] = []
    kind = config.get("model_type", "nemotron_h")
    if kind != "nemotron_h":
        problems.append(f"model_type is {shown(kind)}; this package reads 'nemotron_h'")
    values: dict[str, Any] = {"pattern": _layers(config, problems)}
    for name in ("vocab_size", "hidden_size"):
        values[name] = config.get(name)
        if not _is_a(values[name], int):
            problems.append(f"{name} is {shown(values[name])}; it must be a whole number")
    for field, (keys, default) in _FIELDS.items():
        values[field] = _read(config, keys, default, problems)
    if config.get("num_key_value_heads", 0) is None:  # one key head per query head
        values["num_key_value_heads"] = values["num_attention_heads"]
    values["moe_latent_size"] = config.get("moe_latent_size")
    if values["moe_latent_size"] is not None and not _is_a(values["moe_latent_size"], int):
        problems.append(
            f"moe_latent_size is {shown(values['moe_latent_size'])}; it must be a whole number or "
            "null"
        )
    values["eos_token_id"] = _eos(config, problems)
    values["time_step_limit"] = _limit(config, problems)
    # `without_dt_clamp` writes the real value here, because time_step_min then means "no clamp".
    values["time_step_min"] = _read(
        config, ("time_step_init_min",), values["time_step_min"], problems
    )
    values["mtp_pattern"], values["mtp_depths"] = _mtp(config, problems)
    _fill_unused_sizes(values)
    _check_proj_bias(config, values["use_bias"], problems)
    for key, (supported, why) in _FIXED.items():
        if key in config and config[key] not in supported:
            wanted = " or ".join(repr(value) for value in supported)
            problems.append(f"{key} is {shown(config[key])}; only {wanted} is supported: {why}")
    if values["mtp_pattern"] and config.get("mtp_use_repeated_layer") not in (None, True):
        repeated = shown(config["mtp_use_repeated_layer"])
        problems.append(
            f"mtp_use_repeated_layer is {repeated}; only True is supported: all depths share one "
            f"MTP module{_WITHOUT_MTP}"
        )
    if problems:
        if len(problems) > MOST_PROBLEMS:
            left = len(problems) - MOST_PROBLEMS
            problems[MOST_PROBLEMS:] = [f"and {left} more keys"]
        raise ConfigError(
            "this config.json describes a model that nemotron_lite does not support:\n  - "
            + "\n  - ".join(problems)
            + "\nSupported are nemotron_h models with untied embeddings, squared-ReLU experts and"
            " full attention without positional encoding. If the file does not describe its weights"
            " correctly, correct these keys."
        )
    return NemotronConfig(**values)


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model: of a multimodal release the part inside, else all of it.

    Keys that may stand on either level (dtype, ids of tokens, quantization) are taken from the
    outer one where the inner has none.
    """
    for key in TEXT_KEYS:
        inner = config.get(key)
        if isinstance(inner, Mapping):
            outer = {name: config[name] for name in _SHARED if config.get(name) is not None}
            return {**outer, **{name: value for name, value in inner.items() if value is not None}}
    return config


_SHARED = (
    "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id",
    "quantization_config", "compression_config",
)  # fmt: skip


def other_parts(config: Mapping[str, Any]) -> list[str]:
    """The configs of a multimodal release that are not its text model's: vision_config, ..."""
    if not any(isinstance(config.get(key), Mapping) for key in TEXT_KEYS):
        return []
    return sorted(
        key
        for key, value in config.items()
        if key.endswith("_config") and isinstance(value, Mapping) and key not in _NO_PARTS
    )


_NO_PARTS = (*TEXT_KEYS, "quantization_config", "compression_config", "generation_config")


def _refuse_sizes_per_layer(config: Mapping[str, Any]) -> None:
    """Refuse a config whose layers have sizes of their own.

    Raises:
        ConfigError: names the keys that differ from layer to layer.
    """
    found = [key for key in _PER_LAYER if config.get(key)]
    entries = [
        entry
        for key in found
        for entry in (config[key] if isinstance(config[key], list) else [])
        if isinstance(entry, Mapping)
    ]
    sizes: dict[str, list[Any]] = {}
    for entry in entries:
        for key, value in entry.items():
            if _is_a(value, int) and isinstance(key, str):
                sizes.setdefault(key, []).append(value)
    lists = [
        key
        for _, (keys, default) in _FIELDS.items()
        for key in keys
        if _is_a(default, int) and isinstance(config.get(key), (list, tuple))
    ]
    if not found and not lists and "puzzle" not in str(config.get("model_type", ""))[:64]:
        return
    sizes |= {key: [each for each in config[key] if _is_a(each, int)] for key in lists}
    differ = [
        f"{shown(key)[1:-1]} ({_some(set(values))})"
        for key, values in sizes.items()
        if len(set(values)) > 1
    ]
    raise ConfigError(
        f"the layers have sizes of their own ({', '.join(found or lists) or 'Puzzle'}), as in "
        "NVIDIA's Puzzle releases. nemotron_lite does not build such models: all its layers of a "
        f"kind have the same sizes. Different are: {', '.join(differ[:8]) or 'none that is known'}"
        ". Take a release with equal layers, such as Nemotron 3 Nano or Super."
    )


def _some(values: Iterable[int], limit: int = 4) -> str:
    ordered = sorted(values)
    some = ", ".join(shown(value, 20) for value in ordered[:limit])
    return some if len(ordered) <= limit else f"{some}, … {shown(ordered[-1], 20)}"


def to_hf(config: NemotronConfig) -> dict[str, Any]:
    """The contents of a `config.json`, with the keys of the published models.

    All programs can read these keys: transformers 5 converts the pattern itself, while
    older programs (remote code, serving engines) know only the pattern. `time_step_limit` is
    omitted when it limits nothing, as in the release. Otherwise it is written and may contain
    `inf`, for which `json.dumps` writes `Infinity`.

    transformers ignores `n_shared_experts=0` and creates a shared expert with random weights. It
    also ignores `attention_bias` and drops these biases. No other key avoids this.
    """
    hf: dict[str, Any] = {
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "hybrid_override_pattern": config.pattern,
        "num_hidden_layers": config.num_layers,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
    }
    for field, (keys, _) in _FIELDS.items():
        hf[keys[0]] = getattr(config, field)
    hf["norm_eps"] = config.norm_eps  # some programs read this name, some the other
    hf["moe_latent_size"] = config.moe_latent_size
    eos = config.eos_token_id
    hf["eos_token_id"] = eos if isinstance(eos, int) else list(eos)
    if config.time_step_limit != (0.0, math.inf):
        hf["time_step_limit"] = list(config.time_step_limit)
    hf["num_nextn_predict_layers"] = 1 if config.mtp_pattern else 0
    if config.mtp_pattern:
        hf["mtp_hybrid_override_pattern"] = config.mtp_pattern
        hf["mtp_depths"] = config.mtp_depths
    hf["mamba_proj_bias"] = config.use_bias  # mlx-lm reads this name
    for key, (supported, _) in _FIXED.items():
        hf[key] = supported[0]
    # The dtype of the SSM state in the caches of other programs.
    hf["mamba_ssm_cache_dtype"] = "float32"
    return hf


def without_dt_clamp(hf: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a `config.json` with which transformers computes the same logits as we do.

    transformers 5.23 reads `time_step_min` as a lower limit of dt, in prefill only (reference sheet
    2.4). With the published 0.001 a trained model gives other logits there, and prefill disagrees
    with decode. So `time_step_min` is written as the limit that we really apply, which is none by
    default. The published number is written as `time_step_init_min`, which `from_hf` reads.
    """
    low = hf.get("time_step_limit", (0.0,))[0]
    start = hf.get("time_step_init_min", hf["time_step_min"])
    return {**hf, "time_step_min": max(low, NO_CLAMP), "time_step_init_min": start}


def _plain_floats(value: Any) -> Any:
    """Convert transformers' spelling of infinity and NaN, which JSON cannot represent."""
    if isinstance(value, (list, tuple)) and len(value) == 2:  # time_step_limit
        return [_plain_float(item) for item in value]
    return _plain_float(value)


def _plain_float(value: Any) -> Any:
    if isinstance(value, Mapping) and set(value) == {"__float__"}:
        name = value["__float__"]
        if isinstance(name, str) and name in ("Infinity", "-Infinity", "NaN"):
            return float(name)
    return value


def _is_a(value: Any, kind: type) -> bool:
    """Whether a JSON value is of `kind`. A bool is not an int; an int is accepted as a float."""
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _read(config: dict[str, Any], keys: tuple[str, ...], default: Any, problems: list[str]) -> Any:
    """The value of a field from any of its spellings; null counts as missing."""
    found = {key: config[key] for key in keys if config.get(key) is not None}
    for key, value in found.items():
        if not _is_a(value, type(default)):
            problems.append(f"{key} is {shown(value)}; it must be like {default!r}")
            return default
    if len(set(found.values())) > 1:
        both = ", ".join(f"{key}={shown(value)}" for key, value in found.items())
        problems.append(f"{both} are spellings of the same key and must agree")
    value = next(iter(found.values()), default)
    if not isinstance(default, float):
        return value
    try:
        return float(value)
    except OverflowError:  # an integer of more than 308 digits
        problems.append(f"{next(iter(found))} is {shown(value)}, which is too large")
        return default


def _string(config: dict[str, Any], key: str, problems: list[str]) -> str:
    """A pattern; `NemotronConfig` checks its letters."""
    value = config[key]
    if not isinstance(value, str):
        like = "'*E'" if key.startswith("mtp") else "'MEM*E'"
        problems.append(f"{key} is {shown(value)}; it must be a string like {like}")
        return ""
    return value


def _letters(key: str, names: Any, problems: list[str]) -> str:
    """A list of layer names as a pattern."""
    known = isinstance(names, list) and all(
        isinstance(name, str) and name in LAYER_LETTERS for name in names
    )
    if not known:
        expected = ", ".join(LAYER_LETTERS)
        problems.append(f"{key} is {shown(names, 120)}; it must be a list of {expected}")
        return ""
    return "".join(LAYER_LETTERS[name] for name in names)


def _layers(config: dict[str, Any], problems: list[str]) -> str:
    """The layer pattern, from either spelling."""
    found: dict[str, str] = {}
    if config.get("hybrid_override_pattern"):
        found["hybrid_override_pattern"] = _string(config, "hybrid_override_pattern", problems)
    for key in ("layers_block_type", "layer_types"):
        if config.get(key) is not None:
            found[key] = _letters(key, config[key], problems)
    if not found:
        problems.append("neither hybrid_override_pattern nor layers_block_type gives the layers")
        return ""
    pattern = next(iter(found.values()))
    if len(set(found.values())) > 1:
        spelled = ", ".join(f"{key} ({shown(value, 120)})" for key, value in found.items())
        problems.append(f"the layers contradict each other: {spelled}")
    layers = config.get("num_hidden_layers")
    if layers is not None and layers != len(pattern):
        problems.append(
            f"num_hidden_layers is {shown(layers)}, but the pattern has {len(pattern)} layers"
        )
    return pattern


def _mtp(config: dict[str, Any], problems: list[str]) -> tuple[str, int]:
    """Pattern and trained depths of the MTP module; ("", 0) without one."""
    modules = config.get("num_nextn_predict_layers") or 0
    if modules is not False and (not _is_a(modules, int) or modules not in (0, 1)):
        problems.append(
            f"num_nextn_predict_layers is {shown(modules)}; only one MTP module, shared by all "
            f"depths, is supported{_WITHOUT_MTP}"
        )
    if not modules:
        return "", 0
    pattern = None
    if config.get("mtp_hybrid_override_pattern"):
        pattern = _string(config, "mtp_hybrid_override_pattern", problems)
    names = config.get("mtp_layers_block_type")
    listed = _letters("mtp_layers_block_type", names, problems) if names is not None else None
    if pattern and listed and pattern != listed:
        problems.append(
            f"the MTP layers contradict each other: mtp_hybrid_override_pattern "
            f"({shown(pattern)}), mtp_layers_block_type ({shown(listed)})"
        )
    depths = config.get("mtp_depths", DEFAULT_MTP_DEPTHS)
    if not _is_a(depths, int) or depths < 1:
        problems.append(f"mtp_depths is {shown(depths)}; it must be a whole number of at least 1")
        depths = DEFAULT_MTP_DEPTHS
    return pattern or listed or "*E", depths


def _eos(config: dict[str, Any], problems: list[str]) -> int | tuple[int, ...]:
    """One end-of-sequence id, or several."""
    eos = config.get("eos_token_id")
    if eos is None:
        return 2
    several = isinstance(eos, list) and 0 < len(eos) <= MOST_EOS_TOKENS
    if several and all(_is_a(item, int) for item in eos):
        return tuple(eos)
    if not _is_a(eos, int):
        problems.append(f"eos_token_id is {shown(eos)}; it must be a token id or a list of them")
        return 2
    return int(eos)


def _fill_unused_sizes(values: dict[str, Any]) -> None:
    """Give the sizes of layers that are nowhere their default values where a file has 0."""
    for letter, fields in _SIZES_OF.items():
        unused = letter not in values["pattern"] + values["mtp_pattern"]
        if unused and any(values[field] == 0 for field in fields):
            values |= {field: _FIELDS[field][1] for field in fields}


def _check_proj_bias(config: dict[str, Any], use_bias: bool, problems: list[str]) -> None:
    """Refuse a file that has `mamba_proj_bias` without `use_bias`: programs read either of them."""
    proj_bias = config.get("mamba_proj_bias")
    if proj_bias not in (None, False) and not (proj_bias is True and use_bias):
        problems.append(
            f"mamba_proj_bias is {shown(proj_bias)}, and use_bias is {use_bias}: set both to True "
            "if in_proj and out_proj have biases in the files, else to False"
        )


def _limit(config: dict[str, Any], problems: list[str]) -> tuple[float, float]:
    """The clamp of dt: none, unless the file has `time_step_limit`."""
    found = [config[k] for k in ("time_step_limit", "mamba_dt_limit") if config.get(k) is not None]
    limit = found[0] if found else [0.0, math.inf]
    pair = isinstance(limit, (list, tuple)) and len(limit) == 2
    try:
        if not pair or not all(_is_a(value, float) or value == "Infinity" for value in limit):
            raise ValueError
        low, high = (float(value) for value in limit)
    except (ValueError, OverflowError):
        problems.append(
            f"time_step_limit is {shown(limit)}; it must be two numbers, as [0.0, Infinity]"
        )
        return 0.0, math.inf
    return low, high if high <= LARGEST_FLOAT32 else math.inf
