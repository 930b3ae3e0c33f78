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
from nemotron_lite.train.callbacks import WatchBalance

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
    load = thin.relative_load(router).T
    steps = thin.steps
    first = int(history.steps[0])
    return _map(load, steps, router, title, (first, last_step or int(steps[-1])))


class LiveBalance(WatchBalance):
    """A callback for `train` that draws one router's `balance_map` while the run goes on.

    The figure appears when the run starts. It is replaced at most once a second and at the end, so
    the notebook keeps the picture of the whole run.

    Args:
        config: of the model.
        layer: number of a layer with experts, counted from 0.
        steps: updates of the run, the right end of the figure.
        title: of the figure; by default it names the router.
        stop: called with the history after every update; if it returns True, the run ends.

    Raises:
        TypeError, ValueError: a layer without experts, or a number out of range.
    """

    def __init__(
        self,
        config: NemotronConfig,
        layer: int,
        steps: int,
        *,
        title: str = "",
        stop: Callable[[BalanceHistory], bool] | None = None,
    ) -> None:
        super().__init__(self._look_at)
        layer = integer("layer", layer, low=0, high=config.num_layers - 1)
        if config.pattern[layer] != "E":
            found = [i for i, letter in enumerate(config.pattern) if letter == "E"]
            raise ValueError(
                f"layer={layer} has no experts in the pattern {config.pattern}: expected one of "
                f"{', '.join(map(str, found)) or 'none; this model has no mixture of experts'}."
            )
        self.router = f"backbone.layers.{layer}.mixer"
        self.last_step = integer("steps", steps, low=1)
        self._experts, self._title, self._stop = config.n_routed_experts, title, stop
        self._replace: Callable[[Any], None] | None = None
        self._drawn = 0.0

    def on_start(self, step: int) -> None:
        """Show the figure, without a value yet."""
        self.records = []
        nothing = np.full((self._experts, 1), np.nan)
        empty = _map(nothing, np.array([1]), self.router, self._title, (1, self.last_step))
        self._replace = show_updating(empty)
        self._drawn = time.perf_counter()

    def _look_at(self, history: BalanceHistory) -> bool | None:
        done = history.steps[-1] >= self.last_step
        if done or time.perf_counter() - self._drawn >= INTERVAL:
            self.draw()
        return False if self._stop is not None and self._stop(history) else None

    def on_end(self, step: int) -> None:
        """Draw the last updates."""
        if self.records:
            self.draw()

    def draw(self) -> go.Figure:
        """Replace the figure that is shown by that of all updates so far; returns it."""
        figure = balance_map(self.history, self.router, title=self._title, last_step=self.last_step)
        if self._replace is not None:
            self._replace(figure)
        self._drawn = time.perf_counter()
        return figure


def _map(
    load: np.ndarray, steps: np.ndarray, router: str, title: str, ends: tuple[int, int]
) -> go.Figure:
    fig = go.Figure(
        go.Heatmap(
            z=np.round(load, 3),
            x=steps,
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
