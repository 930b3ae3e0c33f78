"""Run tasks in worker processes, so that none of them can end the others.

The checks of an exercise seed torch's global generator, so they cannot run in threads. A worker may
die: a learner's process without isolation can kill it, and so can a system without memory. Then
`concurrent.futures` gives up all tasks that are left. Here those that may have been running are
tried once more, each alone, and a task whose worker dies again gets the result that `failed` makes.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

T = TypeVar("T")
ENDED = "the process that graded it ended"


def run_all(
    work: Callable[..., T],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int,
    failed: Callable[[int, str], T],
    progress: Callable[[], Any] = lambda: None,
) -> list[T]:
    """The results of `work(*task)` in the order of the tasks.

    Args:
        work: a function of a module.
        tasks: the arguments of each call.
        jobs: calls at the same time; with 1, they run in this process.
        failed: makes the result of a task, from its number and the reason in words.
        progress: called after each task.
    """
    results: dict[int, T] = {}

    def done(number: int, result: T) -> None:
        results[number] = result
        progress()

    if jobs <= 1:
        for number, task in enumerate(tasks):
            try:
                result = work(*task)
            except Exception as error:
                result = failed(number, f"{type(error).__name__}: {error}")
            done(number, result)
    else:
        waiting = list(range(len(tasks)))
        while waiting:
            left = _in_pool(work, tasks, waiting, jobs, failed, done)
            # A pool hands out tasks in order, and one more than it has workers.
            for number in left[: jobs + 1]:
                if _in_pool(work, tasks, [number], 1, failed, done):
                    done(number, failed(number, ENDED))
            waiting = left[jobs + 1 :]
    return [results[number] for number in range(len(tasks))]


def _in_pool(
    work: Callable[..., T],
    tasks: Sequence[tuple[Any, ...]],
    numbers: Sequence[int],
    jobs: int,
    failed: Callable[[int, str], T],
    done: Callable[[int, T], None],
) -> list[int]:
    """Run these tasks in one pool; returns those that are left because a worker died."""
    left: list[int] = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        running: dict[Future[T], int] = {}
        for number in numbers:
            try:
                running[pool.submit(work, *tasks[number])] = number
            except BrokenProcessPool:
                left.append(number)
        for future in as_completed(running):
            try:
                result = future.result()
            except BrokenProcessPool:
                left.append(running[future])
                continue
            except Exception as error:
                result = failed(running[future], f"{type(error).__name__}: {error}")
            done(running[future], result)
    return sorted(left)
