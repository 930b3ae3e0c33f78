"""The config of a Nemotron model: all sizes, validated once, and the presets of the course.

A model is a stack of layers. Each character of `pattern` is one residual layer with one mixer:

    M  Mamba-2        E  mixture of experts (LatentMoE when `moe_latent_size` is set)
    *  attention      -  dense MLP

Sizes have the names of the published `config.json`. The comments below give the letters that the
course uses for them: d, h, p, n, g, k, e, f, l, v.

`NemotronConfig.lite(depth)` is a family with one dial: models of half a million parameters and more
with Super's proportions, of which the preset `lite` is the sixth.

Sources: Nemotron 3 Super technical report (arXiv 2604.12374) Table 1 and section 2; the Nano report
(arXiv 2512.20848) Table 1; NVIDIA's own small test model for `tiny-super`. Left out: tied
embeddings and rotary positions, which no model of the family has.
"""

from __future__ import annotations

import math
import operator
import sys
from dataclasses import dataclass, fields, replace
from typing import Any, SupportsIndex

from nemotron_lite.arguments import integer, shown

LAYER_KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}

SUPER_PATTERN = (
    "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
)
NANO_PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
ULTRA_PATTERN = (
    "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*"
    "EMEMEM*EMEMEMEM*EMEMEMEME"
)


# Bounds that no released model comes near. Beyond them a tensor has more numbers than 64 bits can
# count, or a config of a few bytes describes a model that takes minutes to list.
MOST = 2**31 - 1  # of any size
MOST_IN_A_TENSOR = 2**48
MOST_MTP_DEPTHS = 64
MOST_EOS_TOKENS = 1024
DEEPEST_LITE = 40  # pairs of layers, as many as Super has


class ConfigError(ValueError):
    """A config that no model can be built from. The message names the field and valid values."""


