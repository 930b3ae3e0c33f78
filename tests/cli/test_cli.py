"""The commands, on models of a few thousand parameters and a text of some hundred kilobytes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import nemotron_lite
from nemotron_lite import cli
from nemotron_lite.cli import app, common, tables
from tests.cli.commands import TINY, call, copy_into, python_files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    """A config.json of a tiny model."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY.to_hf()))
    return file


@pytest.fixture
def text(tmp_path: Path, own_cache: None) -> Path:
    """A folder of Python files."""
    return copy_into(tmp_path / "text", python_files())


def test_info_shows_the_published_totals():
    shown = call("info", "super", "--context", 1_048_576).stdout
    for figure in ("120,668,707,840", "2,942,325,248", "123,611,033,088", "12.77 B", "12.23 B"):
        assert figure in shown
    assert "4096 * (2*128*64 + 2*8*128 + 128) = 76.02 M" in shown
    assert re.search(r"1,048,576\W+8 GiB\W+2.344 MiB\W+160 MiB\W+8.159 GiB", shown)


def test_info_reads_a_folder_and_lists_layers(sizes):
    shown = call("info", sizes.parent, "--layers").stdout
    kinds = re.findall(r"│ (\d) +│ (mamba|moe|attention) ", shown)
    assert kinds == [("0", "mamba"), ("1", "moe"), ("2", "attention"), ("3", "moe")]
    with torch.device("meta"):
        stored = nemotron_lite.Nemotron(TINY).num_parameters()
    assert f"{stored:,}" in shown


def test_info_draws_the_map_of_a_recipe(sizes):
    shown = call("info", "super").stdout
    assert re.search(r"NVFP4 +│ routed experts +│ 34: 1 to 74 +│ +95.83 B │ 77.5% │", shown)
    assert re.search(r"MXFP8 +│ Mamba out_proj +│ 34: 0 to 73 ", shown)
    assert re.search(r"BF16 +│ the last layers +│ 13: 75 to 87 ", shown)
    assert "tail of BF16 from layer 75" in " ".join(shown.split())
    assert re.search(r"gradient along tokens +│ dW +│ 1x16 +│ yes +│ stochastic", shown)
    assert re.search(r"│ weight +│ y, dx +│ 16x16 +│ no +│ to nearest", shown)
    shown = call("info", sizes.parent, "--layers", "--precision", "bf16").stdout
    assert "NVFP4" not in shown
    assert re.search(r"│ 1 +│ moe +│ BF16, FP32 ", shown)


def test_info_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli.out, "_width", 80)
    result = CliRunner().invoke(app, ["info", "super"])
    assert "in numbers" not in result.stdout
    assert "120,668,707,840" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 88  # the pattern string is not cut


def test_train_writes_a_checkpoint_and_generate_is_reproducible(sizes, text, tmp_path):
    run = tmp_path / "run"
    shown = call(
        "train",
        "--model",
        sizes,
        "--text",
        text,
        "--out",
        run,
        "--steps",
        3,
        "--batch-size",
        2,
        "--seq-len",
        32,
        "--seed",
        1,
    ).stdout
    assert re.search(r"this Nemotron\W+\d\.\d{3}", shown)
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3]
    loaded = nemotron_lite.load(run / "model")
    assert loaded.config.pattern == TINY.pattern
    assert loaded.config.mtp_pattern == "*E"

    options = ("--model", run / "model", "--prompt", "def f", "--max-new-tokens", 12)
    first = call("generate", *options, "--temperature", 1.0, "--seed", 7)
    assert call("generate", *options, "--temperature", 1.0, "--seed", 7).stdout == first.stdout
    assert call("generate", *options, "--temperature", 1.0, "--seed", 8).stdout != first.stdout
    assert "tokens/s" in first.stderr
    greedy = call("generate", *options, "--temperature", 0).stdout
    ids = loaded.tokenizer.encode("def f").ids
    [new] = nemotron_lite.generate(loaded, [ids], 12, temperature=0)
    assert greedy == loaded.tokenizer.decode(ids + new) + "\n"
    assert greedy == "def f" + nemotron_lite.generate(loaded, "def f", 12, temperature=0) + "\n"
    drafted = call(
        "generate", *options, "--temperature", 0, "--draft", "mtp", "--draft-length", 2, "--fixed"
    )
    assert drafted.stdout == greedy
    assert "acceptance length" in drafted.stderr
    assert "acceptance length" not in first.stderr
    wrong = call("generate", *options, "--draft", "eagle", code=1)
    assert "--draft eagle: expected mtp" in wrong.stderr


def test_info_shows_the_family_and_each_of_its_members(monkeypatch):
    shown = call("info", "--family", "--context", 1000).stdout
    rows = [line.replace("│", " ").split() for line in shown.splitlines() if "lite-" in line]
    assert [row[0] for row in rows] == [f"lite-{depth}" for depth in range(1, 13)]
    assert rows[5][1:5] == ["14", "256", "14.13", "M"]
    assert "at 1,000 tokens" in shown
    monkeypatch.setattr(cli.out, "_width", 80)
    narrow = call("info", "--family").stdout
    assert "cache" not in narrow
    assert "96.09 M" in narrow
    assert "lite-2: 5 layers" in call("info", "lite-2").stdout


