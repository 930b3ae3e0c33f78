"""The arithmetic of a model: what it stores, what a token costs, what a sequence keeps.

Nothing here builds a tensor. Each number is a row with the formula that gives it, in the letters of
the course. The formula that is shown is the one that is evaluated:

    in_proj    d * (2*h*p + 2*g*n + h)    4096 * (2*128*64 + 2*8*128 + 128)    76,021,760

The formulas of a layer are in the file of its mixer (`parameter_lines`, `flop_lines` and
`cache_lines` in layers/). Here they are counted over the layers of a config, and embedding, final
norm and head are added.

Three questions:

- `parameters`: how many numbers the model stores, and how many of them one token reads. A mixture
  of experts stores e experts and reads k: of Super's 120.7 billion parameters a token reads 12.8.
- `flops`: how much arithmetic one token takes. A multiply-add is two. Counted: matrix products, the
  convolution, attention's two products, the scan. Left out: norms, activations, softmax, decays,
  top-k, which are a few operations per element beside thousands.
- `cache`: how many bytes a sequence of t tokens keeps. Attention's keys and values grow with t;
  the convolution's last k-1 inputs and the scan's state do not.

`family` gives the answers for all sizes of `NemotronConfig.lite` together.

Only causal work is counted: in attention token t reads t keys, and in a chunk of the scan position
l reads l positions. Programs that multiply whole squares and mask one half do about twice as much.

Source: Nemotron 3 Super report (arXiv 2604.12374) Table 1. Letters beside those of the course:
j key-value heads, s width of the shared expert, a keys that a token reads, w positions of its chunk
that a token reads, c chunks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType

from nemotron_lite.config import LAYER_KINDS, NemotronConfig
from nemotron_lite.layers import MIXERS, MTP, Block, LedgerLine

Number = int | float

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
BYTES |= {"float8_e4m3fn": 1, "float8_e5m2": 1}


@dataclass(frozen=True)
class Row:
    """One line of the ledger: a tensor or an operation of one kind of layer."""

    part: str  # mamba, attention, moe, mlp, mtp, embedding, norm, head
    name: str
    formula: str
    letters: Mapping[str, Number]
    each: Number  # one layer
    count: int  # layers that have it (times the depths, in FLOPs of MTP)
    active_each: Number  # what one token uses of it; differs from `each` for experts only
    mtp: bool = False

    @property
    def total(self) -> Number:
        """In all layers."""
        return self.each * self.count

    @property
    def active(self) -> Number:
        """What one token uses, in all layers."""
        return self.active_each * self.count

    @property
    def worked(self) -> str:
        """The formula with numbers in place of the letters."""
        return re.sub(r"[a-z]", lambda m: f"{self.letters[m[0]]:.12g}", self.formula)


@dataclass(frozen=True)
class Layer:
    """One layer of the pattern, in order."""

    index: int
    kind: str
    total: Number
    active: Number


@dataclass(frozen=True)
class Parameters:
    """Numbers stored. The router's selection bias is counted: it is learned, without a gradient."""

    rows: tuple[Row, ...]
    layers: tuple[Layer, ...]

    @property
    def backbone(self) -> int:
        """Everything but the MTP module."""
        return int(sum(row.total for row in self.rows if not row.mtp))

    @property
    def mtp(self) -> int:
        """The MTP module; it shares the embedding and the head, which are not counted again."""
        return int(sum(row.total for row in self.rows if row.mtp))

    @property
    def total(self) -> int:
        """Backbone and MTP module."""
        return self.backbone + self.mtp

    @property
    def active(self) -> int:
        """Backbone parameters one token reads, embedding and head in full as reports count them."""
        return int(sum(row.active for row in self.rows if not row.mtp))

    @property
    def active_without_embedding(self) -> int:
        """`active` less the embedding table, of which a token reads one row."""
        return self.active - self.by_part["embedding"]

    @property
    def active_body(self) -> int:
        """`active` less embedding and head: the layers and the last norm."""
        return self.active_without_embedding - self.by_part["head"]

    @property
    def by_part(self) -> dict[str, int]:
        """Stored parameters by part; "mtp" holds that module's own layers."""
        return {part: int(n) for part, n in _by_part(self.rows, "total").items()}

    @property
    def active_by_part(self) -> dict[str, int]:
        """Parameters one token reads, by part."""
        return {part: int(n) for part, n in _by_part(self.rows, "active").items()}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one token: the average over the prompt, or the next one after a context."""

    rows: tuple[Row, ...]
    mode: str
    context: int

    @property
    def per_token(self) -> Number:
        """FLOPs of one token."""
        return sum(row.total for row in self.rows)

    @property
    def by_part(self) -> dict[str, Number]:
        """FLOPs of one token by part."""
        return _by_part(self.rows, "total")

    @property
    def total(self) -> Number:
        """FLOPs of the whole prompt (prefill, train) or of the one token (decode)."""
        return self.per_token * (1 if self.mode == "decode" else self.context)


@dataclass(frozen=True)
class CacheBytes:
    """Bytes that `batch` sequences keep after `context` tokens each."""

    kv_per_token: int  # one sequence, all attention layers
    kv: int
    conv: int
    ssm: int

    @property
    def total(self) -> int:
        """Keys and values, convolution inputs and states."""
        return self.kv + self.conv + self.ssm


@dataclass(frozen=True)
class Member:
    """One model of a family."""

    depth: int
    config: NemotronConfig
    parameters: Parameters
    training: Flops  # FLOPs of a token in training
    cache: CacheBytes  # of one sequence of that context


def family(depths: Iterable[int] = range(1, 13), context: int = 512) -> tuple[Member, ...]:
    """The models `NemotronConfig.lite(depth)`: half a million to a hundred million parameters.

    Args:
        depths: which of them.
        context: tokens of a sequence, for FLOPs and cache.

    >>> [f"{member.parameters.total / 1e6:.1f}" for member in family((1, 6, 12))]
    ['0.5', '14.1', '96.1']
    """
    found = []
    for depth in depths:
        config = NemotronConfig.lite(depth)
        work = flops(config, context, "train")
        found.append(Member(depth, config, parameters(config), work, cache(config, context)))
    return tuple(found)


def parameters(config: NemotronConfig) -> Parameters:
    """Every stored parameter of the model, by tensor and by layer.

    >>> parameters(NemotronConfig.from_preset("super")).backbone
    120668707840
    """
    rows = [_row(config, "embedding", LedgerLine("weight", "v * d"))]
    for letter, count in _counts(config.pattern).items():
        for line in Block.parameter_lines(config, letter):
            rows.append(_row(config, letter, line, count=count))
    rows.append(_row(config, "norm", LedgerLine("norm_f", "d")))
    rows.append(_row(config, "head", LedgerLine("weight", "v * d")))
    if config.mtp_pattern:
        rows += [_row(config, "mtp", line, mtp=True) for line in MTP.parameter_lines()]
        for letter, count in _counts(config.mtp_pattern).items():
            for line in Block.parameter_lines(config, letter):
                rows.append(_row(config, letter, line, count=count, mtp=True))
    layers = []
    for index, letter in enumerate(config.pattern):
        kind = LAYER_KINDS[letter]
        mine = [row for row in rows if row.part == kind and not row.mtp]
        active = sum(row.active_each for row in mine)
        layers.append(Layer(index, kind, sum(row.each for row in mine), active))
    return Parameters(tuple(rows), tuple(layers))


def flops(
    config: NemotronConfig,
    context: int,
    mode: str = "prefill",
    *,
    chunk: int | None = None,
    mtp_depths: int | None = None,
    logits_to_keep: int = 0,
) -> Flops:
    """FLOPs per token.

    Args:
        context: tokens t. "prefill" and "train": the length of the prompt, over which the cost is
            averaged. "decode": the tokens already read before the one counted.
        mode: "prefill" (chunked scan), "decode" (one step of the recurrence), "train" (three times
            prefill: the backward pass makes two products for each one of the forward pass).
        chunk: chunk length of the scan; by default `config.chunk_size`, with which the model itself
            does not compute (on a CPU it takes chunks of 32 to 64).
        mtp_depths: how often the MTP module runs; 0 by default, the config's depths in "train".
        logits_to_keep: count the head for that many last tokens of the prompt; 0 for all of them.
            Does not change "decode", which has one token.

    Raises:
        ValueError: context or chunk below 1, an unknown mode, MTP depths without a module, or more
            logits than tokens.
    """
    if mode not in ("prefill", "decode", "train"):
        raise ValueError(f"mode={mode!r}: expected 'prefill', 'decode' or 'train'.")
    if context < (0 if mode == "decode" else 1):
        raise ValueError(f"context={context}: expected a number of tokens of at least 1.")
    chunk = config.chunk_size if chunk is None else chunk
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least 1.")
    if mtp_depths is None:
        mtp_depths = config.mtp_depths if mode == "train" else 0
    if mtp_depths and not config.mtp_pattern:
        raise ValueError(f"mtp_depths={mtp_depths}: this model has no MTP module; use 0.")

    extra: dict[str, Number] = {"a": context + 1, "t": context}
    if mode != "decode":
        full, rest = divmod(context, chunk)
        inside = full * chunk * (chunk + 1) / 2 + rest * (rest + 1) / 2
        chunks = full + (rest > 0)
        extra = {"a": (context + 1) / 2, "t": context, "w": inside / context, "c": chunks}
    head = "2*d*v"
    if logits_to_keep and mode != "decode":
        if not 0 < logits_to_keep <= context:
            raise ValueError(
                f"logits_to_keep={logits_to_keep}: expected 0 (all) to {context}, the tokens of "
                "the prompt."
            )
        head = f"{logits_to_keep} * 2*d*v / t"
    times = "3 * ({})" if mode == "train" else "{}"

    def row(part: str, line: LedgerLine, count: int = 1, mtp: bool = False) -> Row:
        line = LedgerLine(line.name, times.format(line.formula))
        return _row(config, part, line, extra=extra, count=count, mtp=mtp)

    rows = []
    for letter, count in _counts(config.pattern).items():
        rows += [row(letter, line, count) for line in MIXERS[letter].flop_lines(config, mode)]
    rows.append(row("head", LedgerLine("logits", head)))
    if mtp_depths:
        rows += [row("mtp", line, mtp_depths, True) for line in MTP.flop_lines()]
        for letter, count in _counts(config.mtp_pattern).items():
            for line in MIXERS[letter].flop_lines(config, mode):
                rows.append(row(letter, line, count * mtp_depths, True))
        rows.append(row("head", LedgerLine("logits", head), mtp_depths, True))
    return Flops(tuple(rows), mode, context)


def cache(
    config: NemotronConfig,
    context: int,
    *,
    batch: int = 1,
    kv_dtype: object = "bfloat16",
    conv_dtype: object = "bfloat16",
    ssm_dtype: object = "float32",
    mtp: bool = False,
) -> CacheBytes:
    """Bytes that are kept after `context` tokens.

        KV    attention layers * 2 (K and V) * j * p * t
        conv  Mamba layers * (k-1) * (h*p + 2*g*n)
        SSM   Mamba layers * h * p * n

    Args:
        context, batch: tokens t of each sequence, and how many sequences.
        kv_dtype, conv_dtype, ssm_dtype: names of dtypes, or torch dtypes. The defaults are those of
            the published model; a state in float32 keeps its rounding errors from adding up.
        mtp: count the MTP module's own attention layers too (speculative decoding).

    Raises:
        ValueError: a negative context, a batch below 1, an unknown dtype.
    """
    if context < 0:
        raise ValueError(f"context={context}: expected a number of tokens of at least 0.")
    if batch < 1:
        raise ValueError(f"batch={batch}: expected at least 1 sequence.")
    width = {"kv": bytes_of(kv_dtype), "conv": bytes_of(conv_dtype), "ssm": bytes_of(ssm_dtype)}
    values = cached_values(config, context, mtp=mtp)
    kept = {name: batch * count * width[name] for name, count in values.items()}
    kv_per_token = cached_values(config, 1, mtp=mtp)["kv"] * width["kv"]
    return CacheBytes(kv_per_token, kept["kv"], kept["conv"], kept["ssm"])


def cached_values(config: NemotronConfig, context: int, *, mtp: bool = False) -> dict[str, int]:
    """Numbers that one sequence of `context` tokens keeps: "kv", "conv" and "ssm".

    Args:
        mtp: count the MTP module's own layers too.
    """
    values = dict.fromkeys(("kv", "conv", "ssm"), 0)
    for letter, count in _counts(config.pattern + (config.mtp_pattern if mtp else "")).items():
        for line in MIXERS[letter].cache_lines(config):
            row = _row(config, letter, line, extra={"t": context}, count=count)
            values[line.name] += int(row.total)
    return values


def bytes_of(dtype: object) -> int:
    """Bytes of one value of a dtype ("bfloat16" or torch.bfloat16); ValueError when unknown."""
    name = str(dtype).removeprefix("torch.")
    if name not in BYTES:
        raise ValueError(f"dtype={name!r}: expected one of {', '.join(BYTES)}.")
    return BYTES[name]


def _row(
    config: NemotronConfig,
    part: str,
    line: LedgerLine,
    *,
    extra: Mapping[str, Number] | None = None,
    count: int = 1,
    mtp: bool = False,
) -> Row:
    """Evaluate one line. `part` is the letter of a kind of layer, or the name of another part."""
    names = {"d": "hidden_size", "v": "vocab_size"}
    if part in MIXERS:
        names |= MIXERS[part].LETTERS
    letters = {letter: getattr(config, name) for letter, name in names.items()} | dict(extra or {})
    each = _value(line.formula, letters)
    active = each if line.active is None else _value(line.active, letters)
    part = LAYER_KINDS.get(part, part)
    return Row(part, line.name, line.formula, letters, each, count, active, mtp)


def _value(formula: str, letters: Mapping[str, Number]) -> Number:
    # Only constants of this package are evaluated: the number cannot differ from the formula shown.
    return eval(_compiled(formula), {"__builtins__": {}}, dict(letters))


@lru_cache(maxsize=256)
def _compiled(formula: str) -> CodeType:
    return compile(formula, "<formula>", "eval")


def _counts(pattern: str) -> dict[str, int]:
    """Layers of each kind that is present, by letter, in the order of `LAYER_KINDS`."""
    return {letter: pattern.count(letter) for letter in LAYER_KINDS if letter in pattern}


def _by_part(rows: Iterable[Row], field: str) -> dict[str, Number]:
    totals: dict[str, Number] = {}
    for row in rows:
        part = "mtp" if row.mtp else row.part
        totals[part] = totals.get(part, 0) + getattr(row, field)
    return totals
