"""The numbers behind chapter 00's figures, and how they are written.

All of them are questions to `nemotron_lite.ledger`, grouped by the letters of the pattern. A model
between Super and a Transformer is made here too: Super's proportions at another width, with as many
attention layers as asked for in the places that mix tokens (`resized`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from nemotron_lite import ledger
from nemotron_lite.config import LAYER_KINDS, PRESETS, SUPER_PATTERN, NemotronConfig
from nemotron_lite.course.plotting import theme
from nemotron_lite.ledger import Number

QUESTIONS = ("stored", "read", "arithmetic", "remembered")
LETTERS = tuple(letter for letter in theme.KINDS if letter in LAYER_KINDS)
REST = "rest"  # embedding, head and the last norm: no layer's
MIXING_PLACES = len(SUPER_PATTERN) - SUPER_PATTERN.count("E")  # layers that look at other tokens


def stanzas(pattern: str) -> list[str]:
    """The pattern in lines that end with an attention layer.

    >>> stanzas("MEM*EM*E")
    ['MEM*', 'EM*', 'E']
    """
    return [line for line in pattern.replace("*", "*\n").split("\n") if line]


def shares(config: NemotronConfig, context: int) -> dict[str, dict[str, float]]:
    """What each kind of layer stores, reads, computes and remembers; see the module text.

    Keys are `QUESTIONS`, then the letters of the pattern and "rest". Stored and read are counts
    (the embedding, of which a token reads one row, is stored but not read), arithmetic is FLOPs
    of the token after `context` others, remembered is bytes after `context` tokens. The MTP module
    is not counted.
    """
    count = ledger.parameters(config)
    cost = ledger.flops(config, context, "decode")
    kept = ledger.cache(config, context)
    stored, read = _by_letter(count.by_part), _by_letter(count.active_by_part)
    read[REST] -= count.active_by_part["embedding"]
    remembered = dict.fromkeys(stored, 0.0) | {"M": kept.conv + kept.ssm, "*": kept.kv}
    return {
        "stored": stored,
        "read": read,
        "arithmetic": _by_letter(cost.by_part),
        "remembered": {k: float(v) for k, v in remembered.items()},
    }


def _by_letter(parts: Mapping[str, Number]) -> dict[str, float]:
    letters = {kind: letter for letter, kind in LAYER_KINDS.items()}
    totals = dict.fromkeys((*LETTERS, REST), 0.0)
    for part, amount in parts.items():
        if part != "mtp":
            totals[letters.get(part, REST)] += amount
    return totals


def resized(width: int, anchors: int) -> NemotronConfig:
    """Super's proportions at another width, with `anchors` of its mixing places given to attention.

    Heads, experts and latent shrink and grow with d as they do between Super and its siblings; the
    number of layers, experts and state sizes stay. Attention layers are spread evenly.

    Raises:
        ValueError: a width that is no multiple of 512, or more anchors than places.
    """
    if width < 512 or width % 512:
        raise ValueError(f"width={width}: expected a multiple of 512, so that the heads divide it.")
    if not 0 <= anchors <= MIXING_PLACES:
        raise ValueError(f"anchors={anchors}: expected 0 to {MIXING_PLACES}, the mixing places.")
    chosen = {int((i + 0.5) * MIXING_PLACES / anchors) for i in range(anchors)}
    pattern, place = "", 0
    for letter in SUPER_PATTERN:
        if letter == "E":
            pattern += "E"
        else:
            pattern += "*" if place in chosen else "M"
            place += 1
    return PRESETS["super"].replace(
        pattern=pattern, hidden_size=width, num_attention_heads=width // 128,
        mamba_num_heads=width // 32, moe_latent_size=width // 4,
        moe_intermediate_size=width * 21 // 32,
        moe_shared_expert_intermediate_size=width * 21 // 16,
    )  # fmt: skip


@cache
def growth(width: int, anchors: int) -> tuple[tuple[Number, Number], tuple[Number, Number]]:
    """Bytes remembered and FLOPs of the next token of `resized(width, anchors)`.

    Both are straight lines over the context: (at no tokens, for each token).
    """
    config = resized(width, anchors)
    kept = ledger.cache(config, 0)
    first, second = (ledger.flops(config, t, "decode").per_token for t in (0, 1))
    return (kept.total, kept.kv_per_token), (first, second - first)


def count(n: Number) -> str:
    """A large count in short: 120.7 B, 12.2 B, 7.1 M."""
    for power, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= power:
            return f"{n / power:.4g} {letter}"
    return f"{n:.4g}"


def size(n: Number) -> str:
    """Bytes in binary units: 162.3 MiB, 8 GiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n >= 2**power:
            return f"{n / 2**power:.4g} {unit}"
    return f"{n:.4g} B"


def tokens(n: int) -> str:
    """Tokens in binary thousands: 8K, 1M."""
    return f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}K" if n >= 1 << 10 else str(n)
