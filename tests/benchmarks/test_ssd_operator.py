"""The operator's benchmark compares programs that do the same work, and says when one does not."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from benchmarks.model import ssd_operator
from benchmarks.model.ssd_peers import find_peers


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_operator, "SIZES", {"b": 1, "h": 4, "p": 8, "n": 16, "g": 2})


def test_the_installed_peer_computes_the_same() -> None:
    peers = find_peers(None)
    assert list(peers) == ["transformers"]
    calls = {"ours": ssd_operator.ours}
    calls["transformers"] = functools.partial(peers["transformers"], chunk=64)
    for entry in ssd_operator.measure_errors(calls, 150):
        for name, errors in entry["errors"].items():
            assert set(errors) == set(ssd_operator.QUANTITIES)
            assert max(errors.values()) < 1e-5, name


def test_an_error_beyond_the_aim_is_not_called_reached() -> None:
    def coarse(*inputs: torch.Tensor) -> torch.Tensor:
        return ssd_operator.ours(*inputs) * (1 + 1e-4)

    def broken(*inputs: torch.Tensor) -> torch.Tensor:
        return ssd_operator.ours(*inputs) * float("nan")

    entries = ssd_operator.measure_errors({"ours": coarse, "broken": broken}, 70)
    assert not any(entry["reached"] for entry in entries)
    assert entries[0]["errors"]["ours"]["y"] == pytest.approx(1e-4, rel=1e-2)
    assert entries[0]["errors"]["broken"]["y"] is None


def test_ratios_and_aims_of_a_short_run() -> None:
    calls = {"ours": ssd_operator.ours, "same": ssd_operator.ours}
    for entry in ssd_operator.measure_speed(calls, 64, rounds=3):
        assert entry["times_faster"]["same"]["n"] == 3
        assert entry["reached"] == (entry["times_faster"]["same"]["median"] >= 2.0)


def test_missing_checkouts_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"ssd_minimal\.py"):
        find_peers(tmp_path)
