"""The tables that the commands print with rich: the ledger, formats and scores.

A row of the ledger shows the formula in the letters of the course, the same formula with numbers,
and the result. Numbers have three or four digits, so that they are easy to compare; `ledger` gives
the exact ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from nemotron_lite import ledger
from nemotron_lite.config import LAYER_KINDS, NemotronConfig
from nemotron_lite.quantization.recipe import OPERANDS, ROLES, ModuleFormat, Recipe, module_formats

if TYPE_CHECKING:
    from nemotron_lite.checkpoint import StorageRow
    from nemotron_lite.data.baselines import Baselines
    from nemotron_lite.train import Evaluation

WIDE = 130  # characters that a table with all columns needs
CONTEXTS = (1024, 8192, 65_536, 1_048_576)


def brief_table(config: NemotronConfig, context: int) -> Table:
    """One line per part: its parameters, those that a token uses, and FLOPs per token."""
    stored = ledger.parameters(config)
    cost = ledger.flops(config, context, mtp_depths=config.mtp_depths).by_part
    table = _table("part", "layers", "parameters", "a token uses", "FLOPs per token")
    for part, count in stored.by_part.items():
        table.add_row(
            part,
            _layers(config, part),
            number(count),
            number(stored.active_by_part[part]),
            number(cost[part]) if part in cost else "-",
        )
    active = sum(stored.active_by_part.values())
    table.add_section()
    table.add_row(
        "all",
        str(len(config.pattern)),
        number(stored.total),
        number(active),
        number(sum(cost.values())),
    )
    return table


def parameter_table(config: NemotronConfig, width: int = WIDE) -> Table:
    """Every tensor with its formula; totals as the reports count them."""
    count = ledger.parameters(config)
    table = _ledger_table("Parameters", "tensor", width)
    table.caption = (
        "d width, v vocabulary; h heads, p head width, n state, g groups, k taps; j key-value "
        "heads; e experts, k chosen, f their width, l latent, s shared expert's width"
    )
    _rows(table, count.rows, width)
    totals = {"backbone": count.backbone, "MTP module": count.mtp, "in all": count.total}
    totals |= {
        "a token uses": count.active,
        "without the embedding": count.active_without_embedding,
        "without embedding and head": count.active_body,
    }
    for name, value in totals.items():
        _total(table, name, f"{value:,}", value, width)
    return table


def flops_table(config: NemotronConfig, context: int, width: int = WIDE) -> Table:
    """FLOPs per token of prefill, decode and training."""
    prefill = ledger.flops(config, context)
    decode = ledger.flops(config, context, "decode")
    title = f"FLOPs per token, prefill of {context:,} tokens"
    table = _ledger_table(title, "operation", width)
    table.caption = "a keys a token reads on average, w positions of its chunk; c chunks, t tokens"
    _rows(table, prefill.rows, width)
    train = ledger.flops(config, context, "train")
    for name, cost in (
        (f"prefill of {context:,} tokens", prefill), (f"decode after {context:,}", decode),
        ("training (MTP included)", train),
    ):  # fmt: skip
        _total(table, name, "", cost.per_token, width)
    return table


def cache_table(config: NemotronConfig, context: int) -> Table:
    """Size of the cache of one sequence by context length; only keys and values grow."""
    table = _table("tokens", "keys and values", "convolution", "SSM states", "all")
    table.title = "Cache of one sequence (bfloat16, SSM states in float32)"
    for tokens in sorted({*CONTEXTS, context}):
        held = ledger.cache(config, tokens)
        table.add_row(f"{tokens:,}", *(size(n) for n in (held.kv, held.conv, held.ssm, held.total)))
    return table


def family_table(members: Sequence[ledger.Member], width: int = WIDE) -> Table:
    """One line per member of a family; parts and cache only if there is space for all columns."""
    more = ("vocabulary", "embedding, head", "MTP", "cache") if width >= WIDE else ()
    table = _table(
        "model", "layers", "width", "parameters", "a token uses", "FLOPs per token", *more
    )
    context = members[0].training.context
    table.title = "Family of lite"
    cache = " and cache of one sequence" if more else ""
    table.caption = f"FLOPs in training{cache}, at {context:,} tokens"
    for member in members:
        parts, config = member.parameters.by_part, member.config
        cells = [
            f"lite-{member.depth}",
            f"{config.num_layers}",
            f"{config.hidden_size:,}",
            number(member.parameters.total),
            number(member.parameters.active),
            number(member.training.per_token),
        ]
        if more:
            cells += [
                f"{config.vocab_size:,}",
                number(parts["embedding"] + parts["head"]),
                number(parts["mtp"]),
                size(member.cache.total),
            ]
        table.add_row(*cells)
    return table


def layer_table(config: NemotronConfig, recipe: Recipe) -> Table:
    """Every layer of the pattern in order, and the formats of its matrices."""
    table = _table(
        "layer", "kind", f"runs in ({recipe.name})", "parameters", "a token uses", left=3
    )
    table.title = "Layers"
    modules = module_formats(config, recipe)
    for layer in ledger.parameters(config).layers:
        formats = {module.format for module in modules if module.layer == layer.index}
        names = ", ".join(format.upper() for format in sorted(formats, key=_bits))
        counts = f"{layer.total:,}", f"{layer.active:,}"
        table.add_row(str(layer.index), layer.kind, names, *counts)
    return table


def precision_table(config: NemotronConfig, recipe: Recipe) -> Table:
    """The recipe applied to this model: each format's matrices, and their share of the weights."""
    modules = module_formats(config, recipe)
    table = _table("runs in", "matrices", "layers", "parameters", "share", left=3)
    tail = recipe.tail_layers(config.num_layers)
    table.title = f"Precision: {recipe.name}"
    table.caption = "norms, softmax, convolution and scan as in BF16 training; master weights FP32"
    if tail:
        table.caption += f"; tail of BF16 from layer {config.num_layers - tail}"
    total = sum(module.parameters for module in modules)
    widest_first = sorted((m.format for m in modules), key=lambda f: -_bits(f))
    for format in dict.fromkeys(widest_first):
        of_format = [module for module in modules if module.format == format]
        for name, group in _by_role(of_format):
            count = sum(module.parameters for module in group)
            table.add_row(
                format.upper(), name, _ranges(group), number(count), f"{count / total:.1%}"
            )
        count = sum(module.parameters for module in of_format)
        table.add_row(
            "", _bold(f"{format.upper()} in all"), "", number(count), f"{count / total:.1%}"
        )
        table.add_section()
    return table


