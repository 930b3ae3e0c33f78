"""The figures of chapter 02: the scan as a matrix and in chunks, and the layer around it.

The scan:

    factors        decay mask, scores, and the matrix that is their product
    step_chunks    a stepper: chunk by chunk, inside, from the state, into the state
    chunk_times    time against chunk length
    chunk_map      how each block is computed, and how many multiply-adds each chunk length costs
    explore_chunks the same with sliders: chunk length and half-life

The layer around it:

    mixer_layout   widths inside a Mamba-2 layer: z | x B C | dt, convolution, groups of the norm
    fingerprints   the error at each position, where two implementations differ
    losses         training loss of several models
    crossing       time against length, with a mark where two lines meet

Rows of a matrix are reading tokens l, columns are writing tokens r, the first token top left. What
a causal map never touches is left blank, so that nobody takes a blank for a small number.

The multiply-adds are those of `ledger.flops` for one head with its own B and C, per token: inside a
chunk of q tokens (q+1)/2 (n+p), into and out of the state 2np, from chunk to chunk np/q. In a text
of t tokens, the first chunk reads no state and nobody reads the state after the last one, so with
one chunk for the whole text nothing goes through a state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets
import numpy as np
import plotly.graph_objects as go
from numpy import ndarray
from numpy.typing import ArrayLike
from plotly.basedatatypes import BaseFigure
from plotly.subplots import make_subplots

from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import described, lines
from nemotron_lite.course.plotting.widgets import Explorer, Stepper, explore, slider, stepper

INSIDE, THROUGH = theme.INK, theme.SERIES[3].colour  # outlines of the two kinds of blocks


def factors(decay: ArrayLike, scores: ArrayLike) -> go.Figure:
    """The decay mask, the scores C B^T, and their product, side by side.

    Args:
        decay: `t t`, zero above the diagonal.
        scores: `t t`; what lies above the diagonal is not shown.

    Raises:
        ValueError: the two are not square matrices of one size.
    """
    mask, dots = _square("decay", decay), _square("scores", scores)
    if mask.shape != dots.shape:
        raise ValueError(f"decay is {mask.shape} and scores are {dots.shape}; they must agree.")
    return _row_of_matrices(
        {
            "decay mask L": (mask, False),
            "scores C·B": (dots, True),
            "matrix M": (mask * dots, True),
        },
        "×=",
        "Three lower triangles side by side, with a colour scale below the first and one beside "
        "the last. The decay mask is one on the diagonal and decays to the lower left. The "
        "scores have both signs everywhere. Their product, the matrix, keeps "
        "the scores near the diagonal and loses them far from it.",
    )


def chunk_map(matrix: ArrayLike, chunk: int, *, p: int, n: int) -> go.Figure:
    """How each block of the matrix is computed, and the arithmetic of every chunk length.

    Args:
        matrix: `t t`, lower-triangular.
        chunk: tokens per chunk, q; outlined on the left, arrowed on the right.
        p: head width.
        n: state size.

    Raises:
        ValueError: not a square matrix, or a chunk below 1.
    """
    whole = _square("matrix", matrix)
    t = len(whole)
    lengths = _chunk_lengths(t)
    fig = make_subplots(
        1,
        2,
        column_widths=[0.52, 0.48],
        horizontal_spacing=0.12,
        subplot_titles=("how each block is computed", "multiply-adds per token and head"),
    )
    fig.add_trace(_heatmap(_blank_above(whole), diverging=True), 1, 1)
    for name, colour, dash in (
        ("step 1: a small masked matrix", INSIDE, "solid"),
        ("steps 2–4: through the state", THROUGH, "dash"),
    ):
        fig.add_scatter(
            x=[None], y=[None], mode="lines", name=name, line=dict(color=colour, dash=dash, width=3)
        )
    work = multiply_adds(np.array(lengths), p, n, t)
    # Dark, light and medium, in the order of the stack, so that they differ without colour too.
    for (name, each), colour in zip(work.items(), (theme.INK, "#9CCDEB", "#E69F00"), strict=True):
        fig.add_bar(
            x=[str(q) for q in lengths],
            y=each,
            name=name,
            marker_color=colour,
            row=1,
            col=2,
        )
    fig.update_layout(
        barmode="stack",
        height=430,
        margin=dict(t=40, b=130),
        shapes=_outlines(t, _at_least_one(chunk)),
        legend=dict(orientation="h", y=-0.2, yanchor="top", x=0, traceorder="normal"),
    )
    _square_axes(fig, 1, "r, the token that wrote")
    fig.update_yaxes(title_text="l, the token that reads", col=1)
    fig.update_xaxes(title_text="chunk length q, tokens", type="category", col=2)
    fig.update_yaxes(title_text="multiply-adds", col=2)
    _point_at(fig, chunk, work, lengths)
    return described(
        fig,
        f"Left: a lower triangle of {t} tokens cut into chunks of {chunk}. Blocks on the diagonal "
        "are outlined as small masked matrices, and the strip to the left of each block as done "
        "through the state. Right: stacked bars of multiply-adds per token over the chunk length. "
        "Short chunks have more work from chunk to chunk, long ones inside the chunks. Into "
        "and out of the state there is less, the fewer chunks there are.",
    )


def explore_chunks(
    dt: ArrayLike, scores: ArrayLike, *, p: int, n: int, chunk: int = 8, half_life: float = 6.0
) -> tuple[Explorer, go.Figure]:
    """`chunk_map` with two sliders: chunk length, and the half-life of the head in tokens.

    Args:
        dt: `t` step sizes, above 0; their mean step is what the half-life is counted in.
        scores: `t t`, C B^T.
        p: head width.
        n: state size.
        chunk: where the first slider starts.
        half_life: where the second one starts.

    Returns:
        (widget, figure): both for `show`; the figure is the one at rest.

    Raises:
        ValueError: scores that are not square, or a start that is neither a power of two nor t.
    """
    dots, steps = _square("scores", scores), np.asarray(dt, dtype=float)
    t = len(dots)
    lengths = _chunk_lengths(t)
    if chunk not in lengths:
        raise ValueError(f"chunk is {chunk}; expected one of {lengths}.")
    bound = float(np.abs(np.tril(dots)).max())

    def matrix(half_life: float) -> ndarray:
        s = -np.log(2) / half_life * np.cumsum(steps / steps.mean())
        return np.tril(np.exp(np.minimum(s[:, None] - s[None, :], 0))) * dots

    def update(fig: BaseFigure, chunk: int, half_life: float) -> str:
        fig.data[0].update(z=_cells(_blank_above(matrix(half_life))), zmin=-bound, zmax=bound)
        fig.layout.shapes = _outlines(t, chunk)
        work = multiply_adds(np.array(lengths), p, n, t)
        _point_at(fig, chunk, work, lengths)
        count = -(-t // chunk)
        total = sum(each[lengths.index(chunk)] for each in work.values())
        return (
            f"{count} block{'s' if count > 1 else ''} of {chunk} × {chunk} on the diagonal, "
            f"{count - 1} strip{'' if count == 2 else 's'} through the state; "
            f"{total:,.0f} multiply-adds per token and head."
        )

    figure = chunk_map(matrix(half_life), chunk, p=p, n=n)
    moving = go.Figure(figure)
    moving.data[0].z = _cells(_blank_above(matrix(half_life)))
    length = ipywidgets.SelectionSlider(
        options=lengths,
        value=chunk,
        description="chunk length q",
        continuous_update=True,
        style={"description_width": "initial"},
        layout=ipywidgets.Layout(width="min(100%, 460px)"),
    )
    fade = slider("half-life, tokens", 0.5, 64.0, value=half_life, log=True)
    return explore(moving, update, chunk=length, half_life=fade), figure


def multiply_adds(chunk: ArrayLike, p: int, n: int, t: int | None = None) -> dict[str, ndarray]:
    """Multiply-adds per token of one head, by what they are for, at each chunk length.

    Args:
        chunk: tokens per chunk.
        p: head width.
        n: state size.
        t: tokens of the text, which starts from a zero state; None is a very long text.
    """
    q = np.asarray(chunk, dtype=float)
    if t is None:
        pairs, through, steps = (q + 1) / 2, np.full_like(q, 2.0), 1 / q
    else:
        chunks = np.ceil(t / q)
        first, last = np.minimum(q, t), t - (chunks - 1) * q
        pairs = ((chunks - 1) * q * (q + 1) + last * (last + 1)) / 2 / t
        through, steps = (2 * t - first - last) / t, (chunks - 1) / t
    return {
        "step 1, inside": pairs * (n + p),
        "steps 2 and 4, into and out of the state": through * n * p,
        "step 3, from chunk to chunk": steps * n * p,
    }


def step_chunks(
    x: ArrayLike, dt: ArrayLike, A: float, B: ArrayLike, C: ArrayLike, *, chunk: int
) -> tuple[Stepper, go.Figure]:
    """A stepper through the chunked scan of one head: three pictures for each chunk.

    Args:
        x: `t p`.
        dt: `t` step sizes.
        A: decay rate, negative.
        B, C: `t n`.
        chunk: tokens per chunk, q; at least two chunks.

    Returns:
        (widget, figure): both for `show`. The figure at rest shows the second chunk reading the
        state of the first.

    Raises:
        ValueError: only one chunk.
    """
    scan = _Chunks(*(np.asarray(v, dtype=float) for v in (x, dt, B, C)), rate=A, size=chunk)
    if scan.count < 2:
        raise ValueError(f"chunk={chunk} makes one chunk of {scan.t} tokens; expected two or more.")
    fig = make_subplots(
        1,
        3,
        column_widths=[0.38, 0.2, 0.42],
        horizontal_spacing=0.1,
        subplot_titles=("matrix M", "state S", "output of one channel"),
    )
    fig.add_trace(_heatmap(_blank_above(scan.matrix), diverging=True), 1, 1)
    bound = float(np.abs(scan.states).max())
    fig.add_trace(_heatmap(scan.states[0], diverging=True, bound=bound), 1, 2)
    for name, colour in (("inside the chunk", "#9CCDEB"), ("through the state", "#E69F00")):
        fig.add_bar(x=np.arange(scan.t), y=np.zeros(scan.t), name=name, marker_color=colour, row=1,
                    col=3)  # fmt: skip
    _square_axes(fig, 1, "r, wrote")
    fig.update_yaxes(title_text="l, reads", col=1)
    fig.update_xaxes(title_text="n", showgrid=False, nticks=4, col=2)
    fig.update_yaxes(title_text="p", showgrid=False, autorange="reversed", nticks=4, col=2)
    fig.update_xaxes(title_text="token", col=3)
    low, high = scan.range_of_outputs()
    fig.update_yaxes(range=[low, high], col=3)
    fig.update_layout(
        barmode="relative",
        height=340,
        margin=dict(t=40, b=90),
        legend=dict(orientation="h", y=-0.25, yanchor="top", x=0.55),
    )
    described(
        fig,
        f"Three panels for a text of {scan.t} tokens in chunks of {chunk}. Left the lower triangle "
        "of the matrix: the second block on the diagonal is outlined, and so is the strip to its "
        "left, dashed. In the middle the state, p rows by n columns, that the first chunk has "
        "left. Right the outputs of the first two chunks as bars; those of the second chunk have "
        "two parts, one from inside the chunk and one from the state.",
    )
    moving = go.Figure(fig)
    moving.data[0].z = _cells(_blank_above(scan.matrix))
    view = stepper(moving, scan.draw, 3 * scan.count, "step")
    scan.draw(fig, 4)
    return view, fig


class _Chunks:
    """The numbers of a chunked scan of one head, and how step i of it is drawn."""

    def __init__(
        self, x: ndarray, dt: ndarray, B: ndarray, C: ndarray, *, rate: float, size: int
    ) -> None:
        self.t, self.chunk = len(x), size
        self.count = -(-self.t // size)
        s = np.cumsum(dt * rate)
        self.matrix = np.tril(np.exp(np.minimum(s[:, None] - s[None, :], 0))) * (C @ B.T)
        where = np.arange(self.t) // size
        near = where[:, None] == where[None, :]
        written = dt[:, None] * x
        self.inside = (np.where(near, self.matrix, 0) @ written)[:, 0]
        self.through = (np.where(near, 0, self.matrix) @ written)[:, 0]
        ends = [min((c + 1) * size, self.t) for c in range(self.count)]
        empty = np.zeros((x.shape[1], B.shape[1]))
        after = [
            np.einsum("r,rp,rn->pn", np.exp(s[end - 1] - s[:end]), written[:end], B[:end])
            for end in ends
        ]
        self.states = np.stack([empty, *after])  # before the first chunk, and after each
        before = [0.0, *(s[end - 1] for end in ends)]
        self.kept = np.exp(np.diff(before))

    def range_of_outputs(self) -> tuple[float, float]:
        parts = np.stack([self.inside, self.through])
        return (
            1.1 * float(np.minimum(parts, 0).sum(0).min()),
            1.1 * float(np.maximum(parts, 0).sum(0).max()),
        )

    def draw(self, fig: BaseFigure, step: int) -> str:
        """Change the traces to step i of the scan; returns the step in words."""
        now, phase = divmod(step, 3)
        state = self.states[now + (phase == 2)]
        fig.data[1].z = [[round(float(v), 4) for v in row] for row in state]
        done = np.arange(self.t) // self.chunk
        fig.data[2].y = np.where(done <= now, self.inside, 0)
        fig.data[3].y = np.where((done < now) | ((done == now) & (phase > 0)), self.through, 0)
        outlines = _outlines(self.t, self.chunk)
        block = 2 * now  # the outlines alternate: block 0, strip 1, block 1, strip 2, …
        shown = [dict(outlines[block], line=dict(color=INSIDE, width=3))]
        if now and phase:
            shown.append(outlines[block - 1])
        fig.layout.shapes = shown
        return self._words(now, phase)

    def _words(self, now: int, phase: int) -> str:
        first, last = now * self.chunk, min((now + 1) * self.chunk, self.t) - 1
        head = f"Chunk {now}, tokens {first} to {last}. "
        if phase == 0:
            return head + (
                "Step 1, inside the chunk: the block on the diagonal is what these tokens read "
                "from each other."
            )
        if phase == 1 and now == 0:
            return head + "Step 4, from the state: it is still zero, so it adds nothing."
        if phase == 1:
            strip = (last - first + 1) * first
            return head + (
                "Step 4, from the state: each token reads it. It stands for the dashed strip, "
                f"{strip} numbers of the matrix that are never formed."
            )
        return head + (
            f"Steps 2 and 3, into the state: it keeps {self.kept[now]:.2f} of itself and takes in "
            f"what the chunk wrote. Now it stands for tokens 0 to {last}."
        )


def chunk_times(chunks: ArrayLike, seconds: ArrayLike) -> go.Figure:
    """Milliseconds of one scan against the chunk length.

    Args:
        chunks: `k` chunk lengths, powers of two.
        seconds: `k` times.
    """
    fig = lines(
        chunks,
        {"time": 1e3 * np.asarray(seconds, dtype=float)},
        title="The same scan in chunks",
        x_title="chunk length q, tokens",
        y_title="milliseconds",
        log_x=True,
        log_y=True,
        height=300,
        alt="Time against chunk length: a valley. The shortest chunks take longer than those in "
        "the middle, and from there on time rises with the length.",
    )
    fig.update_xaxes(tickvals=np.asarray(chunks))
    fig.update_yaxes(tickvals=np.outer(10.0 ** np.arange(-2, 6), [1, 2, 5]).flatten())
    return fig


def mixer_layout(config: NemotronConfig) -> go.Figure:
    """The channels of a Mamba-2 layer from the input to the output projection, to scale."""
    inner, shared = config.mamba_inner_size, config.n_groups * config.ssm_state_size
    heads, groups, d = config.mamba_num_heads, config.n_groups, config.hidden_size
    head_width, per_group = config.mamba_head_dim, inner // config.n_groups
    z = ("z", "the gate", inner, "sky")
    xbc = [
        ("x", f"{heads} heads of {head_width}", inner, "orange"),
        ("B", f"{groups} groups of {config.ssm_state_size}", shared, "green"),
        ("C", f"{groups} groups of {config.ssm_state_size}", shared, "purple"),
    ]
    dt = ("dt", "one step size a head", heads, "vermillion")
    norm = [(f"norm {i}", "one group", per_group, "yellow") for i in range(1, groups + 1)]
    gate = ("silu(z)", "multiplied into y before the norm", inner, "sky")
    rows: list[tuple[str, int, list[tuple[str, str, int, str]]]] = [
        ("in_proj", 0, [z, *xbc, dt]),
        (f"conv, {config.conv_kernel} taps, SiLU", inner, xbc),
        ("scan", inner, [("y", f"{heads} heads of {head_width}", inner, "orange")]),
        ("gate, then norm", 0, [gate, *norm]),
        ("out_proj", inner, [("out", "back to the residual stream", d, "sky")]),
    ]
    fig = go.Figure()
    for name, start, parts in rows:
        widths = [width for _, _, width, _ in parts]
        fills = [theme.PALETTE[colour] for *_, colour in parts]
        fig.add_bar(
            y=[name] * len(parts),
            x=widths,
            base=(start + np.cumsum([0, *widths[:-1]])).tolist(),
            orientation="h",
            width=0.66,
            showlegend=False,
            marker_color=fills,
            text=[f"<b>{label}</b> {w:,}" if w > 0.05 * inner else "" for label, _, w, _ in parts],
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            constraintext="none",
            insidetextfont=dict(size=13, color=[theme.text_on(fill) for fill in fills]),
            hovertext=[f"{label}: {meaning}, {w:,} channels" for label, meaning, w, _ in parts],
            hoverinfo="text",
        )
    fig.add_annotation(
        x=config.mamba_in_proj_size,
        y="in_proj",
        text=f"<b>dt</b> {heads}",
        showarrow=False,
        xanchor="left",
        xshift=6,
    )
    fig.update_layout(barmode="overlay", height=310, margin_t=24)
    fig.update_xaxes(title_text="channels", range=[0, 1.08 * config.mamba_in_proj_size])
    fig.update_yaxes(categoryorder="array", categoryarray=[r[0] for r in rows], showgrid=False)
    fig.update_yaxes(autorange="reversed")
    return described(
        fig,
        "Five bars, one for each stage of a Mamba-2 layer, cut into channels to scale. The input "
        "projection is cut into z, x, B, C and a sliver dt. The convolution passes over x, B and "
        "C. The scan leaves y, as wide as z. The gate is multiplied in, the norm cuts the product "
        f"into {groups} groups, and the output projection returns to the width of the model.",
    )


def crossing(
    lengths: ArrayLike, seconds: Mapping[str, ArrayLike], at: float | None = None
) -> go.Figure:
    """Milliseconds against length, both axes logarithmic, with a mark where two lines meet.

    Args:
        lengths: `k` tokens.
        seconds: name → `k` times.
        at: the length to mark; None marks nothing.
    """
    fig = go.Figure()
    for name, times in seconds.items():
        fig.add_scatter(
            x=np.asarray(lengths),
            y=1e3 * np.asarray(times, dtype=float),
            name=name,
            mode="lines+markers",
        )
    if at is not None:
        fig.add_vline(x=at, line=dict(color=theme.MUTED, dash="dot", width=2))
        fig.add_annotation(
            x=float(np.log10(at)),
            y=1.0,
            yref="paper",
            text="equal",
            showarrow=False,
            xanchor="left",
            xshift=4,
            yanchor="top",
        )
    fig.update_xaxes(title_text="tokens", type="log", tickvals=np.asarray(lengths))
    fig.update_yaxes(title_text="milliseconds", type="log")
    fig.update_layout(height=330, margin_t=24)
    return described(
        fig,
        f"Time against length on logarithmic axes for {' and '.join(seconds)}. Both lines "
        "rise; the one for attention is steeper and starts lower, and they meet at a marked "
        "length, beyond which the scan takes less time.",
    )


def fingerprints(
    errors: Mapping[str, ArrayLike], marks: Mapping[str, int], *, floor: float = 1e-9
) -> go.Figure:
    """The largest error at each position, one small plot for each implementation.

    Args:
        errors: name → `t` absolute errors; anything below `floor` is drawn at it.
        marks: name → position of an event: dotted lines in each plot.
        floor: the smallest error drawn.

    Raises:
        ValueError: nothing to draw.
    """
    if not errors:
        raise ValueError("errors is empty; expected at least one implementation.")
    columns = min(2, len(errors))
    rows = -(-len(errors) // columns)
    fig = make_subplots(
        rows,
        columns,
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=list(errors),
        horizontal_spacing=0.06,
        vertical_spacing=0.14,
    )
    look = theme.SERIES[1]
    for i, (name, values) in enumerate(errors.items()):
        y = np.maximum(np.asarray(values, dtype=np.float32), np.float32(floor))
        where = dict(row=i // columns + 1, col=i % columns + 1)
        fig.add_scatter(
            y=y,
            name=name,
            mode="lines",
            showlegend=False,
            line=dict(color=look.colour, dash="solid"),
            **where,
        )
        for position in marks.values():
            line = dict(color=theme.MUTED, dash="dot", width=2)
            fig.add_vline(x=position - 0.5, line=line, **where)
    for i, (label, position) in enumerate(marks.items()):
        fig.add_annotation(
            x=position,
            y=0.02 + 0.14 * i,  # one above the other: the plots are narrow
            yref="y domain",
            xref="x",
            text=label,
            showarrow=False,
            xanchor="left",
            yanchor="bottom",
            xshift=2,
        )
    fig.update_yaxes(type="log", range=[np.log10(floor), 1.2], exponentformat="power")
    fig.update_yaxes(title_text="largest error", col=1)
    fig.update_xaxes(title_text="position in the text", row=rows)
    fig.update_layout(height=110 + 130 * rows, margin_t=40)
    plots = f"{len(errors)} small plots" if len(errors) > 1 else "One plot"
    return described(
        fig,
        f"{plots} of error against position in the text, named {'; '.join(errors)}, with dotted "
        f"lines at {' and '.join(marks)}. Errors are at the floor where two programs agree, and "
        "above it from the token on at which they part.",
    )


def losses(curves: Mapping[str, ArrayLike], *, every: int) -> go.Figure:
    """Training loss by step of models that should learn the same.

    Args:
        curves: name → mean losses of `every` steps each, of equal length.
        every: the number of steps that one value is the mean of; it is drawn in their middle.

    Raises:
        ValueError: curves of different lengths.
    """
    count = len(np.asarray(next(iter(curves.values()))))
    return lines(
        np.arange(count) * every + (every + 1) / 2,
        curves,
        height=320,
        title=f"Training loss, mean of {every} steps",
        x_title="step",
        y_title="nats per byte",
        alt=f"Training loss against steps for {'; '.join(curves)}. The curves fall and lie on top "
        "of each other.",
    )


def _row_of_matrices(
    panels: Mapping[str, tuple[ndarray, bool]], signs: Sequence[str], alt: str
) -> go.Figure:
    """Matrices side by side with signs between them; (values, whether both signs occur)."""
    fig = make_subplots(1, len(panels), subplot_titles=list(panels), horizontal_spacing=0.09)
    both = [values for values, diverging in panels.values() if diverging]
    bound = float(max(np.nanmax(np.abs(np.tril(np.nan_to_num(v)))) for v in both))
    for column, (values, diverging) in enumerate(panels.values(), start=1):
        picture = _heatmap(_blank_above(values), diverging=diverging, bound=bound)
        picture.showscale = not diverging or column == len(panels)
        fig.add_trace(picture, 1, column)
        if not diverging:  # from 0 to 1: a scale of its own, below it
            middle = sum(fig.layout[f"xaxis{column if column > 1 else ''}"].domain) / 2
            fig.data[-1].colorbar.update(
                orientation="h", x=middle, xanchor="center", y=-0.3, yanchor="top",
                len=0.24, thickness=10, tickvals=[0, 0.5, 1],
            )  # fmt: skip
        _square_axes(fig, column, "r, wrote")
    for column, sign in enumerate(signs, start=1):
        edge = fig.layout[f"xaxis{column if column > 1 else ''}"].domain[1]
        fig.add_annotation(
            x=edge + 0.022,
            y=0.5,
            xref="paper",
            yref="paper",
            text=sign,
            showarrow=False,
            font_size=24,
        )
    fig.update_yaxes(title_text="l, reads", col=1)
    fig.update_layout(height=350, margin=dict(t=40, b=100))
    return described(fig, alt)


def _heatmap(values: ndarray, *, diverging: bool, bound: float | None = None) -> go.Heatmap:
    limit = bound or float(np.nanmax(np.abs(values))) or 1.0
    return go.Heatmap(
        z=np.asarray(values, dtype=np.float32),  # a third of the bytes in a committed chapter
        zmin=-limit if diverging else 0,
        zmax=limit if diverging else 1,
        colorscale=theme.DIVERGING if diverging else theme.SEQUENTIAL,
        showscale=False,
        hovertemplate="row %{y}, column %{x}: %{z:.3f}<extra></extra>",
        hoverongaps=False,
    )


def _square_axes(fig: go.Figure, column: int, x_title: str) -> None:
    """First row on top, square cells, ticks few enough to read."""
    x = f"x{column if column > 1 else ''}"
    fig.update_xaxes(
        title_text=x_title,
        showgrid=False,
        zeroline=False,
        constrain="domain",
        nticks=5,
        col=column,
    )
    fig.update_yaxes(
        autorange="reversed",
        showgrid=False,
        zeroline=False,
        constrain="domain",
        scaleanchor=x,
        nticks=5,
        col=column,
    )


def _outlines(t: int, chunk: int) -> list[dict[str, object]]:
    """One rectangle for each block on the diagonal, and one for the strip to its left."""
    shapes: list[dict[str, object]] = []
    for first in range(0, t, chunk):
        low, high = first - 0.5, min(first + chunk, t) - 0.5
        common = dict(type="rect", xref="x", yref="y", y0=low, y1=high)
        if first:
            line = dict(color=THROUGH, dash="dash", width=2)
            shapes.append(dict(common, x0=-0.5, x1=low, line=line))
        shapes.append(dict(common, x0=low, x1=high, line=dict(color=INSIDE, width=2)))
    return shapes


def _point_at(
    fig: BaseFigure, chunk: int, work: Mapping[str, ndarray], lengths: Sequence[int]
) -> None:
    """An arrow over the bar of this chunk length; the last annotation of the figure."""
    titles = [a for a in fig.layout.annotations if a.name != "here"]
    if chunk in lengths:
        at = lengths.index(chunk)
        top = float(sum(each[at] for each in work.values()))
        titles.append(
            go.layout.Annotation(
                name="here",
                x=at,
                y=top,
                xref="x2",
                yref="y2",
                text=f"q = {chunk}",
                ay=-28,
                ax=0,
                arrowhead=2,
                arrowcolor=theme.INK,
            )
        )
    fig.layout.annotations = titles


def _chunk_lengths(t: int) -> list[int]:
    """Powers of two below t, and t itself."""
    return [*(2**i for i in range(t.bit_length()) if 2**i < t), t]


def _blank_above(values: ndarray) -> ndarray:
    return np.where(np.tri(len(values), dtype=bool), values, np.nan)


def _cells(values: ndarray) -> list[list[float | None]]:
    """Rows with None for a blank: a live figure sends matrices as JSON, which has no nan."""
    return [[None if np.isnan(v) else round(float(v), 4) for v in row] for row in values]


def _square(name: str, values: ArrayLike) -> ndarray:
    array = np.asarray(values, dtype=float)
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ValueError(f"{name} has shape {array.shape}; expected a square matrix.")
    return array


def _at_least_one(chunk: int) -> int:
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 token.")
    return chunk