@pytest.mark.parametrize("precision", ["fp32", "nvfp4"])
def test_train_resumes_where_it_stopped(sizes, text, tmp_path, precision):
    options = (
        "--model", sizes, "--text", text, "--batch-size", 2, "--seq-len", 32, "--save-every", 2,
        "--steps", 4, "--precision", precision,
    )  # fmt: skip
    call("train", *options, "--out", tmp_path / "whole")
    call("train", *options, "--out", tmp_path / "parts")
    for newest in (tmp_path / "parts" / "checkpoints").glob("*4*"):
        newest.unlink()
    refused = call("train", *options, "--out", tmp_path / "parts", code=1).stderr
    assert "already holds a run" in refused
    call("train", *options, "--out", tmp_path / "parts", "--resume")
    losses = [
        [json.loads(line)["loss"] for line in file.read_text().splitlines()]
        for file in (tmp_path / name / "log.jsonl" for name in ("whole", "parts"))
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "supper"), "no preset 'supper'; there are lite, tiny-super, nano, super, ultra"),
        (("info", "lite", "--context", "0"), "context=0"),
        (("generate", "--model", "nowhere", "--prompt", "x"), "nowhere"),
        (("train", "--out", "x"), "steps and max_seconds are both None"),
        (("train", "--out", "x", "--model", "ultra", "--steps", "1"), "8,352 GiB.*such as lite"),
        (("train", "--out", "x", "--steps", "0"), "steps=0"),
        (("train", "--out", "x", "--steps", "1", "--text", "nowhere"), "nowhere"),
        (("run", "--max-seconds", "0"), "max_seconds=0"),
        (("run", "--precision", "fp8"), "precision='fp8': expected one of fp32, bf16, nvfp4"),
        (("info", "--precision", "int4"), "precision='int4'"),
    ],
)
def test_user_errors_print_one_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments, code=1)
    assert result.stderr.startswith("Error: ")
    assert re.search(message, result.stderr)
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == []


def test_missing_and_invalid_configs(tmp_path):
    assert "no config.json in" in call("info", tmp_path, code=1).stderr
    (tmp_path / "config.json").write_text("{")
    assert "is no readable JSON" in call("info", tmp_path, code=1).stderr
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf() | {"num_experts_per_tok": 9}))
    assert "num_experts_per_tok=9" in call("info", tmp_path, code=1).stderr


def test_a_text_prompt_needs_a_tokenizer(tmp_path):
    nemotron_lite.save(nemotron_lite.Nemotron(TINY), tmp_path / "model")
    options = ("generate", "--model", tmp_path / "model", "--prompt", "x")
    assert "has no tokenizer.json" in call(*options, code=1).stderr
    assert "--dtype int3" in call(*options, "--dtype", "int3", code=1).stderr


def test_a_fault_of_the_package_is_one_line_and_a_traceback_on_request(monkeypatch):
    def broken(*_: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("nemotron_lite.cli.info.read_config", broken)
    [line] = call("info", "lite", code=1).stderr.splitlines()
    assert line.startswith("Error: KeyError: 'a bug' (a fault of nemotron_lite, in ")
    assert "--traceback shows all of it" in line
    for options in (["--traceback", "info", "lite"], ["info", "lite", "--traceback"]):
        assert isinstance(CliRunner().invoke(app, options).exception, KeyError)
    monkeypatch.setenv("NEMOTRON_LITE_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(app, ["info", "lite"]).exception, KeyError)
    shown = CliRunner().invoke(app, ["--traceback", "generate", "--model", "no", "--prompt", "x"])
    assert isinstance(shown.exception, nemotron_lite.CheckpointError)


def test_the_installed_command_starts_without_torch():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    module, name = scripts["nemotron-lite"].split(":")
    for arguments, shown, needs_torch in (
        (["--help"], "quantize", False),
        (["--version"], f"nemotron-lite {nemotron_lite.__version__}", False),
        (["generate", "--help"], "--max-new-tokens", False),
        (["info", "nano"], "31,577,940,288", True),  # the layers hold the formulas of the ledger
    ):
        program = (
            f"import sys; from {module} import {name}\n"
            f"try: {name}({arguments}, prog_name='nemotron-lite')\n"
            "finally: print('torch' in sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert shown in done.stdout
        assert done.stdout.splitlines()[-1] == str(needs_torch)


def test_the_package_is_a_program(tmp_path):
    """`python -m nemotron_lite` is the command, for those who have no script on their path."""
    done = subprocess.run(
        [sys.executable, "-m", "nemotron_lite", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: python -m nemotron_lite" in done.stdout


def test_the_command_that_is_shown_can_be_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", [".venv/bin/nemotron-lite", "run"])
    assert common.program() == ".venv/bin/nemotron-lite"
    monkeypatch.setattr(sys, "argv", ["/somewhere/nemotron_lite/__main__.py", "run"])
    assert common.program() == f"{sys.executable} -m nemotron_lite"


def test_numbers_and_sizes_are_readable():
    assert tables.number(120_668_707_840) == "120.7 B"
    assert tables.number(999) == "999"
    assert tables.number(0.5) == "0.5"
    assert tables.size(167_772_160) == "160 MiB"
    assert tables.size(1023) == "1023 B"
    assert tables.size(2_457_600) == "2.344 MiB"