def gemm_table(recipe: Recipe) -> Table:
    """How the operands of the three matrix products of an NVFP4 layer are quantized."""
    table = _table("operand", "read by", "block", "Hadamard", "rounding", left=5)
    table.title = "NVFP4 products: y = x W^T, dx = dy W, dW = dy^T x"
    for name, used in OPERANDS.items():
        how = getattr(recipe.gemm, name)
        rounding = "stochastic" if how.stochastic else "to nearest"
        words = name.replace("_", " ")
        table.add_row(words, used, how.block, "yes" if how.hadamard else "no", rounding)
    return table


def _bits(format: str) -> int:
    return {"fp32": 32, "bf16": 16, "mxfp8": 8, "nvfp4": 4}[format]


def _by_role(modules: list[ModuleFormat]) -> list[tuple[str, list[ModuleFormat]]]:
    """Modules of one format, grouped by role; modules of the BF16 tail are a group of their own."""
    groups: dict[str, list[ModuleFormat]] = {}
    for module in modules:
        group = "the last layers" if module.in_tail else ROLES[module.role]
        groups.setdefault(group, []).append(module)
    return list(groups.items())


def _ranges(modules: list[ModuleFormat]) -> str:
    """The layers of these modules: how many, and the first and the last of them."""
    layers = sorted({module.layer for module in modules if module.layer is not None})
    if not layers:
        return ""
    return f"{len(layers)}: {layers[0]} to {layers[-1]}" if len(layers) > 1 else f"1: {layers[0]}"


def stored_table(groups: Iterable[StorageRow]) -> Table:
    """What a checkpoint's files hold: which matrices in which format, and in how many bytes."""
    groups = list(groups)
    table = _table("format", "matrices", "modules", "weights", "bits each", "bytes", left=2)
    table.title = "Files"
    for group in groups:
        table.add_row(
            group.format,
            ROLES.get(group.role, "norms and the rest"),
            f"{group.modules:,}",
            number(group.weights),
            f"{group.bits:.3f}",
            size(group.num_bytes),
        )
    table.add_section()
    weights, stored = sum(g.weights for g in groups), sum(g.num_bytes for g in groups)
    table.add_row(
        _bold("in all"),
        "",
        "",
        number(weights),
        f"{8 * stored / weights:.3f}",
        _bold(size(stored)),
    )
    return table


