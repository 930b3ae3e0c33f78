"""Threads that wait give their core back as soon as another program needs it.

torch's products run on several threads of GNU OpenMP. Between two products the threads wait for
the next one in a loop ("they spin"), because that is the fastest way to notice it. Where another
program uses a core too, a spinning thread takes time from a thread that has work, and all others
wait for that one: training becomes many times slower.

The environment variable GOMP_SPINCOUNT says how long a thread spins before it sleeps. But it is
read once, when torch is imported, and threads that sleep early make a machine slower that nobody
else uses. `watching` decides while the program runs:

    the machine is ours      threads spin, as always
    others need a core       threads sleep at once when they have nothing to do

**How it notices.** Linux counts for every thread how long it was ready to run and had no core
(`/proc/self/task/*/schedstat`). A thread of ours reads the counts a few times a second. It costs
about a thousandth of a core.

**How it acts.** GNU OpenMP itself has the rule that is needed: if a process has more OpenMP
threads than cores, waiting threads hardly spin. So we start a second team of threads. It does
nothing; it is there to be counted. When it ends, threads spin again. The number of threads that
compute stays the same, and so do all results, bit for bit.

Nothing is done where the user has set GOMP_SPINCOUNT or OMP_WAIT_POLICY, where torch uses one
thread or another OpenMP, and where the system does not count (macOS, Windows).

Source: libgomp's `wait.h` (`gomp_throttled_spin_count_var`) and `team.c` (`gomp_managed_threads`).
Left out: more threads than two teams; a process that is forked starts without a watch.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

TASKS = Path("/proc/self/task")
SET_BY_USERS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
FIRST, PERIOD = 0.05, 0.25  # seconds before the first look, and between two
BUSY = 0.2  # of one core that our threads lack; above it they shall sleep
QUIET = 0.05  # below it they may spin
PATIENCE = 1.0, 30.0  # seconds that they sleep at least; doubled each time it was too short
PARALLEL = 1 << 17  # numbers that torch adds on all threads


class _Team:
    """OpenMP threads of a Python thread of their own, which do nothing."""

    def __init__(self) -> None:
        self._end, begun = threading.Event(), threading.Event()

        def hold() -> None:
            import torch

            try:
                torch.ones(PARALLEL).add_(1)  # starts the threads
            finally:
                begun.set()
            self._end.wait()

        self._thread = threading.Thread(target=hold, name="openmp-team", daemon=True)
        self._thread.start()
        begun.wait()

    def end(self) -> None:
        """End the threads; they are counted no longer."""
        self._end.set()
        self._thread.join()


class _Watch:
    """A thread that looks at the machine and starts or ends the second team."""

    def __init__(self) -> None:
        self.users = 0
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._end = threading.Event()
        self._busy_at = -PATIENCE[1]  # when others last needed a core

    def enter(self) -> None:
        """Look from now on."""
        with self._lock:
            self.users += 1
            if self.users == 1:
                self._end = threading.Event()
                self._thread = threading.Thread(
                    target=self._run, args=(self._end,), name="openmp-watch", daemon=True
                )
                try:
                    self._thread.start()
                except RuntimeError:  # the system allows no more threads: nothing is watched
                    self._thread = None

    def leave(self) -> None:
        """Stop when the last user leaves."""
        with self._lock:
            self.users -= 1
            if self.users == 0 and self._thread is not None:
                self._end.set()
                self._thread = None

    def _run(self, end: threading.Event) -> None:
        shortest, longest = PATIENCE
        patience, team, until = shortest, None, 0.0
        if time.monotonic() - self._busy_at < shortest:  # calls that follow each other
            team, until = _Team(), time.monotonic() + patience
        at, before, pause = time.monotonic(), missing_time(), FIRST
        try:
            while not end.wait(pause):
                now, delay, pause = time.monotonic(), missing_time(), PERIOD
                rate, at, before = (delay - before) / (now - at), now, delay
                if rate > BUSY:
                    self._busy_at = now
                    if team is None:
                        patience = min(2 * patience, longest) if now < until + 10 else shortest
                        team, until = _Team(), now + patience
                elif rate < QUIET and team is not None and now > until:
                    team.end()
                    team = None
        finally:
            if team is not None:
                team.end()


_watch = _Watch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: globals().update(_watch=_Watch()))


@contextmanager
def watching() -> Iterator[None]:
    """While the block runs, threads that wait sleep if other programs need their core.

    Several blocks may be open at the same time, in any threads.
    """
    if not _can_watch():
        yield
        return
    mine = _watch
    mine.enter()
    try:
        yield
    finally:
        mine.leave()


def watch_until_exit() -> None:
    """The same for the rest of the process, as in a notebook."""
    if _can_watch() and not _forever:
        _forever.append(True)
        _watch.enter()


_forever: list[bool] = []


def missing_time() -> float:
    """Seconds that threads of this process were ready to run and had no core, all together."""
    total = 0
    for name in os.listdir(TASKS):
        try:
            total += int((TASKS / name / "schedstat").read_bytes().split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended
            continue
    return total / 1e9


def _can_watch() -> bool:
    """Whether there is something to decide. It imports torch."""
    import torch

    return (
        torch.get_num_threads() > 1
        and not any(name in os.environ for name in SET_BY_USERS)
        and _has_gnu_openmp()
        and (TASKS / str(threading.get_native_id()) / "schedstat").is_file()
    )


@lru_cache
def _has_gnu_openmp() -> bool:
    """Whether the process has loaded libgomp."""
    maps = Path("/proc/self/maps")
    return maps.is_file() and "libgomp" in maps.read_text(errors="replace")
