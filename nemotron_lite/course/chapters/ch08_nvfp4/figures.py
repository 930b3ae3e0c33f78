"""Figures of chapter 08: a block in four bits, what becomes zero, what an outlier does, and gaps.

    precision_map    the format of each kind of matrix in each layer, under a recipe
    block_steps      one block of sixteen numbers: scaled, rounded, scaled back, and a stepper
    flushed          the share of numbers that are read as zero, for several inputs
    sums             the error of a sum of rounded gradients against their number
    outlier          a block with one large number, read with and without the Hadamard transform,
                     and a slider for its size
    weight_gradients  the error of dW, of one and of the mean of many, with and without each part
    losses           the losses of two trainings
    ablations        the gaps of the record, a circle for each seed
    after_training   the record of quantizing a trained model, by format
    block_sizes      the error against the size of a block, with two kinds of scales
    states           a number of a state in float32 and float16

Figures that compute take the functions that read numbers as arguments, so the learner's own run.

Left out: the live map of a training, since the two trainings of this chapter take seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from torch import Tensor

from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import described, lines
from nemotron_lite.course.plotting.widgets import Explorer, Stepper, explore, slider, stepper
from nemotron_lite.course.records import record
from nemotron_lite.quantization.nvfp4 import E2M1_VALUES, inverse_hadamard_transform
from nemotron_lite.quantization.recipe import ROLES, Recipe, module_formats

GRID = sorted(set(E2M1_VALUES))
NAMES = {"fp32": "FP32", "bf16": "BF16", "mxfp8": "MXFP8", "nvfp4": "NVFP4"}
COLOURS = {"fp32": "#57606A", "bf16": "#0072B2", "mxfp8": "#8F5C00", "nvfp4": "#00795A"}
MARKS = {"fp32": "32", "bf16": "16", "mxfp8": "8", "nvfp4": "4"}
EXACT, READ, LARGE = theme.SERIES[0].colour, theme.KINDS["E"].strong, theme.SERIES[1].colour
STEPS = (
    "the sixteen numbers",
    "divided by the scale of the block",
    "rounded to E2M1",
    "multiplied by the scale again",
)
LARGEST = 200.0  # size of an outlier, beside numbers of about 1

Quantize = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
Read = Callable[[Tensor], Tensor]


def precision_map(config: NemotronConfig, recipe: Recipe) -> go.Figure:
    """One row for each kind of matrix, one column for each layer, coloured by the format."""
    found = [entry for entry in module_formats(config, recipe) if entry.layer is not None]
    roles = [role for role in ROLES if any(entry.role == role for entry in found)]
    formats = [name for name in NAMES if any(entry.format == name for entry in found)]
    fig = go.Figure()
    for name in reversed(formats):
        here = {(e.layer, e.role) for e in found if e.format == name}
        places = sorted((layer, roles.index(role)) for layer, role in here)
        fig.add_bar(
            name=NAMES[name],
            x=[layer for layer, _ in places],
            y=[0.8] * len(places),
            base=[row - 0.4 for _, row in places],
            width=0.9,
            marker=dict(color=COLOURS[name], line_width=0),
            text=[MARKS[name]] * len(places) if config.num_layers <= 24 else None,
            textposition="inside",
            insidetextanchor="middle",
            textangle=0,
            insidetextfont=dict(size=12, color=theme.text_on(COLOURS[name])),
            hovertext=[f"layer {x}, {ROLES[roles[row]]}: {NAMES[name]}" for x, row in places],
            hoverinfo="text",
        )
    fig.update_xaxes(title_text="layer", showgrid=False)
    fig.update_yaxes(
        tickvals=list(range(len(roles))),
        ticktext=[ROLES[role] for role in roles],
        range=[len(roles) - 0.4, -0.6],
        showgrid=False,
        zeroline=False,
    )
    fig.update_layout(
        title_text="Which matrix in which format?", barmode="overlay", height=150 + 34 * len(roles)
    )
    return described(
        fig,
        f"A map with one row for each of {len(roles)} kinds of matrices and one column for each of "
        f"{config.num_layers} layers. The colour is the format, from "
        f"{', '.join(NAMES[name] for name in formats)}. The last layers are in BF16, with all "
        "their matrices but the router.",
    )


def block_steps(block: Tensor, quantize: Quantize, step: int = 0) -> go.Figure:
    """Sixteen numbers as bars, at one of the `STEPS` of being quantized.

    Args:
        block: 16 numbers that are not all zero.
        quantize: like the answer to 08.quantize.
        step: of `STEPS`.
    """
    heights, ticks, words = _block(block, quantize, step)
    fig = go.Figure(
        go.Bar(
            x=list(range(16)),
            y=heights,
            marker=dict(color=READ, line_width=0),
            hovertemplate="number %{x}: %{y:.4g}<extra></extra>",
        )
    )
    top = 1.1 * max(abs(tick) for tick in ticks)
    fig.update_xaxes(title_text="place in the block", showgrid=False, dtick=1)
    fig.update_yaxes(
        title_text="number", tickvals=ticks, ticktext=_written(ticks), range=[-top, top]
    )
    fig.update_layout(title_text=f"Step {step}: {STEPS[step]}", height=400, showlegend=False)
    return described(
        fig,
        "Sixteen bars, one for each number of a block. The horizontal lines are the fifteen values "
        "that four bits can hold, dense near zero and wide apart far from it. After rounding every "
        f"bar ends on a line, and the smallest bars are gone. {words}",
    )


def block_stepper(block: Tensor, quantize: Quantize, start: int = 0) -> Stepper:
    """`block_steps`, from the numbers to what is read of them."""

    def update(fig: go.FigureWidget, step: int) -> str:
        heights, ticks, words = _block(block, quantize, step)
        top = 1.1 * max(abs(tick) for tick in ticks)
        fig.data[0].y = heights
        fig.layout.yaxis.tickvals = ticks
        fig.layout.yaxis.ticktext = _written(ticks)
        fig.layout.yaxis.range = [-top, top]
        fig.layout.title.text = f"Step {step}: {STEPS[step]}"
        return words

    return stepper(block_steps(block, quantize, start), update, len(STEPS), "step", start)


def _written(ticks: list[float]) -> list[str]:
    """The fifteen values as text; those next to 0, 1 and 2 would lie upon each other."""
    close = (0.5, 1.5)
    return ["" if abs(v) in close else f"{t:.3g}" for v, t in zip(GRID, ticks, strict=True)]


def _block(block: Tensor, quantize: Quantize, step: int) -> tuple[list[float], list[float], str]:
    """Heights of the bars, the fifteen values, and a sentence, at a step."""
    values, block_scale, tensor_scale = quantize(block)
    scale = float(block_scale.float()[0] * tensor_scale)
    heights = (block, block / scale, values, values * scale)[step]
    ticks = [value if step in (1, 2) else value * scale for value in GRID]
    small = int(((values == 0) & (block != 0)).sum())
    words = (
        f"The largest of the sixteen numbers is {float(block.abs().max()):.3g} in size.",
        f"The scale of the block is {scale:.3g}. Divided by it, the largest number is about 6.",
        f"Each number went to the nearest of the fifteen values, and {small} went to zero.",
        "The numbers that a matrix product reads. Their largest error is "
        f"{float((values * scale - block).abs().max()):.2g}.",
    )[step]
    return heights.tolist(), ticks, words


def flushed(shares: Mapping[str, float], title: str) -> go.Figure:
    """The share of numbers that are read as zero, in %.

    Args:
        shares: names such as "layer 0 in_proj", and shares. Names with the same last word have the
            same colour.
        title: of the figure.
    """
    fig = go.Figure()
    kinds = list(dict.fromkeys(name.rpartition(" ")[2] for name in shares))
    fills = (theme.KINDS["M"].pale, LARGE, theme.KINDS["E"].pale)
    for kind, fill in zip(kinds, fills, strict=False):
        here = {n.rpartition(" ")[0]: 100 * s for n, s in shares.items() if n.endswith(f" {kind}")}
        fig.add_bar(
            name=f"input of {kind}", x=list(here), y=list(here.values()), marker_color=fill,
            text=[f"{height:.0f}" for height in here.values()], textposition="outside",
            textfont_size=13, cliponaxis=False,
        )  # fmt: skip
    fig.update_layout(title_text=title, height=360, barmode="group")
    fig.update_xaxes(showgrid=False)
    most = max([*shares.values(), 0.01])
    fig.update_yaxes(title_text="read as 0, %", range=[0, 115 * most])
    return described(
        fig,
        f"A bar for each of {len(shares)} inputs of linear layers, in groups by layer: the share "
        "of the numbers that are not zero and are read as zero in NVFP4. In every layer the bar "
        f"of {kinds[-1]} is the highest.",
    )


def sums(errors: Mapping[str, Mapping[int, float]], title: str) -> go.Figure:
    """The error of a sum of rounded gradients against how many there are, both logarithmic."""
    counts = list(next(iter(errors.values())))
    fig = lines(
        counts,
        {name: [100 * error for error in found.values()] for name, found in errors.items()},
        title=title,
        x_title="gradients in the sum",
        y_title="error of the sum, %",
        log_x=True,
        log_y=True,
        alt=f"The error of a sum of rounded gradients over their number, for {', '.join(errors)}. "
        + (
            "The error falls at first and then stays, far from zero."
            if len(errors) == 1
            else "Rounded to nearest, the error falls at first and then stays. Rounded "
            "stochastically, it begins higher and keeps falling."
        ),
    )
    fig.update_xaxes(tickvals=counts, ticktext=[str(count) for count in counts])
    ticks = [0.5, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20]  # close enough to read a value between
    fig.update_yaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return fig


def outlier(
    block: Tensor, read: Read, transform: Read, size: float = 30.0, place: int = 5
) -> go.Figure:
    """A block with one large number, read directly and behind the Hadamard transform.

    Args:
        block: 16 numbers of about 1.
        read: the numbers that a product reads.
        transform: the Hadamard transform, with Transformer Engine's signs.
        size: of the large number, which is not drawn in full.
        place: where it is.
    """
    fig = make_subplots(
        2, 1, shared_xaxes=True, vertical_spacing=0.14,
        subplot_titles=["Read directly", "Transformed, read, and transformed back"],
    )  # fmt: skip
    _, exact, found, _ = _with_outlier(block, read, transform, size, place)
    for row, heights in enumerate(found, 1):
        fig.add_bar(
            x=list(range(16)), y=heights, name="read", legendgroup="read", showlegend=row == 1,
            marker=dict(color=theme.KINDS["E"].pale), row=row, col=1,
        )  # fmt: skip
        fig.add_scatter(
            x=list(range(16)), y=exact, name="exact", legendgroup="exact", showlegend=row == 1,
            mode="markers", marker=dict(color=EXACT, symbol="line-ew-open", size=14, line_width=3),
            row=row, col=1,
        )  # fmt: skip
    reach = 1.7 * float(block.abs().max())
    fig.update_yaxes(range=[-reach, reach], title_text="number")
    fig.update_xaxes(showgrid=False, dtick=1, range=[-0.6, 15.6])
    fig.update_xaxes(title_text="place in the block", row=2, col=1)
    fig.update_annotations(font_size=13)
    fig.update_layout(title_text=_outlier_title(size, place), height=460, margin_t=84)
    return described(
        fig,
        "Two rows of sixteen bars: what is read of a block with one large number, cut off in the "
        "figure, and fifteen small ones. Lines mark the exact numbers. Above, without the "
        "transform, nearly all small numbers are read as zero. Below, with it, they are not zero, "
        "but their errors are as large as they are, and some have the wrong sign.",
    )


def outlier_widget(block: Tensor, read: Read, transform: Read, place: int = 5) -> Explorer:
    """`outlier` with a slider for the size of the large number."""

    def update(fig: go.FigureWidget, size: float) -> str:
        zeros, exact, found, errors = _with_outlier(block, read, transform, size, place)
        for row, heights in enumerate(found):
            fig.data[2 * row].y = heights
            fig.data[2 * row + 1].y = exact
        fig.layout.title.text = _outlier_title(size, place)
        return (
            f"Of the fifteen small numbers, {zeros[0]} are read as zero directly, {zeros[1]} with "
            f"the transform. Their error is {errors[0]:.0f} % directly, {errors[1]:.0f} % with it; "
            f"that of the whole block {errors[2]:.1f} % directly, {errors[3]:.1f} % with it."
        )

    return explore(
        outlier(block, read, transform, place=place),
        update,
        size=slider("size of the large number", 1, LARGEST, value=30, log=True),
    )


def _with_outlier(
    block: Tensor, read: Read, transform: Read, size: float, place: int
) -> tuple[list[int], list[float], list[list[float]], list[float]]:
    """Zeros among the small numbers, exact numbers, those that are read, and errors in %.

    The errors are those of the small numbers, directly and with the transform, then those of all.
    """
    x = block.clone()
    x[place] = size
    found = [read(x), inverse_hadamard_transform(read(transform(x)))]
    small = torch.arange(16) != place
    zeros = [int((one[small].abs() < 1e-6).sum()) for one in found]
    errors = [
        100 * float((one - x)[which].norm() / x[which].norm())
        for which in (small, torch.ones(16, dtype=torch.bool))
        for one in found
    ]
    return zeros, x.tolist(), [one.tolist() for one in found], errors


def _outlier_title(size: float, place: int) -> str:
    return f"Number {place} is {size:.3g}, the others are about 1"


def weight_gradients(errors: Mapping[str, tuple[float, float]], draws: int) -> go.Figure:
    """Two bars for each variant of dW: the error of one, and of the mean of several."""
    fig = go.Figure()
    for name, which, look in (
        ("one dW", 0, theme.KINDS["M"]),
        (f"mean of {draws}", 1, theme.KINDS["E"]),
    ):
        heights = [100 * pair[which] for pair in errors.values()]
        fig.add_bar(
            name=name, x=list(errors), y=heights,
            marker=dict(color=look.pale if which == 0 else look.strong),
            text=[f"{height:.1f}" for height in heights], textposition="outside",
            textfont_size=12, cliponaxis=False,
        )  # fmt: skip
    most = max(max(pair) for pair in errors.values())
    fig.update_layout(title_text="How far is dW from the exact one?", height=380, barmode="group")
    fig.update_xaxes(showgrid=False)
    fig.update_yaxes(title_text="error of dW, %", range=[0, 118 * most])
    return described(
        fig,
        f"Two bars for each of {len(errors)} ways to compute dW: {'; '.join(errors)}. The error of "
        f"one dW is larger with stochastic rounding than with rounding to nearest. The mean of "
        f"{draws} is better with stochastic rounding only; rounded to nearest it is the same.",
    )


def losses(runs: Mapping[str, Sequence[float]], title: str, smoothed: int = 10) -> go.Figure:
    """Losses over the updates, averaged over some of them, a line for each training."""
    smooth = {}
    for name, values in runs.items():
        whole = len(values) // smoothed * smoothed
        smooth[name] = np.asarray(values[:whole], dtype=float).reshape(-1, smoothed).mean(1)
    first = next(iter(smooth.values()))
    return lines(
        smoothed * np.arange(1, len(first) + 1),
        smooth,
        title=title,
        x_title="update",
        y_title="loss, nats per token",
        markers=False,
        alt=f"The losses of {len(runs)} trainings over their updates: {', '.join(runs)}. The lines "
        "fall together and lie nearly upon each other.",
    )


def ablations(found: Mapping[str, Any] | None = None) -> go.Figure:
    """Gaps of the held-out loss to BF16 in the record of small trainings, a circle for each seed.

    Args:
        found: a record like nvfp4_training_small.json; None reads it.
    """
    variants = (found or record("nvfp4_training_small"))["variants"]
    rows = {
        words: variants[name]["held_out_nats_gap_percent"]["each"]
        for name, words in _VARIANTS.items()
        if name in variants
    }
    return _circles(
        rows,
        "Every part taken out once",
        "loss above that of BF16, %",
        f"One row for each of {len(rows)} precisions, with a circle for each seed: by how many "
        "percent the loss on held-out text is above that of BF16. From the lowest circle to the "
        "highest: "
        + "; ".join(f"{name}, {min(row):.2f} to {max(row):.2f}" for name, row in rows.items())
        + f". Below the recipe with each seed: {', '.join(_always_better(rows)) or 'no row'}.",
    )


def _always_better(rows: Mapping[str, Sequence[float]]) -> list[str]:
    """The variants whose loss is below the recipe's with each seed, those without a part of it."""
    recipe = rows[_VARIANTS["nvfp4"]]
    return [
        name
        for name, row in rows.items()
        if name.startswith("without") and all(a < b for a, b in zip(row, recipe, strict=True))
    ]


