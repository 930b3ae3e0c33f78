"""Figures of `benchmarks/records/quality_per_flop.json`: what models learn from equal compute.

`quality_curves` draws bits per byte over training FLOPs, `quality_claims` the difference of the two
models of each claim. Both draw every seed, so that the spread can be seen beside the effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import described
from nemotron_lite.course.records import record

RECORD = "quality_per_flop"


def quality_curves(
    models: Sequence[str] | None = None,
    *,
    title: str = "Bits per byte at equal compute",
    found: dict[str, Any] | None = None,
) -> go.Figure:
    """Bits per byte of the held-out text over training FLOPs, one line for each model.

    A line is the median of the seeds; bars reach from the smallest to the largest.

    Args:
        models: their names in the record; all that were trained by default.
        title: of the figure.
        found: a record like quality_per_flop.json; None reads it.

    Raises:
        ValueError: a model that the record does not have, or that was not trained yet.
    """
    entries = (found or record(RECORD))["models"]
    trained = [name for name, entry in entries.items() if entry["seeds"]]
    chosen = trained if models is None else list(models)
    if missing := [name for name in chosen if name not in trained]:
        raise ValueError(f"the record has no runs of {missing}; it has those of {trained}.")
    fig = go.Figure()
    for name in chosen:
        entry, look = entries[name], theme.SERIES[list(entries).index(name)]
        scores = [point["bits_per_byte"] for point in entry["curve"]]
        fig.add_scatter(
            name=entry["words"],
            x=[point["flops"] / 1e12 for point in entry["curve"]],
            y=[score["median"] for score in scores],
            mode="lines+markers",
            line=dict(color=look.colour, dash=look.dash),
            marker=dict(color=look.colour, symbol=look.marker),
            error_y=dict(
                array=[score["max"] - score["median"] for score in scores],
                arrayminus=[score["median"] - score["min"] for score in scores],
                width=3,
            ),
        )
    fig.update_layout(title_text=title, height=420)
    fig.update_xaxes(title_text="training FLOPs (10<sup>12</sup>)", rangemode="tozero")
    fig.update_yaxes(title_text="bits per byte of held-out text")
    return described(
        fig,
        f"One falling line for each of {len(chosen)} models: "
        f"{', '.join(entries[name]['words'] for name in chosen)}. To the right more arithmetic was "
        "spent on training, and lower is better. Bars show the spread of the seeds. The lines are "
        "close to each other, so the differences stand in the table of claims.",
    )


def quality_claims(
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    title: str = "Claims, tested over seeds",
    found: dict[str, Any] | None = None,
) -> go.Figure:
    """The difference of the two models of each claim: each seed, and the interval of the mean.

    Args:
        pairs: (model, other) of the claims to show; all by default.
        title: of the figure.
        found: a record like quality_per_flop.json; None reads it.

    Raises:
        ValueError: a pair about which the record has no claim.
    """
    whole = found or record(RECORD)
    claims = {(claim["model"], claim["other"]): claim for claim in whole["claims"]}
    chosen = list(claims) if pairs is None else list(pairs)
    if missing := [pair for pair in chosen if pair not in claims]:
        raise ValueError(f"the record has no claim about {missing}; it has {list(claims)}.")
    fig = go.Figure()
    names = []
    for place, pair in enumerate(chosen):
        claim = claims[pair]
        words = [whole["models"][name]["words"] for name in pair]
        names.append("<br>minus ".join(words) + f"<br><b>{claim['verdict']}</b>")
        for trace in difference(claim, place):
            fig.add_trace(trace)
    margin = whole["claims"][0]["margin"]
    fig.add_vrect(x0=-margin, x1=margin, fillcolor=theme.GRID, line_width=0, layer="below")
    fig.add_vline(x=0, line=dict(color=theme.MUTED, width=1))
    fig.update_layout(title_text=title, height=130 + 62 * len(chosen), showlegend=False)
    fig.update_xaxes(title_text="bits per byte, below 0 the first model is better")
    fig.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=names,
        range=[len(names) - 0.5, -0.5],
        showgrid=False,
    )
    return described(
        fig,
        f"One row for each of {len(chosen)} claims about two models. Open circles are the seeds, a "
        "bar with ends is the interval of their mean. Left of zero the first model is better. The "
        "grey band marks differences too small to matter. The verdict below each pair says whether "
        "the claim holds, does not, or is not decided.",
    )


def difference(claim: dict[str, Any], place: int) -> list[go.Scatter]:
    """Two traces for a claim at the height `place`: every seed, and the mean with its interval."""
    each = go.Scatter(
        name=f"seeds of claim {place + 1}",
        x=claim["each"],
        y=[place] * claim["n"],
        mode="markers",
        marker=dict(symbol="circle-open", size=9, color=theme.SERIES[0].colour, line_width=2),
        showlegend=False,
    )
    if claim["interval"] is None:
        return [each]
    look = theme.SERIES[1]
    mean = go.Scatter(
        name=f"mean of claim {place + 1}",
        x=[claim["mean"]],
        y=[place],
        mode="markers",
        marker=dict(symbol="line-ns-open", size=16, color=look.colour, line_width=3),
        error_x=dict(
            array=[claim["interval"][1] - claim["mean"]], thickness=2, width=6, color=look.colour
        ),
        showlegend=False,
    )
    return [each, mean]
