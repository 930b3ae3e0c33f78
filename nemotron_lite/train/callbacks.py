"""Callbacks: code of a user that runs between the updates of a training run.

    class StopWhenGood(Callback):
        def on_evaluation(self, record):
            return record["validation_loss"] > 2.0      # False ends the run

    train(model, data, config, validation=held_out, callbacks=[StopWhenGood()])

A method that returns False ends the run: it is saved, and `train` returns with `stopped=True`. Any
other value, None included, lets it go on. An error in a callback does not lose the run. The loop
saves it first, and then the error goes on to the caller of `train`.

`WatchBalance` is a callback that is made already: it hands over the balance of the routers while
the run goes on, to a plot, say.

The order after an update: validation if it is due, the log, `on_step`, `on_evaluation`, a
checkpoint if it is due, `on_save`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemotron_lite.arguments import integer
from nemotron_lite.train.balance_history import BalanceHistory

Record = dict[str, Any]


class Callback:
    """What can be called during a run; override the methods that you need."""

    def on_start(self, step: int) -> bool | None:
        """Before the first update of this call; `step` updates were made before."""

    def on_step(self, record: Record) -> bool | None:
        """After an update, with its log record."""

    def on_evaluation(self, record: Record) -> bool | None:
        """After a validation; the record has `validation_loss` and `best_validation_loss`."""

    def on_save(self, path: Path) -> bool | None:
        """After a checkpoint was written to `path`."""

    def on_end(self, step: int) -> None:
        """After the last update and the last save, if no error ended the run."""


class WatchBalance(Callback):
    """Collects how evenly the routers spread the tokens, and hands it over while the run goes on.

        watch = WatchBalance(lambda history: print(history.max_vio), every=10)
        train(model, data, config, callbacks=[watch])

    Args:
        look: called with all updates so far, after every `every` of them and at the end; if it
            returns False, the run ends. Its time is not part of the training time.
        every: updates.

    Attributes:
        records: of the updates so far. A run that was resumed begins with its first new update;
            `BalanceHistory.from_folder` has those before it too.

    Raises:
        ValueError: while the run goes on, if the model has no mixture of experts.
    """

    def __init__(self, look: Callable[[BalanceHistory], Any], *, every: int = 1) -> None:
        self._look, self._every = look, integer("every", every, low=1)
        self.records: list[Record] = []

    @property
    def history(self) -> BalanceHistory:
        """All updates so far."""
        return BalanceHistory.from_records(self.records)

    def on_step(self, record: Record) -> bool | None:
        """Take a record, and hand over the history if it is due."""
        self.records.append({"step": record["step"], "routers": record["routers"]})
        return None if len(self.records) % self._every else _only_false(self._look(self.history))

    def on_end(self, step: int) -> None:
        """Hand over the last updates."""
        if len(self.records) % self._every:
            self._look(self.history)


def _only_false(answer: Any) -> bool | None:
    return False if answer is False else None


class Callbacks:
    """All callbacks of a run, called in order.

    Args:
        callbacks: of the caller.
        on_step: a plain function that is called like `Callback.on_step`, before the others.
    """

    def __init__(
        self, callbacks: Sequence[Callback], on_step: Callable[[Record], Any] | None
    ) -> None:
        self._callbacks = tuple(callbacks)
        self._on_step = on_step
        self.stopped = False

    def start(self, step: int) -> None:
        """Before the first update."""
        self._call("on_start", step)

    def step(self, record: Record) -> None:
        """After an update, and after its validation if there was one."""
        if self._on_step is not None:
            self._note(self._on_step(record))
        self._call("on_step", record)
        if "validation_loss" in record:
            self._call("on_evaluation", record)

    def save(self, path: Path) -> None:
        """After a checkpoint."""
        self._call("on_save", path)

    def end(self, step: int) -> None:
        """At the end of a run without an error."""
        self._call("on_end", step)

    def _call(self, method: str, argument: Any) -> None:
        for callback in self._callbacks:
            self._note(getattr(callback, method)(argument))

    def _note(self, answer: Any) -> None:
        self.stopped |= answer is False
