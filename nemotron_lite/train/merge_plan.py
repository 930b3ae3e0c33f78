"""Which checkpoints of a run a merge takes: those of the stable phase, if nothing else is said.

A merge imitates a decay that begins at a constant rate (merging.py). Weights of a warm-up are
hardly trained, and weights of a decay have decayed already. The equation gives the oldest ones the
largest shares all the same. The log of the run has the rate of each update, so the stable phase is
read from there: the most updates in a row that had the same rate.

    update        1 ... 99     100 ... 1200     1201 ... 2000
    rate          rises        the peak         falls
    merged                     the snapshots from 100 to 1200

The snapshot after update s has taken part in the updates up to s. So in a merge from 100 to 1200
the updates 101 to 1200 count.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from nemotron_lite.arguments import integer
from nemotron_lite.input_files import FileError
from nemotron_lite.train.checkpointing import step_of
from nemotron_lite.train.merging import checkpoints_of, merge_weights, steps_inside
from nemotron_lite.train.run_log import read_log


class MergePlan(NamedTuple):
    """What a merge takes.

    Attributes:
        steps: number of updates before each checkpoint, increasing.
        shares: weight of each of them.
        rates: learning rate of the update before each; None if the log has none, and at step 0.
        warning: why the equation does not hold for this window, or an empty text.
    """

    steps: list[int]
    shares: tuple[float, ...]
    rates: list[float | None]
    warning: str


def plan_merge(
    run: str | Path, *, window: int | None = None, until: int | None = None
) -> MergePlan:
    """The checkpoints of a merge, from the log of the run.

    Args:
        run: folder of the run.
        window: updates that the merge goes back; if None, as far as the rate was the same.
        until: number of updates of the last checkpoint; if None, that of the stable phase.

    Raises:
        FileNotFoundError: there are no checkpoints.
        ValueError: no checkpoint where the window begins or ends; or no window is given, and the
            log has no two checkpoints with a constant rate between them.
    """
    at = [step_of(path) for path in checkpoints_of(Path(run))]
    log = _Rates(Path(run))
    stable = log.longest_constant(at, until)
    if until is not None and until not in at:
        steps_inside(at, 0, until)  # raises
    if window is None and stable is None:
        raise ValueError(
            f"the log of {run} has no two checkpoints with a constant learning rate between them"
            f"{'' if until is None else f', the second after {until:,} updates'}: say how many "
            "updates the merge goes back (--window)."
        )
    last = until if until is not None else stable[1] if stable is not None else at[-1]
    if window is None and stable is not None:
        window = last - stable[0]
    steps = steps_inside(at, integer("window", window, low=0), last)
    return MergePlan(
        steps,
        merge_weights(steps),
        [log.of(step) for step in steps],
        log.warning(steps[0], last, log.longest_constant(at)),
    )


class _Rates:
    """The learning rate of each update that the log of a run has."""

    def __init__(self, run: Path) -> None:
        rates: dict[int, float] = {}
        with suppress(FileNotFoundError, FileError):
            for record in read_log(run):
                if isinstance(record.get("lr"), int | float):
                    rates[record["step"]] = float(record["lr"])
        self._steps, self._rates = [*rates], [*rates.values()]

    def of(self, step: int) -> float | None:
        found = self._between(step - 1, step)
        return found[0] if found else None

    def _between(self, first: int, last: int) -> list[float]:
        """The rates of the updates after `first`, up to `last`."""
        return self._rates[bisect_right(self._steps, first) : bisect_right(self._steps, last)]

    def _constant(self, first: int, last: int) -> float | None:
        """The rate of all updates after `first`, up to `last`; None if there is no such rate."""
        rates = self._between(first, last)
        return rates[0] if len(rates) == last - first and len({*rates}) == 1 else None

    def longest_constant(
        self, at: Sequence[int], until: int | None = None
    ) -> tuple[int, int] | None:
        """The first and the last of the checkpoints `at` with the most such updates between them.

        Args:
            at: numbers of updates, increasing.
            until: the last checkpoint; any if None.
        """
        best: tuple[int, int] | None = None
        begin, rate = None, None
        for before, after in pairwise(at):
            found = self._constant(before, after)
            if found is None:
                begin, rate = None, None
                continue
            if begin is None or found != rate:
                begin, rate = before, found
            wanted = until is None or after == until
            if wanted and (best is None or after - begin >= best[1] - best[0]):
                best = begin, after
        return best

    def warning(self, first: int, last: int, stable: tuple[int, int] | None) -> str:
        if first == last or self._constant(first, last) is not None:
            return ""
        rates = self._between(first, last)
        if len(rates) < last - first:
            what = f"log.jsonl does not have the learning rates of all updates from {first + 1:,}"
            return f"{what} to {last:,}. A merge is meant for a constant rate."
        text = (
            f"the learning rate was not constant in the updates {first + 1:,} to {last:,}: it was "
            f"{min(rates):.2e} to {max(rates):.2e}. A merge imitates a decay from a constant rate, "
            "so it is not meant for a warm-up or a decay."
        )
        if stable is not None:
            text += (
                f" The stable phase of this run has the checkpoints {stable[0]:,} to {stable[1]:,}."
            )
        return text
