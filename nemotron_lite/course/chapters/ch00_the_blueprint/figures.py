"""Chapter 00's figures: one token in three layers, and what layers store, read, cost and keep.

`walk` follows one token through a model of three layers, and shows what each keeps of it.

`atlas` writes a pattern in lines that end with an attention layer, so that its rhythm can be seen:
pairs of M and E, then attention. Beside it four bars show four quantities of the same layers. They
look very different, and that is what the design is about:

    stored       numbers in the model              nearly all in the experts
    read         numbers that one token uses       a few experts, and everything that is no expert
    arithmetic   FLOPs of the next token           grows with the context, in attention alone
    cached       bytes a sequence keeps            grows with the context, in attention alone

`ledger_curves` shows the last two over the context, between a model in which every layer that
mixes tokens is attention and one in which none is. `resized` makes the models in between: Super's
proportions at another width, with as many attention layers as asked for.

Every number comes from `nemotron_lite.ledger`. Left out: time. FLOPs and bytes bound it from below,
and the chapters measure it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import ipywidgets
import plotly.graph_objects as go
from plotly.basedatatypes import BaseFigure
from plotly.subplots import make_subplots

from nemotron_lite import ledger
from nemotron_lite.config import LAYER_KINDS, PRESETS, SUPER_PATTERN, NemotronConfig
from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import described, lines
from nemotron_lite.course.plotting.removal import removal_figure
from nemotron_lite.course.plotting.widgets import Explorer, Stepper, explore, stepper
from nemotron_lite.ledger import Number

QUANTITIES = ("stored", "read", "arithmetic", "cached")
LETTERS = tuple(letter for letter in theme.KINDS if letter in LAYER_KINDS)
REST = "rest"  # embedding, head and the last norm: no layer's
MIXING_PLACES = len(SUPER_PATTERN) - SUPER_PATTERN.count("E")  # layers that mix tokens
MODELS = {"Super": "super", "Nano": "nano", "Ultra": "ultra", "lite (yours)": "lite"}
CONTEXTS = tuple(2**i for i in range(10, 21))  # 1K to 1M tokens
ATLAS_CONTEXT = 65_536  # end of the atlas's slider: the cache after 1M tokens is predicted later
SMALLEST_LABEL = 0.09  # share of a bar large enough for a letter and a number
LINES = {
    "attention in every place": theme.SERIES[1],
    "as set": theme.SERIES[0],
    "no attention": theme.SERIES[2],
}
WIDTHS = (1024, 2048, 3072, 4096, 6144, 8192)
STAGES = ("M", "E", "*", "head")  # where a token can be, after it was looked up
WALKED = ("def", " mean", "(", "values", ")", ":")  # the tokens of `walk_stepper`


def walk(config: NemotronConfig, step: int = 0) -> go.Figure:
    """One token on its way through a model of three layers, and what the cache keeps.

    Args:
        config: its pattern is "ME*".
        step: 0 to len(WALKED) * len(STAGES) - 1.
    """
    fig = make_subplots(
        cols=2,
        column_widths=[0.42, 0.58],
        horizontal_spacing=0.2,
        subplot_titles=("the way of one token", "what is kept, float32"),
    )
    boxes = dict(textposition="inside", insidetextanchor="middle", textangle=0)
    fig.add_bar(
        orientation="h", y=[0, 1, 2, 3, 4], x=[1] * 5, **boxes, constraintext="none",
        textfont_size=14, marker_line=dict(color=theme.INK, width=1), hoverinfo="skip",
        row=1, col=1,
    )  # fmt: skip
    for i in range(len(WALKED) + 1):  # the block of M, then one block for each token
        fig.add_bar(
            orientation="h", y=[2 if i else 0], x=[0.0], width=0.7, hoverinfo="text",
            marker_line=dict(color=theme.INK, width=1), row=1, col=2,
        )  # fmt: skip
    fig.update_xaxes(visible=False, range=[0, 1], fixedrange=True, col=1)
    fig.update_yaxes(visible=False, range=[4.6, -0.6], fixedrange=True, col=1)
    most = sum(_walk_bytes(config, 0)) / 1024
    fig.update_xaxes(title_text="KiB", range=[0, 1.15 * most], fixedrange=True, col=2)
    fig.update_yaxes(
        tickvals=[0, 1, 2],
        ticktext=["<b>M</b>  state", "<b>E</b>  nothing", "<b>*</b>  keys, values"],
        range=[2.6, -0.6], fixedrange=True, showgrid=False, ticks="", col=2,
    )  # fmt: skip
    fig.update_layout(barmode="stack", bargap=0.3, height=340, showlegend=False)
    draw_walk(fig, config, step)
    return described(
        fig,
        "Left, five boxes from top to bottom: embedding, the layers M, E and *, norm and head; the "
        "box in which the token is now is filled strongly. Right, bars of the bytes that are kept: "
        "for M one block of constant size, for * one small block for each token read, for E "
        "nothing.",
    )


def draw_walk(fig: BaseFigure, config: NemotronConfig, step: int) -> str:
    """Show one step of `walk`; returns the step in words."""
    token, place = divmod(step, len(STAGES))
    stage = STAGES[place]
    state, each = _walk_bytes(config, token)[0], _walk_bytes(config, 1)[1]
    kept = token + (place >= STAGES.index("*"))  # tokens whose keys and values are in the cache
    boxes, blocks = fig.data[0], fig.data[1:]
    names = [f"embedding of “{WALKED[token].strip()}”", "M  Mamba-2", "E  experts", "*  attention",
             "norm and head"]  # fmt: skip
    fills = [_stage_fill(own, own == stage) for own in ("embedding", *STAGES)]
    boxes.text, boxes.marker.color = names, fills
    boxes.insidetextfont = dict(color=[theme.text_on(fill) for fill in fills])
    blocks[0].x, blocks[0].marker.color = [state / 1024], _stage_fill("M", stage == "M")
    blocks[0].hovertext = f"{format_bytes(state)}, overwritten by every token"
    for i, block in enumerate(blocks[1:]):
        block.x = [each / 1024 if i < kept else 0.0]
        block.marker.color = _stage_fill("*", stage == "*" and i == token)
        block.hovertext = f"“{WALKED[i].strip()}”: {format_bytes(each)}"
    return _walk_words(config, token, stage, state, each, kept)


def _walk_words(
    config: NemotronConfig, token: int, stage: str, state: int, each: int, kept: int
) -> str:
    here = f"Token {token + 1}, “{WALKED[token].strip()}”. "
    if stage == "M":
        holds = "zeros" if token == 0 else f"a summary of {_tokens(token)}"
        return here + (
            f"The Mamba-2 layer reads its state, which holds {holds}, and overwrites it: "
            f"{format_bytes(state)}, as for every token."
        )
    if stage == "E":
        return here + (
            f"The mixture reads this token alone: its router chooses {config.num_experts_per_tok} "
            f"of {config.n_routed_experts} experts. Nothing is kept."
        )
    if stage == "*":
        return here + (
            f"The attention layer keeps the token's key and value, {format_bytes(each)} more, and "
            f"compares its query with the keys of {_tokens(kept)}, its own included."
        )
    return here + (
        f"Norm and head give one score for each of {config.vocab_size:,} tokens. Kept after "
        f"{_tokens(kept)}: {format_bytes(state)} in M, {format_bytes(kept * each)} in *."
    )


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def _stage_fill(stage: str, active: bool) -> str:
    if stage not in theme.KINDS:
        return theme.MUTED if active else theme.PLOT
    return theme.KINDS[stage].strong if active else theme.KINDS[stage].pale


def _walk_bytes(config: NemotronConfig, context: int) -> tuple[int, int]:
    """Bytes of the Mamba layer's and of the attention layer's cache, all numbers in float32."""
    kept = ledger.cache(
        config, context, kv_dtype="float32", conv_dtype="float32", ssm_dtype="float32"
    )
    return kept.conv + kept.ssm, kept.kv


def walk_stepper(config: NemotronConfig) -> Stepper:
    """`walk`, one step at a time."""

    def update(fig: go.FigureWidget, step: int) -> str:
        return draw_walk(fig, config, step)

    return stepper(walk(config), update, steps=len(WALKED) * len(STAGES), label="step")


def atlas(config: NemotronConfig, *, context: int = 8192, kind: str = "all") -> go.Figure:
    """The layers in lines, and four bars with the share of each kind of layer.

    Args:
        config: the model.
        context: tokens read so far, for arithmetic and memory.
        kind: "all", or the letter of the kind to keep strong.

    Raises:
        ValueError: a kind that is no letter of a pattern.
    """
    if kind != "all" and kind not in LAYER_KINDS:
        raise ValueError(f"kind={kind!r}: expected 'all' or one of {', '.join(LAYER_KINDS)}.")
    fig = make_subplots(cols=2, column_widths=[0.45, 0.55], horizontal_spacing=0.2)
    for letter in LETTERS:
        look = theme.KINDS[letter]
        fig.add_scatter(
            mode="markers+text",
            name=f"{letter}  {look.name}",
            legendgroup=letter,
            textfont=dict(family=theme.MONO, size=13),
            hoverinfo="text",
            marker=dict(symbol="square", size=19, line=dict(color=look.strong, width=1.5)),
            row=1,
            col=1,
        )
    for letter in (*LETTERS, REST):
        fig.add_bar(
            orientation="h",
            name="embedding and head" if letter == REST else letter,
            legendgroup=letter,
            showlegend=False,
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            constraintext="none",
            textfont_size=13,
            hoverinfo="text",
            marker_line=dict(color=theme.INK, width=1),
            row=1,
            col=2,
        )
    fig.update_xaxes(visible=False, fixedrange=True, col=1)
    fig.update_yaxes(
        showgrid=False, showline=False, ticks="", zeroline=False, fixedrange=True, col=1
    )
    fig.update_xaxes(
        title_text="share of the total", ticksuffix=" %", range=[0, 100], fixedrange=True, col=2
    )
    fig.update_yaxes(
        tickvals=[0, 1, 2, 3], range=[3.5, -0.5], fixedrange=True, showgrid=False, ticks="", col=2
    )
    fig.update_layout(
        title_text="Four quantities of the same layers",
        barmode="stack",
        bargap=0.28,
        plot_bgcolor=theme.CARD,
        height=470,
        legend=dict(orientation="h", x=0, y=-0.12, yanchor="top"),
    )
    fig.update_xaxes(showgrid=False)
    _draw_atlas(fig, config, context, kind)
    rows = ", ".join(pattern_lines(config.pattern))
    return described(
        fig,
        f"Left, the {config.num_layers} layers in lines that end in an attention layer: {rows}. "
        "Right, four stacked bars with the share of each kind of layer: of the numbers stored and "
        "of those a token reads, of the arithmetic of the next token, and of the cache in bytes. "
        "Experts fill most of the first bar and nothing of the last, which Mamba-2 and attention "
        "share between them.",
    )


def _fill(letter: str, pale: bool) -> str:
    if letter == REST:
        return theme.PLOT
    return theme.KINDS[letter].pale if pale else theme.KINDS[letter].strong


def _draw_atlas(fig: BaseFigure, config: NemotronConfig, context: int, kind: str) -> None:
    rows = pattern_lines(config.pattern)
    layers = ledger.parameters(config).layers
    asked = shares(config, context)
    places = [(row, column) for row, line in enumerate(rows) for column in range(len(line))]
    for trace, letter in zip(fig.data, LETTERS, strict=False):
        mine = [i for i, own in enumerate(config.pattern) if own == letter]
        fill = _fill(letter, pale=kind not in ("all", letter))
        trace.x, trace.y = [places[i][1] for i in mine], [places[i][0] for i in mine]
        trace.text = [letter] * len(mine)
        kept = asked["cached"][letter] / max(1, len(mine))
        trace.hovertext = [
            f"layer {i}: {theme.KINDS[letter].name}<br>stores {int(layers[i].total):,}<br>"
            f"a token reads {int(layers[i].active):,}<br>keeps {format_bytes(kept)} after "
            f"{format_tokens(context)} tokens"
            for i in mine
        ]
        trace.marker.color, trace.textfont.color = fill, theme.text_on(fill)
        trace.showlegend = bool(mine)
    for trace, letter in zip(fig.data[len(LETTERS) :], (*LETTERS, REST), strict=True):
        parts = [asked[q][letter] / sum(asked[q].values()) for q in QUANTITIES]
        pale = kind not in ("all", letter)
        fill, least = _fill(letter, pale), 0.19 if letter == REST else SMALLEST_LABEL
        trace.x, trace.y = [100 * part for part in parts], [0, 1, 2, 3]
        trace.text = [f"{letter} {part:.0%}" if part > least else "" for part in parts]
        asking = zip(QUANTITIES, parts, strict=True)
        trace.hovertext = [f"{question}: {trace.name} {part:.2%}" for question, part in asking]
        trace.marker.color, trace.textfont.color = fill, theme.text_on(fill)
    starts = [sum(map(len, rows[:row])) for row in range(len(rows))]
    fig.layout.yaxis.tickvals = list(range(len(rows)))
    fig.layout.yaxis.ticktext = [f"layer {start}" for start in starts]
    fig.layout.yaxis.range = [max(len(rows), 9) - 0.4, -0.6]
    fig.layout.xaxis.range = [-0.6, max(max(map(len, rows)), 11) - 0.4]
    totals = {q: sum(asked[q].values()) for q in QUANTITIES}
    fig.layout.yaxis2.ticktext = [
        f"<b>stored</b><br>{format_count(totals['stored'])}",
        f"<b>read</b> per token<br>{format_count(totals['read'])}",
        f"<b>arithmetic</b><br>{format_count(totals['arithmetic'])} FLOPs",
        f"<b>cached</b><br>{format_bytes(totals['cached'])}",
    ]


def atlas_widget() -> Explorer:
    """`atlas` with a choice of model and kind, and the context on a slider."""

    def update(fig: go.FigureWidget, model: str, kind: str, context: int) -> str:
        config = PRESETS[MODELS[model]]
        _draw_atlas(fig, config, context, kind)
        asked = shares(config, context)
        totals = {name: sum(parts.values()) for name, parts in asked.items()}
        cached = asked["cached"]
        most = max(("M", "*"), key=lambda letter: cached[letter])
        part = cached[most] / totals["cached"]
        return (
            f"{model} after {format_tokens(context)} tokens: of {format_count(totals['stored'])} "
            f"numbers one token reads {format_count(totals['read'])}; its cache holds "
            f"{format_bytes(totals['cached'])}, {part:.0%} of it in {theme.KINDS[most].name} "
            "layers."
        )

    wide = {"description_width": "90px"}
    kinds = [("all", "all")] + [(f"{k}  {theme.KINDS[k].name}", k) for k in ("M", "E", "*")]
    return explore(
        atlas(PRESETS["super"]),
        update,
        model=ipywidgets.Dropdown(options=list(MODELS), description="model", style=wide),
        kind=ipywidgets.Dropdown(options=kinds, description="kind", style=wide),
        context=context_slider(8192, longest=ATLAS_CONTEXT),
    )


def context_slider(value: int, longest: int = CONTEXTS[-1]) -> ipywidgets.SelectionSlider:
    """Tokens of context in powers of two, from 1K to `longest`."""
    return ipywidgets.SelectionSlider(
        options=[(format_tokens(n), n) for n in CONTEXTS if n <= longest],
        value=value,
        description="context",
        continuous_update=True,
        style={"description_width": "90px"},
        layout=ipywidgets.Layout(width="min(100%, 460px)"),
    )


def ledger_curves(width: int = 4096, anchors: int = 8, context: int = 8192) -> go.Figure:
    """Bytes of the cache and FLOPs of the next token over the context, at one width.

    Args:
        width: d; everything else follows in Super's proportions.
        anchors: attention layers among the places that mix tokens.
        context: position of the mark.
    """
    fig = make_subplots(
        cols=2,
        subplot_titles=("bytes of the cache", "FLOPs of the next token"),
        horizontal_spacing=0.16,
    )
    for col in (1, 2):
        for name, look in LINES.items():
            fig.add_scatter(
                name=name,
                mode="lines",
                legendgroup=name,
                showlegend=col == 1,
                line=dict(color=look.colour, dash=look.dash, width=2.5),
                row=1,
                col=col,
            )
        fig.add_scatter(name="here", mode="markers", showlegend=False, row=1, col=col)
        fig.data[-1].marker = dict(color=theme.INK, symbol="circle", size=12)
        fig.update_xaxes(
            type="log",
            title_text="context in tokens",
            tickvals=CONTEXTS[::2],
            ticktext=[format_tokens(n) for n in CONTEXTS[::2]],
            row=1,
            col=col,
        )
    memory = [2**i for i in (24, 27, 30, 33, 36)]
    work = [1e9, 1e10, 1e11, 1e12]
    fig.update_yaxes(
        type="log",
        tickvals=memory,
        ticktext=[format_bytes(n) for n in memory],
        range=[7.1, 11.4],
        row=1,
        col=1,
    )
    fig.update_yaxes(
        type="log",
        tickvals=work,
        ticktext=[format_count(n) for n in work],
        range=[8.9, 12.8],
        row=1,
        col=2,
    )
    fig.update_layout(
        height=450,
        title_text="What a longer context costs",
        margin_t=92,
        legend=dict(orientation="h", x=0, y=-0.2, yanchor="top"),
    )
    _draw_curves(fig, width, anchors, context)
    return described(
        fig,
        "Two plots over the context from 1K to 1M tokens, both axes logarithmic: bytes of cache "
        "and FLOPs of the next token. Without attention both are flat. With attention in every "
        "place both begin below that line, cross it, and rise in proportion to the context. The "
        "model as set starts near the flat line, leaves it late and stays below the other.",
    )


def _draw_curves(fig: BaseFigure, width: int, anchors: int, context: int) -> None:
    for i, n in enumerate((MIXING_PLACES, anchors, 0)):
        memory, work = cost_lines(width, n)
        fig.data[i].x = fig.data[4 + i].x = CONTEXTS
        fig.data[i].y = [memory[0] + memory[1] * t for t in CONTEXTS]
        fig.data[4 + i].y = [work[0] + work[1] * t for t in CONTEXTS]
    memory, work = cost_lines(width, anchors)
    for trace, (start, slope) in ((fig.data[3], memory), (fig.data[7], work)):
        trace.x, trace.y = [context], [start + slope * context]


def ledger_widget() -> Explorer:
    """`ledger_curves` with context, width and anchors on sliders."""

    def update(fig: go.FigureWidget, context: int, width: int, anchors: int) -> str:
        _draw_curves(fig, width, anchors, context)
        numbers = ledger.parameters(resized(width, anchors))
        memory, work = cost_lines(width, anchors)
        cached, flops = (start + slope * context for start, slope in (memory, work))
        return (
            f"Width {width:,}, {anchors} attention layers: {format_count(numbers.backbone)} "
            f"numbers stored, {format_count(numbers.active_without_embedding)} read by a token. "
            f"After {format_tokens(context)} tokens its cache holds {format_bytes(cached)}, and "
            f"the next token takes {format_count(flops)} FLOPs."
        )

    wide = {"description_width": "90px"}
    layout = ipywidgets.Layout(width="min(100%, 460px)")
    return explore(
        ledger_curves(),
        update,
        context=context_slider(8192),
        width=ipywidgets.SelectionSlider(
            options=[(f"{n:,}", n) for n in WIDTHS],
            value=4096,
            description="width d",
            style=wide,
            layout=layout,
        ),
        anchors=ipywidgets.IntSlider(
            value=8, min=0, max=MIXING_PLACES, description="attention", style=wide, layout=layout
        ),
    )


def memory_lines(
    contexts: Sequence[int], series: Mapping[str, Sequence[Number]], *, title: str, alt: str
) -> go.Figure:
    """Bytes over the context, both axes logarithmic and marked in binary units.

    Args:
        contexts: tokens.
        series: name → bytes, one for each context.
        title: what the bytes are.
        alt: the alternative text.
    """
    fig = lines(
        contexts,
        series,
        title=title,
        alt=alt,
        x_title="context in tokens",
        y_title="",
        log_x=True,
        log_y=True,
    )
    most, least = (pick(pick(values) for values in series.values()) for pick in (max, min))
    step = 3 if most > 64 * least else 1  # a mark for each factor of eight, or of two
    marks = [2**i for i in range(10, 50, step) if least / 4 <= 2**i <= most * 4]
    fig.update_yaxes(tickvals=marks, ticktext=[format_bytes(n) for n in marks])
    first, last = min(contexts), max(contexts)
    step = 2 if last > 64 * first else 1
    shown = [2**i for i in range(0, 40, step) if first <= 2**i <= last]
    fig.update_xaxes(tickvals=shown, ticktext=[format_tokens(n) for n in shown])
    fig.update_layout(legend=dict(orientation="h", x=0, y=-0.24, yanchor="top"))
    return fig


EQUAL_CURVES = dict(
    title="Two models learn alike",
    alt="Two training losses over the updates, the learner's class and the package's model: they "
    "lie on each other and fall, steeply at first and then more slowly.",
)
WITHOUT_MAMBA = dict(
    title="Three layers, with and without Mamba-2",
    alt="Two training losses over the updates. Both fall, at first together; then the model with a "
    "Mamba-2 layer falls further, and the one with attention in its place stays above it.",
)


def removed_kinds() -> go.Figure:
    """What the model of seven layers loses without each kind of layer, from the record."""
    kinds = ("mamba", "attention", "experts")
    return removal_figure("text", kinds, title="Seven layers, one kind replaced")


def planner(contexts: Sequence[int], plan: Sequence[Number], kept: Sequence[Number]) -> go.Figure:
    """The bytes that a planner for Transformers expects, and those that Super keeps."""
    return memory_lines(
        contexts,
        {"the plan": plan, "cache_bytes": kept},
        title="Cache of one conversation",
        alt="Two lines over the context. The plan is straight. The other line is flat first and "
        "rises later. The plan starts far below it, crosses it, and ends far above.",
    )


def loss_curves(curves: Mapping[str, Sequence[float]], *, alt: str, title: str) -> go.Figure:
    """The loss of each update, smoothed over ten.

    Args:
        curves: name → losses in nats per token, of equal length.
        alt: what the curves do.
        title: of the figure.
    """
    steps = list(range(1, 1 + max(map(len, curves.values()))))
    return lines(
        steps,
        {name: smoothed(losses) for name, losses in curves.items()},
        title=title,
        alt=alt,
        x_title="updates",
        y_title="nats per token",
        markers=False,
        height=340,
    )


def score_bars(scores: Mapping[str, float], *, ours: Sequence[str] = ()) -> go.Figure:
    """Bits per byte as horizontal bars, best on top; lower is better.

    Args:
        scores: name → bits per byte.
        ours: names to fill strongly.
    """
    best = sorted(scores, key=lambda name: scores[name])
    fills = [theme.KINDS["M"].strong if name in ours else theme.KINDS["M"].pale for name in best]
    fig = go.Figure(
        go.Bar(
            orientation="h",
            y=best,
            x=[scores[name] for name in best],
            text=[f"{scores[name]:.2f}" for name in best],
            textposition="outside",
            cliponaxis=False,
            marker=dict(color=fills, line=dict(color=theme.INK, width=1)),
            hovertemplate="%{y}: %{x:.3f} bits per byte<extra></extra>",
        )
    )
    fig.update_xaxes(
        title_text="bits per byte of held-out files (lower is better)", rangemode="tozero"
    )
    fig.update_yaxes(autorange="reversed", showgrid=False)
    fig.update_layout(
        title_text="Bits needed for the held-out files",
        bargap=0.35,
        height=130 + 44 * len(best),
        showlegend=False,
    )
    names = ", ".join(sorted(scores))
    return described(
        fig, f"Bars of bits per byte on held-out files, the shortest on top, for: {names}."
    )


# The numbers behind the figures, all from `nemotron_lite.ledger`, and how they are written.


def pattern_lines(pattern: str) -> list[str]:
    """The pattern in lines that end with an attention layer.

    >>> pattern_lines("MEM*EM*E")
    ['MEM*', 'EM*', 'E']
    """
    return [line for line in pattern.replace("*", "*\n").split("\n") if line]


def shares(config: NemotronConfig, context: int) -> dict[str, dict[str, float]]:
    """What each kind of layer stores, reads, computes and keeps; see the module text.

    Keys are `QUANTITIES`, then the letters of the pattern and "rest". Stored and read are counts
    (the embedding, of which a token reads one row, is stored but not read), arithmetic is FLOPs
    of the token after `context` others, cached is bytes after `context` tokens. The MTP module
    is not counted.
    """
    count = ledger.parameters(config)
    cost = ledger.flops(config, context, "decode")
    kept = ledger.cache(config, context)
    stored, read = _by_letter(count.by_part), _by_letter(count.active_by_part)
    read[REST] -= count.active_by_part["embedding"]
    cached = dict.fromkeys(stored, 0.0) | {"M": kept.conv + kept.ssm, "*": kept.kv}
    return {
        "stored": stored,
        "read": read,
        "arithmetic": _by_letter(cost.by_part),
        "cached": {k: float(v) for k, v in cached.items()},
    }


def _by_letter(parts: Mapping[str, Number]) -> dict[str, float]:
    letters = {kind: letter for letter, kind in LAYER_KINDS.items()}
    totals = dict.fromkeys((*LETTERS, REST), 0.0)
    for part, amount in parts.items():
        if part != "mtp":
            totals[letters.get(part, REST)] += amount
    return totals


def resized(width: int, anchors: int) -> NemotronConfig:
    """Super's proportions at another width, with `anchors` of its mixing layers given to attention.

    Heads, experts and latent shrink and grow with d as they do between Super and its siblings; the
    number of layers, experts and state sizes stay. Attention layers are spread evenly.

    Raises:
        ValueError: a width that is no multiple of 512, or more anchors than places.
    """
    if width < 512 or width % 512:
        raise ValueError(f"width={width}: expected a multiple of 512, so that the heads divide it.")
    if not 0 <= anchors <= MIXING_PLACES:
        raise ValueError(
            f"anchors={anchors}: expected 0 to {MIXING_PLACES}, the layers that mix tokens."
        )
    chosen = {int((i + 0.5) * MIXING_PLACES / anchors) for i in range(anchors)}
    pattern, place = "", 0
    for letter in SUPER_PATTERN:
        if letter == "E":
            pattern += "E"
        else:
            pattern += "*" if place in chosen else "M"
            place += 1
    return PRESETS["super"].replace(
        pattern=pattern,
        hidden_size=width,
        num_attention_heads=width // 128,
        mamba_num_heads=width // 32,
        moe_latent_size=width // 4,
        moe_intermediate_size=width * 21 // 32,
        moe_shared_expert_intermediate_size=width * 21 // 16,
    )


@cache
def cost_lines(width: int, anchors: int) -> tuple[tuple[Number, Number], tuple[Number, Number]]:
    """Bytes of the cache and FLOPs of the next token of `resized(width, anchors)`.

    Both are straight lines over the context: (at no tokens, for each token).
    """
    config = resized(width, anchors)
    kept = ledger.cache(config, 0)
    first, second = (ledger.flops(config, t, "decode").per_token for t in (0, 1))
    return (kept.total, kept.kv_per_token), (first, second - first)


def smoothed(losses: Sequence[float], width: int = 10) -> list[float]:
    """The mean of each loss and those before it, `width` at most.

    >>> smoothed([4.0, 2.0, 0.0], width=2)
    [4.0, 3.0, 1.0]
    """
    return [
        sum(losses[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(losses))
    ]


def format_count(n: Number) -> str:
    """A large count in short: 120.7 B, 12.2 B, 7.1 M."""
    for power, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if n >= power:
            return f"{n / power:.4g} {letter}"
    return f"{n:.4g}"


def format_bytes(n: Number) -> str:
    """Bytes in binary units: 162.3 MiB, 8 GiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n >= 2**power:
            return f"{n / 2**power:.4g} {unit}"
    return f"{n:.4g} B"


def format_tokens(n: int) -> str:
    """Tokens in binary thousands: 8K, 1M."""
    return f"{n >> 20}M" if n >= 1 << 20 else f"{n >> 10}K" if n >= 1 << 10 else str(n)