_VARIANTS = {
    "fp32": "FP32",
    "nvfp4": "NVFP4, the recipe",
    "nvfp4 without stochastic": "without stochastic rounding",
    "nvfp4 without hadamard": "without the Hadamard transform",
    "nvfp4 without square": "without 16 × 16 tiles",
    "nvfp4 without tail": "without last layers in BF16",
}


def after_training(found: Mapping[str, Any] | None = None) -> go.Figure:
    """What quantizing a trained model costs, a circle for each group of held-out files.

    Args:
        found: a record like nvfp4_checkpoints_loss.json; None reads it.
    """
    entries = (found or record("nvfp4_checkpoints_loss"))["results"]
    rows = {}
    for entry in entries:
        if "weights and inputs" in entry and entry["as"] in _WAYS:
            name = f"{_WAYS[entry['as']]}<br>{entry['bits_a_weight']:.2f} bits"
            rows[name] = entry["weights and inputs"]["change_percent"]["each"]
    medians = {name.partition("<br>")[0]: float(np.median(row)) for name, row in rows.items()}
    order = sorted(medians, key=medians.__getitem__)
    return _circles(
        rows,
        "A trained model, quantized",
        "loss above that of float32, %",
        f"One row for each of {len(rows)} ways to quantize a trained model, with a circle for each "
        "group of held-out files. The medians, from the lowest: "
        + "; ".join(f"{name}, {medians[name]:.2f} %" for name in order)
        + ".",
    )


