"""A task that fails, or whose worker dies, costs the others nothing."""

from __future__ import annotations

import os

from nemotron_lite.coursework.workers import ENDED, run_all


def task(name: str) -> str:
    if name == "raises":
        raise RuntimeError("a bug")
    if name == "dies":
        os._exit(3)
    return name.upper()


def test_results_come_in_order_and_failures_in_their_places() -> None:
    names = ["a", "raises", "b", "dies", "c", "dies", "d"]
    seen: list[int] = []
    found = run_all(
        task, [(n,) for n in names], 2, lambda i, why: f"{i}: {why}", lambda: seen.append(1)
    )
    assert found == ["A", "1: RuntimeError: a bug", "B", f"3: {ENDED}", "C", f"5: {ENDED}", "D"]
    assert len(seen) == len(names)


def test_one_job_runs_here_and_goes_on_after_an_error() -> None:
    names = ["a", "raises", "b"]
    found = run_all(task, [(n,) for n in names], 1, lambda i, why: why)
    assert found == ["A", "RuntimeError: a bug", "B"]
    assert run_all(task, [], 1, lambda i, why: why) == []
