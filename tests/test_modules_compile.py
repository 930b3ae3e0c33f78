"""`torch.compile` and `torch.export`; the cases are in `compile_cases.py`, which says why."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import compile_cases

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def results(*names: str) -> dict[str, str | None]:
    """The traceback of each case, or None; all in one process."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.compile_cases", *names],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


TRACED = [name for name in compile_cases.CASES if name not in compile_cases.DEFAULT_MODE]


@pytest.mark.parametrize("name", TRACED)
def test_tracing(name: str) -> None:
    error = results(*TRACED)[name]
    assert error is None, error


@pytest.mark.skipif(shutil.which("g++") is None, reason="TorchInductor needs a C++ compiler")
@pytest.mark.parametrize("name", compile_cases.DEFAULT_MODE)
def test_the_default_mode(name: str) -> None:
    error = results(*compile_cases.DEFAULT_MODE)[name]
    assert error is None, error
