"""The figures of chapter 01: a state that is written and read, two rules, parallel scans.

    states_of, state_figure, state_stepper   a state of p x n numbers, token by token
    follow, trace, explorer     one number of the state while tokens come in; with sliders
    two_rules                   decay and gain of one step, by two rules
    doubling                    which tokens the scan by doubling combines in which round
    scan_rounds, wiring, costs  which tokens a parallel scan combines in which round, and how often
    speed                       time per token of scans, against the length
    learning                    accuracy while training
    chosen_steps                the step sizes that a trained layer gives to the tokens of a row
    half_lives                  how many tokens the heads of a layer remember
    losses                      two models during the same training

Functions take arrays and return figures. Scans are computed by `ops.selective_scan`, so a picture
always agrees with the code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import ipywidgets
import numpy as np
import plotly.graph_objects as go
import torch
from numpy.typing import ArrayLike
from plotly.subplots import make_subplots

from nemotron_lite import ops
from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import described, lines
from nemotron_lite.course.plotting.widgets import (
    Explorer,
    Stepper,
    explore,
    slider,
    stepper,
)

KINDS = ("one by one", "doubling", "tree")
TOKENS = 48  # in the explorer


ROW = tuple(".G..E.~.F..~.???")  # what the stepper reads; ~ is noise
LETTERS, SLOTS = "EFGH", 3
RATE = -0.1


class States(NamedTuple):
    """A row of t tokens with p = 4 and n = 3: the inputs of a scan and what it computes."""

    tokens: list[str]
    x: np.ndarray  # t p
    dt: np.ndarray  # t
    B: np.ndarray  # t n
    C: np.ndarray  # t n
    fade: np.ndarray  # t, what is kept of the state
    state: np.ndarray  # t p n, after each token
    y: np.ndarray  # t p


def states_of(tokens: Sequence[str] = ROW) -> States:
    """Scan a row of letters, silence `.`, noise `~` and questions `?`, with dt, B, C by hand.

    The k-th letter is written along direction k with dt = 1, silence and questions have dt = 0, and
    noise has a small one. Question k reads along direction k.
    """
    t, p = len(tokens), len(LETTERS)
    x, B, C = (torch.zeros(1, t, 1, size, dtype=torch.float64) for size in (p, SLOTS, SLOTS))
    dt = torch.zeros(1, t, 1, dtype=torch.float64)
    letters = questions = 0
    for i, token in enumerate(tokens):
        if token in LETTERS:
            x[0, i, 0, LETTERS.index(token)] = B[0, i, 0, letters % SLOTS] = dt[0, i, 0] = 1.0
            letters += 1
        elif token == "?":
            C[0, i, 0, questions % SLOTS] = 1.0
            questions += 1
        elif token == "~":
            x[0, i, 0], B[0, i, 0], dt[0, i, 0] = 0.7, 0.7, 0.1
    rate = torch.tensor([RATE], dtype=torch.float64)
    state, states, outputs = torch.zeros(1, 1, p, SLOTS, dtype=torch.float64), [], []
    for i in range(t):
        now = slice(i, i + 1)
        y, state = ops.selective_scan(
            x[:, now], dt[:, now], rate, B[:, now], C[:, now], initial_state=state
        )
        states.append(state[0, 0])
        outputs.append(y[0, 0, 0])
    parts = (x[0, :, 0], dt[0, :, 0], B[0, :, 0], C[0, :, 0], torch.exp(dt[0, :, 0] * RATE))
    arrays = [part.numpy() for part in (*parts, torch.stack(states), torch.stack(outputs))]
    return States(list(tokens), *arrays)


def in_words(found: States, i: int) -> str:
    """What token i does to the state, as a sentence."""
    token, dt = found.tokens[i], found.dt[i]
    name = {".": "silence", "~": "noise", "?": "a question"}.get(token, f"the letter {token}")
    start = f"Token {i} is {name}: dt = {dt:.3g}, so {found.fade[i]:.0%} of the state is kept"
    if token == "?":
        slot, best = int(found.C[i].argmax()), int(found.y[i].argmax())
        return (
            f"{start} and nothing is written. C reads direction {slot}: the largest of y is "
            f"{LETTERS[best]}, with {found.y[i, best]:.2f}."
        )
    if dt == 0:
        return f"{start} and nothing is written."
    if token == "~":
        return f"{start} and a little noise is written along all directions."
    return f"{start}, and {token} is written along direction {int(found.B[i].argmax())}."


def state_figure(i: int = 0, found: States | None = None) -> go.Figure:
    """x, B, C, dt and y of token i around the state after it, all with their numbers."""
    found = states_of() if found is None else found
    fig = make_subplots(
        rows=4,
        cols=3,
        specs=[
            [{"colspan": 3}, None, None],
            [None, {}, None],
            [{}, {}, {}],
            [None, {}, None],
        ],
        row_heights=[0.2, 0.13, 0.54, 0.13],
        column_widths=[0.2, 0.6, 0.2],
        horizontal_spacing=0.1,
        vertical_spacing=0.1,
    )
    places = list(range(len(found.tokens)))
    fig.add_bar(x=places, y=found.dt, row=1, col=1, hovertemplate="token %{x}: dt = %{y}")
    for row, col in ((2, 2), (3, 1), (3, 2), (3, 3), (4, 2)):
        fig.add_heatmap(
            zmin=0,
            zmax=1,
            colorscale=[[0.0, theme.PLOT], [1.0, theme.PALETTE["blue"]]],
            showscale=False,
            texttemplate="%{z:.2f}",
            textfont_size=13,
            xgap=2,
            ygap=2,
            row=row,
            col=col,
        )
    directions, none = [f"direction {k}" for k in range(SLOTS)], dict(showticklabels=False)
    # A bar of height zero cannot be seen, so a band marks the current token as well.
    fig.add_vrect(
        x0=i - 0.5, x1=i + 0.5, fillcolor=theme.PALETTE["orange"], opacity=0.3, line_width=0,
        layer="below", row=1, col=1,
    )  # fmt: skip
    fig.update_xaxes(tickvals=places, ticktext=found.tokens, tickangle=0, row=1, col=1)
    fig.update_yaxes(title_text="dt", range=[0, 1.15], row=1, col=1)
    fig.update_yaxes(tickvals=[0], ticktext=["B"], row=2, col=2)
    fig.update_yaxes(tickvals=[0], ticktext=["C"], row=4, col=2)
    for col, title in ((1, "x"), (2, "state S"), (3, "y")):
        fig.update_yaxes(
            autorange="reversed", tickvals=list(range(4)), ticktext=list(LETTERS), row=3, col=col
        )
        fig.update_xaxes(title_text=title, **none, row=3, col=col)
    fig.update_xaxes(**none, row=2, col=2)
    fig.update_xaxes(tickvals=list(range(SLOTS)), ticktext=directions, row=4, col=2)
    fig.update_xaxes(showgrid=False, zeroline=False)
    fig.update_yaxes(showgrid=False, zeroline=False)
    fig.update_layout(height=620, showlegend=False, bargap=0.3)
    show_token(fig, i, found)
    return described(
        fig,
        "Above, the row of tokens with a bar for the step size dt of each: high for letters, low "
        "for noise, zero for silence and questions; a band and a filled bar mark the current token"
        ". Below, the state as four rows (letters) by three columns (directions) of numbers, with "
        "x on its left, B above, C below and the output y on its right. A letter fills one cell, "
        "the row given by x and the column given by B, and all older cells shrink a little. A "
        "question copies one column to y.",
    )


def show_token(fig: go.Figure | go.FigureWidget, i: int, found: States) -> str:
    """Draw token i in a figure of `state_figure`; returns the sentence about it."""
    pale, strong = theme.KINDS["M"].pale, theme.KINDS["M"].strong
    bars, B, x, state, y, C = fig.data
    band = fig.layout.shapes[0]
    band.x0, band.x1 = i - 0.5, i + 0.5
    bars.marker.color = [strong if k == i else pale for k in range(len(found.tokens))]
    bars.marker.line = dict(
        color=theme.MUTED, width=[3 if k == i else 1 for k in range(len(found.tokens))]
    )
    B.z, C.z = found.B[i : i + 1], found.C[i : i + 1]
    x.z, y.z, state.z = found.x[i][:, None], found.y[i][:, None], found.state[i]
    name = {".": "silence", "~": "noise", "?": "question"}.get(found.tokens[i], found.tokens[i])
    fig.layout.title.text = f"Token {i}: {name}"
    return in_words(found, i)


def state_stepper() -> tuple[Stepper, go.Figure]:
    """Step through `ROW`, and the figure that is shown when no kernel runs."""
    found = states_of()
    start = found.tokens.index("F")
    still = state_figure(start, found)

    def update(fig: go.FigureWidget, step: int) -> str:
        return show_token(fig, step, found)

    return stepper(still, update, len(found.tokens), "token", start), still


class Trace(NamedTuple):
    """One number of a state over time, arrays of length t."""

    fade: np.ndarray  # what is kept of the state at each token
    state: np.ndarray
    first: np.ndarray  # the part of the state that the first token with an input wrote


def follow(x: ArrayLike, dt: ArrayLike, A: float) -> Trace:
    """Run the scan with p = n = 1 and B = C = 1 over inputs `x` and step sizes `dt`, `t` each.

    Raises:
        ValueError: no input differs from zero, so there is nothing to follow.
    """
    inputs = torch.tensor(np.asarray(x, dtype=float))
    steps = torch.tensor(np.asarray(dt, dtype=float))
    written = inputs.nonzero()
    if not len(written):
        raise ValueError("every x is zero; expected one input that is not, to follow it.")
    alone = torch.zeros_like(inputs)
    alone[written[0]] = inputs[written[0]]
    both = torch.stack([inputs, alone], dim=1)[None, :, :, None]  # b t h p, two heads
    ones = torch.ones(1, len(inputs), 1, 1, dtype=torch.float64)
    rates = torch.full((2,), float(A), dtype=torch.float64)
    y, _ = ops.selective_scan(both, steps[None, :, None].expand(1, -1, 2), rates, ones, ones)
    return Trace(torch.exp(steps * A).numpy(), y[0, :, 0, 0].numpy(), y[0, :, 1, 0].numpy())


def trace(x: ArrayLike, dt: ArrayLike, A: float, *, title: str, alt: str) -> go.Figure:
    """Three plots over time: what comes in, how much of the state is kept, and the state.

    Args:
        x: inputs, `t`.
        dt: step sizes, `t`.
        A: decay rate, negative.
        title: over the three plots.
        alt: the alternative text (see `described`).
    """
    t = np.arange(len(np.asarray(x)))
    found = follow(x, dt, A)
    fig = make_subplots(
        rows=3, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.25, 0.25, 0.5]
    )
    fig.add_bar(x=t, y=np.asarray(x), name="input x", marker_color=theme.PALETTE["sky"])
    blue, red, green = theme.SERIES[:3]
    for row, name, values, look, width in (
        (2, "kept: exp(dt A)", found.fade, green, 2),
        (3, "state S", found.state, blue, 2.5),
        (3, "of that, the first input", found.first, red, 2.5),
    ):
        line = dict(color=look.colour, dash=look.dash, width=width, shape="hv")
        fig.add_scatter(x=t, y=values, name=name, mode="lines", line=line, row=row, col=1)
    for row, name in ((1, "x"), (2, "kept"), (3, "S")):
        fig.update_yaxes(title_text=name, row=row, col=1)
    fig.update_yaxes(range=[0, 1.05], row=2, col=1)
    fig.update_xaxes(title_text="token", row=3, col=1)
    fig.update_layout(
        title_text=title,
        height=480,
        bargap=0.4,
        margin_t=92,
        title_y=0.96,
        legend=dict(orientation="h", x=0, y=1.02, yanchor="bottom"),
    )
    return described(fig, alt)


def explorer() -> tuple[Explorer, go.Figure]:
    """Sliders for dt, A and the input, and the figure that is shown when no kernel runs."""
    x, dt = _inputs(20, 0.0), np.full(TOKENS, 0.25)
    still = trace(
        x,
        dt,
        -0.4,
        title="One number of the state",
        alt="Three plots over 48 tokens. Two inputs come in, at token 4 and token 20. The share of "
        "the state that is kept is the same at every token. The state jumps at each input and "
        "falls off exponentially after it; what the first input wrote is almost gone at the end.",
    )
    waits = ipywidgets.Checkbox(value=False, description="selective: dt = 0 where x is silent")
    waits.style.description_width = "initial"

    def update(
        fig: go.FigureWidget, dt: float, A: float, place: int, noise: float, waits: bool
    ) -> str:
        x = _inputs(place, noise)
        loud = np.isin(np.arange(TOKENS), (4, place))
        steps = np.where(loud | (not waits), dt, 0.0)
        found = follow(x, steps, A)
        values = (x, found.fade, found.state, found.first)
        for drawn, new in zip(fig.data, values, strict=True):
            drawn.y = new
        left = found.first[-1] / found.first[4]
        half = np.log(0.5) / (dt * A)
        return (
            f"A token with dt = {dt:.3g} keeps {np.exp(dt * A):.3f} of the state; {half:.3g} such "
            f"tokens halve it. At the end {left:.1%} of what the first input wrote is left."
        )

    view = explore(
        still,
        update,
        dt=slider("step dt", 0.01, 4.0, value=0.25, log=True),
        A=slider("rate A", -4.0, -0.05, value=-0.4, step=0.05),
        place=slider("second input at token", 5, TOKENS - 4, value=20),
        noise=slider("noise between them", 0.0, 0.5, value=0.0, step=0.05),
        waits=waits,
    )
    return view, still


def _inputs(place: int, noise: float) -> np.ndarray:
    """Two inputs of 1, at token 4 and at `place`, and noise after the first."""
    x = noise * np.abs(np.sin(np.arange(TOKENS) * 2.4))
    x[:5] = 0.0
    x[[4, place]] = 1.0
    return x


def two_rules(exponents: ArrayLike) -> go.Figure:
    """Fade and gain of one step against -dt A, exact and by Euler's rule.

    Args:
        exponents: values of -dt A, `n`, above zero.
    """
    z = np.asarray(exponents, dtype=float)
    fig = make_subplots(rows=1, cols=2, subplot_titles=("fade", "gain / dt"))
    blue, red, green = theme.SERIES[:3]
    for column, name, values, look in (
        (1, "exact: exp(dt A)", np.exp(-z), blue),
        (1, "Euler: 1 + dt A", 1 - z, red),
        (2, "exact: zero-order hold", -np.expm1(-z) / z, blue),
        (2, "Mamba: gain = dt", np.ones_like(z), green),
    ):
        line = dict(color=look.colour, dash=look.dash, width=2.5)
        fig.add_scatter(x=z, y=values, name=name, mode="lines", line=line, row=1, col=column)
    fig.add_hrect(y0=-1.2, y1=0, fillcolor=theme.PALETTE["orange"], opacity=0.18, row=1, col=1)
    fig.update_yaxes(range=[-1.2, 1.1], row=1, col=1)
    fig.update_yaxes(range=[0, 1.1], row=1, col=2)
    fig.update_xaxes(title_text="-dt A", type="log", tickvals=[0.01, 0.1, 1])
    fig.update_layout(
        title_text="One step by different rules",
        height=400,
        margin_t=96,
        legend=dict(orientation="h", y=-0.28, x=0),
    )
    return described(
        fig,
        "Two plots against minus dt A, from a hundredth to four. Left, the fade: the exact one "
        "falls from one towards zero; Euler's follows it at first, then crosses zero at one and "
        "goes negative, into a shaded region. Right, the gain divided by dt: Mamba's is one "
        "everywhere, the zero-order hold's falls away from one as steps grow.",
    )


def scan_rounds(kind: str, t: int) -> list[list[tuple[int, int]]]:
    """The combinations of a scan over t entries: for each round, pairs (earlier, later).

    A round combines each `later` with its `earlier`. At the end, entry i is the combination of
    entries 0 to i. "doubling" is Hillis and Steele's (1986); "tree" is Blelloch's two sweeps (1990)
    in the form of Brent and Kung, where every entry ends inclusive.

    Raises:
        ValueError: an unknown kind, or a t that is not a power of two.
    """
    if t < 1 or t & (t - 1):
        raise ValueError(f"t is {t}; expected a power of two.")
    if kind == "one by one":
        return [[(i - 1, i)] for i in range(1, t)]
    steps = [1 << k for k in range(t.bit_length() - 1)]
    if kind == "doubling":
        return [[(i - step, i) for i in range(step, t)] for step in steps]
    if kind != "tree":
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}.")
    up = [[(i - step, i) for i in range(2 * step - 1, t, 2 * step)] for step in steps]
    down = [[(i - step, i) for i in range(3 * step - 1, t, 2 * step)] for step in steps[-2::-1]]
    return [pairs for pairs in up + down if pairs]


def wiring(t: int = 8) -> go.Figure:
    """Which entries are combined in which round: the three scans over t entries, side by side."""
    fig = make_subplots(rows=1, cols=len(KINDS), shared_yaxes=True, horizontal_spacing=0.05)
    counts = []
    deepest = 0
    for column, kind in enumerate(KINDS, 1):
        plan = scan_rounds(kind, t)
        deepest = max(deepest, len(plan))
        counts.append(f"{kind}: {len(plan)} rounds, {sum(map(len, plan))} combinations")
        for at, pairs in enumerate(plan):
            for earlier, later in pairs:
                fig.add_scatter(
                    x=[earlier, later],
                    y=[at, at + 1],
                    mode="lines",
                    hoverinfo="skip",
                    line=dict(color=theme.SERIES[1].colour, width=2, dash="solid"),
                    row=1,
                    col=column,
                )
        lanes = [(i, at) for at in range(len(plan) + 1) for i in range(t)]
        busy = {(later, at + 1) for at, pairs in enumerate(plan) for _, later in pairs}
        fills = [theme.SERIES[0].colour if lane in busy else theme.PLOT for lane in lanes]
        fig.add_scatter(
            x=[i for i, _ in lanes],
            y=[at for _, at in lanes],
            mode="markers",
            marker=dict(size=12, color=fills, symbol="circle", line=dict(color=theme.INK, width=1)),
            hoverinfo="skip",
            row=1,
            col=column,
        )
        fig.update_xaxes(
            title_text=f"{kind}<br>{sum(map(len, plan))} combinations", row=1, col=column
        )
    fig.update_xaxes(showgrid=False, tickvals=list(range(t)), range=[-0.6, t - 0.4])
    fig.update_yaxes(range=[deepest + 0.4, -0.4], showgrid=False, dtick=1)
    fig.update_yaxes(title_text="round", row=1, col=1)
    fig.update_layout(title_text=f"Three ways to scan {t} entries", height=430, showlegend=False)
    return described(
        fig,
        f"Three diagrams of {t} lanes, rounds from top to bottom; a filled dot is an entry that "
        f"was combined with an earlier one. {'; '.join(counts)}. One by one the dots form a single "
        "staircase; doubling fills almost whole rows; the tree fills few dots per row, on a sweep "
        "up and a sweep down.",
    )


def doubling(t: int = 8) -> go.Figure:
    """The rounds of the scan by doubling over t entries."""
    plan = scan_rounds("doubling", t)
    fig = go.Figure()
    for at, pairs in enumerate(plan):
        for earlier, later in pairs:
            fig.add_scatter(
                x=[earlier, later],
                y=[at, at + 1],
                mode="lines",
                hoverinfo="skip",
                line=dict(color=theme.SERIES[1].colour, width=2, dash="solid"),
            )
    for at in range(len(plan) + 1):
        reach = 1 << at
        spans = [f"{max(0, i - reach + 1)}-{i}" if i else "0" for i in range(t)]
        fig.add_scatter(
            x=list(range(t)),
            y=[at] * t,
            mode="markers+text",
            text=[str(i) for i in range(t)] if at == 0 else spans,
            textposition="middle right",
            marker=dict(size=12, color=theme.SERIES[0].colour, symbol="circle"),
            hoverinfo="skip",
        )
    fig.update_xaxes(title_text="entry", tickvals=list(range(t)), range=[-0.4, t - 0.2])
    fig.update_yaxes(title_text="after round", range=[len(plan) + 0.3, -0.4], dtick=1)
    fig.update_xaxes(showgrid=False, zeroline=False)
    fig.update_yaxes(showgrid=False, zeroline=False)
    fig.update_layout(
        title_text=f"Doubling over {t} entries: which tokens each entry spans",
        height=360,
        showlegend=False,
    )
    return described(
        fig,
        f"{t} entries from left to right, rounds from top to bottom. In each round a line goes to "
        "every entry from an entry to its left: one place to the left in the first round, two in "
        "the second, four in the third. Labels say which tokens an entry spans; in the last line "
        "every entry spans all tokens from 0 to itself.",
    )


def costs(lengths: Sequence[int]) -> go.Figure:
    """Rounds and combinations of the three scans against the length.

    Args:
        lengths: powers of two.
    """
    fig = make_subplots(
        rows=1, cols=2, subplot_titles=("rounds (time, at best)", "combinations (work)")
    )
    for look, kind in zip(theme.SERIES, KINDS, strict=False):
        plans = [scan_rounds(kind, t) for t in lengths]
        for column, values in (
            (1, [len(p) for p in plans]),
            (2, [sum(map(len, p)) for p in plans]),
        ):
            fig.add_scatter(
                x=list(lengths),
                y=values,
                name=kind,
                legendgroup=kind,
                showlegend=column == 1,
                line=dict(color=look.colour, dash=look.dash, width=2),
                marker=dict(color=look.colour, symbol=look.marker, size=8),
                row=1,
                col=column,
            )
    fig.update_xaxes(title_text="tokens", type="log", tickvals=list(lengths)[::3])
    fig.update_yaxes(type="log", dtick=1)
    fig.update_layout(
        title_text="What a parallel scan costs",
        height=400,
        margin_t=96,
        legend=dict(orientation="h", y=-0.25, x=0),
    )
    return described(
        fig,
        "Two plots with logarithmic axes against the number of tokens. Left, rounds: one by one "
        "they grow in proportion to the length; doubling and the tree stay nearly flat, the tree "
        "with about twice as many. Right, combinations: one by one and the tree grow in "
        "proportion, the tree twice as high; doubling grows faster than both.",
    )


def speed(lengths: Sequence[int], seconds: Mapping[str, Sequence[float]]) -> go.Figure:
    """Time per token of several forms of the scan against the length.

    Args:
        lengths: tokens, `n`.
        seconds: name → seconds of one scan of each length, `n`.
    """
    fig = lines(
        lengths,
        {k: 1e6 * np.asarray(v) / np.asarray(lengths) for k, v in seconds.items()},
        title="Time per token of one scan",
        x_title="tokens",
        y_title="µs per token",
        log_x=True,
        log_y=True,
        alt="Lines on logarithmic axes, microseconds per token against tokens, one line for each "
        f"form of the scan: {', '.join(seconds)}.",
    )
    return fig.update_xaxes(tickvals=list(lengths)).update_yaxes(dtick=1)


def learning(steps: ArrayLike, rows: Mapping[str, ArrayLike]) -> go.Figure:
    """Rows without a mistake during training, one line for each model.

    Args:
        steps: updates at which it was measured, `n`.
        rows: name → rows of 100, `n`; the best model first.
    """
    first, *others = rows
    fig = lines(
        steps,
        rows,
        title="Selective copy: rows repeated without a mistake",
        x_title="updates",
        y_title="rows of 100",
        markers=False,
        alt=f"Faultless rows of 100 against training updates. All lines start at zero. The line of "
        f"{first} rises to nearly all rows. Below it, in this order: {'; '.join(others)}.",
    )
    fig.update_yaxes(range=[-2, 103])
    fig.update_layout(legend=dict(orientation="h", y=-0.25, x=0))
    return fig


def chosen_steps(text: str, dt: ArrayLike) -> go.Figure:
    """The step size of each head at each token of a row, as a picture.

    Args:
        text: the tokens, separated by blanks.
        dt: `h t`.
    """
    tokens = text.split()
    z = np.asarray(dt, dtype=float)
    if z.ndim != 2 or z.shape[1] != len(tokens):
        raise ValueError(f"dt has shape {z.shape}; expected heads x {len(tokens)} tokens.")
    bar = dict(title="dt", outlinewidth=0)
    fig = go.Figure(go.Heatmap(z=z, colorscale=theme.SEQUENTIAL, zmin=0, colorbar=bar))
    fig.update_xaxes(
        tickvals=list(range(len(tokens))), ticktext=tokens, tickangle=0, showgrid=False
    )
    fig.update_xaxes(title_text="token")
    fig.update_yaxes(title_text="head", showgrid=False, dtick=1)
    fig.update_layout(title_text="The dt of each token in the first trained layer", height=320)
    return described(
        fig,
        f"A picture of {len(z)} heads by {len(tokens)} tokens of one row. In at least one head the "
        "step size is larger at the letters than in the silence between them.",
    )


def half_lives(layers: Sequence[ArrayLike]) -> go.Figure:
    """After how many tokens each head has forgotten half, longest first.

    Args:
        layers: for each layer the half-lives of its heads, in tokens.
    """
    fig = go.Figure()
    for number, values in enumerate(layers, 1):
        ordered = np.sort(np.asarray(values, dtype=float))[::-1]
        fig.add_scatter(
            y=ordered,
            x=np.arange(1, len(ordered) + 1),
            name=f"Mamba-2 layer {number}",
            mode="lines+markers",
        )
    fig.update_xaxes(title_text="head, longest memory first", dtick=1)
    fig.update_yaxes(title_text="tokens until half has faded", type="log", dtick=1)
    fig.update_layout(
        title_text="Memory of the heads of an untrained model",
        height=340,
        showlegend=len(layers) > 1,
    )
    return described(
        fig,
        f"Half-lives of the heads of {len(layers)} layers, in tokens, on a logarithmic axis, "
        "longest first. In every layer they differ by more than a factor of two.",
    )


def losses(curves: Mapping[str, Sequence[float]]) -> go.Figure:
    """Losses of models that are trained on the same batches.

    Args:
        curves: name → loss at each update.
    """
    count = min(map(len, curves.values()))
    return lines(
        np.arange(1, count + 1),
        {name: values[:count] for name, values in curves.items()},
        title="The same training with two scans",
        x_title="updates",
        y_title="loss, nats per byte",
        markers=False,
        alt=f"Loss against updates, one line for each of: {', '.join(curves)}. Both fall steeply "
        "at first and then slowly, and lie on each other.",
    )
