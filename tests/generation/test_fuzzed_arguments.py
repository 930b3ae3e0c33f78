"""`generate` and `stream` with values of every type: right results, or an error that names the one.

The calls run in a program of their own, without the tests' check of types.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

CALLS = 1200
MEMORY = 300 << 20  # bytes that the peak may grow by


@pytest.mark.parametrize("seed", [1])
def test_no_call_ends_in_a_raw_error(seed: int) -> None:
    command = [sys.executable, "-m", "tests.generation.fuzz_arguments", str(CALLS), str(seed)]
    root = Path(__file__).resolve().parents[2]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    *wrong, last = run.stdout.splitlines()
    summary = json.loads(last)
    assert not wrong, "\n".join(wrong)
    counts = summary["counts"]
    assert sum(counts.values()) == CALLS
    # Both kinds of answers occur often, so that neither passes by never happening.
    assert counts["right"] > CALLS / 4 and counts["refused"] > CALLS / 4
    assert summary["grown"] < MEMORY