_WAYS = {
    "fp8 for all": "FP8",
    "mixed, 4.75 bits": "NVFP4 and FP8, chosen",
    "shipped": "the package's packed model",
    "nvfp4 for all": "NVFP4, searched scales",
    "nvfp4 for all, scales by rule": "NVFP4, your rule's scales",
}


def _circles(rows: Mapping[str, Sequence[float]], title: str, x_title: str, alt: str) -> go.Figure:
    fig = go.Figure()
    look = theme.SERIES[0]
    for place, values in enumerate(rows.values()):
        fig.add_scatter(
            x=list(values), y=[place] * len(values), mode="markers",
            marker=dict(symbol="circle-open", size=11, color=look.colour, line_width=2),
            hovertemplate="%{x:.2f} %<extra></extra>",
        )  # fmt: skip
        fig.add_scatter(
            x=[float(np.median(values))], y=[place], mode="markers",
            marker=dict(symbol="line-ns-open", size=18, color=LARGE, line_width=3),
            hovertemplate="median %{x:.2f} %<extra></extra>",
        )  # fmt: skip
    fig.add_vline(x=0, line=dict(color=theme.MUTED, width=1))
    fig.update_layout(title_text=title, height=120 + 44 * len(rows), showlegend=False)
    fig.update_xaxes(title_text=x_title)
    fig.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=list(rows), range=[len(rows) - 0.5, -0.5],
        showgrid=False, zeroline=False,
    )  # fmt: skip
    return described(fig, f"{alt} An orange line marks the median.")


