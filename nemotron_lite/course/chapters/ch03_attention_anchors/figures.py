"""Figures of chapter 03: what a state can store, what a cache costs, which query reads which key.

    panels          matrices side by side: questions against answers, queries against keys
    crowding        many pairs in one state, beside a cache, and a widget for both
    recall_curves   recall against the number of pairs
    key_heads       which key head each query head reads
    who_looks_where attention weights of several ways to read a row
    shuffled        how far outputs move when the past is shuffled
    two_orders      recall with key heads in two orders
    bars            a few numbers, on a linear or logarithmic axis
    memory          bytes of one layer of each kind against the context, and a widget
    losses          the losses of two trainings
    filling         a cache that fills and a query that looks, and a stepper through it

The widget of `crowding` runs a small experiment. Keys are random unit vectors and values are random
codes. A state keeps the sum of their outer products, a cache keeps each pair:

    state   S = sum_j v_j k_j^T,            read  S q = sum_j (k_j . q) v_j
    cache   all k_j and v_j,                read  sum_j softmax_j(b k_j . q) v_j

Asked for key i, the state answers v_i plus a share k_j . k_i of every other value. With n numbers
in a key at most n keys can be orthogonal, so the noise grows with pairs / n.

Left out: learned keys, decay, several heads. The chapter trains those.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import ArrayLike, NDArray
from plotly.subplots import make_subplots
from torch import Tensor

from nemotron_lite import ledger
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.chapters.ch03_attention_anchors.lesson import Watched
from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import described, lines
from nemotron_lite.course.plotting.widgets import Explorer, Stepper, explore, slider, stepper

VALUE_WIDTH = 16  # p: numbers in a value
KEY_WIDTH = 32  # numbers in a key of the cache; the state's keys have n
SHARPNESS = 24.0  # of the cache's softmax over unit keys
MOST_PAIRS = 64
MIB = 2**20

# White is zero, so that a mostly empty matrix is mostly white; grey is a cell that has no value.
SHADES = [[0, "#FFFFFF"], [0.3, "#C6DDEE"], [0.65, "#3E8EC4"], [1, "#00224E"]]

Matrix = NDArray[np.float64]


def panels(
    matrices: Mapping[str, ArrayLike],
    *,
    title: str,
    alt: str,
    x_title: str = "",
    y_title: str = "",
    marks: Mapping[str, tuple[ArrayLike, ArrayLike]] | None = None,
    height: int = 400,
) -> go.Figure:
    """Matrices side by side, first row on top, with one colour scale.

    Args:
        matrices: name → `rows columns`.
        title, alt, x_title, y_title: see `plotting.matrix`.
        marks: name → (rows, columns) of cells to mark with a cross.
        height: pixels.

    Raises:
        ValueError: nothing to draw, or marks for a panel that is not there.
    """
    named = {name: np.asarray(values, dtype=float) for name, values in matrices.items()}
    unknown = sorted(set(marks or {}) - set(named))
    if not named or unknown:
        raise ValueError(f"panels {sorted(named)}, marks for {unknown}: expected panels for all.")
    fig = make_subplots(1, len(named), subplot_titles=list(named), horizontal_spacing=0.12)
    low = min(float(np.nanmin(z)) for z in named.values())
    high = max(float(np.nanmax(z)) for z in named.values())
    for column, (name, z) in enumerate(named.items(), 1):
        fig.add_heatmap(
            z=z,
            coloraxis="coloraxis",
            row=1,
            col=column,
            name=name,
            hovertemplate="row %{y}, column %{x}: %{z:.3g}<extra></extra>",
        )
        rows, columns = (marks or {}).get(name, ((), ()))
        fig.add_scatter(
            x=np.asarray(columns),
            y=np.asarray(rows),
            mode="markers",
            row=1,
            col=column,
            marker=dict(
                symbol="x",
                size=8,
                color=theme.PALETTE["vermillion"],
                line=dict(color=theme.PLOT, width=1),
            ),
            hoverinfo="skip",
            showlegend=False,
        )
        fig.update_xaxes(title_text=x_title, range=[-0.5, z.shape[1] - 0.5], row=1, col=column)
        fig.update_yaxes(range=[z.shape[0] - 0.5, -0.5], row=1, col=column)
    fig.update_xaxes(showgrid=False, zeroline=False)
    fig.update_yaxes(showgrid=False, zeroline=False)
    fig.update_yaxes(title_text=y_title, row=1, col=1)
    fig.update_annotations(font_size=14)
    fig.update_layout(
        title_text=title,
        height=height,
        margin_t=92,
        plot_bgcolor=theme.GRID,
        coloraxis=dict(
            colorscale=SHADES, cmin=low, cmax=high, colorbar=dict(outlinewidth=0, tickfont_size=12)
        ),
    )
    return described(fig, alt)


def read_state(keys: Matrix, values: Matrix) -> Matrix:
    """Ask a state for each of its own keys; how much each answer looks like each value.

    Args:
        keys: `pairs n`.
        values: `pairs p`.

    Returns:
        `pairs pairs`: row i is the answer to key i, 1 where it equals a value exactly.
    """
    state = values.T @ keys
    return keys @ state.T @ values.T / values.shape[1]


def read_cache(keys: Matrix, values: Matrix, sharpness: float = SHARPNESS) -> Matrix:
    """The same questions to a cache of all keys and values, with a softmax."""
    scores = sharpness * keys @ keys.T
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)
    return weights @ values @ values.T / values.shape[1]


def mistakes(read: Matrix) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(questions, answers) of the cells where the best answer is not the right one."""
    best = read.argmax(1)
    wrong = np.flatnonzero(best != np.arange(len(read)))
    return wrong, best[wrong]


