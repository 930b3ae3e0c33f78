"""The figure of `benchmarks/records/removal.json`: what is lost without each part.

Every run is one mark, so that the spread of the seeds can be seen beside the effect. A difference
that is smaller than the spread is no result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import described
from nemotron_lite.course.records import record
from nemotron_lite.course.removal import PARTS

AXES = {
    "text": "bits per byte more than the whole model",
    "recall": "share of right answers, minus that of the whole model",
}
WORSE = {"text": "to the right", "recall": "to the left"}


def removal_figure(
    task: str, parts: Sequence[str], *, title: str, found: dict[str, Any] | None = None
) -> go.Figure:
    """Differences to the whole model, one row for each part, one mark for each seed.

    Args:
        task: "text" or "recall".
        parts: keys of `removal.PARTS`, first one on top.
        title: of the figure.
        found: a record like removal.json; None reads it.

    Raises:
        ValueError: the record has no such task or part; the message lists what it has.
    """
    entries = {
        entry["without"]: entry
        for entry in (found or record("removal"))["results"]
        if entry["task"] == task
    }
    missing = [part for part in parts if part not in entries]
    if missing:
        known = [part for part in entries if part]
        raise ValueError(f"the record of task {task!r} has no {missing}; it has {known}.")
    names = [PARTS[part] for part in parts]
    fig = go.Figure()
    style = theme.SERIES[0]
    for name, part in zip(names, parts, strict=True):
        runs = entries[part]["difference"]["runs"]
        marker = dict(color=style.colour, symbol="circle-open", size=11, line=dict(width=2))
        fig.add_scatter(x=runs, y=[name] * len(runs), mode="markers", marker=marker, name=name)
    medians = [entries[part]["difference"]["median"] for part in parts]
    mark = dict(color=theme.SERIES[1].colour, symbol="line-ns-open", size=18, line=dict(width=3))
    fig.add_scatter(x=medians, y=names, mode="markers", marker=mark, name="median")
    fig.add_vline(x=0, line=dict(color=theme.MUTED, width=1))
    fig.update_layout(title_text=title, height=120 + 44 * len(parts), showlegend=False)
    fig.update_xaxes(title_text=AXES[task])
    # One row has no height for the words, so they stand before its name.
    fig.update_yaxes(autorange="reversed", title_text="without the …" if len(parts) > 1 else "")
    if len(parts) == 1:
        fig.update_yaxes(tickvals=names, ticktext=[f"without the {names[0]}"])
    return described(
        fig,
        f"One row for each part that is taken out: {', '.join(names)}. Each open circle is one "
        "training run with its own seed, compared with the whole model of the same seed; a bar "
        f"marks the median. Worse is {WORSE[task]} of zero.",
    )
