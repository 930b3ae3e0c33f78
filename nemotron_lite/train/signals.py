"""Stopping a run by a signal: the update is finished, the run is saved, and `train` returns.

    SIGINT    Ctrl-C
    SIGTERM   `kill`, a scheduler's time limit, a shutdown
    SIGHUP    the terminal was closed, or the connection to it was lost

A second SIGINT or SIGTERM acts as usual, so that a run that hangs can be stopped. A second SIGHUP
does not: when a terminal is closed, the kernel and the shell both send one, and the second would
end the process while it saves. A process that ignores SIGHUP (`nohup`) goes on ignoring it.
"""

from __future__ import annotations

import signal
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any


class StopOnSignal(AbstractContextManager["StopOnSignal"]):
    """Sets `requested` on the first signal.

    Python delivers signals to the main thread only, so in other threads this changes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                ignored = signal.getsignal(number) is signal.SIG_IGN
                if not (number is signal.SIGHUP and ignored):
                    self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore(*self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore(signal.SIGINT, signal.SIGTERM)

    def _restore(self, *numbers: signal.Signals) -> None:
        for number in numbers:
            if number in self._previous:
                before = self._previous.pop(number)
                signal.signal(number, signal.SIG_DFL if before is None else before)
