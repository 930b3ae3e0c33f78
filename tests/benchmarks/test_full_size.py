"""The benchmark of models larger than the memory: its checks, and the figures it gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import figures
from benchmarks.model import full_size
from nemotron_lite import NemotronConfig, ledger


@pytest.mark.parametrize("packed", [False, True])
def test_a_generated_model_is_measured(packed: bool) -> None:
    found = full_size.generated("ME*E", packed, 0.06, True)
    config = full_size.config_of("ME*E", quick=True)
    assert found["ledger_parameters"] == ledger.parameters(config).total
    assert 0 < found["weights_in_memory_gib"] <= 0.06
    decode = found["decode"]
    assert decode["seconds"]["n"] == full_size.NEW - 1
    assert decode["flops"] == ledger.flops(config, full_size.PROMPT + 1, "decode").total
    for rate in (decode["expert_hit_rate"], decode["hit_rate"]):
        assert 0 <= rate["min"] <= rate["max"] <= 1
    assert decode["source_bytes"]["max"] <= decode["used_bytes"]


def test_the_bytes_of_a_token_of_super() -> None:
    config = full_size.config_of(NemotronConfig.from_preset("super").pattern, quick=False)
    weights, size = full_size.ledger_of_a_token(config, packed=False)
    assert weights == ledger.parameters(config).active_without_embedding + config.hidden_size
    assert size == 2 * weights + 2 * 40 * 512  # selection biases in float32
    mamba, attention, moe = 4_383_047_680, 134_217_728, 4_844_421_120 + 335_544_320 + 1_761_607_680
    packed = mamba + attention + moe
    scales = 40 * 2 + 8 + 40 * (2 * 22 + 2 + 2)  # one of each matrix
    size += packed * 9 // 16 - 2 * packed + 4 * scales
    assert full_size.ledger_of_a_token(config, packed=True) == (weights, size)


def test_other_work_than_the_ledger_says_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_size, "PROMPT", 3)
    plain = ledger.flops

    def other(config, context, *args, **options):  # type: ignore[no-untyped-def]
        return plain(config, context + 1, *args, **options)

    monkeypatch.setattr(ledger, "flops", other)
    with pytest.raises(RuntimeError, match=r"FLOPs were counted; the ledger has"):
        full_size.generated("ME", False, 0.06, True)


def test_the_figures_come_from_the_record(tmp_path: Path) -> None:
    assert "still to be made" in figures.full_size(tmp_path)
    spread = {"n": 4, "median": 0.5, "min": 0.25, "max": 0.75}
    decode = {
        "seconds": {**spread, "median": 12.34}, "flops": 24.7e9, "weights": 12.2e9,
        "used_bytes": 24.5e9, "source_bytes": spread, "hit_rate": spread,
        "expert_hit_rate": {**spread, "median": 0.07},
    }  # fmt: skip
    run = {"budget_gib": 4, "peak_gib": 4.56, "load_average": 2.5, "decode": decode}
    record = {
        "machine": {"cpu": "A processor", "threads": 2, "cores": 4}, "prompt": 8, "new": 5,
        "results": [
            {"what": "generated", "format": "BF16", "layers": 88, **run,
             "prompt": {"seconds": 30.0, "source_bytes": 6e10}},
            {"what": "files", "pattern": "ME", "checkpoint": {"bytes": 3.4e9},
             "in_memory_peak_gib": 3.9, "load_in_memory": "RuntimeError", "runs": [
                 {**run, "page_cache": "warm", "limit_gib": 2.0, "idle_gib": 0.6},
                 {**run, "page_cache": "dropped before each call"}]},
        ],
    }  # fmt: skip
    (tmp_path / "full_size.json").write_text(json.dumps(record))
    text = figures.full_size(tmp_path)
    numbers = "4 GiB | 4.56 GiB | 12.3 (0.25 to 0.75) | 24.50 | 0.00 | 50% | 7% |"
    assert f"| Super in BF16, generated | {numbers}" in text
    assert text.count("`ME` of a file") == 2
    for words in (
        "A processor, 2 thread(s)", "load average at most 2.5", "24.70 GFLOP", "3.40 GB",
        "RuntimeError", "3.90 GiB",
    ):  # fmt: skip
        assert words in " ".join(text.split())
