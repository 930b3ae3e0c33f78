"""Kernel tests run in Triton's interpreter, with every fresh buffer full of NaN.

A process either interprets kernels or compiles them, and which one is settled when triton is first
imported: tests/conftest.py sets TRITON_INTERPRET before any test module is. Tests that compile
start a Python of their own with the variable unset (`compiling_environment`).

A kernel that forgets to write an element leaves what was in memory before, which in a fresh
process is often zero and looks right. Here it is NaN, so it looks wrong.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from nemotron_kernels._compat import INTERPRET
from tests.kernels import interpreter

if not INTERPRET:
    raise RuntimeError(
        "Kernel tests run in Triton's interpreter, but triton was imported before TRITON_INTERPRET "
        "was set. Start pytest with TRITON_INTERPRET=1."
    )

interpreter.indices_from_arrays()
interpreter.patch_once_per_launch()

# `torch.device(...)` as a context manager keeps, from its first use in a process, the set of the
# functions that it sends to the device. Used here once, before `torch.empty` is replaced below:
# otherwise that set would name the replacement, and every later model "on the meta device" would
# take real memory, hundreds of GB for Super.
with torch.device("meta"):
    torch.empty(0)


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def fill(*args: Any, **kwargs: Any) -> torch.Tensor:
        fresh = make(*args, **kwargs)
        if fresh.is_floating_point() and not fresh.is_meta:
            return fresh.fill_(float("nan"))
        if fresh.dtype in (torch.int32, torch.int64):
            return fresh.fill_(torch.iinfo(fresh.dtype).max)
        return fresh

    return fill


@pytest.fixture(autouse=True)
def _nan_in_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty and its relatives hand out NaN (integers: their maximum) instead of leftovers."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))
    for name in ("new_empty", "new_empty_strided"):
        monkeypatch.setattr(torch.Tensor, name, _poisoned(getattr(torch.Tensor, name)))


@pytest.fixture
def compiling_environment() -> dict[str, str]:
    """Environment of a subprocess that compiles kernels instead of interpreting them."""
    kernels = Path(__file__).resolve().parents[2] / "kernels"
    path = os.pathsep.join(filter(None, [str(kernels), os.environ.get("PYTHONPATH")]))
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": path}
