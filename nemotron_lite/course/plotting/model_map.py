"""A map of the layers of a model: one block for each layer.

The pattern of a Nemotron model is a string, one character for each layer. The map writes it in
rows, first layer top left, one block with its letter for each character. It shows the regularity of
the pattern: M and E in turn, and an attention layer after every few pairs. The kinds of layer that
a chapter is about are filled strongly, the others are pale. Hovering over a block shows what the
ledger counts for it.

Each block has the letter of its layer, so the map can be read without colour. Left out: the sizes
inside a layer (docs/architecture.svg shows the inside of each kind).
"""

from __future__ import annotations

from collections.abc import Collection
from math import ceil

import plotly.graph_objects as go

from nemotron_lite import ledger
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.plotting import theme
from nemotron_lite.course.plotting.figure import described

PER_ROW = 24  # blocks, at most: the letters can still be read on a phone


def model_map(
    config: NemotronConfig,
    highlight: str | Collection[int] | None = None,
    *,
    title: str | None = None,
) -> go.Figure:
    """Draw the layer pattern of `config`.

    Args:
        config: the model.
        highlight: which layers to fill strongly: kinds as in the pattern ("M", "*E"), "MTP" for
            the multi-token prediction module, or layer numbers. None fills none.
        title: of the map; by default the number of layers of each kind.

    Raises:
        ValueError: `highlight` names a kind or a layer that the model does not have.
    """
    strong, description = _highlighted(config, highlight)
    columns = ceil(config.num_layers / ceil(config.num_layers / PER_ROW))
    rows = ceil(config.num_layers / columns)
    sizes = ledger.parameters(config).layers
    fig = go.Figure()
    for kind in (k for k in theme.KINDS if k in config.pattern):
        layers = [i for i, letter in enumerate(config.pattern) if letter == kind]
        hover = [
            f"layer {i} of {config.num_layers}: {theme.KINDS[kind].name}<br>"
            f"{int(sizes[i].total):,} parameters, {int(sizes[i].active):,} read per token"
            for i in layers
        ]
        places = [(i % columns, i // columns) for i in layers]
        fig.add_bar(
            **_blocks(kind, places, [i in strong for i in layers], kind, hover),
            name=f"{kind}  {theme.KINDS[kind].name} ({len(layers)})",
        )
    if config.mtp_pattern:
        hover = [
            f"MTP module, part {part}: {theme.KINDS[part].name}<br>"
            f"one module, used {config.mtp_depths} times: token t+2, t+3, …"
            for part in config.mtp_pattern
        ]
        places = [(column, rows) for column in range(len(config.mtp_pattern))]
        chosen = [highlight == "MTP"] * len(places)
        fig.add_bar(
            **_blocks("MTP", places, chosen, list(config.mtp_pattern), hover),
            name=f"{config.mtp_pattern}  MTP (one module, {config.mtp_depths} depths)",
        )
    _axes(fig, columns, rows, config)
    fig.update_layout(title_text=title or f"{config.num_layers} layers: {_counts(config)}")
    return described(fig, _alt(config, description))


def _highlighted(
    config: NemotronConfig, highlight: str | Collection[int] | None
) -> tuple[set[int], str]:
    """Numbers of the layers to fill strongly, and a description of them."""
    if highlight is None or highlight == "MTP":
        if highlight and not config.mtp_pattern:
            raise ValueError("highlight='MTP', but this model has no MTP module (mtp_pattern='').")
        return set(), "the MTP module is" if highlight else ""
    if isinstance(highlight, str):
        unknown = sorted(set(highlight) - set(config.pattern))
        if unknown or not highlight:
            raise ValueError(
                f"highlight={highlight!r} names {unknown}, which the pattern does not have; "
                f"expected letters of {sorted(set(config.pattern))}, 'MTP' or layer numbers."
            )
        names = [theme.KINDS[kind].name for kind in dict.fromkeys(highlight)]
        layers = {i for i, letter in enumerate(config.pattern) if letter in highlight}
        return layers, f"the {' and '.join(names)} layers are"
    beyond = sorted(i for i in highlight if not 0 <= i < config.num_layers)
    if beyond:
        raise ValueError(
            f"highlight has layer {beyond[0]}; this model has 0 to {config.num_layers - 1}."
        )
    listed = ", ".join(str(i) for i in sorted(highlight))
    return set(highlight), f"layers {listed} are"


def _blocks(
    kind: str,
    places: list[tuple[int, int]],
    strong: list[bool],
    letters: str | list[str],
    hover: list[str],
) -> dict[str, object]:
    """One trace of blocks; they are bars, so that they become wider with the page."""
    look = theme.KINDS[kind]
    fills = [look.strong if s else look.pale for s in strong]
    return dict(
        x=[column for column, _ in places],
        y=[0.76] * len(places),
        base=[row - 0.38 for _, row in places],
        width=0.92,
        text=letters if isinstance(letters, list) else [letters] * len(places),
        textposition="inside",
        insidetextanchor="middle",
        textangle=0,
        constraintext="none",
        insidetextfont=dict(family=theme.MONO, size=14, color=[theme.text_on(f) for f in fills]),
        marker=dict(color=fills, line=dict(color=look.strong, width=1.5)),
        hovertext=hover,
        hoverinfo="text",
    )


def _axes(fig: go.Figure, columns: int, rows: int, config: NemotronConfig) -> None:
    """Name each row by its first layer; hide the grid and the x axis."""
    names = [f"layer {row * columns}" for row in range(rows)]
    if config.mtp_pattern:
        names.append("MTP")
    fig.update_xaxes(visible=False, range=[-0.6, max(columns, 8) - 0.4], fixedrange=True)
    fig.update_yaxes(
        tickvals=list(range(len(names))),
        ticktext=names,
        range=[len(names) - 0.4, -0.6],
        showgrid=False,
        showline=False,
        ticks="",
        zeroline=False,
        fixedrange=True,
    )
    legend = dict(orientation="h", x=0, y=-0.02, yanchor="top", traceorder="normal")
    fig.update_layout(barmode="overlay", height=150 + 36 * len(names), legend=legend)
    fig.update_layout(plot_bgcolor=theme.CARD, margin=dict(l=72, r=16, t=52, b=72))


def _counts(config: NemotronConfig) -> str:
    kinds = [k for k in theme.KINDS if k in config.pattern]
    return ", ".join(f"{config.pattern.count(k)} {theme.KINDS[k].name}" for k in kinds)


def _alt(config: NemotronConfig, description: str) -> str:
    text = f"Map of {config.num_layers} layers in the order {config.pattern}: {_counts(config)}."
    if config.mtp_pattern:
        text += f" Below them one MTP module, {config.mtp_pattern}."
    return text + (f" Filled strongly: {description.rsplit(' ', 1)[0]}." if description else "")
