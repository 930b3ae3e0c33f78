"""The benchmark of quantized checkpoints: its folders, its ways, and losses that mean something."""

from __future__ import annotations

import copy
import json
import math
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import figures, measure, record
from benchmarks.model import nvfp4_checkpoints as bench
from benchmarks.model import peers
from nemotron_lite import Nemotron, load
from nemotron_lite.data import HeldOut, TextData, prepare
from nemotron_lite.quantization.packed_layers import PackedExperts

TINY = peers.SIZES["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folders")
    bench.write_folders(TINY, path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TextData:
    path = tmp_path_factory.mktemp("text")
    for source in sorted(Path(sysconfig.get_path("stdlib"), "asyncio").glob("*.py")):
        (path / source.name).write_bytes(source.read_bytes())
    return prepare(vocab_size=300, held_out_bytes=2_000, root=path, cache=path / "cache")


def test_folders_hold_one_model(folder: Path) -> None:
    wide, packed = load(folder / "bf16"), load(folder / "nvfp4", packed=True)
    assert isinstance(packed.backbone.layers[1].mixer.experts, PackedExperts)
    exact = wide.state_dict()["backbone.layers.1.mixer.experts.up_proj"][3].float()
    found = packed.backbone.layers[1].mixer.experts.up_proj.decode(torch.float32, 3)
    assert 0.05 < float((found - exact).norm() / exact.norm()) < 0.15


def test_sizes_are_those_of_the_format(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(measure, "in_own_process", lambda *a: asked.append(a) or len(asked))
    plain, packed, *peaks = bench.measure_size(TINY, folder, 4)
    assert plain["routed_experts"]["bits_a_weight"] == 16
    # 24 columns are padded to 32. Each matrix has one float32 scale, that of the tensor; the scale
    # of its inputs needs a calibration.
    up, down = 24 * 16 * 4.5 + 32, 16 * 32 * 4.5 + 32
    assert packed["routed_experts"]["bits_a_weight"] == pytest.approx((up + down) / (2 * 24 * 16))
    assert packed["bytes"] < plain["bytes"]
    assert [entry["way"] for entry in peaks] == list(bench.WAYS)
    assert asked[0] == ("benchmarks.model.nvfp4_checkpoints", "child", str(folder), "bf16", "0")
    assert {call[-1] for call in asked} == {"0", "4"}


@pytest.mark.parametrize("way", bench.WAYS)
def test_every_way_loads_and_writes(folder: Path, way: str, monkeypatch) -> None:
    loaded: list[dict[str, Any]] = []

    def load_and_note(path: Path, **options: Any) -> Nemotron:
        model = load(path, **options)
        loaded.append({"path": path.name, "model": model})
        return model

    monkeypatch.setattr(bench, "load", load_and_note)
    work = bench.prepare_way(folder, way, 2)
    work()
    name, packed, dtype = bench.WAYS[way]
    model = loaded[-1]["model"]
    assert loaded[-1]["path"] == name
    assert isinstance(model.backbone.layers[1].mixer.experts, PackedExperts) == packed
    assert model.dtype == getattr(torch, dtype)


def test_speeds_stand_beside_bf16(folder: Path) -> None:
    found = bench.measure_speed(folder, 3, 2)
    assert [(e["way"], e["rows"]) for e in found] == [
        (way, rows) for rows in (1, 8) for way in bench.WAYS if way != "bf16"
    ]
    assert all(entry["times_faster"]["n"] == 2 for entry in found)


def test_losses_of_every_assignment(data: TextData, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(record, "RECORDS", tmp_path)
    torch.manual_seed(0)
    model = Nemotron(TINY.replace(vocab_size=300), seed=0).eval()
    peers.randomize(model, model.config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    formats = bench.single_format(bench.quantizable_modules(model), "fp8")
    calibration = bench.calibrate(model, [torch.randint(300, (4, 32))])
    packed = bench.quantize_model(copy.deepcopy(model), formats, calibration)
    found = bench.measure_loss(model, data, bits=6.0, prompts=4, length=32, most=256, packed=packed)
    by_name = {entry["as"]: entry for entry in found}
    assert (next(iter(by_name)), list(by_name)[-1]) == ("it was", "shipped")
    plain, fp8, nvfp4 = (by_name[f"{f} for all"] for f in ("bf16", "fp8", "nvfp4"))
    assert (plain["bits_a_weight"], fp8["bits_a_weight"]) == (16, 8)
    assert plain["weights"] == plain["weights and inputs"]
    assert 0 == plain["estimated_nats"] < fp8["estimated_nats"] < nvfp4["estimated_nats"]

    def size(entry: dict[str, Any], what: str) -> float:
        return float(np.abs(entry[what]["change_percent"]["each"]).mean())

    assert size(plain, "weights") < size(fp8, "weights") < size(nvfp4, "weights")
    # Random weights: rounding the inputs too may move the loss up or down, but it moves it.
    for entry in (fp8, nvfp4):
        assert entry["weights"] != entry["weights and inputs"]
    assert 0 < size(by_name["shipped"], "weights") < size(nvfp4, "weights")
    assert by_name["shipped"]["bits_a_weight"] == pytest.approx(4.904, abs=1e-3)
    mixed = by_name["mixed, 6.0 bits"]
    assert mixed["bits_a_weight"] <= 6.0
    assert set(mixed["formats"]) > {"nvfp4"}
    assert sum(mixed["by_role"].values()) == sum(mixed["formats"].values())
    now = model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in before.items()), "left as it was"
    record.write_record("trial", {"path": "load", "results": found})
    # Of the text that was scored: a uniform guess of 300 tokens.
    held_out = bench.groups_of(data, 8, 256)
    uniform = math.log2(300) * sum(len(d) - 1 for g in held_out for d in g.documents)
    expected = uniform / sum(group.num_bytes for group in held_out)
    assert by_name["it was"]["bits_per_byte"] == pytest.approx(expected, rel=0.2)
    content = {
        "model": "lite", "parameters": 14_130_400, "before_packing": True, "stored_as": ["F32"],
        "tokens_of_a_document": 256, "results": found,
    }  # fmt: skip
    file = tmp_path / "nvfp4_checkpoints_loss.json"
    file.write_text(json.dumps(content))
    text = figures.loss_of_checkpoints(tmp_path)
    assert "The shipped model before its weights were packed, with 14.1 million" in text
    assert "second rounding" not in text
    assert f"| as it was | 32.00 | {by_name['it was']['bits_per_byte']:.4f} |" in text
    bits = nvfp4["weights"]["bits_per_byte"]
    assert f"| NVFP4 | {nvfp4['bits_a_weight']:.2f} | {bits:.4f} |" in text
    file.write_text(json.dumps(content | {"before_packing": False, "stored_as": ["FP8", "NVFP4"]}))
    text = " ".join(figures.loss_of_checkpoints(tmp_path).split())
    assert "The model `lite`, with" in text
    assert "stored in FP8 and NVFP4, so this is a second rounding" in text


def test_groups_share_the_documents(data: TextData) -> None:
    letters = {letter: data.tokenizer.encode(letter).ids[0] for letter in "abcdefg"}
    lengths = [90, 10, 40, 40, 30, 70, 20]
    pairs = zip(letters.values(), lengths, strict=True)
    documents = tuple(np.full(length, token) for token, length in pairs)
    groups = bench.groups_of(replace(data, held_out=HeldOut(documents, 300)), 3, 80)
    first = [int(d[0]) for g in groups for d in g.documents]
    assert sorted(first) == sorted(letters.values())
    sizes = [sum(len(d) for d in g.documents) for g in groups]
    assert sum(sizes) == 290 and max(sizes) - min(sizes) <= 20
    assert [group.num_bytes for group in groups] == sizes, "a letter is a byte"
