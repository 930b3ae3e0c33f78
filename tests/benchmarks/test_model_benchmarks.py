"""The model benchmarks compare two programs with one model, and never two models."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import measure, plot, record
from benchmarks.model import growth, memory, model_speed, peers
from tests.browser import chromium

PLAN = dataclasses.replace(
    model_speed.QUICK, prefill={40: 2}, decode=((1, 20), (8, 20)), train=(2, 24)
)

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def pair() -> tuple[torch.nn.Module, torch.nn.Module]:
    return peers.build_pair("tiny")


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(record, "RECORDS", tmp_path / "benchmarks" / "records")
    return record.RECORDS


def test_two_programs_hold_one_model(pair):
    ours, peer = pair
    assert peers.check_same_model(ours, peer, length=70) < 1e-4
    mine = dict(ours.state_dict())
    for name, value in peer.state_dict().items():
        torch.testing.assert_close(mine.pop(name.replace("model.", "backbone.", 1)), value)
    assert mine == {}


def test_two_models_are_not_timed_against_each_other(pair):
    _, peer = pair
    other = peers.build_ours(peers.SIZES["tiny"], peer)
    with torch.no_grad():
        other.backbone.layers[0].mixer.D.mul_(1.02)
    with pytest.raises(RuntimeError, match="not the same model"):
        peers.check_same_model(other, peer, length=70)


def test_sizes_are_those_of_the_published_baselines():
    counts = {name: round(growth.ledger.parameters(c).total, -5) for name, c in peers.SIZES.items()}
    assert counts["S"] == 10_800_000
    assert counts["M"] == 106_000_000


def test_routing_is_spread_out(pair):
    spread = peers.router_spread(pair[0], length=512)
    assert spread["experts_in_use"] == 1.0
    assert spread["largest_load_over_mean"] < 3


@pytest.mark.parametrize("who", ["ours", "peer"])
def test_a_widened_cache_is_that_of_equal_rows(pair, who):
    model = pair[0] if who == "ours" else pair[1]
    config = peers.SIZES["tiny"]
    prompt, tokens = peers.random_tokens(config, 1, 37), peers.random_tokens(config, 3, 4, seed=5)
    wide = peers.widen(who, peers.prefill(who, model, prompt)[1], 3)
    whole = peers.prefill(who, model, prompt.expand(3, -1))[1]
    written = peers.decode(who, model, wide, tokens)
    assert written.shape == (3, 4)
    assert torch.equal(written, peers.decode(who, model, whole, tokens))


def test_both_programs_write_the_same_tokens_and_last_logits(pair):
    config = peers.SIZES["tiny"]
    prompt, tokens = peers.random_tokens(config, 2, 50), peers.random_tokens(config, 2, 6, seed=5)
    found = {
        who: peers.prefill(who, m, prompt) for who, m in zip(("ours", "peer"), pair, strict=True)
    }
    torch.testing.assert_close(found["ours"][0], found["peer"][0], atol=1e-4, rtol=0)
    assert found["ours"][0].shape == (2, 1, config.vocab_size)
    written = [
        peers.decode(who, model, found[who][1], tokens)
        for who, model in zip(("ours", "peer"), pair, strict=True)
    ]
    assert torch.equal(*written)


def test_a_training_step_moves_both_programs_alike():
    config = peers.SIZES["tiny"]
    ours, peer = peers.build_pair("tiny", seed=3)
    before = ours.lm_head.weight.detach().clone()
    tokens = peers.random_tokens(config, 2, 40)
    losses = [
        peers.train_step_ours(ours.train(), peers.new_optimizer(ours), tokens),
        peers.train_step_peer(peer.train(), peers.new_optimizer(peer), tokens),
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert (ours.lm_head.weight - before).abs().max() > 5e-5  # lr 1e-4, Adam's first step
    # Adam divides a gradient by its own size: rounding shows where one is next to nothing.
    moved = dict(ours.named_parameters())
    for name, value in peer.named_parameters():
        gap = (moved[name.replace("model.", "backbone.", 1)] - value).abs()
        assert gap.mean() < 2e-6, name


def test_bfloat16_keeps_the_selection_bias(pair):
    for model in pair:
        narrow = peers.in_bfloat16(model)
        dtypes = {n: t.dtype for n, t in narrow.state_dict().items()}
        biases = {n for n in dtypes if n.endswith("correction_bias")}
        assert len(biases) == 2
        assert {dtypes[n] for n in biases} == {torch.float32}
        assert {t for n, t in dtypes.items() if n not in biases} == {torch.bfloat16}
        wide = dict(model.state_dict())
        assert all(torch.equal(narrow.state_dict()[n], wide[n]) for n in biases)


def test_a_record_of_every_part(records, monkeypatch):
    peaks = {("ours", "train"): 60, ("peer", "train"): 100}
    monkeypatch.setattr(memory, "peak", lambda who, work, *_: peaks.get((who, work), 50))
    plan = dataclasses.replace(PLAN, aims=True)
    found = model_speed.measure_size("tiny", model_speed.WORKS, plan)
    path = record.write_record("model_speed_tiny", found)
    written = json.loads(path.read_text())
    assert written["parameters"] == growth.ledger.parameters(peers.SIZES["tiny"]).total
    assert written["largest_logit_difference"] < 1e-4
    assert set(written["path"]) == {"prefill", "decode", "train"}
    entries = written["measurements"]
    assert [entry["what"] for entry in entries] == [
        "prefill",
        "decode",
        "decode",
        "train",
        "train memory",
        "prefill memory",
        "bf16 bare product",
        "bf16",
        "bf16 against the peer's",
        "bf16 against the peer's float32",
        "bf16 agreement with float32 on the random model",
    ]
    timed = [entry for entry in entries if "seconds" in entry]
    assert [entry["times_faster"]["n"] for entry in timed] == [2, 2, 2, 2, 31, 2, 2, 2]
    assert all(entry["seconds"]["ours"]["n"] == entry["times_faster"]["n"] for entry in timed)
    decode = entries[2]
    assert (decode["batch"], decode["context"], decode["aim"]) == (8, 20, 1.5)
    assert decode["reached"] == (decode["times_faster"]["median"] >= 1.5)
    assert entries[4]["share_of_peer"] == 0.6
    assert entries[4]["reached"] is True
    assert 0 <= entries[-1]["ours"]["mean_kl"] < 0.1


def test_agreement_of_logits():
    exact = torch.randn(1, 50, 11)
    same = model_speed.agreement(exact, exact.clone())
    assert same == {"mean_kl": pytest.approx(0, abs=1e-12), "same_first_choice": 1.0}
    other = model_speed.agreement(exact, -exact)
    assert other["mean_kl"] > 0.5
    assert other["same_first_choice"] < 0.2


def test_calls_alternate():
    order = []
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    seconds = measure.alternate(calls, 3, warmup=1)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_within_a_round():
    entry = measure.compare(
        "work", {"ours": [1.0, 4.0, 2.0], "peer": [3.0, 4.0, 4.0]}, tokens=8, aim=2.5, batch=1
    )
    assert entry["times_faster"] == {"n": 3, "median": 2.0, "min": 1.0, "max": 3.0}
    assert entry["tokens_per_second"] == {"ours": 4.0, "peer": 2.0}
    assert (entry["reached"], entry["batch"]) == (False, 1)
    assert "2.00 times faster (1.00-3.00)" in measure.describe(entry)
    with pytest.raises(ValueError, match="at least one round"):
        measure.summary([])


@pytest.mark.timing
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_is_what_was_touched_above_the_model():
    # The C library keeps freed blocks of up to 32 MiB, and a block that it gives out again is no
    # new memory. So the blocks are larger.
    def prepare():
        model = torch.ones(16_000_000)  # 64 MB, not to be counted
        return lambda: float((model + 1).sum())  # 64 MB more

    assert measure.peak_above(prepare) == pytest.approx(64e6, rel=0.2)


@pytest.mark.timing
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_memory_is_measured_in_a_process_of_its_own():
    weights = 4 * growth.ledger.parameters(peers.SIZES["tiny"]).total
    assert memory.peak("ours", "train", "tiny", 16) > 3 * weights  # gradients and two moments
    with pytest.raises(RuntimeError, match="invalid choice: 'huge'"):
        memory.peak("ours", "train", "huge", 16)


def test_growth_and_its_drawing(pair, records, tmp_path):
    results = [growth.measure_length(*pair, length, rounds=2) for length in (64, 128)]
    results.append(growth.measure_length(pair[0], None, 256, rounds=2))
    assert "peer" not in results[2]["seconds"]
    states = [entry["state_bytes"] for entry in results]
    assert [s["kv"] for s in states] == [states[0]["kv"] * k for k in (1, 2, 4)]
    assert states[0]["ssm"] == states[2]["ssm"] == 4 * 16 * 16 * 4
    path = record.write_record("growth", {"size": "tiny", "path": "prefill", "results": results})
    with pytest.raises(FileNotFoundError, match="python -m benchmarks growth"):
        plot.draw(tmp_path / "none.json")
    chromium.required()
    drawing = plot.draw(path, tmp_path / "docs" / "growth.svg")
    root = ET.fromstring(drawing.read_text())
    assert root.get("role") == "img"
    words = {e.text.strip() for e in root.iter(SVG + "text") if e.text}
    assert {"nemotron_lite", "transformers", "this hybrid", "its Mamba layers", "256"} <= words
    assert {"microseconds per token", "bytes", "length of the prompt (tokens)"} <= words
    assert root.find(SVG + "desc").text == plot.summary(json.loads(path.read_text()))
    lines = [e for e in root.iter(SVG + "g") if e.get("class", "").startswith("trace scatter")]
    points = [[e.get("class") for e in line.iter()].count("point") for line in lines]
    assert points == [3, 2, 3, 3, 3]


def test_the_drawing_has_the_numbers_of_its_record():
    found = json.loads(plot.RECORD.read_text())
    results = found["results"]
    lines = {line.name: line for line in plot.figure(found).data}
    for name, who in (("nemotron_lite", "ours"), ("transformers", "peer")):
        times = [r["microseconds_per_token"] for r in results]
        measured = [t[who] for t in times if who in t]
        line = lines[name]
        assert list(line.y) == [t["median"] for t in measured]
        assert list(line.x) == [r["length"] for r in results][: len(measured)]
        highs = [m + e for m, e in zip(line.y, line.error_y.array, strict=True)]
        lows = [m - e for m, e in zip(line.y, line.error_y.arrayminus, strict=True)]
        assert highs == pytest.approx([t["max"] for t in measured])
        assert lows == pytest.approx([t["min"] for t in measured])
    attention = lines["if all were attention"].y
    assert list(attention) == [r["all_attention_bytes"] for r in results]
    assert list(lines["this hybrid"].y) == [sum(r["state_bytes"].values()) for r in results]
    assert len(lines) == 5


def test_the_committed_drawing_is_that_of_the_record():
    root = ET.fromstring(plot.DRAWING.read_text())
    found = json.loads(plot.RECORD.read_text())
    assert root.find(SVG + "desc").text == plot.summary(found), "run python -m benchmarks.plot"
    words = {e.text.strip() for e in root.iter(SVG + "text") if e.text}
    assert {line.name for line in plot.figure(found).data} <= words


def test_colors_can_be_read_on_the_background():
    def luminance(color: str) -> float:
        parts = (int(h, 16) / 255 for h in re.findall("..", color[1:]))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert contrast(plot.TEXT, plot.BACKGROUND) >= 4.5
    looks = (plot.OURS, plot.PEER, plot.PART)
    assert all(contrast(look["color"], plot.BACKGROUND) >= 3.5 for look in looks)
    for part in ("color", "dash", "symbol"):
        assert len({look[part] for look in looks}) == 3


def test_names_at_the_ends_of_lines_do_not_overlap():
    """Names of one plot start at the same place; the lines of the record end apart."""
    root = ET.fromstring(plot.DRAWING.read_text())
    for panel in (("nemotron_lite", "transformers"), ("if all", "this hybrid", "its Mamba")):
        heights = sorted(
            float(e.get("y"))
            for e in root.iter(SVG + "text")
            if e.text and e.text.strip().startswith(panel)
        )
        assert len(heights) == len(panel)
        assert min(b - a for a, b in pairwise(heights)) >= 15


def test_every_benchmark_has_its_place_in_the_command():
    folder = Path(command.__file__).parent / "model"
    found = {file.stem for file in folder.glob("*.py") if "\ndef main(arg" in file.read_text()}
    listed = [*command.BENCHMARKS, *command.BY_NAME]
    assert sorted({*found, "figures"}) == sorted(listed)
    assert all(f"python -m benchmarks {name}" in command.__doc__ for name in command.BY_NAME)


def test_the_command_knows_its_benchmarks(monkeypatch):
    called: list[tuple[object, list[str]]] = []
    for module in (growth, model_speed):
        monkeypatch.setattr(module, "main", lambda options, m=module: called.append((m, options)))
    command.main(["growth", "--quick"])
    assert called == [(growth, ["--quick"])]
    with pytest.raises(SystemExit, match="no benchmark 'speed'; expected one of ssd_operator"):
        command.main(["speed"])
    with pytest.raises(SystemExit, match="name the benchmark first"):
        command.main(["--size", "S"])