def _pairs(n: int, seed: int) -> tuple[Matrix, Matrix]:
    """`MOST_PAIRS` unit keys of n numbers and codes of `VALUE_WIDTH` signs; more n, same codes."""
    keys = np.random.default_rng([seed, n]).standard_normal((MOST_PAIRS, n))
    codes = np.random.default_rng(seed).choice([-1.0, 1.0], (MOST_PAIRS, VALUE_WIDTH))
    return keys / np.linalg.norm(keys, axis=1, keepdims=True), codes


def _crowded(pairs: int, n: int, seed: int) -> dict[str, Matrix]:
    keys, values = (part[:pairs] for part in _pairs(n, seed))
    cached = _pairs(KEY_WIDTH, seed)[0][:pairs]
    return {
        "Answers of the state": read_state(keys, values),
        "Answers of the cache": read_cache(cached, values),
    }


def crowding(pairs: int = 32, n: int = 8, *, seed: int = 0) -> go.Figure:
    """Questions against answers, for one state of `VALUE_WIDTH` x n and for one cache.

    Raises:
        ValueError: more pairs than `MOST_PAIRS`, or a size below 1.
    """
    if not 1 <= pairs <= MOST_PAIRS or n < 1:
        raise ValueError(f"pairs={pairs}, n={n}: expected 1 to {MOST_PAIRS} pairs and n above 0.")
    read = _crowded(pairs, n, seed)
    fig = panels(
        read,
        title=f"{pairs} pairs: one state of {VALUE_WIDTH} x {n}, and a cache",
        x_title="answer",
        y_title="question",
        marks={name: mistakes(z) for name, z in read.items()},
        alt=f"Two square maps, {pairs} questions down and {pairs} answers across. The cache's map "
        "has a strong diagonal, and pale cells where two values are alike: each question finds its "
        "own answer. On the state's map other cells are as strong as the diagonal, more of them "
        "the fewer numbers a key has, and crosses mark the questions where another answer comes "
        "out on top.",
    )
    # One fixed scale, so that the slider's pictures can be compared; negative values are white.
    fig.update_layout(coloraxis=dict(cmin=0, cmax=1.5, colorbar_title_text="likeness"))
    return fig


