"""Time and memory, measured so that two programs can be compared on a machine that others use too.

Times. The programs run alternately, and the order changes each round (A B, B A, ...), so that a
slow minute of the machine affects both. The record has the median and the spread. The ratio is
computed for each round, between measurements next to each other in time, and has its own median and
spread.

Memory. The operating system keeps the peak of a process, so each measurement has its own process.
It builds the model, resets the peak (`/proc/self/clear_refs`), does the work and reports how far
the peak is above the model. Linux only; elsewhere `peak_above` returns None.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class Timed(float):
    """Seconds that a call has measured itself, because it does more than what is compared.

    `alternate` takes them in place of the time of the whole call.
    """


def summary(values: Sequence[float]) -> dict[str, float]:
    """n, median, min and max of some measurements.

    Raises:
        ValueError: nothing was measured.
    """
    if not values:
        raise ValueError("no measurements to summarize: run at least one round.")
    return {
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def alternate(
    calls: Mapping[str, Callable[[], object]], rounds: int, *, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call, `rounds` of each; they alternate, in another order each round.

    A call that returns `Timed` is counted with these seconds.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected at least 1.")
    names = list(calls)
    for _ in range(warmup):
        for name in names:
            calls[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            gc.collect()
            start = time.perf_counter()
            found = calls[name]()
            taken = time.perf_counter() - start
            seconds[name].append(float(found) if isinstance(found, Timed) else taken)
    return seconds


def compare(
    what: str,
    seconds: Mapping[str, Sequence[float]],
    *,
    tokens: int,
    aim: float | None = None,
    over: str = "peer",
    **labels: object,
) -> dict[str, Any]:
    """One entry of a record: "ours" against `over`, in seconds, tokens per second and as a ratio.

    Args:
        what: what was done, e.g. "prefill".
        seconds: lists of the same length, from `alternate`.
        tokens: tokens that one call reads or generates, all rows together.
        aim: the ratio that is required.
        labels: sizes that distinguish this entry from others.
    """
    ratios = [b / a for a, b in zip(seconds["ours"], seconds[over], strict=True)]
    entry: dict[str, Any] = {"what": what, **labels, "seconds": {}, "tokens_per_second": {}}
    for name, values in seconds.items():
        entry["seconds"][name] = summary(values)
        entry["tokens_per_second"][name] = tokens / statistics.median(values)
    entry["times_faster"] = summary(ratios)
    if aim is not None:
        entry["aim"] = aim
        entry["reached"] = entry["times_faster"]["median"] >= aim
    return entry


def compare_each(
    what: str,
    seconds: Mapping[str, Sequence[float]],
    *,
    tokens: int,
    aims: Mapping[str, float | None] | None = None,
    **labels: object,
) -> dict[str, Any]:
    """One entry of a record with several peers: "ours" against each of the others.

    The same as `compare`, but `times_faster`, `aim` and `reached` are dictionaries by peer.

    Args:
        what: what was done.
        seconds: lists of the same length, from `alternate`.
        tokens: tokens that one call reads or generates, all rows together.
        aims: the required ratio for each peer that has one.
        labels: sizes that distinguish this entry from others.
    """
    entry: dict[str, Any] = {"what": what, **labels, "seconds": {}, "tokens_per_second": {}}
    for name, values in seconds.items():
        entry["seconds"][name] = summary(values)
        entry["tokens_per_second"][name] = tokens / statistics.median(values)
    entry["times_faster"] = {
        name: summary([b / a for a, b in zip(seconds["ours"], values, strict=True)])
        for name, values in seconds.items()
        if name != "ours"
    }
    wanted = {name: aim for name, aim in (aims or {}).items() if aim and name in seconds}
    if wanted:
        entry["aim"] = wanted
        entry["reached"] = {
            name: entry["times_faster"][name]["median"] >= aim for name, aim in wanted.items()
        }
    return entry


def describe(entry: Mapping[str, Any]) -> str:
    """One line of progress: what was measured, and the result."""
    speeds = entry.get("tokens_per_second", {})
    parts = [f"{name} {speed:,.0f} tokens/s" for name, speed in speeds.items()]
    if "times_faster" in entry:
        faster = entry["times_faster"]
        single = "median" in faster
        for name, ratio in {"": faster}.items() if single else faster.items():
            spread = f"({ratio['min']:.2f}-{ratio['max']:.2f})"
            over = "" if single else f" than {name}"
            parts.append(f"{ratio['median']:.2f} times faster{over} {spread}")
    parts += [f"{k} {_plain(v)}" for k, v in entry.items() if k not in _SHOWN]
    return f"{entry['what']}: " + ", ".join(parts)


_SHOWN = {"what", "path", "seconds", "tokens_per_second", "times_faster"}


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return " / ".join(f"{name} {_plain(item)}" for name, item in value.items())
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def peak_above(prepare: Callable[[], Callable[[], object]]) -> int | None:
    """Bytes by which resident memory rises above what `prepare` leaves, while its result runs.

    Call this in a separate process. None where the system has no peak that can be reset.
    """
    work = prepare()
    gc.collect()
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        return None
    peak.write_text("5")
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}: memory cannot be measured here.")


def in_own_process(module: str, *arguments: str) -> Any:
    """What `python -m module arguments` prints as JSON on its last line.

    Raises:
        RuntimeError: the process failed; the message has the end of its error output.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env={**os.environ},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])
