"""The profile of a prompt: shares of the time, and the arithmetic behind the floor."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks import figures, record
from benchmarks.model import peers, prefill_profile
from nemotron_lite import Nemotron, ledger

LENGTH = 40


@pytest.fixture
def model() -> Nemotron:
    return Nemotron(peers.SIZES["tiny"], seed=0).eval()


def test_the_arithmetic_is_that_of_the_ledger() -> None:
    config = peers.SIZES["tiny"]
    found = prefill_profile.arithmetic(config, LENGTH)
    assert set(found) == {"mamba", "moe", "attention", "rest"}
    whole = ledger.flops(config, LENGTH, logits_to_keep=1).total
    assert sum(found.values()) == pytest.approx(float(whole), rel=1e-12)
    assert found["rest"] == 2 * config.hidden_size * config.vocab_size  # one token's logits


def test_the_seconds_of_a_slow_layer_are_its_kind_s(
    model: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the timers leave nothing behind."""
    layers = model.backbone.layers
    (slow,) = (layer for layer in layers if layer.kind == "*")
    forward = slow.mixer.forward

    def slowly(*arguments: object) -> object:
        time.sleep(0.5)
        return forward(*arguments)

    monkeypatch.setattr(slow.mixer, "forward", slowly)
    entry = prefill_profile.measure_length(model, LENGTH, rounds=2, side=64)
    shares = {name: part["share"]["median"] for name, part in entry["parts"].items()}
    assert sum(shares.values()) == pytest.approx(1, abs=0.1)
    assert max(shares, key=shares.__getitem__) == "attention"
    for layer in layers:
        assert not layer.mixer._forward_pre_hooks and not layer.mixer._forward_hooks


def test_the_timers_change_no_result(model: Nemotron) -> None:
    tokens = peers.random_tokens(model.config, 1, LENGTH)
    plain = peers.prefill("ours", model, tokens)[0]
    with prefill_profile.timers(model) as spent:
        timed = peers.prefill("ours", model, tokens)[0]
    assert torch.equal(plain, timed)
    assert set(spent) == {"mamba", "moe", "attention"} and min(spent.values()) > 0


def test_the_record_and_its_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    assert "prefill_profile`" in figures.prefill_profile(tmp_path)
    found = prefill_profile.measure_size("tiny", prefill_profile.QUICK)
    file = record.write_record("prefill_profile_S_amd_epyc", found)
    written = json.loads(file.read_text())
    (entry,) = written["measurements"]
    assert len(entry["operations"]) == prefill_profile.OPERATIONS
    assert all(0 < one["share"] < 1 for one in entry["operations"])
    entry["of_floor"]["median"] = 3.456
    entry["parts"]["moe"]["share"]["median"] = 0.37
    file.write_text(json.dumps(written))
    text = figures.prefill_profile(tmp_path)
    assert "| 40 | 3.46 |" in text and "37% / " in text
