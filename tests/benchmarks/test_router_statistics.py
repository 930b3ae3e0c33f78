"""The cost of the router statistics is that of every router, beside the update it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import figures, record
from benchmarks.model import router_statistics as bench
from nemotron_lite.data import ConcatenatedDocuments, concatenate_documents


@pytest.fixture
def text() -> ConcatenatedDocuments:
    random = np.random.default_rng(0)
    return ConcatenatedDocuments(*concatenate_documents([random.integers(1, 300, 2000)]))


def test_shares_are_of_the_update(text: ConcatenatedDocuments) -> None:
    (entry,) = bench.measure_shares(bench.TINY, text, [(1, 32)], rounds=3)
    assert (entry["routers"], entry["experts"]) == (2, 64)
    seconds = entry["seconds"]
    assert all(values["n"] == 3 for values in seconds.values())
    assert 0 < seconds["statistics"]["median"] < seconds["update"]["median"]
    assert 0 < entry["share"]["min"] <= entry["share"]["median"] < 1
    assert entry["reached"] is (entry["share"]["median"] < 0.01)


def test_record_and_figure(
    text: ConcatenatedDocuments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RECORDS", tmp_path / "benchmarks" / "records")
    monkeypatch.setattr(bench, "prepare", lambda vocab_size: text)
    assert "still to be made" in figures.router_statistics(record.RECORDS)
    bench.main(["--quick"])
    assert not record.RECORDS.exists()
    summary = {"n": 5, "median": 0.00123, "min": 0.001, "max": 0.00456}
    entry = {
        "batch_size": 8, "length": 512, "share": summary, "routers": 7, "experts": 64,
    }  # fmt: skip
    monkeypatch.setattr(bench, "measure_shares", lambda *_: [entry])
    bench.main([])
    found = json.loads((record.RECORDS / "router_statistics.json").read_text())
    assert found["results"] == [entry]
    shown = " ".join(figures.router_statistics(record.RECORDS).split())
    assert "7 routers of 64 experts" in shown
    assert "0.12% of an update of 8 x 512 tokens (largest of 5: 0.46%)" in shown