def crowding_widget(pairs: int = 32, n: int = 8, *, seed: int = 0) -> Explorer:
    """Sliders for the number of pairs and the size of the state."""

    def update(fig: go.FigureWidget, pairs: int, n: int) -> str:
        read = _crowded(pairs, n, seed)
        right = []
        for panel, z in enumerate(read.values()):
            rows, columns = mistakes(z)
            right.append(pairs - len(rows))
            fig.data[2 * panel].z = z
            fig.data[2 * panel + 1].update(x=columns, y=rows)
        for axis in ("xaxis", "xaxis2"):
            fig.layout[axis].range = [-0.5, pairs - 0.5]
        for axis in ("yaxis", "yaxis2"):
            fig.layout[axis].range = [pairs - 0.5, -0.5]
        fig.layout.title.text = f"{pairs} pairs: one state of {VALUE_WIDTH} x {n}, and a cache"
        return (
            f"State: {VALUE_WIDTH * n:,} numbers, {right[0]} of {pairs} answers right. "
            f"Cache: {pairs * (KEY_WIDTH + VALUE_WIDTH):,} numbers, {right[1]} of {pairs} right."
        )

    return explore(
        crowding(pairs, n, seed=seed),
        update,
        pairs=slider("pairs", 1, MOST_PAIRS, value=pairs),
        n=slider("state size n", 1, 64, value=n),
    )


def recall_curves(pairs: Sequence[int], recall: Mapping[str, ArrayLike]) -> go.Figure:
    """Share of right answers against the number of pairs, a line per model.

    Args:
        pairs: how many pairs a row held.
        recall: model → share of right answers at each, 0 to 1.
    """
    shares = {name: 100 * np.asarray(values, dtype=float) for name, values in recall.items()}
    fig = lines(
        pairs,
        shares,
        log_x=True,
        title="Recall against the number of pairs",
        x_title="pairs to remember",
        y_title="right answers, %",
        alt=f"Share of right answers over the number of pairs, for {'; '.join(recall)}. The lines "
        "of Mamba alone with a small state fall as the pairs grow; with a large state, or with "
        "Mamba and attention together, the line stays high.",
    )
    fig.update_xaxes(tickvals=list(pairs), ticktext=[str(p) for p in pairs])
    fig.update_yaxes(range=[-4, 104])
    return fig


def key_heads(shared: Mapping[str, Sequence[int]], kv: int) -> go.Figure:
    """Which key head each query head reads, one panel for each order of repeating.

    Args:
        shared: name → for each query head, the number of its key head.
        kv: key heads in all.

    Raises:
        ValueError: a key head that is not there.
    """
    for name, heads in shared.items():
        if not all(0 <= head < kv for head in heads):
            raise ValueError(f"{name!r} reads key heads {list(heads)}; there are 0 to {kv - 1}.")
    grids = {name: np.eye(kv)[list(heads)].T for name, heads in shared.items()}
    fig = panels(
        grids,
        title="Query heads and the key head each one reads",
        x_title="query head",
        y_title="key head",
        height=250,
        alt="; ".join(
            f"{name}: query heads 0 to {len(heads) - 1} read key heads "
            + " ".join(str(head) for head in heads)
            for name, heads in shared.items()
        ),
    )
    for trace, grid in zip(fig.data[::2], grids.values(), strict=True):
        marks = np.where(grid > 0, "●", "")
        trace.update(xgap=3, ygap=3, text=marks, texttemplate="%{text}", textfont_size=14)
    fig.update_xaxes(dtick=1)
    fig.update_yaxes(dtick=1)
    pale_to_strong = [[0, theme.KINDS["*"].pale], [1, theme.KINDS["*"].strong]]
    fig.update_layout(coloraxis=dict(showscale=False, colorscale=pale_to_strong))
    return fig


