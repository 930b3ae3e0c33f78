"""Figures of chapter 06: what layers add to the stream, how it grows, what a model adds up to.

    stream           the stream behind each layer, and what each layer adds; with a stepper
    grown            the stream of an untrained model of 88 layers, divided and not divided
    running_total    the map of a model, filled layer by layer, with a widget that counts
    lost             the share of additions that BF16 loses
    time_of_a_token  seconds of each kind of layer, estimated and timed one by one

The size of a stream is its root mean square, over the tokens of a text and the channels: what
RMSNorm divides by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from nemotron_lite import ledger
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.chapters.ch06_the_whole_backbone.lesson import HEAD, NAMES, Added, Work
from nemotron_lite.course.plotting import model_map, theme
from nemotron_lite.course.plotting.figure import described
from nemotron_lite.course.plotting.widgets import Explorer, Stepper, explore, slider, stepper

AHEAD = theme.GRID  # what the stepper has not reached
TIMED = "timed layers,<br>added up"


def stream(layers: Sequence[Added], step: int) -> go.Figure:
    """The stream behind each layer (above) and what each layer adds (below), up to a layer.

    Args:
        layers: from `lesson.stream`; the first is the embedding.
        step: layer 0 is the first layer, so the embedding is always drawn.
    """
    places = list(range(-1, len(layers) - 1))
    fig = make_subplots(
        2,
        1,
        shared_xaxes=True,
        vertical_spacing=0.12,
        subplot_titles=["Size of the stream behind the layer", "Size of what the layer adds"],
    )
    after, colours, added = _stream_values(layers, step)
    line = dict(color=theme.SERIES[0].colour, width=2)
    fig.add_scatter(x=places, y=after, mode="lines+markers", line=line, row=1, col=1)
    fig.add_bar(x=places, y=added, marker=dict(color=colours), row=2, col=1)
    letters = [layer.kind or "Emb" for layer in layers]
    fig.update_xaxes(tickvals=places, ticktext=letters, showgrid=False, title_text="layer", row=2)
    fig.update_xaxes(showgrid=False, zeroline=False, range=[-1.6, len(layers) - 1.4])
    highest = max(layer.after for layer in layers)
    fig.update_yaxes(range=[0, 1.08 * highest], row=1, col=1)
    fig.update_yaxes(range=[0, 1.08 * max(layer.size for layer in layers)], row=2, col=1)
    fig.update_annotations(font_size=13)
    smaller = [str(i) for i, (a, b) in enumerate(pairwise(layers)) if b.after < a.after]
    falls = f", except behind layer {' and '.join(smaller)}, where it falls" if smaller else ""
    fig.update_layout(
        title_text="The residual stream of a trained model",
        height=460,
        showlegend=False,
        margin_t=84,
    )
    return described(
        fig,
        f"Above a line: the size of the residual stream behind the embedding and behind each of "
        f"{len(layers) - 1} layers; it rises from layer to layer{falls}. Below a bar for each "
        "layer, the size of what it adds, in the colour of its kind. The first Mamba-2 layer and "
        "the last layers add most, expert layers in between add little.",
    )


def stream_stepper(layers: Sequence[Added], start: int = 0) -> Stepper:
    """`stream` layer by layer."""

    def update(fig: go.FigureWidget, step: int) -> str:
        after, colours, added = _stream_values(layers, step)
        fig.data[0].y = after
        fig.data[1].y, fig.data[1].marker.color = added, colours
        now, before = layers[step + 1], layers[step]
        return (
            f"Layer {step} is {now.kind}, {NAMES[now.kind]}. The stream has size "
            f"{before.after:.2f}; the layer adds a vector of size {now.size:.2f}; behind it the "
            f"stream has {now.after:.2f}."
        )

    return stepper(stream(layers, start), update, len(layers) - 1, "layer", start)


def _stream_values(
    layers: Sequence[Added], step: int
) -> tuple[list[float | None], list[str], list[float]]:
    """Sizes of the stream up to a layer, and bars: those of later layers are grey."""
    after = [layer.after if i <= step + 1 else None for i, layer in enumerate(layers)]
    colours = [
        AHEAD if i > step + 1 else theme.KINDS[layer.kind or "-"].strong
        for i, layer in enumerate(layers)
    ]
    return after, colours, [layer.size for layer in layers]


def grown(runs: Mapping[str, Sequence[Added]]) -> go.Figure:
    """How many times as large as the embedding the stream is, a line for each run."""
    fig = go.Figure()
    for name, layers in runs.items():
        sizes = [layer.after / layers[0].after for layer in layers]
        fig.add_scatter(x=list(range(len(layers))), y=sizes, name=name, mode="lines")
    fig.update_layout(title_text="An untrained model of 88 layers, 64 wide", height=380)
    fig.update_xaxes(title_text="layers so far")
    fig.update_yaxes(title_text="stream / embedding", type="log", dtick=1)
    return described(
        fig,
        f"Lines over the layers, on a logarithmic axis: {', '.join(runs)}. Both rise in steps, "
        "first fast and then more slowly, and the line without division stays about a power of ten "
        "above the other one.",
    )


def running_total(config: NemotronConfig, layers: int) -> go.Figure:
    """The map of a model; the first layers are filled."""
    fig = model_map(config, highlight=range(layers), title=_total_title(config, layers))
    return described(
        fig,
        f"The map of the {config.num_layers} layers of a model, with {layers} of them filled "
        "strongly. The title says how many parameters the filled layers hold and how many of "
        "these one token uses.",
    )


def running_total_widget(config: NemotronConfig) -> Explorer:
    """A slider that fills the map, and says what embedding, layers and head add up to."""
    places = {
        kind: [i for i, letter in enumerate(config.pattern) if letter == kind]
        for kind in theme.KINDS
        if kind in config.pattern
    }
    counted = ledger.parameters(config)
    outside = counted.backbone - sum(int(layer.total) for layer in counted.layers)

    def update(fig: go.FigureWidget, layers: int) -> str:
        for trace, (kind, where) in zip(fig.data, places.items(), strict=False):
            look = theme.KINDS[kind]
            fills = [look.strong if i < layers else look.pale for i in where]
            trace.marker.color = fills
            trace.insidetextfont.color = [theme.text_on(fill) for fill in fills]
        fig.layout.title.text = _total_title(config, layers)
        stored, used = _total(config, layers)
        if layers == config.num_layers:
            return (
                f"All layers: {stored:,}. Embedding, last norm and head have {outside:,}. The "
                f"model has {stored + outside:,} parameters, of which {used + outside:,} are "
                "active."
            )
        last = config.pattern[layers]
        one = counted.layers[layers]
        return (
            f"So far {stored:,} parameters, {used:,} active. The next layer is {layers}, {last}: "
            f"{int(one.total):,} parameters, {int(one.active):,} active."
        )

    return explore(
        running_total(config, config.num_layers),
        update,
        layers=slider("layers counted", 0, config.num_layers, value=config.num_layers),
    )


def _total(config: NemotronConfig, layers: int) -> tuple[int, int]:
    """Parameters of the first layers, and those of them that one token uses."""
    first = ledger.parameters(config).layers[:layers]
    return sum(int(layer.total) for layer in first), sum(int(layer.active) for layer in first)


def _total_title(config: NemotronConfig, layers: int) -> str:
    stored, used = _total(config, layers)
    sizes = f"{stored / 1e9:.1f} billion parameters, {used / 1e9:.2f} active"
    return f"{layers} layers, without embedding and head: {sizes}"


def time_of_a_token(
    pattern: str, parts: Mapping[str, Work], estimated: Mapping[str, float]
) -> go.Figure:
    """Seconds of all layers of each kind and of the head: estimated, and timed one by one.

    The second bar is not the time of a token, in which the layers run one after the other.

    Args:
        pattern: one letter a layer.
        parts: one measured layer of each kind, and the head.
        estimated: seconds of one layer of each kind, and of the head.
    """
    fig = go.Figure()
    for kind, work in parts.items():
        count = pattern.count(kind) if kind != HEAD else 1
        look = theme.KINDS["-" if kind == HEAD else kind]
        name = f"{count} × {NAMES[kind]}" if kind != HEAD else NAMES[kind]
        fig.add_bar(
            y=["estimated", TIMED],
            x=[count * estimated[kind], count * work.seconds],
            name=name,
            orientation="h",
            marker=dict(color=look.pale, line=dict(color=look.strong, width=1.5)),
            hovertemplate=f"{name}: %{{x:.2f}} s<extra></extra>",
        )
    legend = dict(orientation="h", x=0, y=-0.36, yanchor="top", traceorder="normal")
    fig.update_layout(
        title_text="Where the time of a token goes", barmode="stack", height=300, legend=legend,
        margin=dict(l=112, b=104),
    )  # fmt: skip
    fig.update_xaxes(title_text="seconds", rangemode="tozero")
    fig.update_yaxes(showgrid=False, autorange="reversed")
    return described(
        fig,
        "Two horizontal bars for one token: the estimated time, and the times of one measured "
        "layer of each kind and of the head, added up. Each is divided "
        f"into {', '.join(NAMES[kind] for kind in parts)}. Expert and Mamba-2 layers take nearly "
        "all of it.",
    )


def lost(pattern: str, shares: Sequence[float]) -> go.Figure:
    """The share of what each layer adds that is lost in BF16, a bar for each layer, in %."""
    fig = go.Figure(
        go.Bar(
            x=list(range(len(shares))),
            y=[100 * share for share in shares],
            marker=dict(color=[theme.KINDS[letter].strong for letter in pattern]),
        )
    )
    fig.update_layout(title_text="Additions that change nothing in BF16", height=340)
    places = list(range(len(pattern)))
    fig.update_xaxes(title_text="layer", tickvals=places, ticktext=list(pattern), showgrid=False)
    fig.update_yaxes(title_text="numbers lost, %", rangemode="tozero")
    return described(
        fig,
        f"One bar for each of {len(shares)} layers: the share of the numbers it adds that leave a "
        "stream in BF16 unchanged. Most bars are low; that of one expert layer is the highest.",
    )
