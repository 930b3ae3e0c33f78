"""The ladder of equivalences: one operation in several forms, and how far apart they are.

A rung of the ladder is one form of an operation (a loop, a chunked form, one step at a time, a
kernel). `climb` measures a rung against the definition in float64, on the same rounded inputs:
values and every gradient, each as a relative rms error. The errors are kept, and a test session run
with NEMOTRON_LADDER=write leaves it in `benchmarks/records/equivalence_ladder.json`:

    NEMOTRON_LADDER=write python -m pytest tests/ops/test_ladder.py -p no:xdist

Other tests add their own rungs by calling `climb`, or `keep` with an error measured elsewhere.
"""

from __future__ import annotations

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.record import write_record
from tests.compare import relative_rms, run

# A result this small, from inputs of order one, has decayed to nothing; fast forms may round it to
# zero. It is compared with this size, without a relative error.
DECAYED = 1e-20

_errors: dict[tuple[str, str, str, str, str], list[float]] = defaultdict(list)


def keep(operation: str, rung: str, below: str, dtype: str, quantity: str, error: float) -> None:
    """Remember one measured error.

    Args:
        operation: e.g. "ssd".
        rung, below: the form that was measured, and the one it was compared with.
        dtype: what the upper form computed in.
        quantity: which output or gradient.
        error: relative rms error.
    """
    _errors[operation, rung, below, dtype, quantity].append(error)


def climb(
    operation: str,
    rung: str,
    fast: Callable[..., Sequence[Tensor]],
    inputs: dict[str, Tensor],
    outputs: Sequence[str],
    exact: tuple[list[Tensor], list[Tensor]],
    below: str,
    dtype: torch.dtype,
) -> dict[str, float]:
    """Errors of `fast` by quantity; they are kept for the record as well.

    Args:
        operation, rung, below: see `keep`.
        fast: takes the inputs in order, returns the outputs in order.
        inputs: by name, already rounded to `dtype`; every one gets a gradient.
        outputs: their names.
        exact: `compare.run` of the definition in float64 on the same inputs.
        dtype: what `fast` computes in.
    """
    values, grads = run(fast, list(inputs.values()), dtype)
    names = [*outputs, *(f"d{name}" for name in inputs)]
    found = {}
    for name, a, b in zip(names, values + grads, exact[0] + exact[1], strict=True):
        decayed = b.abs().max() < DECAYED
        found[name] = float(a.abs().max() > DECAYED) if decayed else relative_rms(a, b)
        keep(operation, rung, below, str(dtype).removeprefix("torch."), name, found[name])
    return found


def wants_record() -> bool:
    """Whether this session was asked to write the record."""
    return os.environ.get("NEMOTRON_LADDER") == "write"


def write() -> Path:
    """Write what was kept, one entry per pair of rungs, dtype and quantity.

    Raises:
        RuntimeError: nothing was measured, or the session is one worker of several, which would
            each see a part of the ladder.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        raise RuntimeError(
            "NEMOTRON_LADDER=write needs one pytest process, and this is a worker: leave out -n."
        )
    if not _errors:
        raise RuntimeError(
            "NEMOTRON_LADDER=write, but no rung was measured: run tests/ops/test_ladder.py."
        )
    pairs = [
        {
            "operation": operation,
            "rung": rung,
            "against": below,
            "dtype": dtype,
            "quantity": quantity,
            "relative_rms_error": {
                "n": len(errors),
                "median": statistics.median(errors),
                "min": min(errors),
                "max": max(errors),
            },
        }
        for (operation, rung, below, dtype, quantity), errors in sorted(_errors.items())
    ]
    what = "relative rms error of each form of an operation against the one below it"
    path = "the public functions of nemotron_lite.ops, with each `impl`"
    environment = "NEMOTRON_LADDER=write"
    payload = {"what": what, "path": path, "environment": environment, "pairs": pairs}
    return write_record("equivalence_ladder", payload)