def shuffled(change: Mapping[str, float]) -> go.Figure:
    """How far the last output moves when the past is shuffled, a bar for each stack of layers."""
    return bars(
        change,
        title="Shuffle the past: how far the last output moves",
        y_title="change / what the layers added",
        log_y=True,
        alt="Four bars on a logarithmic axis, one for each stack of layers. One attention layer "
        "does not notice the shuffle: its bar is rounding error. Two attention layers notice part "
        "of it. A Mamba layer, alone or in front of an attention layer, changes its output by "
        "about its size.",
    )


def two_orders(recall: Mapping[str, float]) -> go.Figure:
    """Recall of a trained model, and of the same weights with key heads in another order, in %."""
    return bars(
        recall,
        title="Recall of 16 pairs, two orders of key heads",
        y_title="right answers, %",
        form=".0f",
        alt="Two bars of recall. As trained the hybrid answers nearly everything. The second bar "
        "is the same hybrid with its key heads in the order of repeat.",
    )


def who_looks_where(weights: Mapping[str, Tensor]) -> go.Figure:
    """Attention weights of several ways to read the same row; grey where a key is not seen.

    Args:
        weights: name → `1 1 t t`.
    """
    maps = {name: w[0, 0].where(w[0, 0] > 0, torch.nan).numpy() for name, w in weights.items()}
    return panels(
        maps,
        title="Who looks where",
        x_title="key",
        y_title="query",
        alt="Two maps of attention weights, queries down, keys across. Left a full lower triangle. "
        "Right the same for the first piece; then the triangle begins again at the left edge: the "
        "first query of the second piece sees the first key only, and no query of it sees its own.",
    )


def bars(
    values: Mapping[str, float],
    *,
    title: str,
    y_title: str,
    alt: str,
    log_y: bool = False,
    form: str = ".2g",
) -> go.Figure:
    """A bar for each name, its value written above it.

    Args:
        values: name → height.
        title, y_title, alt: see `plotting.lines`.
        log_y: a logarithmic axis.
        form: of the numbers above the bars.
    """
    heights = list(values.values())
    fig = go.Figure(
        go.Bar(
            x=list(values),
            y=heights,
            marker_color=theme.PALETTE["sky"],
            width=0.6,
            text=[format(height, form) for height in heights],
            textposition="outside",
            textfont_size=13,
            cliponaxis=False,
        )
    )
    fig.update_layout(title_text=title, height=360, showlegend=False)
    fig.update_yaxes(title_text=y_title, type="log" if log_y else "-", exponentformat="power")
    return described(fig, alt)


_CONTEXTS = 2 ** np.arange(6, 21)


def _kv(config: NemotronConfig, contexts: Sequence[int] | NDArray[np.int64]) -> list[float]:
    """MiB of one attention layer's keys and values."""
    layer = config.replace(pattern="*")
    return [ledger.cache(layer, int(t)).kv / MIB for t in contexts]


def _state(config: NemotronConfig) -> float:
    """MiB of one Mamba-2 layer's state."""
    return ledger.cache(config.replace(pattern="M"), 0).ssm / MIB


def _crossing(config: NemotronConfig) -> int:
    """Tokens after which one attention layer's keys and values are as large as one state."""
    per_token = ledger.cache(config.replace(pattern="*"), 1).kv
    return math.ceil(ledger.cache(config.replace(pattern="M"), 0).ssm / per_token)


