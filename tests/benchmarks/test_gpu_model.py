"""Every line of the GPU benchmark, on a fake GPU with tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import record
from benchmarks.model import gpu_model, peers
from nemotron_lite import Nemotron


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The CPU reports itself as a GPU; returns the path of the record."""
    fakes: dict[str, Any] = {
        "is_available": lambda: True, "get_device_name": lambda: "Fake GPU 100",
        "synchronize": lambda: None, "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 100,
        "max_memory_allocated": lambda: 700,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    small = {"DEVICE": "cpu", "COPIED": 64, "SQUARE": 8, "PREFILL": {32: 1, 64: 1}, "STEPS": 2}
    small |= {"DECODE": ((1, 32), (3, 32)), "DECODE_ROUNDS": 1, "TRAIN": (1, 32)}
    for name, value in small.items():
        monkeypatch.setattr(gpu_model, name, value)
    monkeypatch.setattr(gpu_model, "slice_of", lambda _: peers.SIZES["tiny"])
    monkeypatch.setattr(record, "RECORDS", tmp_path / "benchmarks" / "records")
    return record.RECORDS / "gpu_model_fake_gpu_100.json"


def test_a_whole_run(fake_gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_model.main([])
    found = json.loads(fake_gpu.read_text())
    assert list(found["slices"]) == ["nano", "super"]
    nano, larger = ([e["what"] for e in part["measurements"]] for part in found["slices"].values())
    assert nano == ["prefill", "prefill", "decode", "decode", "train"]
    assert larger == nano[:-1]
    for part in found["slices"].values():
        assert part["agreement"]["same_first_choice"] > 0.9
        for entry in part["measurements"]:
            assert entry["times_faster"]["median"] > 0 and entry["share_of_floor"] > 0
    assert found["slices"]["nano"]["measurements"][-1]["peak_bytes"] == {"ours": 600, "peer": 600}
    assert "decode: ours" in capsys.readouterr().out


def test_a_peer_that_does_not_fit_is_left_out(
    fake_gpu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill = peers.prefill

    def full(who: str, *arguments: Any) -> Any:
        if who == "peer":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return prefill(who, *arguments)

    monkeypatch.setattr(peers, "prefill", full)
    gpu_model.main(["--slice", "nano", "--only", "prefill,decode"])
    for entry in json.loads(fake_gpu.read_text())["slices"]["nano"]["measurements"]:
        assert set(entry["seconds"]) == {"ours"} and "times_faster" not in entry
        assert entry["peer"] == "out of memory"


def test_slices_end_behind_the_first_attention_layer() -> None:
    assert gpu_model.slice_of("nano").pattern == "MEMEM*E"
    assert gpu_model.slice_of("super").pattern == "MEMEMEM*E"
    assert gpu_model.slice_of("super").mtp_depths == 0


def test_bytes_of_weights_grow_from_the_active_ones_to_all() -> None:
    """One token reads the active weights of the ledger; many tokens read every expert."""
    config = gpu_model.slice_of("super")
    model = Nemotron(config, device="meta", dtype=torch.bfloat16)
    one, many = (gpu_model.weight_bytes(model, tokens) for tokens in (1, 100_000))
    parts = gpu_model.ledger.parameters(config)
    assert one == pytest.approx(2 * parts.active_without_embedding)
    assert many == pytest.approx(2 * (parts.total - parts.by_part["embedding"]))


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA GPU here"):
        gpu_model.main([])
