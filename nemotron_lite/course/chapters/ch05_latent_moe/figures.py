"""Figures of chapter 05: the layer, its weights, three costs of a step, choices, runs, widths.

    layer           the way of one token through the layer, and how wide it is at each place
    token_weights   the weights that one token reads, part by part, for several layers
    walls           times of one layer over the tokens of a step, and a widget
    choices         digits of the number of ways to choose the experts of a token
    runs            scores of several trainings, a circle for each seed
    energy          the share of the energy that l directions keep
    narrower        what a trained model loses if its experts are cut to a smaller width

`walls` draws what the learner's `step_costs` returns. Reading weights, exchanging vectors and
computing are assumed to run at the same time, so the longest of the three times is the least that a
step takes. A line that is straight on logarithmic axes grows with the number of tokens; the weights
do so only until all experts are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go

from nemotron_lite.course.chapters.ch05_latent_moe.lesson import PARTS, Device, Sizes, StepCosts
from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import described, lines
from nemotron_lite.course.plotting.widgets import Explorer, explore, slider

SHADES = (theme.KINDS["E"].strong, theme.PALETTE["orange"], theme.PALETTE["sky"])
TIMES = ("arithmetic", "reading weights", "exchange")
MOST_TOKENS = 16_384
TOKENS = np.unique(np.geomspace(1, MOST_TOKENS, 29).round())
LEAST, MOST = 0.05, 200_000.0  # microseconds at the ends of the axis
F_OF_SUPER = 2688  # hidden width of an expert, in the widget


WIDE, NARROW = 6.0, 2.0  # pixels of an arrow with d and with l numbers


def layer(d: int, latent: int, top_k: int) -> go.Figure:
    """The way of one token through a latent layer; thick arrows carry d numbers, thin ones l.

    Args:
        d: width of the model.
        latent: width of the experts.
        top_k: experts that the token chooses, at most 3; each is on a device of its own.
    """
    fig = go.Figure()
    places = [3.0 + 1.1 * ((top_k - 1) / 2 - i) for i in range(top_k)]
    pale, strong = theme.KINDS["E"].pale, theme.KINDS["E"].strong
    boxes = [
        (2.2, 5.4, "router", theme.PLOT), (2.2, 3.0, "W<sub>down</sub>", pale),
        *((5.0, y, f"expert {i + 1}", pale) for i, y in enumerate(places)),
        (7.1, 3.0, "sum", theme.PLOT), (8.6, 3.0, "W<sub>up</sub>", pale),
        (5.0, 0.6, "shared expert", theme.PLOT), (10.0, 3.0, "+", theme.PLOT),
    ]  # fmt: skip
    for x, y, words, fill in boxes:
        half = 0.85 if words == "shared expert" else 0.3 if words == "+" else 0.55
        fig.add_shape(
            type="rect", x0=x - half, x1=x + half, y0=y - 0.4, y1=y + 0.4, fillcolor=fill,
            line=dict(color=strong, width=1.5),
        )  # fmt: skip
        fig.add_annotation(x=x, y=y, text=words, showarrow=False, font_size=13)
    fig.add_shape(
        type="rect", x0=4.2, x1=5.8, y0=min(places) - 0.6, y1=max(places) + 0.95,
        line=dict(color=theme.MUTED, width=1, dash="dash"),
    )  # fmt: skip
    ends = [(0.6, 3.0, 1.65, 3.0, d), (0.6, 3.3, 1.65, 5.3, d), (0.6, 2.7, 4.15, 0.6, d)]
    ends += [(2.75, 3.0, 4.45, y, latent) for y in places]
    ends += [(5.55, y, 6.55, 3.0, latent) for y in places]
    ends += [(7.65, 3.0, 8.05, 3.0, latent), (9.15, 3.0, 9.7, 3.0, d)]
    ends += [(5.85, 0.6, 9.9, 2.6, d), (10.3, 3.0, 11.0, 3.0, d)]
    for x0, y0, x1, y1, width in ends:
        thick = WIDE if width == d else NARROW
        fig.add_annotation(
            x=x1, y=y1, ax=x0, ay=y0, xref="x", yref="y", axref="x", ayref="y", text="",
            name=f"{width} numbers", showarrow=True, arrowhead=2, arrowwidth=thick,
            arrowsize=0.6 if width == d else 1,
            arrowcolor=theme.INK if width == d else theme.SERIES[1].colour,
        )  # fmt: skip
    notes = [
        (0.35, 3.0, "x"), (11.2, 3.0, "y"), (5.0, max(places) + 0.68, "other devices"),
        (3.55, max(places) + 0.35, "dispatch"), (6.5, max(places) + 0.35, "combine"),
        (4.0, 5.4, f"chooses {top_k} experts,<br>gives weights"),
    ]  # fmt: skip
    for x, y, words in notes:
        fig.add_annotation(x=x, y=y, text=words, showarrow=False, font_size=13)
    for words, pixels, colour in (
        (f"d = {d} numbers", WIDE, theme.INK), (f"l = {latent} numbers", NARROW,
                                                theme.SERIES[1].colour),
    ):  # fmt: skip
        fig.add_scatter(x=[None], y=[None], mode="lines", name=words,
                        line=dict(width=pixels, color=colour, dash="solid"))  # fmt: skip
    fig.update_xaxes(visible=False, range=[0, 11.5], fixedrange=True)
    fig.update_yaxes(visible=False, range=[0, 6], fixedrange=True)
    fig.update_layout(
        title_text="One token in a latent layer", height=380, plot_bgcolor=theme.CARD,
        legend=dict(orientation="h", x=0, y=-0.02, yanchor="top"), showlegend=True,
    )  # fmt: skip
    return described(
        fig,
        f"A token x of {d} numbers goes to three places. The router reads all {d} and chooses "
        f"{top_k} experts with their weights. The shared expert reads all {d} and writes {d}. "
        f"W_down makes {latent} numbers of the token; they are sent to each of {top_k} experts on "
        f"other devices (dispatch), and {latent} come back from each (combine). Their weighted "
        f"sum has {latent} numbers. W_up makes {d} of it, once, and the output of the shared "
        "expert is added.",
    )


def token_weights(layers: Mapping[str, Mapping[str, int]]) -> go.Figure:
    """Weights that one token reads in one layer; a bar for each layer, a colour for each part."""
    fig = go.Figure()
    names = list(layers)
    for part, colour in zip(PARTS, SHADES, strict=True):
        values = [layers[name][part] for name in names]
        fig.add_bar(
            name=part,
            y=names,
            x=values,
            orientation="h",
            marker_color=colour,
            text=[f"{value:,}" if value > 10_000 else "" for value in values],
            textposition="inside",
            insidetextfont=dict(size=13, color=theme.text_on(colour)),
            textangle=0,
        )
    fig.update_layout(
        barmode="stack",
        title_text="Weights that one token reads in one layer",
        height=150 + 60 * len(names),
        legend=dict(orientation="h", traceorder="normal", y=-0.42),
    )
    fig.update_xaxes(title_text="weights, without the shared expert")
    fig.update_yaxes(autorange="reversed", showgrid=False)
    return described(
        fig,
        f"One horizontal bar for each of {len(names)} layers, {' and '.join(names)}, divided into "
        f"{', '.join(PARTS)}. The bar of the latent layer is a little longer. Only it has "
        "projections, and its router is longer.",
    )


def walls(step_costs: StepCosts, sizes: Sizes, tokens: int, device: Device) -> go.Figure:
    """Times for arithmetic, for reading weights and for the exchange, over the tokens of a step."""
    times = _times(step_costs, sizes, device)
    fig = lines(
        TOKENS,
        dict(zip(TIMES, times, strict=True)),
        title=_title(sizes),
        x_title="tokens in a step",
        y_title="microseconds",
        log_x=True,
        log_y=True,
        markers=False,
        height=420,
        alt="Three rising lines on logarithmic axes, over the tokens of a step. Arithmetic and "
        "exchange are straight. Reading weights begins far above them and becomes level, because "
        "all experts are read. With many tokens the exchange is above it. A vertical line marks "
        "the number of tokens that the text below speaks of.",
    )
    ticks = [4**i for i in range(8)]
    fig.update_xaxes(tickvals=ticks, ticktext=[f"{t:,}" for t in ticks])
    powers = range(-1, 6)
    fig.update_yaxes(
        range=[np.log10(LEAST), np.log10(MOST)],
        tickvals=[10.0**p for p in powers],
        ticktext=[f"{10.0**p:,g}" if p < 0 else f"{10**p:,}" for p in powers],
    )
    fig.add_vline(x=tokens, line=dict(color=theme.INK, width=1, dash="dot"))
    return fig


def walls_widget(step_costs: StepCosts, sizes: Sizes, tokens: int = 128) -> Explorer:
    """Sliders for the sizes of a layer, the tokens of a step and the device."""
    start = Device()

    def update(
        fig: go.FigureWidget,
        d: int,
        ratio: int,
        experts: int,
        top_k: int,
        tokens: float,
        memory: float,
        link: float,
    ) -> str:
        width = None if ratio == 1 else max(1, d // ratio)
        chosen = Sizes(d, width, experts, min(top_k, experts), sizes.f)
        device = Device(memory=memory, link=link)
        for trace, values in zip(fig.data, _times(step_costs, chosen, device), strict=True):
            trace.y = values
        at = round(tokens)
        fig.layout.shapes[0].x0 = fig.layout.shapes[0].x1 = at
        fig.layout.title.text = _title(chosen)
        now = device.microseconds(chosen.costs(step_costs, at))
        longest = TIMES[int(np.argmax(now))]
        listed = ", ".join(f"{name} {t:,.3g} µs" for name, t in zip(TIMES, now, strict=True))
        return f"{at:,} token{'' if at == 1 else 's'}: {listed}. The longest is {longest}."

    ratio = 1 if sizes.latent is None else sizes.d // sizes.latent
    # The first values lie on a step of their sliders, the geometric middle of the range.
    logs = {
        "tokens": slider("tokens in a step", 1, MOST_TOKENS, value=tokens, log=True),
        "memory": slider("memory, GB/s", 300, 30_000, value=start.memory, log=True),
        "link": slider("links, GB/s", 10, 1000, value=start.link, log=True),
    }
    for control in logs.values():
        control.readout_format = ",.0f"
    return explore(
        walls(step_costs, sizes, tokens, start),
        update,
        d=slider("width d", 1024, 8192, value=sizes.d, step=1024),
        ratio=slider("d / l (1: no latent space)", 1, 16, value=ratio),
        experts=slider("experts", 8, 1024, value=sizes.experts, step=8),
        top_k=slider("chosen by a token", 1, 64, value=sizes.top_k),
        **logs,
    )


def _times(step_costs: StepCosts, sizes: Sizes, device: Device) -> list[list[float]]:
    """Microseconds at `TOKENS`, a list for each of `TIMES`."""
    each = [device.microseconds(sizes.costs(step_costs, int(t))) for t in TOKENS]
    return [list(column) for column in zip(*each, strict=True)]


def _title(sizes: Sizes) -> str:
    width = f"l = {sizes.latent}" if sizes.latent is not None else "no latent space"
    return f"{sizes.top_k} of {sizes.experts} experts, d = {sizes.d}, {width}"


def choices(found: Mapping[str, tuple[int, int, int]]) -> go.Figure:
    """Digits of the number of ways to choose, a bar for each layer.

    Args:
        found: name of a layer, such as its alpha → (experts, experts per token, digits).
    """
    names = [f"{name}<br>{k} of {e}" for name, (e, k, _) in found.items()]
    heights = [n for _, _, n in found.values()]
    fig = go.Figure(
        go.Bar(
            x=names,
            y=heights,
            marker_color=theme.KINDS["E"].pale,
            width=0.6,
            text=[str(n) for n in heights],
            textposition="outside",
            textfont_size=13,
            cliponaxis=False,
        )
    )
    fig.update_layout(
        title_text="Ways to choose the experts of one token", height=360, showlegend=False
    )
    fig.update_yaxes(title_text="decimal digits", range=[0, 1.12 * max(heights)])
    return described(
        fig,
        f"One bar for each of {len(found)} layers of nearly equal cost. Its height is the number "
        "of decimal digits of the number of ways to choose the experts of one token. The bars "
        "about double from one to the next.",
    )


def runs(scores: Mapping[str, Sequence[float]]) -> go.Figure:
    """Bits per byte of several trainings, a row for each model and a circle for each seed."""
    fig = go.Figure()
    for name, values in scores.items():
        fig.add_scatter(
            x=list(values),
            y=[name] * len(values),
            mode="markers",
            name=name,
            marker=dict(
                color=theme.SERIES[0].colour, symbol="circle-open", size=12, line=dict(width=2)
            ),
        )
    fig.update_layout(
        title_text="After a short training",
        height=130 + 55 * len(scores),
        showlegend=False,
    )
    fig.update_xaxes(title_text="bits per byte of held-out text, lower is better", tickformat=".2f")
    fig.update_yaxes(autorange="reversed")
    return described(
        fig,
        f"One row for each of {len(scores)} models: {', '.join(scores)}. Each circle is one "
        "training with a seed of its own. Lower is better, to the left. Compare the distance of "
        "the rows with the distance of the circles in one row.",
    )


def energy(widths: Sequence[int], best: Sequence[float], learned: float, latent: int) -> go.Figure:
    """The share of the energy that l directions keep: the best, random ones, and the trained."""
    d = max(widths)
    fig = lines(
        np.asarray(widths),
        {"best directions": np.asarray(best), "random directions": 100 * np.asarray(widths) / d},
        title="Energy of what the experts read",
        x_title="number of directions l",
        y_title="energy kept, %",
        alt="Two rising lines over the number of directions. The best directions keep most of the "
        "energy with a quarter of the width. Random directions keep a share equal to their "
        "number. One mark shows what the trained projections of the model keep at their width; "
        "it is far below the line of the best directions, and not above that of the random ones.",
    )
    look = theme.SERIES[2]
    fig.add_scatter(
        x=[latent],
        y=[learned],
        mode="markers",
        name="trained W<sub>down</sub>",
        marker=dict(color=look.colour, symbol=look.marker, size=13),
    )
    fig.update_xaxes(tickvals=list(widths))
    fig.update_yaxes(range=[0, 104])
    return fig


def narrower(
    d: int,
    widths: Sequence[int],
    scores: Mapping[str, Sequence[float]],
    whole: float,
    nobody: float,
) -> go.Figure:
    """Bits per byte after the experts were cut to a smaller width, without training.

    Args:
        d: the width of the model.
        widths: latent widths, in the order of the scores.
        scores: by how the directions were chosen.
        whole: the score of the model that was cut.
        nobody: the score without routed experts.
    """
    names = [f"α = {d // width}<br>l = {width}" for width in widths]
    fig = go.Figure()
    for (name, values), look in zip(scores.items(), theme.SERIES, strict=False):
        fig.add_scatter(
            x=names,
            y=list(values),
            name=name,
            mode="lines+markers",
            line=dict(color=look.colour, dash=look.dash),
            marker=dict(color=look.colour, symbol=look.marker, size=9),
        )
    levels = {"not cut": (whole, theme.MUTED, "dot")}
    levels["without routed experts"] = (nobody, theme.INK, "longdash")
    for name, (level, colour, dash) in levels.items():
        line = dict(color=colour, dash=dash)
        fig.add_scatter(x=names, y=[level] * len(names), name=name, mode="lines", line=line)
    fig.update_layout(title_text="A trained model whose experts are cut", height=380)
    fig.update_yaxes(title_text="bits per byte of held-out text", tickformat=".2f")
    return described(
        fig,
        f"Lines over {len(names)} latent widths, from wide to narrow. Two are level: a dotted one "
        "for the model that was not cut, and a dashed one for the model without routed experts. "
        "Higher is worse. With the directions of most energy the score rises slowly at "
        "first, with random directions it rises at once.",
    )
