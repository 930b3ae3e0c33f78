"""The quantizer's cases for a device, small and interpreted: with a tolerance of zero they pass.

And they can fail: a kernel whose codes differ in one place does not.
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.syspath_prepend(SCRIPTS)
    device = importlib.import_module("device")
    monkeypatch.setattr(device, "DEVICE", "cpu")
    # The tests' own poison stands in for torch's, which would have to undo its warnings.
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *args, **kwargs: None)
    cases = importlib.import_module("cases_nvfp4_quantize")
    for name, size in (("TOKENS", 64), ("WIDTH", 96), ("HIDDEN", 48)):
        monkeypatch.setattr(cases, name, size)
    return device, cases


def test_every_case_passes_bit_for_bit(modules: tuple[ModuleType, ModuleType]) -> None:
    device, cases = modules
    for case in cases.CASES:
        result = device.check(case)
        assert result["passed"], (str(case), result)
        assert set(result["errors"]) == {0.0}


def test_one_wrong_code_fails(modules: tuple[ModuleType, ModuleType]) -> None:
    device, cases = modules
    case = next(case for case in cases.CASES if case.op == "nvfp4_quantize")

    def wrong(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        codes, scales, scale = case.run(x)
        codes[-1, -1] ^= 1
        return codes, scales, scale

    assert not device.check(replace(case, run=wrong))["passed"]
