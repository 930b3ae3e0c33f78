"""Interrupt code of the grader that takes too long with what a learner wrote.

A parser of HTML or Markdown needs hours for texts that somebody made for that. A signal interrupts
it. Signals reach the main thread only: elsewhere the limit does not hold.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OverTimeError(BaseException):
    """The time is over; no Exception, so that a library's `except` lets it through."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OverTimeError in the block after so many seconds, and again until the block is left.

    Once is not enough: Python drops an exception that is raised in a destructor or in a callback of
    the garbage collector, and a bare `except` takes it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    inside = True

    def ring(number: int, frame: FrameType | None) -> None:
        if inside:
            raise OverTimeError(f"it took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