def block_sizes(errors: Mapping[str, Mapping[int, float]]) -> go.Figure:
    """The error of numbers in four bits against the size of a block."""
    sizes = list(next(iter(errors.values())))
    fig = lines(
        sizes,
        {f"scales: {kind}": [100 * e for e in found.values()] for kind, found in errors.items()},
        title="How many numbers should share a scale?",
        x_title="numbers in a block (bits a number)",
        y_title="error, %",
        log_x=True,
        alt="The error of normally distributed numbers over the size of a block, for scales in "
        "E4M3 and for powers of two. With E4M3 it rises with the size, and it is lower at every "
        "size that is drawn. With powers of two it hardly depends on the size.",
    )
    fig.update_xaxes(tickvals=sizes, ticktext=[f"{n}<br>({4 + 8 / n:g})" for n in sizes])
    fig.update_yaxes(rangemode="tozero")
    return fig


def states(found: Mapping[str, Sequence[float]]) -> go.Figure:
    """A number of a state over the tokens; every fiftieth is drawn."""
    count = len(next(iter(found.values())))
    names = {
        "float32": "float32",
        "stochastic": "float16, stochastic (mean of 64)",
        "nearest": "float16, to nearest",
    }
    return lines(
        np.arange(1, count + 1)[::50],
        {names[name]: np.asarray(found[name])[::50] for name in names},
        title="One number of a state, written at every token",
        x_title="token",
        y_title="state",
        markers=False,
        alt="Three lines that rise over the tokens: a number of a state in float32 and in float16. "
        "Rounded to nearest, the line first runs above float32, then stops at a power of two and "
        "stays there. The mean of 64 states that are rounded stochastically follows float32.",
    )
