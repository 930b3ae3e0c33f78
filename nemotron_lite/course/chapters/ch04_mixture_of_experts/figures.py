"""Figures of chapter 04: which experts read which token, how even their load is, what they cost.

    who_reads       weights of every expert for every token of a text
    routing         one token: scores, biased scores, weights, and a stepper through a text
    zeros           the share of zeros behind the squared ReLU, layer by layer
    violations      MaxVio over the updates of several trainings
    drifted         biases of devices that count for themselves
    reading         the share of the experts that several tokens read together, and a widget

The line of `reading` is a formula: if every token chooses k of e experts at random, an expert is
left out by all of n tokens with probability (1 - k / e)^n. Real routers prefer some experts, so
they read fewer. Reading is what decoding waits for, which is why a mixture saves most for one user
and little for a full batch.

Left out: the map of the load, experts by updates, which is `plotting.balance`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import NDArray
from plotly.subplots import make_subplots
from torch import Tensor

from nemotron_lite.course.chapters.ch04_mixture_of_experts.lesson import Looked
from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import described, lines
from nemotron_lite.course.plotting.widgets import Explorer, Stepper, explore, slider, stepper

# White is zero: most experts do not read a token.
SHADES = [[0, "#FFFFFF"], [0.3, "#BFE3D8"], [0.65, "#3E9E85"], [1, "#003D2E"]]
IDLE, CHOSEN = theme.GRID, theme.KINDS["E"].strong
BY_BIAS = theme.PALETTE["vermillion"]  # chosen only because of the bias
MOST_TOKENS = 256
SMOOTHED = 10  # updates that are averaged for a line


def who_reads(found: Looked, title: str) -> go.Figure:
    """The weight of every expert for every token; white where an expert was not chosen."""
    weights = found.weights.numpy()
    fig = go.Figure(
        go.Heatmap(
            z=weights,
            colorscale=SHADES,
            colorbar=dict(title=dict(text="weight", side="right")),
            hovertemplate="token %{y}, expert %{x}: weight %{z:.2f}<extra></extra>",
        )
    )
    fig.update_layout(title_text=title, height=130 + 20 * len(found.names))
    fig.update_xaxes(title_text="expert", showgrid=False)
    fig.update_yaxes(
        title_text="token",
        tickvals=list(range(len(found.names))),
        ticktext=[f"{name}" for name in found.names],
        range=[len(found.names) - 0.5, -0.5],
        showgrid=False,
    )
    each = int(found.chosen[0].sum())
    return described(
        fig,
        f"A map with one row for each of {len(found.names)} tokens and one column for each of "
        f"{weights.shape[1]} experts. In each row {each} cells are coloured, the experts that "
        "were chosen; all others are white. Most tokens have different experts; rows of equal "
        "tokens share many.",
    )


def routing(found: Looked, token: int) -> go.Figure:
    """Scores, scores with the bias, and weights of one token, a bar for each expert.

    The smallest bias is subtracted from all: a common amount changes no choice, and it would hide
    the differences.
    """
    fig = make_subplots(
        3,
        1,
        shared_xaxes=True,
        vertical_spacing=0.1,
        subplot_titles=["Score s", "Score plus bias, s + b, less the smallest b", "Weight w"],
    )
    experts = list(range(len(found.bias)))
    for row, (heights, colours) in enumerate(_bars(found, token), 1):
        fig.add_bar(
            x=experts,
            y=heights,
            marker=dict(color=colours, line_width=0),
            hovertemplate="expert %{x}: %{y:.3f}<extra></extra>",
            row=row,
            col=1,
        )
    fig.update_yaxes(range=[0, 1], row=1, col=1)
    fig.update_yaxes(range=[0, 1.05 * float(_biased(found).max())], row=2, col=1)
    fig.update_yaxes(range=[0, 1.05 * float(found.weights.max())], row=3, col=1)
    fig.update_xaxes(title_text="expert", showgrid=False, row=3, col=1)
    fig.update_annotations(font_size=13)
    fig.update_layout(title_text="One token is routed", height=460, showlegend=False, margin_t=84)
    return described(
        fig,
        f"Three rows of bars, one bar for each of {len(experts)} experts. Above the scores; in the "
        "middle the scores with the selection bias, where the largest are marked as chosen; below "
        "the weights, which only the chosen experts have. Experts chosen only because of their "
        f"bias have another colour: {_named(_by_bias(found, token)) or 'none'}. The weights follow "
        "the scores without the bias.",
    )


def routing_stepper(found: Looked, start: int) -> Stepper:
    """`routing` token by token."""

    def update(fig: go.FigureWidget, step: int) -> str:
        for trace, (heights, colours) in zip(fig.data, _bars(found, step), strict=True):
            trace.y = heights
            trace.marker.color = colours
        chosen = found.chosen[step]
        biased = _named(_by_bias(found, step)) or "none"
        return (
            f"Token {step} is {found.names[step]}. Experts {_named(chosen)} compute it. Chosen "
            f"only because of their bias: {biased}. The weights add up to "
            f"{float(found.weights[step].sum()):.2f}."
        )

    return stepper(routing(found, start), update, len(found.names), "token", start)


def _bars(found: Looked, token: int) -> list[tuple[list[float], list[str]]]:
    """Heights and colours of the three rows of `routing`."""
    marks = zip(found.chosen[token].tolist(), _by_bias(found, token).tolist(), strict=True)
    colours = [BY_BIAS if biased else CHOSEN if chosen else IDLE for chosen, biased in marks]
    scores = found.scores[token]
    rows = (scores, _biased(found)[token], found.weights[token])
    return [(row.tolist(), colours) for row in rows]


def _by_bias(found: Looked, token: int) -> Tensor:
    """True for the experts of a token that their scores alone would not have chosen."""
    chosen = found.chosen[token]
    best = found.scores[token].topk(int(chosen.sum())).indices
    return chosen & ~torch.zeros_like(chosen).scatter(0, best, True)


def _named(marked: Tensor) -> str:
    return ", ".join(map(str, marked.nonzero().flatten().tolist()))


def _biased(found: Looked) -> Tensor:
    """Scores plus bias, less the smallest bias."""
    return found.scores + found.bias - found.bias.min()


def zeros(shares: Mapping[str, float]) -> go.Figure:
    """The share of hidden numbers that are 0, a bar for each layer, in %."""
    heights = [100 * share for share in shares.values()]
    fig = go.Figure(
        go.Bar(
            x=list(shares),
            y=heights,
            marker_color=theme.KINDS["E"].pale,
            width=0.6,
            text=[f"{height:.0f}" for height in heights],
            textposition="outside",
            textfont_size=13,
            cliponaxis=False,
        )
    )
    fig.update_layout(title_text="Zeros behind the squared ReLU", height=340, showlegend=False)
    fig.update_yaxes(title_text="hidden numbers that are 0, %", range=[0, 108])
    return described(
        fig,
        f"One bar for each of {len(shares)} layers with experts: the share of the hidden numbers "
        "of the chosen experts that are exactly zero. No bar reaches the top and none is empty.",
    )


def violations(
    runs: Mapping[str, NDArray[np.float64]], title: str = "How uneven is the load?"
) -> go.Figure:
    """MaxVio over the updates, a line for each training, averaged over `SMOOTHED` updates."""
    smooth = {name: _smoothed(np.asarray(values, dtype=float)) for name, values in runs.items()}
    first = next(iter(smooth.values()))
    fig = lines(
        SMOOTHED * np.arange(1, len(first) + 1),
        smooth,
        title=title,
        x_title="update",
        y_title="MaxVio",
        markers=False,
        alt=f"MaxVio of one router over the updates of {len(runs)} trainings: {', '.join(runs)}. "
        "Zero is an even load. The line without balancing stays far above the others.",
    )
    fig.update_yaxes(rangemode="tozero")
    return fig


def _smoothed(values: NDArray[np.float64]) -> NDArray[np.float64]:
    whole = len(values) // SMOOTHED * SMOOTHED
    if not whole:
        raise ValueError(f"{len(values)} updates: expected at least {SMOOTHED}.")
    return values[:whole].reshape(-1, SMOOTHED).mean(1)


def drifted(biases: Tensor) -> go.Figure:
    """The biases of several devices, a line of marks for each."""
    fig = go.Figure()
    for device, row in enumerate(biases.tolist()):
        fig.add_scatter(x=list(range(len(row))), y=row, name=f"device {device}", mode="markers")
    fig.update_layout(title_text="Every device counts for itself", height=340)
    fig.update_xaxes(title_text="expert", showgrid=False)
    fig.update_yaxes(title_text="selection bias")
    return described(
        fig,
        f"Marks for the selection bias of every expert on {len(biases)} devices. The devices "
        "disagree: at many experts one bias is far above zero and another far below.",
    )


def share_read(
    experts: int, top_k: int, tokens: Sequence[int] | NDArray[np.float64]
) -> NDArray[np.float64]:
    """The expected share of the experts that some tokens read, if every choice is random, in %."""
    share: NDArray[np.float64] = 1 - (1 - top_k / experts) ** np.asarray(tokens, dtype=float)
    return 100 * share


def reading(experts: int, top_k: int) -> go.Figure:
    """The share of the experts that are read in one step, against the tokens of the step.

    Raises:
        ValueError: more experts chosen than there are, or none.
    """
    if not 1 <= top_k <= experts:
        raise ValueError(f"{top_k} of {experts} experts: expected 1 to {experts} chosen.")
    tokens = np.unique(np.geomspace(1, MOST_TOKENS, 40).round())
    fig = lines(
        tokens,
        {"experts read": share_read(experts, top_k, tokens)},
        title=_reading_title(experts, top_k),
        x_title="tokens that are decoded together",
        y_title="experts read, %",
        log_x=True,
        markers=False,
        alt="A line that rises from a few percent for one token towards all experts: the share of "
        "the experts that at least one of the tokens reads, if every choice is random.",
    )
    ticks = [2**i for i in range(0, 9, 2)]
    fig.update_xaxes(tickvals=ticks, ticktext=[str(t) for t in ticks])
    fig.update_yaxes(range=[0, 105])
    return fig


def reading_widget(experts: int, top_k: int) -> Explorer:
    """Sliders for the number of experts and for how many of them a token chooses."""
    tokens = np.unique(np.geomspace(1, MOST_TOKENS, 40).round())

    def update(fig: go.FigureWidget, experts: int, top_k: int) -> str:
        chosen = min(top_k, experts)
        fig.data[0].y = share_read(experts, chosen, tokens)
        fig.layout.title.text = _reading_title(experts, chosen)
        shares = share_read(experts, chosen, (1, 8, 32, 256))
        listed = ", ".join(
            f"{n} {'token' if n == 1 else 'tokens'} {share:.0f} %"
            for n, share in zip((1, 8, 32, 256), shares, strict=True)
        )
        return f"{chosen} of {experts} experts each. Read in one step: {listed}."

    return explore(
        reading(experts, top_k),
        update,
        experts=slider("experts", 8, 512, value=experts),
        top_k=slider("chosen by a token", 1, 32, value=top_k),
    )


def _reading_title(experts: int, top_k: int) -> str:
    return f"{experts} experts, {top_k} for each token: how many are read?"