def loss_table(lines: Iterable[tuple[str, Evaluation, int]]) -> Table:
    """Held-out loss and bytes on disk of versions of one model; changes are against the first."""
    lines = list(lines)
    table = _table("model", "nats a token", "bits a byte", "change", "on disk")
    (_, base, before), *_ = lines
    for name, score, stored in lines:
        change = f"{score.nats_per_token / base.nats_per_token - 1:+.2%}"
        share = f"{size(stored)} ({stored / before:.0%})"
        table.add_row(
            name,
            f"{score.nats_per_token:.4f}",
            f"{score.bits_per_byte:.4f}",
            "" if score is base else change,
            share,
        )
    return table


def score_table(scores: Iterable[tuple[str, float, str]], baselines: Baselines) -> Table:
    """Models and the baselines, best first; the models are bold.

    Args:
        scores: name, bits per byte, and what the model has seen.
    """
    table = _table("model", "bits per byte", "what it has seen", left=1)
    ours = list(scores)
    others = [
        ("gzip -9", baselines.gzip, "the held-out text only"),
        ("LZMA", baselines.lzma, "the training text"),
        (f"{baselines.ngram_order}-gram of bytes", baselines.ngram, "the training text"),
    ]
    for name, bits, seen in sorted(ours + others, key=lambda line: line[1]):
        bold = any(name == each for each, *_ in ours)
        table.add_row(_bold(name) if bold else name, f"{bits:.3f}", seen)
    return table


def decoding_table(lines: Iterable[tuple[str, float, float]]) -> Table:
    """Ways to write the same text: name, tokens per second, tokens for each pass of the backbone.

    The first line is what the others are compared with.
    """
    lines = list(lines)
    table = _table("decoding", "tokens/s", "speed", "tokens per pass")
    for name, speed, per_pass in lines:
        table.add_row(name, f"{speed:,.0f}", f"{speed / lines[0][1]:.2f} x", f"{per_pass:.2f}")
    return table


def number(value: int | float) -> str:
    """A number with four digits and a unit: 120.7 B, 23.04 M."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.4g} {unit}"
    return f"{value:.4g}"


def size(value: int) -> str:
    """Bytes in binary units: 160 MiB."""
    for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if value >= 1 << power:
            return f"{value / (1 << power):.4g} {unit}"
    return f"{value} B"


def _ledger_table(title: str, what: str, width: int) -> Table:
    """An empty table of ledger rows; without the "in numbers" column if narrower than `WIDE`."""
    numbers = ["in numbers"] if width >= WIDE else []
    table = _table("part", what, "formula", *numbers, "layers", "all", left=3 + len(numbers))
    table.title = title
    return table


def _rows(table: Table, rows: Iterable[ledger.Row], width: int) -> None:
    for row in rows:
        part = "mtp" if row.part == "mtp" else f"mtp: {row.part}" if row.mtp else row.part
        numbers = [f"{row.worked} = {number(row.each)}"] if width >= WIDE else []
        table.add_row(part, row.name, row.formula, *numbers, str(row.count), number(row.total))
    table.add_section()


def _total(table: Table, name: str, exact: str, value: int | float, width: int) -> None:
    gap = [""] if width >= WIDE else []
    table.add_row("", _bold(name), exact, *gap, "", _bold(number(value)))


def _bold(text: str) -> Text:
    return Text(text, style="bold")


def _layers(config: NemotronConfig, part: str) -> str:
    letter = next((c for c, kind in LAYER_KINDS.items() if kind == part), None)
    return str(config.pattern.count(letter)) if letter else ""


def _table(*columns: str, left: int = 1) -> Table:
    """Columns of text to the left, numbers to the right."""
    table = Table(
        header_style="bold", title_justify="left", title_style="bold", caption_justify="left"
    )
    for i, column in enumerate(columns):
        words = i < left
        table.add_column(column, justify="left" if words else "right", no_wrap=not words)
    return table
