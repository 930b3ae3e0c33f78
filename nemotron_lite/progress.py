"""Progress of a long computation: a bar on a terminal or in a notebook, lines in a file or a pipe.

A bar draws itself again and again on one line, with carriage returns. In the log file of a batch
job this is one line of many megabytes. So a file and a pipe get whole lines, and few of them: after
each tenth of the work, but at least 10 seconds apart; where a tenth takes longer, every 30 seconds;
and one at the end.

    with Progress("training", total=100) as progress:
        progress.update(40.0, "step 12, loss 3.21")

    training:  40%|████      | 00:12 step 12, loss 3.21           on a terminal
    training: 40%, 12 s, about 18 s left, step 12, loss 3.21      in a file

The report goes to stderr, so that it never mixes with a result. If stderr cannot be written any
more (the reader of the pipe has gone, the terminal was closed), the rest is dropped: a training run
does not end because nobody looks at its bar.

Left out: nested bars. The chapters have a display of their own (`course/display.py`).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

SHORTEST, LONGEST = 10.0, 30.0  # seconds between two lines in a file
_REDRAW = 0.1  # seconds between two pictures of a bar
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed} {postfix}"

_clock = time.monotonic


@runtime_checkable
class Stream(Protocol):
    """What a report is written to: a text file, or what a test or a notebook puts in its place."""

    def write(self, text: str, /) -> Any:
        """Take some text."""

    def flush(self) -> Any:
        """Hand on what was written."""

    def isatty(self) -> bool:
        """Whether a person reads it on a terminal."""


class Progress(AbstractContextManager["Progress"]):
    """Reports how much of a computation is done.

    Args:
        label: what is computed.
        total: the value of `done` at the end, above 0.
        enabled: False reports nothing.
        file: where the report goes; stderr by default.
    """

    def __init__(
        self,
        label: str,
        total: int | float,
        *,
        enabled: bool = True,
        file: Stream | None = None,
    ) -> None:
        self.label, self.total, self.done, self.note = label, total, 0.0, ""
        stream: Stream | None = sys.stderr if file is None else file  # None: stderr is closed
        self._report: _Bar | _Lines | None = None
        if not enabled or stream is None:
            return
        if in_notebook() and file is None:
            self._report = _Bar(label, total, None)
        elif is_terminal(stream):
            self._report = _Bar(label, total, stream)
        else:
            self._report = _Lines(label, stream)

    def update(self, done: int | float, note: str = "") -> None:
        """Report that `done` of the total is done.

        Args:
            done: from 0 to the total; not the increase since the last call.
            note: shown behind it, such as the current loss.
        """
        self.done, self.note = float(done), note
        self._show(last=False)

    def close(self) -> None:
        """Report the last state and end the line. Later calls do nothing."""
        self._show(last=True)
        self._report = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def _show(self, *, last: bool) -> None:
        if self._report is None:
            return
        try:
            self._report.show(self.done, self.done / self.total, self.note, last=last)
        except (OSError, ValueError):  # ValueError: the stream is closed
            self._report = None


class _Bar:
    """A bar of tqdm; its own timer decides when it is drawn."""

    def __init__(self, label: str, total: int | float, stream: Stream | None) -> None:
        from tqdm.auto import tqdm

        where = {} if stream is None else {"file": stream}
        self._bar: Any = tqdm(total=total, desc=label, bar_format=_BAR, dynamic_ncols=True, **where)
        self._drawn = _clock()

    def show(self, done: float, share: float, note: str, *, last: bool) -> None:
        self._bar.n = round(done, 1)
        self._bar.set_postfix_str(note, refresh=False)
        if last:
            self._bar.refresh()
            self._bar.close()
        elif _clock() - self._drawn >= _REDRAW:
            self._bar.refresh()
            self._drawn = _clock()


class _Lines:
    """Whole lines, few of them."""

    def __init__(self, label: str, stream: Stream) -> None:
        self._label, self._stream = label, stream
        self._started = self._written = _clock()
        self._tenths = 0

    def show(self, done: float, share: float, note: str, *, last: bool) -> None:
        now, tenths = _clock(), int(10 * share)
        wait = SHORTEST if tenths > self._tenths else LONGEST
        if not last and now - self._written < wait:
            return
        self._written, self._tenths = now, tenths
        passed = now - self._started
        parts = [f"{min(share, 1.0):.0%}", duration(passed)]
        if 0 < share < 1 and not last:
            parts.append(f"about {duration(passed / share * (1 - share))} left")
        if note:
            parts.append(note)
        self._stream.write(f"{self._label}: {', '.join(parts)}\n")
        self._stream.flush()


@contextmanager
def still_working(label: str, file: Stream | None = None) -> Iterator[None]:
    """Write a line every 30 seconds while the block runs, where nobody can say how far it is.

    Args:
        label: what is done.
        file: where the lines go; stderr by default.
    """
    end, begun = threading.Event(), _clock()
    stream: Stream | None = sys.stderr if file is None else file

    def write() -> None:
        while stream is not None and not end.wait(LONGEST):
            try:
                stream.write(f"{label}: {duration(_clock() - begun)} so far\n")
                stream.flush()
            except (OSError, ValueError):  # nobody reads it any more
                return

    thread = threading.Thread(target=write, name="still-working", daemon=True)
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def is_terminal(stream: Stream | None) -> bool:
    """Whether a stream is a terminal that can draw over a line; `TERM=dumb` is one that cannot."""
    try:
        return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
    except ValueError:  # a closed file
        return False


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    return get_ipython is not None and hasattr(get_ipython(), "kernel")


def duration(seconds: int | float) -> str:
    """`0.4 s`, `12 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
