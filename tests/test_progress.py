"""Progress: a bar on a terminal, few whole lines elsewhere, and silence once nobody can read it."""

from __future__ import annotations

import io
import os
import pty
import re
import sys
import time

import pytest

from nemotron_lite import progress
from nemotron_lite.progress import Progress, duration, is_terminal


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test turns: its first entry is the time."""
    now = [0.0]
    monkeypatch.setattr(progress, "_clock", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(clock: list[float], updates: int, seconds: float) -> list[str]:
    """The lines of a computation of `updates` equal steps that takes `seconds`."""
    file = io.StringIO()
    with Progress("work", updates, file=file) as bar:
        for i in range(1, updates + 1):
            clock[0] += seconds / updates
            bar.update(i, f"step {i}")
    assert "\r" not in file.getvalue()
    assert file.getvalue().endswith("\n")
    return file.getvalue().splitlines()


@pytest.mark.parametrize(
    ("seconds", "fewest", "most"),
    [(1, 1, 1), (8, 1, 1), (60, 4, 7), (200, 8, 11), (3600, 90, 122)],
)
def test_lines_in_a_file_are_few_and_regular(
    clock: list[float], seconds: float, fewest: int, most: int
) -> None:
    for updates in (7, 1000, 20_000):
        if seconds / updates > progress.LONGEST:
            continue
        clock[0] = 0.0
        lines = report(clock, updates, seconds)
        assert fewest <= len(lines) <= most, lines
        assert lines[-1].startswith("work: 100%, ") and lines[-1].endswith(f"step {updates}")


def test_a_line_has_share_time_rest_and_note(clock: list[float]) -> None:
    file = io.StringIO()
    bar = Progress("training", 100, file=file)
    clock[0] = 12.0
    bar.update(40.0, "loss 3.2")
    assert file.getvalue() == "training: 40%, 12 s, about 18 s left, loss 3.2\n"
    clock[0] = 13.0
    bar.close()
    bar.close()
    assert file.getvalue().splitlines()[1:] == ["training: 40%, 13 s, loss 3.2"], "it ended early"


def test_a_bar_on_a_terminal_and_lines_on_a_dumb_one(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with Progress("work", 10, file=file) as bar:
        for i in range(11):
            clock[0] += 1
            bar.update(i, f"step {i}")
    assert file.getvalue().count("\r") > 5
    assert "100%" in file.getvalue() and "step 10" in file.getvalue()
    monkeypatch.setenv("TERM", "dumb")
    file = Terminal()
    with Progress("work", 10, file=file) as bar:
        bar.update(5)
    assert file.getvalue() == "work: 50%, 0.0 s\n"


def test_updates_of_a_bar_that_follow_quickly_are_not_drawn(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    with Progress("work", 100_000, file=file) as bar:
        before = len(file.getvalue())
        for i in range(100_000):
            bar.update(i)
        assert len(file.getvalue()) == before


@pytest.mark.parametrize("columns", ["1", "0", "10", "many"])
def test_any_width_of_a_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("work", 3, file=Terminal()) as bar:
        bar.update(1, "a long note about the loss")


def test_a_reader_that_has_gone_does_not_end_the_work(clock: list[float]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w", buffering=1) as pipe:
        with Progress("work", 10, file=pipe) as bar:
            for i in range(11):
                clock[0] += 100
                bar.update(i)
        with pytest.raises(BrokenPipeError):
            pipe.write("the pipe was really broken\n")
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)


def test_a_terminal_that_was_closed_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(progress, "_REDRAW", 0.0)
    master, slave = pty.openpty()
    terminal = os.fdopen(slave, "w", buffering=1)
    with Progress("work", 10, file=terminal) as bar:
        bar.update(1)
        os.close(master)
        for i in range(11):
            bar.update(i)
    os.dup2(os.open(os.devnull, os.O_WRONLY), slave)
    terminal.close()


def test_no_stderr_and_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with Progress("work", 10) as bar:
        bar.update(10)
    file = io.StringIO()
    with Progress("work", 10, file=file, enabled=False) as bar:
        bar.update(10)
    assert file.getvalue() == ""
    file.close()
    assert not is_terminal(file) and not is_terminal(None)
    with Progress("work", 10, file=file) as bar:
        bar.update(10)


def test_durations() -> None:
    shown = [duration(s) for s in (0.44, 9.94, 9.96, 59.4, 59.6, 185, 3599.9, 7620)]
    assert shown == [
        "0.4 s", "9.9 s", "10 s", "59 s", "1 min 00 s", "3 min 05 s", "1 h 00 min", "2 h 07 min",
    ]  # fmt: skip


def test_work_of_unknown_length_writes_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LONGEST", 0.02)
    file = io.StringIO()
    with progress.still_working("scoring", file):
        while file.getvalue().count("\n") < 2:
            time.sleep(0.005)
    lines = file.getvalue().splitlines()
    assert all(re.fullmatch(r"scoring: \d\.\d s so far", line) for line in lines)
    time.sleep(0.1)
    assert file.getvalue().splitlines() == lines, "the end ends it"
    file.close()
    with progress.still_working("scoring", file):  # nobody reads it: no error
        time.sleep(0.05)
