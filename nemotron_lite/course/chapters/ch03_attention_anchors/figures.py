"""Figures of chapter 03: what a state can store, what a cache costs, which query reads which key.

    panels          matrices side by side: questions against answers, queries against keys
    crowding        many pairs in one state, beside a cache, and a widget for both
    recall_curves   recall against the number of pairs
    key_heads       which key head each query head reads
    bars            a few numbers, on a linear or logarithmic axis
    memory          bytes against context, and a widget for the number of attention layers

The widget of `crowding` runs a small experiment. Keys are random unit vectors and values are random
codes. A state keeps the sum of their outer products, a cache keeps each pair:

    state   S = sum_j v_j k_j^T,            read  S q = sum_j (k_j . q) v_j
    cache   all k_j and v_j,                read  sum_j softmax_j(b k_j . q) v_j

Asked for key i, the state answers v_i plus a share k_j . k_i of every other value. With n numbers
in a key at most n keys can be orthogonal, so the noise grows with pairs / n.

Left out: learned keys, decay, several heads. The chapter trains those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from numpy.typing import ArrayLike, NDArray
from plotly.subplots import make_subplots

from nemotron_lite import ledger
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import described, lines
from nemotron_lite.course.plotting.widgets import Explorer, explore, slider

VALUE_WIDTH = 16  # p: numbers in a value
KEY_WIDTH = 32  # numbers in a key of the cache; the state's keys have n
SHARPNESS = 24.0  # of the cache's softmax over unit keys
MOST_PAIRS = 64
GIB = 2**30

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
        "is a clean diagonal: each question finds its own answer. On the state's map the diagonal "
        "stands in a haze of other answers, more of it the fewer numbers a key has, and crosses "
        "mark the questions where another answer comes out on top.",
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
        "of Mamba alone with a small state fall as the pairs grow, and so does that of attention "
        "alone; with a large state, or with Mamba and attention together, the line stays high.",
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


_CONTEXTS = 2 ** np.arange(10, 21)


def _with(config: NemotronConfig, anchors: int, key_heads: int) -> NemotronConfig:
    """`config` with that many attention layers behind its other layers, sharing that many keys."""
    rest = config.pattern.replace("*", "")
    return config.replace(pattern=rest + "*" * anchors, num_key_value_heads=key_heads)


def _kv(config: NemotronConfig, contexts: Sequence[int] | NDArray[np.int64]) -> list[float]:
    return [ledger.cache(config, int(t)).kv / GIB for t in contexts]


def memory(config: NemotronConfig) -> go.Figure:
    """Bytes that one sequence needs, against its length, on logarithmic axes."""
    all_attention = _with(config, config.num_layers, config.num_key_value_heads)
    rest = ledger.cache(config, 0).total / GIB
    fig = lines(
        _CONTEXTS,
        {
            "keys and values of the anchors": _kv(config, _CONTEXTS),
            "states of the Mamba layers": [rest] * len(_CONTEXTS),
            "keys and values, were every layer attention": _kv(all_attention, _CONTEXTS),
        },
        title="What one sequence keeps in memory",
        x_title="context, tokens",
        y_title="GiB",
        log_x=True,
        log_y=True,
        height=430,
        alt="Memory of one sequence over its context, both axes logarithmic. Keys and values grow "
        "in a straight line, those of a model with attention in every layer far above those of the "
        "anchors alone. The states of the Mamba layers are a level line that the anchors' keys "
        "and values cross at some tens of thousands of tokens.",
    )
    ticks = _CONTEXTS[::2]
    fig.update_xaxes(tickvals=ticks, ticktext=[_tokens(int(t)) for t in ticks])
    fig.update_yaxes(dtick=1)  # whole powers of ten
    fig.update_layout(legend=dict(orientation="h", x=0, y=-0.22, yanchor="top"))
    return fig


def memory_widget(config: NemotronConfig) -> Explorer:
    """Sliders for context, number of anchors and key heads."""
    state = ledger.cache(config, 0).total

    def update(fig: go.FigureWidget, tokens: int, anchors: int, key_heads: int) -> str:
        changed = _with(config, anchors, key_heads)
        fig.data[0].y = _kv(changed, _CONTEXTS)
        per_token = ledger.cache(changed, 0).kv_per_token
        fig.data[3].update(x=[tokens], y=[tokens * per_token / GIB])
        equal = f"as much as the states after {state // per_token:,} tokens. " if anchors else ""
        return (
            f"{anchors} anchors, {config.num_attention_heads} query heads on {key_heads} key "
            f"heads: {per_token:,} bytes a token, {equal}At {tokens:,} tokens "
            f"{tokens * per_token / GIB:.2f} GiB of keys and values beside {state / GIB:.2f} GiB "
            "of states."
        )

    figure = memory(config)
    figure.add_scatter(
        x=[2**20],
        y=[0],
        mode="markers",
        name="the context chosen",
        marker=dict(size=13, symbol="star", color=theme.INK),
    )
    halves = [h for h in (1, 2, 4, 8, 16, 32, 64) if config.num_attention_heads % h == 0]
    return explore(
        figure,
        update,
        tokens=_steps("context", {_tokens(int(t)): int(t) for t in _CONTEXTS}, 2**20),
        anchors=slider("anchors", 0, 40, value=config.pattern.count("*")),
        key_heads=_steps("key heads", {str(h): h for h in halves}, config.num_key_value_heads),
    )


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
    """1K, 256K, 1M."""
    return f"{t >> 20}M" if t >= 2**20 else f"{t >> 10}K"
