"""A training while it runs: on a terminal a chart that grows, in a log a line every ten seconds.

    with LiveCurve(seconds=75, reference=curve) as live:
        train(model, data, config, progress=False, on_step=live.step)
    live.show_result()

The chart has the loss of this run and, below it, that of the shipped reference curve: the same run
on a quiet machine. It is drawn on stderr twice a second, which takes a thousandth of the training's
time. The finished chart goes to stdout, in a log as ASCII.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from nemotron_lite.cli.chart import Chart, Curve
from nemotron_lite.cli.common import err, note, out, settings
from nemotron_lite.progress import is_terminal

REDRAW = 0.5  # seconds between two pictures
LINE_EVERY = 10.0  # seconds between two lines in a log
RECENT = 20  # updates whose mean loss is shown as a number
STEEP = 0.05  # the first part of a run, whose losses do not set the range of the chart
RECENT_SECONDS = 3.0  # of the reference curve, for its loss at the end
MOST_POINTS = 150  # of a curve that is kept
_BAR = 60  # characters
_clock = time.monotonic


class LiveCurve(AbstractContextManager["LiveCurve"]):
    """Collects the log records of a training and shows them.

    Args:
        seconds: how long the training takes.
        reference: `seconds` and `loss` of another run, or None.
    """

    def __init__(self, seconds: float | int, reference: Mapping[str, Any] | None = None) -> None:
        self.seconds = seconds
        self._passed: list[float] = []
        self._loss: list[float] = []
        self._reference = reference
        self._record: dict[str, Any] = {}
        self._live: Live | None = None
        self._shown = 0.0

    def __enter__(self) -> LiveCurve:
        if not settings.quiet and is_terminal(sys.stderr):
            self._live = Live(console=err, auto_refresh=False, transient=True)
            self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*exception)
            self._live = None

    def step(self, record: dict[str, Any]) -> None:
        """Take the record of an update; the callback `on_step` of `train`."""
        self._passed.append(float(record["seconds"]))
        self._loss.append(float(record["ce"]))
        self._record = record
        now = _clock()
        if self._live is not None:
            if now - self._shown >= REDRAW:
                self._shown = now
                self._live.update(Group(*self._chart(), self._status()), refresh=True)
        elif not settings.quiet and record["seconds"] >= self._shown + LINE_EVERY:
            self._shown += LINE_EVERY
            note(f"training: {self._in_words()}")

    def show_result(self) -> None:
        """Print the finished chart and what it shows; nothing with `--quiet`."""
        if settings.quiet or not self._loss:
            return
        terminal = is_terminal(sys.stdout)
        for line in self._chart(ascii_only=not terminal):
            out.print(line, soft_wrap=True)
        mine, theirs = ("*", ".") if not terminal else ("bright dots", "dim dots")
        text = f"{mine}: this run, loss {self.loss:.3f} at the end"
        if self._reference is not None:
            where = self._reference.get("machine", {}).get("cpu", "another machine")
            last = _last(self._reference["seconds"], self._reference["loss"], RECENT_SECONDS)
            text += f"; {theirs}: the same run on a quiet machine ({where}), {last:.3f}"
        out.print(Text(text), soft_wrap=True)

    @property
    def loss(self) -> float:
        """Mean loss of the last updates."""
        return _last_mean(self._loss)

    def as_json(self) -> dict[str, Any]:
        """The curve in at most 150 points: means of neighboring updates."""
        step = max(1, -(-len(self._loss) // MOST_POINTS))
        parts = range(0, len(self._loss), step)
        return {
            "seconds": [round(self._passed[min(i + step, len(self._loss)) - 1], 2) for i in parts],
            "loss": [round(_mean(self._loss[i : i + step]), 4) for i in parts],
        }

    def _chart(self, *, ascii_only: bool = False) -> list[Text]:
        curves = [Curve(self._passed, self._loss, "bold cyan", "*")]
        if self._reference is not None:
            curves.append(
                Curve(self._reference["seconds"], self._reference["loss"], "bright_black", ".")
            )
        points = [point for curve in curves for point in zip(curve.x, curve.y, strict=True)]
        low = min(y for _, y in points)
        # The first updates fall so far that the rest would be a flat line: they are at the edge.
        later = [y for x, y in points if x >= STEEP * self.seconds]
        high = max(later or [y for _, y in points])
        chart = Chart((0.0, float(self.seconds)), (low, max(high, low + 0.1)))
        return chart.draw(curves, ascii_only=ascii_only)

    def _status(self) -> Text:
        share = min(1.0, self._record["seconds"] / self.seconds)
        done = round(_BAR * share)
        text = Text("       ")
        text.append("━" * done, style="cyan")
        text.append("━" * (_BAR - done), style="bright_black")
        text.append(f"\n       {self._in_words()}")
        return text

    def _in_words(self) -> str:
        record = self._record
        text = (
            f"{record['seconds']:.0f} of {self.seconds:.0f} s, update {record['step']}, "
            f"loss {self.loss:.3f}"
        )
        if self._reference is not None:
            there = _at(self._reference, record["seconds"])
            text += f" (reference {there:.3f})" if there is not None else ""
        return f"{text}, {record['tokens'] / record['seconds']:,.0f} tokens/s"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _last_mean(values: Sequence[float]) -> float:
    return _mean(values[-RECENT:])


def _last(seconds: Sequence[float], losses: Sequence[float], span: float) -> float:
    """Mean loss of the last seconds of a curve."""
    end = seconds[-1]
    return _mean([y for x, y in zip(seconds, losses, strict=True) if x >= end - span])


def _at(curve: Mapping[str, Any], second: float) -> float | None:
    """The loss of a curve at a time; None behind its end."""
    points = zip(curve["seconds"], curve["loss"], strict=True)
    return next((float(y) for x, y in points if x >= second), None)