@dataclass(frozen=True)
class NemotronConfig:
    """Sizes of one model. Immutable; `replace(field=value)` gives a changed, re-validated copy.

    Raises:
        ConfigError: a field has an invalid value.
    """

    pattern: str
    vocab_size: int  # v
    hidden_size: int  # d

    # attention layers
    num_attention_heads: int = 4  # h
    num_key_value_heads: int = 2
    head_dim: int = 64
    attention_bias: bool = False  # no released model has biases on these projections, ...

    # Mamba-2 layers
    mamba_num_heads: int = 8  # h
    mamba_head_dim: int = 32  # p
    ssm_state_size: int = 128  # n
    n_groups: int = 1  # g
    conv_kernel: int = 4  # k
    # q, as config.json has it. The model does not compute with it: the scan takes chunks of 64 on a
    # CPU (backends/cpu_ssd.py) and what the kernel's tables say on a GPU, and the result depends on
    # it only by rounding. The ledger counts FLOPs with it.
    chunk_size: int = 128
    use_conv_bias: bool = True
    use_bias: bool = False  # ... nor on Mamba's in_proj and out_proj
    time_step_min: float = 0.001  # range of the initial step sizes; for initialization only
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: tuple[float, float] = (0.0, math.inf)  # clamp of dt; Nemotron 3 has none

    # mixture-of-experts layers
    n_routed_experts: int = 16  # e
    num_experts_per_tok: int = 2  # k
    moe_intermediate_size: int = 384  # f
    moe_latent_size: int | None = None  # l; None is a mixture of experts at width d
    n_shared_experts: int = 1
    moe_shared_expert_intermediate_size: int = 768
    n_group: int = 1  # expert groups of group-limited routing
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    # dense MLP layers
    intermediate_size: int = 768  # f
    mlp_bias: bool = False  # of dense layers, shared experts and latent projections

    # multi-token prediction: one module of this pattern, applied once per depth with shared weights
    mtp_pattern: str = ""
    mtp_depths: int = 0  # number of trained depths; 2 for Super

    norm_eps: float = 1e-5
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    max_position_embeddings: int = 262_144
    bos_token_id: int = 1
    eos_token_id: int | tuple[int, ...] = 2
    pad_token_id: int = 0

    def __post_init__(self) -> None:
        self._use_plain_numbers()
        self._check_pattern("pattern", self.pattern, set(LAYER_KINDS))
        if not isinstance(self.mtp_pattern, str) or self.mtp_pattern:
            self._check_pattern("mtp_pattern", self.mtp_pattern, {"*", "E"})
        self._check_positive(
            "vocab_size",
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "mamba_num_heads",
            "mamba_head_dim",
            "ssm_state_size",
            "n_groups",
            "conv_kernel",
            "chunk_size",
            "n_routed_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "intermediate_size",
            "n_group",
            "topk_group",
            "max_position_embeddings",
        )
        if self.moe_latent_size is not None:
            self._check_positive("moe_latent_size")
        self._check_divides("num_key_value_heads", "num_attention_heads")
        self._check_divides("n_groups", "mamba_num_heads")
        self._check_divides("n_group", "n_routed_experts")
        if self.num_experts_per_tok > self.n_routed_experts:
            self._fail("num_experts_per_tok", f"at most n_routed_experts={self.n_routed_experts}")
        self._check_expert_groups()
        if not _is_count(self.n_shared_experts) or self.n_shared_experts > 1:
            self._fail("n_shared_experts", "0 or 1 (widen moe_shared_expert_intermediate_size)")
        for name in (
            "time_step_min", "time_step_max", "time_step_floor", "norm_eps",
            "routed_scaling_factor", "initializer_range",
        ):  # fmt: skip
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) <= _LARGEST:
                self._fail(name, "a finite number above 0")
        if self.time_step_min > self.time_step_max:
            self._fail("time_step_min", f"at most time_step_max={self.time_step_max}")
        limit = self.time_step_limit
        pair = isinstance(limit, tuple) and len(limit) == 2 and all(map(_is_number, limit))
        if not pair or not 0 <= limit[0] < limit[1] or not all(map(_fits_float32, limit)):
            self._fail(
                "time_step_limit",
                "(low, high) with 0 <= low < high, in numbers of float32; (0, inf) is no clamp",
            )
        for name in (
            "use_conv_bias", "use_bias", "attention_bias", "mlp_bias", "norm_topk_prob",
            "rescale_prenorm_residual",
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                self._fail(name, "True or False")
        self._check_token_ids()
        if not _is_count(self.mtp_depths) or self.mtp_depths > MOST_MTP_DEPTHS:
            self._fail("mtp_depths", f"a whole number of at least 0 and at most {MOST_MTP_DEPTHS}")
        if bool(self.mtp_pattern) != bool(self.mtp_depths):
            self._fail("mtp_depths", "above 0 with an mtp_pattern, and 0 without one")
        self._check_tensor_sizes()

    def _use_plain_numbers(self) -> None:
        """Turn NumPy's numbers into Python's, which compare, print and save as expected.

        An integer where a float belongs becomes one, as in a file: above 2^53 they may differ.
        """
        for field in fields(self):
            value, is_float = getattr(self, field.name), "float" in str(field.type)
            if isinstance(value, tuple):
                plain: Any = tuple(_plain(part) for part in value)
                if is_float:
                    plain = tuple(map(_as_float, plain))
            else:
                plain = _as_float(_plain(value)) if is_float else _plain(value)
            if plain is not value:
                object.__setattr__(self, field.name, plain)

    def _fail(self, name: str, expected: str) -> None:
        value = shown(getattr(self, name), 100)
        raise ConfigError(f"{name}={value} does not work: expected {expected}.")

    def _check_pattern(self, name: str, pattern: object, allowed: set[str]) -> None:
        wrong = sorted(set(pattern) - allowed) if isinstance(pattern, str) else []
        if not isinstance(pattern, str) or not pattern or wrong:
            kinds = ", ".join(f"{c!r} ({LAYER_KINDS[c]})" for c in sorted(allowed))
            self._fail(name, f"a string of {kinds}" + (f", without {wrong[:8]}" if wrong else ""))

    def _check_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not _is_count(value) or value < 1:
                self._fail(name, "a whole number of at least 1")
            if value > MOST:
                self._fail(name, f"at most {MOST:,}")

    def _check_token_ids(self) -> None:
        for name in ("bos_token_id", "pad_token_id"):
            if not _is_token(getattr(self, name)):
                self._fail(name, "a token id, 0 or above")
        eos = self.eos_token_id
        each = eos if isinstance(eos, tuple) and eos else (eos,)
        if len(each) > MOST_EOS_TOKENS or not all(map(_is_token, each)):
            self._fail(
                "eos_token_id",
                f"a token id, 0 or above, or a tuple of at most {MOST_EOS_TOKENS}: (2, 11)",
            )

    def _check_divides(self, divisor: str, number: str) -> None:
        if getattr(self, number) % getattr(self, divisor):
            self._fail(divisor, f"a divisor of {number}={getattr(self, number)}")

    def _check_tensor_sizes(self) -> None:
        """Refuse sizes whose products no tensor can have."""
        d = self.hidden_size
        experts = self.n_routed_experts * self.moe_intermediate_size * self.expert_size
        shared = d * self.moe_shared_expert_intermediate_size
        for names, count in (
            (("vocab_size", "hidden_size"), self.vocab_size * d),
            (("num_attention_heads", "head_dim"), self.num_attention_heads * self.head_dim * d),
            (("mamba_num_heads", "mamba_head_dim"), self.mamba_in_proj_size * d),
            (("mamba_num_heads", "ssm_state_size"), self.mamba_inner_size * self.ssm_state_size),
            (("conv_kernel", "ssm_state_size"), self.conv_kernel * self.conv_dim),
            (("n_routed_experts", "moe_intermediate_size"), experts),
            (("n_routed_experts", "hidden_size"), self.n_routed_experts * d),
            (("moe_shared_expert_intermediate_size", "hidden_size"), shared),
            (("intermediate_size", "hidden_size"), self.intermediate_size * d),
        ):
            if count > MOST_IN_A_TENSOR:
                sizes = ", ".join(f"{name}={getattr(self, name)}" for name in names)
                raise ConfigError(
                    f"{sizes} does not work: a tensor would have {count:,} numbers, and no model "
                    f"has more than {MOST_IN_A_TENSOR:,}."
                )

    def _check_expert_groups(self) -> None:
        if self.topk_group > self.n_group:
            self._fail("topk_group", f"at most n_group={self.n_group}")
        if self.n_group == 1:
            return
        per_group = self.n_routed_experts // self.n_group
        if per_group < 2:
            self._fail(
                "n_group", "groups of 2 experts or more: a group's score is that of its best two"
            )
        if self.num_experts_per_tok > per_group * self.topk_group:
            self._fail(
                "num_experts_per_tok",
                f"at most {per_group * self.topk_group}, the experts in topk_group="
                f"{self.topk_group} groups of {per_group}",
            )

    @property
    def num_layers(self) -> int:
        """Residual layers, MTP not counted."""
        return len(self.pattern)

    @property
    def mamba_inner_size(self) -> int:
        """Channels of the Mamba mixer, h * p."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C side by side, h*p + 2*g*n."""
        return self.mamba_inner_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def mamba_in_proj_size(self) -> int:
        """Output width of the Mamba input projection: z, xBC and dt."""
        return self.mamba_inner_size + self.conv_dim + self.mamba_num_heads

    @property
    def expert_size(self) -> int:
        """Input and output width of routed experts: l with a latent, d without."""
        return self.moe_latent_size or self.hidden_size

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, as a tuple even if there is only one."""
        eos = self.eos_token_id
        return (eos,) if isinstance(eos, int) else tuple(eos)

    def replace(self, **changes: Any) -> NemotronConfig:
        """A copy with some fields changed.

        Raises:
            ConfigError: an unknown field, or a value that does not fit the others.
        """
        known = {f.name for f in fields(self)}
        unknown = sorted(set(changes) - known)
        if unknown:
            raise ConfigError(f"unknown field {unknown[0]!r}; the fields are {sorted(known)}.")
        return replace(self, **changes)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> NemotronConfig:
        """One of the named models, with optional changes.

        Args:
            name: of `PRESETS`; or "lite-1", "lite-2", ... for `lite(depth=1)`, `lite(depth=2)`, ...

        Raises:
            ConfigError: an unknown name or an invalid change.
        """
        if not is_preset(name):
            raise ConfigError(
                f"no preset {name!r}; there are {', '.join(PRESETS)}, and lite-1 to "
                f"lite-{DEEPEST_LITE}."
            )
        if name not in PRESETS:
            return cls.lite(int(name.removeprefix("lite-")), **changes)
        return PRESETS[name].replace(**changes)

    @classmethod
    def lite(cls, depth: SupportsIndex = 6, **changes: Any) -> NemotronConfig:
        """A small model with Super's proportions; `depth` alone says how large it is.

        Depth 1 has half a million parameters, 6 is the preset "lite" with 14 million, and 12 has a
        hundred million. All sizes follow from the depth, which counts pairs of a Mamba and an MoE
        layer (Super has 40):

            width           d = 64 round(2 depth / 3): it grows with the depth
            attention       in about every third pair, between its layers; always in the last one
            heads           of 32 numbers; d/32 of attention, 2 for keys and values; 2d/32 of Mamba
            latent          l = d/4
            experts         e = 64, k = 6, of width f = d/2; a shared one of width 2f = d
            MTP             *E, used for two depths
            vocabulary      v = 16 d, at least 2048 (Super has 32 d)
            initialization  0.014 sqrt(4096/d), Super's with the variance of a product kept

        Proportions of Super are the inner width of Mamba (2d), the latent, the shared expert (2f),
        attention heads that together have width d, the two key-value heads, MTP, and how M and E
        alternate. Others are those of "lite": see the comment there.

        A member whose depth is no multiple of 6 has widths that are multiples of 16, the block of
        NVFP4, but not of 64, its block in GGUF files.

        Args:
            depth: 1 to 40.
            changes: fields with another value, such as `vocab_size=4096` for one tokenizer in all
                members.

        Raises:
            ConfigError: an invalid change.
            TypeError, ValueError: `depth` is no such integer.
        """
        depth = integer("depth", depth, low=1, high=DEEPEST_LITE)
        d = 64 * ((4 * depth + 3) // 6)
        sizes: dict[str, Any] = dict(
            pattern=_lite_pattern(depth), vocab_size=max(2048, 16 * d), hidden_size=d,
            num_attention_heads=d // 32, num_key_value_heads=2, head_dim=32,
            mamba_num_heads=2 * d // 32, mamba_head_dim=32, ssm_state_size=64, n_groups=2,
            n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=d // 2,
            moe_latent_size=d // 4, moe_shared_expert_intermediate_size=d, intermediate_size=d,
            routed_scaling_factor=2.5, initializer_range=round(0.014 * math.sqrt(4096 / d), 4),
            bos_token_id=0, eos_token_id=0, pad_token_id=0, mtp_pattern="*E", mtp_depths=2,
        )  # fmt: skip
        return cls(**sizes).replace(**changes)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> NemotronConfig:
        """Read a Hugging Face `config.json`, given as a dict. See `hf_config`."""
        from nemotron_lite.hf_config import from_hf

        return from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of this model, as a dict. See `hf_config`."""
        from nemotron_lite.hf_config import to_hf

        return to_hf(self)


def is_preset(name: str) -> bool:
    """Whether `NemotronConfig.from_preset` knows a name."""
    depth = name.removeprefix("lite-")
    return name in PRESETS or (
        name.startswith("lite-") and depth in map(str, range(1, DEEPEST_LITE + 1))
    )


def _lite_pattern(depth: int) -> str:
    """Pairs of M and E; attention in the last pair of each of round(depth / 3) equal parts."""
    parts = max(1, (2 * depth + 3) // 6)
    last = {-(-i * depth // parts) for i in range(1, parts + 1)}  # pairs are counted from 1
    return "".join("M*E" if pair in last else "ME" for pair in range(1, depth + 1))


_LARGEST = sys.float_info.max
LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127


def _as_float(value: Any) -> Any:
    """An integer as a float; anything else as it is, and integers that no float can hold."""
    return float(value) if type(value) is int and abs(value) <= _LARGEST else value


def _plain(value: Any) -> Any:
    """A number of NumPy as one of Python; anything else as it is."""
    if type(value) in (int, float, bool, str) or not hasattr(value, "dtype"):
        return value
    try:
        kind = str(value.dtype)
        if kind.endswith("bool"):
            return bool(value)
        return float(value) if "float" in kind else operator.index(value)
    except (TypeError, ValueError):  # several numbers: refused by the check of its field
        return value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fits_float32(value: int | float) -> bool:
    """Whether float32, in which dt is computed, holds a number without overflow."""
    return value == math.inf or value <= LARGEST_FLOAT32


def _is_token(value: object) -> bool:
    return _is_count(value) and value <= MOST  # type: ignore[operator]


def _is_count(value: object) -> bool:
    """A whole number of at least 0; a bool does not count as one."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_FULL_SIZE: dict[str, Any] = dict(
    vocab_size=131_072, num_attention_heads=32, num_key_value_heads=2, head_dim=128,
    mamba_head_dim=64, ssm_state_size=128, n_groups=8,
)  # fmt: skip
_SUPER_MTP: dict[str, Any] = dict(mtp_pattern="*E", mtp_depths=2)

PRESETS: dict[str, NemotronConfig] = {
    # `NemotronConfig.lite(6)`: Super's proportions at a width that two CPU cores train in minutes:
    # d_inner = 2d, latent d/4, MTP *E used twice. It has fewer experts and a smaller state than
    # Super, because these take most of the time. Experts of 0.5d and a shared expert of 1.0d are
    # narrower than Super's 0.656d and 1.3125d: so every width is a multiple of 64, the block of
    # NVFP4 in GGUF files, and the packed model is small enough to ship.
    "lite": NemotronConfig(
        pattern="MEMEM*EMEMEM*E", vocab_size=4096, hidden_size=256,
        num_attention_heads=8, num_key_value_heads=2, head_dim=32,
        mamba_num_heads=16, mamba_head_dim=32, ssm_state_size=64, n_groups=2,
        n_routed_experts=64, num_experts_per_tok=6, moe_intermediate_size=128, moe_latent_size=64,
        moe_shared_expert_intermediate_size=256, intermediate_size=256,
        routed_scaling_factor=2.5, initializer_range=0.056,  # Super's 0.014 grown by 1/sqrt(d)
        bos_token_id=0, eos_token_id=0, pad_token_id=0, **_SUPER_MTP,
    ),
    # NVIDIA's own small model, which tests the official recipe.
    "tiny-super": NemotronConfig(
        pattern="MEM*EME", vocab_size=131_072, hidden_size=256,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        mamba_num_heads=8, mamba_head_dim=32, ssm_state_size=128, n_groups=8,
        n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=384, moe_latent_size=128,
        moe_shared_expert_intermediate_size=768, routed_scaling_factor=2.5, **_SUPER_MTP,
    ),
    "nano": NemotronConfig(
        pattern=NANO_PATTERN, hidden_size=2688, mamba_num_heads=64,
        n_routed_experts=128, num_experts_per_tok=6, moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712, intermediate_size=1856,
        routed_scaling_factor=2.5, **_FULL_SIZE,
    ),
    "super": NemotronConfig(
        pattern=SUPER_PATTERN, hidden_size=4096, mamba_num_heads=128,
        n_routed_experts=512, num_experts_per_tok=22, moe_intermediate_size=2688,
        moe_latent_size=1024, moe_shared_expert_intermediate_size=5376, intermediate_size=2688,
        routed_scaling_factor=5.0, initializer_range=0.014, **_FULL_SIZE, **_SUPER_MTP,
    ),
    # As in the released file, which has the routing of Super.
    "ultra": NemotronConfig(
        pattern=ULTRA_PATTERN, **{**_FULL_SIZE, "num_attention_heads": 64}, hidden_size=8192,
        mamba_num_heads=256, n_routed_experts=512, num_experts_per_tok=22,
        moe_intermediate_size=5120, moe_latent_size=2048,
        moe_shared_expert_intermediate_size=10_240, intermediate_size=5120,
        routed_scaling_factor=5.0, initializer_range=0.0099, **_SUPER_MTP,
    ),
}  # fmt: skip
