"""Checks of chapter 00's exercises: for each mistake there is a config that shows it.

Answers are compared with `nemotron_lite.ledger`, which is tested against the model that it
describes. In `small` all sizes differ, so an answer that mixes up two of them is noticed. Each
check switches on one more part (a shared expert, a latent, shared heads), so the first check that
fails names the part that the answer ignores. The published sizes come last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nemotron_lite import ledger
from nemotron_lite.config import LAYER_KINDS, PRESETS, SUPER_PATTERN, NemotronConfig
from nemotron_lite.course.exercises import close, raises

Answer = Callable[..., Any]


def small(**changes: Any) -> NemotronConfig:
    """A config whose sizes are all different, so that mixing up two of them changes the result."""
    sizes: dict[str, Any] = dict(
        pattern="ME", vocab_size=8, hidden_size=96, num_attention_heads=6, num_key_value_heads=6,
        head_dim=16, mamba_num_heads=10, mamba_head_dim=14, ssm_state_size=18, n_groups=2,
        n_routed_experts=12, num_experts_per_tok=3, moe_intermediate_size=44, n_shared_experts=0,
        moe_shared_expert_intermediate_size=70,
    )  # fmt: skip
    return NemotronConfig(**(sizes | changes))


def _same_layers(function: Answer, pattern: str) -> None:
    expected = {
        kind: [i for i, letter in enumerate(pattern) if letter == own]
        for own, kind in LAYER_KINDS.items()
    }
    found = function(pattern)
    assert isinstance(found, dict), f"expected a dict, got {type(found).__name__}"
    for kind, places in expected.items():
        assert kind in found, f'{pattern!r}: the key "{kind}" is missing'
        assert list(found[kind]) == places, (
            f'{pattern!r}: "{kind}" layers are at {places}, not at {list(found[kind])}'
        )
    extra = sorted(set(found) - set(expected))
    assert not extra, f"{pattern!r}: there is no kind of layer {extra[0]!r}"


def places(function: Answer) -> None:
    _same_layers(function, "M*MM*")
    _same_layers(function, "*")


def all_four_letters(function: Answer) -> None:
    _same_layers(function, "M-M*-ME")
    _same_layers(function, SUPER_PATTERN)


def foreign_letters(function: Answer) -> None:
    # Megatron's unified string: "|" between pipeline stages, and the MTP module behind a "/".
    for pattern in ("MEM*E/*E", "ME|M*E", "mem"):
        raises(function, pattern, error=ValueError, what=f"the pattern {pattern!r}")


def _counted(function: Answer, config: NemotronConfig, what: str, part: int | None = None) -> None:
    layer = next(layer for layer in ledger.parameters(config).layers if layer.kind == "moe")
    found = function(config)
    pair = isinstance(found, tuple) and len(found) == 2
    assert pair, "expected a tuple (stored, read)"
    expected = (int(layer.total), int(layer.active))
    names = (f"stored in {what}", f"read by one token in {what}")
    for i in (0, 1) if part is None else (part,):
        close(found[i], expected[i], what=names[i], rtol=0.0, atol=0.0)


def plain_stored(function: Answer) -> None:
    _counted(function, small(), "a mixture without extras", 0)


def plain_read(function: Answer) -> None:
    _counted(function, small(), "a mixture without extras", 1)


def with_shared(function: Answer) -> None:
    _counted(function, small(n_shared_experts=1), "a mixture with a shared expert")


def with_latent(function: Answer) -> None:
    _counted(function, small(moe_latent_size=24), "a mixture with a latent")


def published_mixtures(function: Answer) -> None:
    for name in ("nano", "super"):
        _counted(function, PRESETS[name], f"a layer of {name}")


def _kept(function: Answer, config: NemotronConfig, what: str) -> None:
    close(function(config), ledger.cache(config, 1).kv_per_token, what=what, rtol=0.0, atol=0.0)


def keys_and_values(function: Answer) -> None:
    _kept(function, small(pattern="*"), "bytes a token of one attention layer")


def only_attention_layers(function: Answer) -> None:
    _kept(function, small(pattern="MEM*EM*E"), "bytes a token of 'MEM*EM*E'")
    _kept(function, small(pattern="MEME"), "bytes a token without attention")


def shared_heads(function: Answer) -> None:
    _kept(function, small(pattern="*", num_key_value_heads=2), "with 6 query and 2 KV heads")


def own_head_width(function: Answer) -> None:
    _kept(function, small(pattern="*", head_dim=40), "with heads of 40 in a model of width 96")
    _kept(function, PRESETS["nano"], "Nano's bytes a token")


def other_bytes(function: Answer) -> None:
    eighth = ledger.cache(PRESETS["super"], 1, kv_dtype="float8_e4m3fn").kv_per_token
    close(function(PRESETS["super"], 1), eighth, what="Super's bytes in FP8", rtol=0.0, atol=0.0)
    _kept(function, PRESETS["super"], "Super's bytes in BF16")


def _price(function: Answer, config: NemotronConfig, context: int, what: str) -> None:
    expected = ledger.flops(config, context, "decode").per_token
    close(function(config, context), expected, what=what, rtol=0.02, atol=0.0)


def weights_that_are_read(function: Answer) -> None:
    config = small(pattern="E", hidden_size=192, vocab_size=2, n_routed_experts=64)
    _price(function, config, 0, "FLOPs of one mixture layer that reads 3 of 64 experts")


def no_arithmetic_in_a_lookup(function: Answer) -> None:
    config = small(pattern="E", hidden_size=192, vocab_size=3000)
    _price(function, config, 10, "FLOPs with a vocabulary of 3,000")


def the_scan(function: Answer) -> None:
    config = small(pattern="M" * 4, ssm_state_size=160)
    _price(function, config, 10, "FLOPs of four Mamba layers")


def every_query_head(function: Answer) -> None:
    config = small(pattern="M*E*", num_key_value_heads=2, hidden_size=192)
    for context in (0, 4000):
        _price(function, config, context, f"FLOPs of 'M*E*' after {context:,} tokens")


def published_prices(function: Answer) -> None:
    for context in (1024, 1_048_576):
        what = f"Super's FLOPs after {context:,} tokens"
        _price(function, PRESETS["super"], context, what)
