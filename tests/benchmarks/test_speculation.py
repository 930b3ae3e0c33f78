"""The benchmark of speculation: it runs, counts what it says, and predicts by arithmetic."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import figures, record
from benchmarks.model import speculation
from nemotron_lite.generation.speculative import SpeculationCosts, Statistics
from nemotron_lite.generation.speculative.measured_costs import costs_from_seconds, measure_seconds
from nemotron_lite.model import Nemotron
from tests.generation.speculative.conftest import SMALL


def test_every_way_is_measured_against_plain(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    monkeypatch.setattr(speculation, "LENGTHS", (2,))
    model = Nemotron(SMALL, seed=0)
    prices = {"measured": SpeculationCosts(0.2, 0.1)}
    entries = speculation.measure_decoding(model, [[1, 2], [3]], 6, 2, 0.0, prices)
    assert [entry["way"] for entry in entries] == ["fixed 2", "adaptive", "poor"]
    for entry in entries:
        assert entry["texts_that_differ"] == 0
        assert entry["times_faster"]["n"] == 2
        assert entry["statistics"]["passes"] > 0
    record.write_record(
        "speculation", {"path": "generate", "results": entries}
    )  # a record takes them as they are
    assert "times plain" in capsys.readouterr().out


def test_a_poor_module_is_another_one_on_the_same_backbone() -> None:
    model = Nemotron(SMALL, seed=0)
    other = speculation.poor(model)
    for name, value in model.state_dict().items():
        same = torch.equal(value, other.state_dict()[name])
        assert same or name.startswith("mtp."), name
    assert not torch.equal(model.mtp.layers[0].eh_proj.weight, other.mtp.layers[0].eh_proj.weight)


def test_the_prediction_is_tokens_over_steps_paid() -> None:
    statistics = Statistics()
    assert speculation.predicted(statistics, SpeculationCosts(0.2, 0.1)) == 1.0
    statistics.count([2], [2])
    statistics.count([0], [0])
    # three tokens for 1 + 0.1 + 2 * 0.3 steps, and one for one
    assert speculation.predicted(statistics, SpeculationCosts(0.2, 0.1, 0.1)) == pytest.approx(
        4 / 2.7
    )


def test_prices_are_measured_in_plain_steps() -> None:
    clock = iter(float(i) ** 2 for i in range(10_000))
    parts = measure_seconds(
        Nemotron(SMALL, seed=0), 3, context=5, rounds=3, timer=lambda: next(clock)
    )
    assert set(parts) == {"step", "draft", "verify_two", "verify_all"}
    found = costs_from_seconds({"step": 2.0, "draft": 0.5, "verify_two": 3.0, "verify_all": 4.0}, 3)
    assert found == SpeculationCosts(draft=0.25, verify=0.25, start=0.25)
    with pytest.raises(ValueError, match="drafts of at least 2"):
        measure_seconds(Nemotron(SMALL, seed=0), 1)


def test_both_ways_of_going_back_are_measured(capsys, tmp_path) -> None:
    accept, clone = found = speculation.measure_rollback(Nemotron(SMALL, seed=0), 2)
    assert (accept["way"], clone["way"]) == ("accept", "clone")
    assert 0 < accept["bytes_kept"] < clone["bytes_kept"]
    # The page of figures can be written from these entries.
    committed = json.loads((record.RECORDS / "speculation.json").read_text())
    decoding = [entry for entry in committed["results"] if entry["what"] != "rollback"]
    new = json.dumps(committed | {"results": [*found, *decoding]})
    (tmp_path / "speculation.json").write_text(new)
    text = figures.speculation(tmp_path).replace("\n", " ")
    for entry, what in ((accept, "the inputs of each token"), (clone, "a copy of the whole cache")):
        times = f"{entry['verify_and_keep_over_a_plain_step']:.2f} plain steps"
        assert f"{entry['bytes_kept']:,} bytes and {times} with {what}" in text