def memory(config: NemotronConfig) -> go.Figure:
    """Bytes that one layer of each kind keeps, against the context, on logarithmic axes."""
    unshared = config.replace(num_key_value_heads=config.num_attention_heads)
    few, many = config.num_key_value_heads, config.num_attention_heads
    fig = lines(
        _CONTEXTS,
        {
            f"one attention layer, {few} key heads": _kv(config, _CONTEXTS),
            "one Mamba-2 layer": [_state(config)] * len(_CONTEXTS),
            f"one attention layer, {many} key heads": _kv(unshared, _CONTEXTS),
        },
        title="What one layer keeps of a sequence",
        x_title="context, tokens",
        y_title="MiB",
        log_x=True,
        log_y=True,
        markers=False,
        height=430,
        alt="Memory of one layer over the context, both axes logarithmic. Keys and values of an "
        "attention layer grow in a straight line; with a key head for each query head the line is "
        "parallel and far above. The state of a Mamba-2 layer is a level line. Both lines cross "
        "it, the one with shared key heads much later; circles mark the crossings.",
    )
    fig.add_scatter(
        x=[_crossing(config), _crossing(unshared)],
        y=[_state(config)] * 2,
        mode="markers",
        name="crossing",
        marker=dict(size=13, symbol="circle-open", color=theme.INK, line=dict(width=3)),
        hovertemplate="%{x:,} tokens<extra></extra>",
    )
    ticks = _CONTEXTS[::2]
    fig.update_xaxes(tickvals=ticks, ticktext=[_tokens(int(t)) for t in ticks])
    fig.update_yaxes(dtick=1, exponentformat="power")  # whole powers of ten
    fig.update_layout(legend=dict(orientation="h", x=0, y=-0.22, yanchor="top"))
    return fig


def memory_widget(config: NemotronConfig) -> Explorer:
    """Sliders for the number of key heads and the size of the state."""

    def update(fig: go.FigureWidget, key_heads: int, n: int) -> str:
        changed = config.replace(num_key_value_heads=key_heads, ssm_state_size=n)
        crossing, state = _crossing(changed), _state(changed)
        name = f"one attention layer, {key_heads} key heads"
        fig.data[0].update(y=_kv(changed, _CONTEXTS), name=name)
        fig.data[1].y = [state] * len(_CONTEXTS)
        fig.data[3].update(x=[crossing], y=[state])
        return (
            f"{config.num_attention_heads} query heads on {key_heads} key heads, state size {n}: "
            f"cache and state cross at {crossing:,} tokens. At {_tokens(2**20)} tokens one "
            f"attention layer keeps {_kv(changed, [2**20])[0]:,.0f} MiB, one Mamba-2 layer "
            f"{state:,.1f} MiB."
        )

    halves = [h for h in (1, 2, 4, 8, 16, 32, 64) if config.num_attention_heads % h == 0]
    return explore(
        memory(config),
        update,
        key_heads=_steps("key heads", {str(h): h for h in halves}, config.num_key_value_heads),
        n=_steps("state size n", {str(n): n for n in (16, 32, 64, 128, 256)}, 128),
    )


def losses(found: Mapping[str, Sequence[float]]) -> go.Figure:
    """Training losses over the updates, a line for each model."""
    names = list(found)
    steps = np.arange(1, len(found[names[0]]) + 1)
    fig = lines(
        steps,
        found,
        title="The same training, two implementations",
        x_title="update",
        y_title="loss",
        markers=False,
        alt=f"Training loss over the updates for {' and '.join(names)}. Both lines fall from above "
        "three to almost zero and lie on each other nearly everywhere.",
    )
    fig.update_yaxes(rangemode="tozero")
    return fig


