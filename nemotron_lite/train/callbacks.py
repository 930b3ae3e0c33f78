"""Callbacks: code of a user that runs between the updates of a training run.

    class StopWhenGood(Callback):
        def on_evaluation(self, record):
            return record["validation_loss"] > 2.0      # False ends the run

    train(model, data, config, validation=held_out, callbacks=[StopWhenGood()])

A method that returns False ends the run: it is saved, and `train` returns with `stopped=True`. Any
other value, None included, lets it go on. An error in a callback does not lose the run. The loop
saves it first, and then the error goes on to the caller of `train`.

A record has what the log has, also the balance of every router (`record["routers"]`). So
`BalanceHistory.from_records` makes arrays of the records so far while the run goes on, and
`course/plotting/balance.py` draws them.

The order after an update: validation if it is due, the log, `on_step`, `on_evaluation`, a
checkpoint if it is due, `on_save`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
