"""`nemotron-lite quantize`, `info` on its folder, and generating with packed weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from typer.testing import Result

import nemotron_lite
from nemotron_lite import data
from nemotron_lite.checkpoint import CheckpointError, storage_summary, weight_bytes
from nemotron_lite.cli.outputs import save_model
from nemotron_lite.cli.quantize import check_options
from nemotron_lite.quantization.packed_layers import PackedWeight
from tests.checkpoint.tiny import randomize
from tests.cli.commands import TINY, call, copy_into, python_files

EXPERTS = "backbone.layers.1.mixer.experts"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_into(tmp_path_factory.mktemp("text"), python_files())


@pytest.fixture(scope="module")
def trained(text: Path) -> Path:
    """A model with its own tokenizer, in which no parameter has its initial value."""
    prepared = data.prepare(
        vocab_size=300, root=text, held_out_bytes=2_000, cache=text.parent / "cache"
    )
    model = nemotron_lite.Nemotron(TINY, seed=0)
    randomize(model.state_dict().items(), 3)
    nemotron_lite.save(model, text.parent / "model", tokenizer=prepared.tokenizer)
    return text.parent / "model"


def quantize(trained: Path, text: Path, out: Path, *more: object, code: int = 0) -> Result:
    return call(
        "quantize",
        "--model",
        trained,
        "--out",
        out,
        "--text",
        text,
        "--prompts",
        4,
        "--tokens",
        32,
        "--held-out",
        2_000,
        *more,
        code=code,
    )


def test_one_format_for_all(trained: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    shown = quantize(trained, text, out, "--format", "nvfp4", "--cache").stdout
    assert re.findall(r"^(\d)\. (\w+)", shown, re.MULTILINE) == [
        ("1", "Read"),
        ("2", "Calibrate"),
        ("3", "Choose"),
        ("4", "Write"),
        ("5", "Score"),
    ]
    # The experts' second matrix has 24 columns, padded to 32. Each matrix has two float32 scales.
    bits = (4 * (24 * 16 * 4.5 + 64) + 4 * (16 * 32 * 4.5 + 64)) / (2 * 4 * 24 * 16)
    row = re.search(r"│ NVFP4 +│ routed experts +│ +2 │ +(\S+ K) │ +([\d.]+) │", shown)
    assert row is not None and float(row[2]) == pytest.approx(bits, abs=1e-3)
    assert re.search(r"│ as it was +│ +\d\.\d{4} ", shown)
    change = re.search(r"│ quantized +│ +\d\.\d{4} │ +\d\.\d{4} │ ([+-][\d.]+)% │", shown)
    assert change is not None and float(change[1]) != 0
    share = round(100 * weight_bytes(out) / weight_bytes(trained))
    assert f"({share}%)" in shown and share < 60
    model = nemotron_lite.load(out, packed=True)
    assert isinstance(model.get_submodule(f"{EXPERTS}.up_proj"), PackedWeight)
    assert "backbone.layers.2.mixer.k_proj.k_scale" in model.state_dict()
    assert model.tokenizer is not None
    shown = call("info", out).stdout
    assert re.search(r"│ NVFP4 +│ routed experts ", shown)
    assert re.search(r"│ BF16 +│ embedding ", shown)


def test_the_field_of_json_lines(trained: Path, text: Path, tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    body = "".join(python.read_text() for python in sorted(text.glob("*.py")))
    file.write_text(json.dumps({"body": body}))
    out, more = tmp_path / "small", ("--format", "nvfp4", "--held-out", 0)
    refused = quantize(trained, file, out, *more, code=1).stderr
    assert "'text'" in refused and "notes.jsonl" in refused
    quantize(trained, file, out, *more, "--jsonl-field", "body")
    assert weight_bytes(out) < weight_bytes(trained)


def test_a_mix_within_a_budget(trained: Path, text: Path, tmp_path: Path) -> None:
    shown = quantize(trained, text, tmp_path / "mix", "--bits", 7, "--held-out", 0).stdout
    found = re.search(r"(\d+) modules can be quantized: (.*); ([\d.]+) bits a weight", shown)
    assert found is not None
    assert {"fp8", "nvfp4"} <= set(found[2].replace(",", "").split())
    assert 6 < float(found[3]) <= 7
    assert "Score" not in shown
    written = json.loads((tmp_path / "mix" / "hf_quant_config.json").read_text())
    assert written["quantization"]["quant_algo"] == "MIXED_PRECISION"


def test_packed_weights_generate_the_same_text(trained: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    quantize(trained, text, out, "--format", "fp8", "--held-out", 0)
    options = ("generate", "--model", out, "--prompt", "def f", "--max-new-tokens", 8,
               "--temperature", 0, "--dtype", "float32")  # fmt: skip
    plain = call(*options).stdout
    assert call(*options, "--packed").stdout == plain
    half = call(*options, "--packed", "--ssm-dtype", "float16")
    assert half.stdout.startswith("def f")
    assert call(*options, "--packed", "--ssm-dtype", "float16").stdout == half.stdout
    plain_folder = ("generate", "--model", trained, "--prompt", "x", "--packed")
    assert "is quantized. Omit this option" in call(*plain_folder, code=1).stderr
    assert "--ssm-dtype int8: expected" in call(*options, "--ssm-dtype", "int8", code=1).stderr


def test_wrong_options_are_refused_before_any_work(
    trained: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for more, words in {
        ("--bits", 4.75, "--format", "fp8"): "a budget or one format, not both",
        ("--format", "int4"): "--format int4: expected one of nvfp4, fp8, bf16",
        ("--choices", "all"): "--choices all: expected one of any, report",
        ("--bits", 4.0): "the smallest formats of these modules take",
        ("--tokens", 100_000): "no document has 100000 tokens",
        ("--held-out", -1): "--held-out -1",
    }.items():
        assert words in quantize(trained, text, out, *more, code=1).stderr
    assert "is the model itself" in quantize(trained, text, trained, code=1).stderr
    assert not out.exists()
    quantize(trained, text, out, "--format", "fp8", "--held-out", 0)
    again = quantize(out, text, tmp_path / "again", code=1).stderr
    assert "is quantized already (FP8)" in again


@pytest.mark.parametrize("kind", ["a file", "below a file", "a pipe", "a name too long", "empty"])
def test_an_output_that_cannot_be_written_is_refused_before_any_work(
    trained: Path, text: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "file").write_text("mine")
    os.mkfifo(tmp_path / "pipe")
    out = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "sub" / "m",
        "a pipe": tmp_path / "pipe",
        "a name too long": tmp_path / ("n" * 300),
        "empty": " ",
    }[kind]
    found = quantize(trained, text, Path(out), "--format", "fp8", code=1)
    assert found.stdout == "", "not even the first step has begun"
    assert "name" in found.stderr and "Traceback" not in found.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "pipe"]
    assert (tmp_path / "file").read_text() == "mine"


def test_trying_the_output_leaves_nothing_behind(trained: Path, tmp_path: Path) -> None:
    check_options(trained, tmp_path / "a" / "b", None, None, "any")
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_folder_is_gone_is_saved_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    (tmp_path / "out").write_text("the folder became a file")
    model = nemotron_lite.Nemotron(TINY, seed=4)
    with pytest.raises(OSError, match=r"out is a file.*It is in .*temporary") as caught:
        save_model(model, tmp_path / "out")
    found = re.search(r"It is in (\S+) instead", str(caught.value))
    assert found is not None
    assert torch.equal(nemotron_lite.load(found[1]).lm_head.weight, model.lm_head.weight)
    monkeypatch.setattr(tempfile, "mkdtemp", lambda prefix: str(tmp_path / "out"))
    with pytest.raises(OSError, match=r"cannot be saved to .*out \(.*\) nor to .*model"):
        save_model(model, tmp_path / "out")


def test_storage_report_reads_headers_only_and_refuses_damaged_files(
    trained: Path, tmp_path: Path
) -> None:
    groups = storage_summary(trained)
    stored = sum(group.num_bytes for group in groups)
    assert {group.format for group in groups} == {"F32"}
    experts = next(group for group in groups if group.role == "experts")
    assert (experts.modules, experts.weights, experts.bits) == (2, 2 * 2 * 4 * 24 * 16, 32)
    with torch.device("meta"):
        model = nemotron_lite.Nemotron(TINY)
    assert sum(group.weights for group in groups) == model.num_parameters()
    assert stored <= weight_bytes(trained) < stored + 20_000, "headers"
    broken = tmp_path / "broken"
    shutil.copytree(trained, broken)
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError):
        storage_summary(broken)
    with pytest.raises(CheckpointError):
        weight_bytes(tmp_path / "nowhere")
