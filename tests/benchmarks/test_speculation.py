"""The benchmark of speculation: it runs, counts what it says, and predicts by arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import figures, record
from benchmarks.model import speculation
from nemotron_lite.data import HeldOut
from nemotron_lite.generation.speculative import SpeculationCosts, Statistics
from nemotron_lite.generation.speculative.measured_costs import costs_from_seconds, measure_seconds
from nemotron_lite.model import Nemotron
from tests.generation.speculative.conftest import SMALL

KINDS = dict.fromkeys(("ledger", "measured"), SpeculationCosts(0.2, 0.1))
PRICES = {"all tokens": KINDS, "shortlist": KINDS}
LITE = {"model": "lite", "parameters": 14_130_400}


def record_of(folder: Path, name: str, **content: Any) -> None:
    texts = {"prompts": 2, "prompt_tokens": 96, "new_tokens": 6, "shortlist": 12}
    content |= {"machine": {"cpu": "some processor", "threads": 2}}
    (folder / f"{name}.json").write_text(json.dumps(LITE | texts | content))


def test_every_way_is_measured_against_plain(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    monkeypatch.setattr(speculation, "LENGTHS", (2,))
    model = Nemotron(SMALL, seed=0)
    shortlist = tuple(range(12))
    results: list[dict[str, Any]] = speculation.measure_rollback(model, 2)
    for temperature in speculation.TEMPERATURES:
        entries = speculation.measure_decoding(
            model, [[1, 2], [3]], 6, 2, temperature, PRICES, shortlist
        )
        assert [e["way"] for e in entries] == ["fixed 2", "shortlist", "adaptive", "poor"]
        for entry in entries:
            assert temperature or entry["texts_that_differ"] == 0
            assert entry["times_faster"]["n"] == 2
            assert entry["statistics"]["passes"] > 0
        results += entries
    record.write_record("speculation", {"path": "generate", "results": results})
    assert "times plain" in capsys.readouterr().out
    record_of(tmp_path, "speculation", results=results)
    lines = figures.speculation(tmp_path).splitlines()
    heads = [line for line in lines if line.startswith("| drafts, ")]
    assert [line.split("|")[1] for line in heads] == [
        " drafts, greedy ",
        " drafts, temperature 0.7 ",
    ]
    assert sum(line.startswith("| none |") for line in lines) == 2
    for entry in results:
        if entry["what"] == "decode":
            ratio = entry["times_faster"]
            speed = f"| {entry['tokens_per_second']['ours']:,.0f} | {ratio['median']:.2f} ("
            assert any(speed in line for line in lines)
    assert "Records that are still to be made: `python -m benchmarks speculation --only" in (
        " ".join(lines)
    )


def test_acceptance_is_that_of_the_drafts(monkeypatch, tmp_path) -> None:
    """The counts of the same calls, one prompt after the other."""
    monkeypatch.setattr(speculation, "LENGTHS", (1, 3))
    model = Nemotron(SMALL, seed=0)
    prompts = [[1, 2], [3], [4, 5]]
    entries = speculation.measure_acceptance(model, prompts, 12, tuple(range(12)))
    assert [(e["temperature"], e["way"]) for e in entries] == [
        (temperature, way)
        for temperature in (0.0, 0.7)
        for way in ("fixed 1", "fixed 3", "shortlist")
    ]
    for entry in entries:
        assert entry["by_prompt"]["n"] == 3
        assert entry["by_prompt"]["min"] <= entry["acceptance_length"] <= entry["by_prompt"]["max"]
        assert len(entry["rates"]) == {"fixed 1": 1, "fixed 3": 3, "shortlist": 4}[entry["way"]]
        found, told = [], []
        speculation.write_all(
            model, prompts, 12, found, told,
            speculation=speculation.fixed_ways(tuple(range(12)))[entry["way"]],
            **speculation.sampling(entry["temperature"]),
        )  # fmt: skip
        tokens = sum(each.verified_tokens for each in told)
        passes = sum(each.verifications for each in told)
        assert entry["acceptance_length"] == pytest.approx(tokens / passes)
        assert all(len(text) == 12 for text in found)
    record_of(tmp_path, "speculation_acceptance", results=entries)
    text = figures.speculation(tmp_path)
    first = entries[0]
    assert f"| drafts of 1 | {first['acceptance_length']:.2f} (" in text
    assert "--only speed`" in text


def test_prompts_are_beginnings_of_files_long_enough(monkeypatch) -> None:
    monkeypatch.setattr(speculation, "PROMPT", 3)
    documents = tuple(np.arange(n) for n in (5, 6, 9, 7))
    held_out = HeldOut(documents, 27)
    assert speculation.beginnings(held_out, 9) == [[0, 1, 2]] * 3
    assert len(speculation.beginnings(held_out, 2)) == 2


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
    decode = {
        "what": "decode", "way": "fixed 2", "temperature": 0.0, "texts_that_differ": 0,
        "times_faster": {"median": 1.5, "min": 1.25, "max": 1.75},
        "predicted_times_faster": {"ledger": 2.0, "measured": 1.6},
        "tokens_per_second": {"ours": 1500.0, "plain": 1000.0},
        "statistics": {"acceptance_length": 2.5},
    }  # fmt: skip
    record_of(tmp_path, "speculation", results=[*found, decode])
    text = figures.speculation(tmp_path).replace("\n", " ")
    assert "| none | 1,000 | 1 |  | 1 |" in text
    assert "| drafts of 2 | 1,500 | 1.50 (1.25-1.75) | 2.00 / 1.60 | 2.50 |" in text
    for entry, what in ((accept, "the inputs of each token"), (clone, "a copy of the whole cache")):
        times = f"{entry['verify_and_keep_over_a_plain_step']:.2f} plain steps"
        assert f"{entry['bytes_kept']:,} bytes and {times} with {what}" in text
