"""Threads that wait: when a second team is started and ended, and what it does to waiting threads.

What Linux counts is replaced by a script for the decisions. The effect is measured as CPU time in a
process of its own: spinning threads use it while they wait, and other programs change it little.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nemotron_lite import openmp

ROOT = Path(__file__).resolve().parents[1]
NEEDS_LINUX = pytest.mark.skipif(
    not openmp.TASKS.is_dir() or not openmp._has_gnu_openmp() or (os.cpu_count() or 1) < 2,
    reason="needs Linux, GNU OpenMP and two cores",
)


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def wait_until(question: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not question():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """A machine on which our threads lack `rate` cores; looks follow quickly."""
    state = {"rate": 0.0, "missing": 0.0, "at": time.monotonic()}

    def missing_time() -> float:
        now = time.monotonic()
        state["missing"] += state["rate"] * (now - state["at"])
        state["at"] = now
        return state["missing"]

    monkeypatch.setattr(openmp, "missing_time", missing_time)
    monkeypatch.setattr(openmp, "_can_watch", lambda: True)
    monkeypatch.setattr(openmp, "FIRST", 0.01)
    monkeypatch.setattr(openmp, "PERIOD", 0.01)
    monkeypatch.setattr(openmp, "PATIENCE", (0.05, 0.2))
    monkeypatch.setattr(openmp, "_watch", openmp._Watch())
    monkeypatch.setattr(openmp, "_forever", [])
    return state


class Looks:
    """A clock that only a look at the machine moves on."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        self.now += openmp.PERIOD
        return self.now


def test_a_second_team_is_there_while_others_need_a_core(machine: dict[str, float]) -> None:
    with openmp.watching():
        time.sleep(0.05)
        assert "openmp-watch" in names() and "openmp-team" not in names()
        machine["rate"] = 0.5
        wait_until(lambda: "openmp-team" in names())
        time.sleep(0.3)
        assert names().count("openmp-team") == 1, "it stays, and there is one"
        machine["rate"] = 0.1  # between the limits nothing changes
        time.sleep(0.3)
        assert "openmp-team" in names()
        machine["rate"] = 0.0
        wait_until(lambda: "openmp-team" not in names())
        machine["rate"] = 0.5
        wait_until(lambda: "openmp-team" in names())
    wait_until(lambda: "openmp-team" not in names() and "openmp-watch" not in names())


def test_it_stays_longer_each_time_that_it_was_ended_too_early(
    machine: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time is counted in looks: how long the test itself waits for a core does not matter."""
    looks, stays = Looks(), []

    class Timed(openmp._Team):
        def __init__(self) -> None:
            self.begun = looks.now
            super().__init__()

        def end(self) -> None:
            stays.append(looks.now - self.begun)
            super().end()

    def missing_time() -> float:
        machine["missing"] += machine["rate"] * openmp.PERIOD  # since the look before
        return machine["missing"]

    monkeypatch.setattr(openmp, "missing_time", missing_time)
    monkeypatch.setattr(openmp, "time", looks)
    monkeypatch.setattr(openmp, "_Team", Timed)
    with openmp.watching():
        for number in range(4):
            machine["rate"] = 1.0
            wait_until(lambda: "openmp-team" in names())
            machine["rate"] = 0.0
            wait_until(lambda number=number: len(stays) > number and "openmp-team" not in names())
    assert stays[0] > 0.04 and stays[1] > 0.09 and min(stays[2:]) > 0.19


def test_a_call_that_follows_a_busy_one_begins_with_it(
    machine: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openmp, "PATIENCE", (5.0, 5.0))
    machine["rate"] = 1.0
    with openmp.watching():
        wait_until(lambda: "openmp-team" in names())
    wait_until(lambda: "openmp-team" not in names())
    monkeypatch.setattr(openmp, "FIRST", 100.0)  # nobody looks
    with openmp.watching():
        wait_until(lambda: "openmp-team" in names())


def test_blocks_may_be_nested_and_in_many_threads(machine: dict[str, float]) -> None:
    def use() -> None:
        for _ in range(20):
            with openmp.watching(), openmp.watching():
                assert names().count("openmp-watch") >= 1

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert openmp._watch.users == 0
    wait_until(lambda: "openmp-watch" not in names())
    with pytest.raises(KeyError), openmp.watching():
        raise KeyError
    assert openmp._watch.users == 0


def test_where_no_thread_can_be_started_nothing_is_watched(
    machine: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with openmp.watching():
            assert "openmp-watch" not in names()
    assert openmp._watch.users == 0
    with openmp.watching():
        assert "openmp-watch" in names()


def test_for_a_notebook_it_begins_once_and_stays(machine: dict[str, float]) -> None:
    openmp.watch_until_exit()
    openmp.watch_until_exit()
    assert openmp._watch.users == 1
    with openmp.watching():
        pass
    assert "openmp-watch" in names()
    openmp._watch.leave()


@NEEDS_LINUX
@pytest.mark.parametrize("name", [None, *openmp.SET_BY_USERS])
def test_it_is_left_to_users_who_have_set_it(
    monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    threads = torch.get_num_threads()
    for variable in openmp.SET_BY_USERS:
        monkeypatch.delenv(variable, raising=False)
    if name:
        monkeypatch.setenv(name, "PASSIVE" if "POLICY" in name else "7")
    try:
        torch.set_num_threads(2)
        assert openmp._can_watch() == (name is None)
        torch.set_num_threads(1)
        assert not openmp._can_watch(), "one thread waits for nobody"
    finally:
        torch.set_num_threads(threads)


PROGRAM = """
import json, os, sys, threading, time, torch
from nemotron_lite import openmp
torch.set_num_threads(2)

def waiting(seconds=None):
    "CPU seconds of 100 short sums with pauses in between, in which the other thread waits."
    x, begun = torch.ones(1 << 16), time.process_time()
    for _ in range(100):
        x.add_(1)
        time.sleep(0.003)
    return time.process_time() - begun

def children_watch():
    child = os.fork()
    if child == 0:
        with openmp.watching():
            os._exit(10 + openmp._watch.users)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) - 10

waiting()
times = [waiting()]
team = openmp._Team()
times.append(waiting())
team.end()
times.append(waiting())
print(json.dumps(times), flush=True)

before = openmp.missing_time()
seen = False
with openmp.watching():
    end = time.monotonic() + 60
    while not seen and time.monotonic() < end:
        torch.ones(1 << 20).add_(1)
        seen = "openmp-team" in [t.name for t in threading.enumerate()]
    users = children_watch()
print(json.dumps([seen, openmp.missing_time() - before, users]), flush=True)
"""


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Processes that keep so many cores busy."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@NEEDS_LINUX
@pytest.mark.timing
def test_with_a_second_team_waiting_threads_sleep_and_a_busy_machine_is_noticed() -> None:
    unset = (*openmp.SET_BY_USERS, "OMP_NUM_THREADS")
    environment = {k: v for k, v in os.environ.items() if k not in unset}
    with neighbours(os.cpu_count() or 2):
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM], env=environment, cwd=ROOT, capture_output=True,
            text=True, timeout=180,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (before, held, after), (seen, missing, users) = map(json.loads, run.stdout.splitlines())
    assert held < 0.5 * min(before, after), "threads that wait use half the CPU time or less"
    assert seen and missing > 0
    assert users == 1, "a forked process begins anew"
