"""The quantizer's benchmark cases, small and interpreted, pass with a tolerance of zero.

A kernel with one wrong code fails.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import pytest
import torch

from benchmarks.kernels import cases_nvfp4_quantize, device


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.setattr(device, "DEVICE", "cpu")
    # conftest.py already fills new memory with NaN; torch's option for this would also warn.
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda *args, **kwargs: None)
    cases = cases_nvfp4_quantize
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
