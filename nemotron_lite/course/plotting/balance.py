"""The load of the experts as a heat map, experts by updates; live while a model is trained.

    watch = LiveBalance(model.config, layer=2, steps=300)
    train(model, data, recipe, callbacks=[watch], progress=False)

    history = BalanceHistory.from_folder("runs/lite")
    show(balance_map(history, history.routers[0]))

A cell shows how often an expert was chosen in an update, as a multiple of the mean. A balanced
router gives one even colour. A router that collapses gives a few lines at the upper end of the
scale, and all other experts are at zero.

Many updates are thinned to `MOST_COLUMNS` columns, each the sum of neighboring updates. So a live
figure stays small enough to be sent once a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import plotly.graph_objects as go

from nemotron_lite.arguments import integer
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.display import show_updating
from nemotron_lite.course.plotting.figure import described
from nemotron_lite.train.balance_history import BalanceHistory
from nemotron_lite.train.callbacks import Callback, Record

MOST_COLUMNS = 150
TOP = 3.0  # times the mean load; the end of the scale
INTERVAL = 1.0  # seconds between two pictures


def balance_map(
    history: BalanceHistory, router: str, *, title: str = "", last_step: int | None = None
) -> go.Figure:
    """Draw the load of every expert of one router over the updates.

    Args:
        history: of a run (`BalanceHistory.from_folder`), or of a part of one.
        router: its name, one of `history.routers`.
        title: of the figure; by default it names the router.
        last_step: the update at the right end; by default the last one of `history`.

    Raises:
        ValueError: no router of that name.
    """
    thin = history.thinned(MOST_COLUMNS)
    first = int(history.steps[0])
    last = int(history.steps[-1]) if last_step is None else last_step
    # A column reaches from the update after those of the column before it to its own last one.
    edges = np.concatenate([[first - 0.5], thin.steps + 0.5])
    return _map(thin.relative_load(router).T, edges, router, title, (first, last))


class LiveBalance(Callback):
    """A callback for `train` that draws one router's `balance_map` while the run goes on.

    The figure appears when the run starts. It is replaced at most once a second and at the end, so
    the notebook keeps the picture of the whole run.

    Args:
        config: of the model.
        layer: number of a layer with experts, counted from 0.
        steps: updates of the run, the right end of the figure.
        title: of the figure; by default it names the router.

    Attributes:
        router: name of the one that is drawn.
        records: its statistics after each update.

    Raises:
        TypeError, ValueError: a layer without experts, or a number out of range; while the run goes
            on, if the model has no such router.
    """

    def __init__(
        self,
        config: NemotronConfig,
        layer: int,
        steps: int,
        *,
        title: str = "",
    ) -> None:
        layer = integer("layer", layer, low=0, high=config.num_layers - 1)
        if config.pattern[layer] != "E":
            found = [i for i, letter in enumerate(config.pattern) if letter == "E"]
            raise ValueError(
                f"layer={layer} has no experts in the pattern {config.pattern}: expected one of "
                f"{', '.join(map(str, found)) or 'none; this model has no mixture of experts'}."
            )
        self.router = f"backbone.layers.{layer}.mixer"
        self.last_step = integer("steps", steps, low=1)
        self._experts, self._title = config.n_routed_experts, title
        self.records: list[Record] = []
        self._replace: Callable[[Any], None] | None = None
        self._drawn = 0.0

    def on_start(self, step: int) -> None:
        """Show the figure, without a value yet."""
        self.records = []
        nothing = np.full((self._experts, 1), np.nan)
        empty = _map(nothing, np.array([0.5, 1.5]), self.router, self._title, (1, self.last_step))
        self._replace = show_updating(empty)
        self._drawn = time.perf_counter()

    def on_step(self, record: Record) -> None:
        """Keep the statistics of this router, and draw them if the picture is a second old."""
        routers = record["routers"]
        if self.router not in routers:
            raise ValueError(
                f"the model has no router {self.router!r}: expected one of "
                f"{', '.join(routers) or 'none; it has no mixture of experts'}. LiveBalance needs "
                "the config of the model that is trained."
            )
        self.records.append(
            {"step": record["step"], "routers": {self.router: routers[self.router]}}
        )
        if time.perf_counter() - self._drawn >= INTERVAL:
            self.draw()

    def on_end(self, step: int) -> None:
        """Draw the last updates."""
        if self.records:
            self.draw()

    def draw(self) -> None:
        """Replace the figure that is shown by that of all updates so far."""
        assert self._replace is not None, "on_start comes first"
        history = BalanceHistory.from_records(self.records)
        self._replace(
            balance_map(history, self.router, title=self._title, last_step=self.last_step)
        )
        self._drawn = time.perf_counter()


def _map(
    load: np.ndarray, edges: np.ndarray, router: str, title: str, ends: tuple[int, int]
) -> go.Figure:
    fig = go.Figure(
        go.Heatmap(
            z=np.round(load, 3),
            x=edges,
            y=np.arange(len(load)),
            zmin=0.0,
            zmax=TOP,
            colorbar=dict(
                title=dict(text="load / mean", side="right"),
                tickvals=[0, 1, 2, TOP],
                ticktext=["0", "1", "2", f"{TOP:.0f} or more"],
            ),
            hovertemplate="update %{x}, expert %{y}: %{z} times the mean<extra></extra>",
        )
    )
    fig.update_layout(title_text=title or f"Load of the experts of {router}", height=420)
    fig.update_xaxes(title_text="update", showgrid=False, range=[ends[0] - 0.5, ends[1] + 0.5])
    fig.update_yaxes(title_text="expert", showgrid=False, range=[len(load) - 0.5, -0.5])
    return described(
        fig,
        f"A heat map with one row for each of the {len(load)} experts of {router} and one column "
        "for each update or group of updates. The colour says how many tokens an expert got, from "
        "none to three times the mean or more. Rows of one even colour mean that the router is "
        "balanced; a few rows at the upper end, with all others at none, mean that it has "
        "collapsed.",
    )
