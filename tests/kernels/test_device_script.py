"""The judge of the device run: it passes what is right and fails what is not.

On small cases, on the CPU, with kernels in the interpreter. What only a GPU can show, its times, is
left to a GPU.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nemotron_kernels import rms_norm, selective_state_update
from nemotron_lite import ops

SCRIPTS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("device")
    monkeypatch.setattr(script, "DEVICE", "cpu")
    # The tests' own poison stands in for torch's, which would have to undo its warnings.
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *args, **kwargs: None)
    return script


def _case(**fields: Any) -> Any:
    return importlib.import_module("registry").Case(**fields)


def _norm(backward: bool):
    return _case(
        op="rms_norm", name="backward" if backward else "forward", shape="small",
        inputs=lambda draw: {
            "x": draw.normal(5, 24, dtype=torch.float16),
            "weight": draw.normal(24, dtype=torch.float16),
        },
        run=rms_norm, exact=lambda x, weight: ops.rms_norm(x, weight, impl="naive"),
        tolerance=1e-3, bytes=1, leaves=("x", "weight") if backward else (), backward=backward,
    )  # fmt: skip


@pytest.mark.parametrize("backward", [False, True])
def test_a_right_kernel_passes(device: ModuleType, backward: bool) -> None:
    result = device.check(_norm(backward))
    assert result["passed"]
    assert result["same_bits_twice"]
    assert len(result["errors"]) == (2 if backward else 1)
    assert 0 < max(result["errors"]) < 1e-3


@pytest.mark.parametrize("backward", [False, True])
def test_a_wrong_kernel_fails(device: ModuleType, backward: bool) -> None:
    wrong = replace(_norm(backward), run=lambda x, weight: rms_norm(x, weight, 0.01))
    result = device.check(wrong)
    assert not result["passed"]
    assert max(result["errors"]) > 1e-3


def test_an_output_that_is_not_written_fails(device: ModuleType) -> None:
    lazy = replace(_norm(False), run=lambda x, weight: torch.empty_like(x))
    result = device.check(lazy)
    assert result["errors"] == [None]
    assert not result["passed"]


def test_different_bits_fail_even_within_the_tolerance(device: ModuleType) -> None:
    def noisy(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return rms_norm(x.float(), weight) * (1 + 1e-5 * torch.rand(1))

    result = device.check(replace(_norm(False), run=noisy))
    assert not result["same_bits_twice"]
    assert not result["passed"]
    assert max(result["errors"]) < 1e-3


def test_a_state_that_is_overwritten_starts_the_same_both_times(device: ModuleType) -> None:
    def run(state, **given):
        return selective_state_update(state, dt_softplus=True, **given), state

    def exact(state, x, dt, A, B, C):
        return ops.ssd_step(state, x, F.softplus(dt), A, B, C, impl="naive")

    case = _case(
        op="selective_state_update", name="float32", shape="small",
        inputs=lambda draw: {
            "state": draw.normal(2, 4, 8, 16, dtype=torch.float32),
            "x": draw.normal(2, 4, 8, dtype=torch.float32),
            "dt": draw.normal(2, 4, dtype=torch.float32),
            "A": -draw.uniform(4),
            "B": draw.normal(2, 2, 16, dtype=torch.float32),
            "C": draw.normal(2, 2, 16, dtype=torch.float32),
        },
        run=run, exact=exact, tolerance=(2e-6, 2e-6), bytes=1, in_place=("state",),
    )  # fmt: skip
    assert device.check(case)["passed"]
    assert not device.check(replace(case, in_place=()))["passed"]


def test_the_shares_and_ratios_of_a_summary(device: ModuleType) -> None:
    assert device.summary([4.0, 1.0, 2.0, 3.0, 5.0]) == {"n": 5, "median": 3, "q1": 1.5, "q3": 4.5}