def filling(found: Watched, step: int) -> go.Figure:
    """A cache after token `step`, what its query looks at, and the state beside it.

    Above left the keys of the cache, one column for each token that was read; below them the weight
    that the newest token's query puts on each of them; right the state of a Mamba-2 head.
    """
    fig = make_subplots(
        2,
        2,
        column_widths=[0.68, 0.32],
        row_heights=[0.6, 0.4],
        horizontal_spacing=0.14,
        vertical_spacing=0.16,
        specs=[[{}, {"rowspan": 2}], [{}, None]],
        subplot_titles=["Cache: keys of all tokens", "State of one Mamba head", "The query looks"],
    )
    shown = _filled(found, step)
    bound = float(found.keys.abs().max()), float(found.states.abs().max())
    scale = dict(colorscale=theme.DIVERGING, showscale=False)
    fig.add_heatmap(
        z=shown["keys"], zmin=-bound[0], zmax=bound[0], hoverinfo="skip", row=1, col=1, **scale
    )
    fig.add_bar(
        x=list(range(len(found.names))),
        y=shown["weights"],
        marker_color=theme.SERIES[0].colour,
        hovertemplate="weight %{y:.2f}<extra></extra>",
        row=2,
        col=1,
    )
    fig.add_heatmap(
        z=shown["state"], zmin=-bound[1], zmax=bound[1], hoverinfo="skip", row=1, col=2, **scale
    )
    columns = dict(
        tickvals=list(range(len(found.names))),
        ticktext=found.names,
        range=[-0.5, len(found.names) - 0.5],
        showgrid=False,
        tickangle=0,
    )
    for row in (1, 2):
        fig.update_xaxes(**columns, row=row, col=1)
    fig.update_xaxes(title_text="token", row=2, col=1)
    fig.update_xaxes(title_text="n", showgrid=False, dtick=1, row=1, col=2)
    fig.update_yaxes(title_text="numbers", showgrid=False, showticklabels=False, row=1, col=1)
    fig.update_yaxes(title_text="weight", range=[0, 1], row=2, col=1)
    fig.update_yaxes(title_text="p", showgrid=False, showticklabels=False, row=1, col=2)
    for place in ((1, 1), (1, 2)):
        fig.update_yaxes(ticks="", row=place[0], col=place[1])
    fig.update_annotations(font_size=13)
    fig.update_layout(
        title_text="A cache grows, a state does not", height=470, showlegend=False, margin_t=84
    )
    return described(
        fig,
        "Three panels. Above left a matrix with one column of keys for each token read so far; the "
        "columns of later tokens are empty. Below it one bar for each of these tokens: how much "
        "weight the newest token's query puts on it. Right the state of one Mamba head, a matrix "
        "of the same size after every token.",
    )


def filling_stepper(found: Watched, start: int) -> Stepper:
    """`filling` token by token; `start` is the token that a reader sees first."""

    def update(fig: go.FigureWidget, step: int) -> str:
        shown = _filled(found, step)
        fig.data[0].z = shown["keys"]
        fig.data[1].y = shown["weights"]
        fig.data[2].z = shown["state"]
        best = int(found.weights[step].argmax())
        columns, state = found.keys.shape[1], found.states[0].numel()
        return (
            f"Token {step} is {found.names[step]}. The cache holds {step + 1} columns of keys, "
            f"{(step + 1) * columns:,} numbers, and as many of values; the state still has "
            f"{state}. The query puts most weight, {100 * float(found.weights[step, best]):.0f} %, "
            f"on token {best}, which is {found.names[best]}."
        )

    return stepper(filling(found, start), update, len(found.names), "token", start)


def _filled(found: Watched, step: int) -> dict[str, Matrix]:
    """The panels after token `step`; what does not exist yet is 0, which is drawn as white."""
    keys = np.zeros((found.keys.shape[1], found.keys.shape[0]))
    keys[:, : step + 1] = found.keys[: step + 1].T.numpy()
    weights = np.zeros(len(found.names))
    weights[: step + 1] = found.weights[step, : step + 1].numpy()
    return {"keys": keys, "weights": weights, "state": found.states[step].T.numpy()}


def _steps(label: str, options: Mapping[str, int], value: int) -> ipywidgets.SelectionSlider:
    """A slider over a few numbers that are not evenly spaced."""
    return ipywidgets.SelectionSlider(
        description=label,
        options=list(options.items()),
        value=value,
        style={"description_width": "initial"},
        layout=ipywidgets.Layout(width="min(100%, 460px)"),
    )


def _tokens(t: int) -> str:
    """64, 1K, 256K, 1M."""
    if t < 2**10:
        return str(t)
    return f"{t >> 20}M" if t >= 2**20 else f"{t >> 10}K"
