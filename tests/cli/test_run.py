"""The first command: its five parts, on models of a few thousand parameters and a little text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nemotron_lite
from nemotron_lite import data, ledger, shipped_models
from nemotron_lite.backends import compiled_step
from nemotron_lite.cli import run, tables
from nemotron_lite.data import Document, read_manifest
from nemotron_lite.train import TrainConfig, lite_recipe
from tests.cli.commands import TINY, call, copy_into, python_files


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    """A config.json of a small model; its vocabulary is not the shipped tokenizer's."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY.replace(pattern="M*", vocab_size=400).to_hf()))
    return file


@pytest.fixture
def text(tmp_path: Path, own_cache: None) -> Path:
    return copy_into(tmp_path / "text", python_files()[:8])


def titles(shown: str) -> list[tuple[str, str]]:
    return re.findall(r"^(\d)\. (\w+)", shown, re.MULTILINE)


def scores(shown: str) -> list[dict[str, float]]:
    """The tables of scores, in their order."""
    found = []
    for table in shown.split("bits per byte ┃")[1:]:
        rows = re.findall(r"│ (\S[^│]*?) +│ +(\d\.\d{3})", table.partition("└")[0])
        found.append({name: float(value) for name, value in rows})
    return found


PARTS = [("1", "Assemble"), ("2", "Write"), ("3", "Score"), ("4", "Train"), ("5", "Go")]


def test_run_has_five_parts(tiny_lite: Path, sizes: Path, text: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in tiny_lite.iterdir()}
    result = call(
        "run", "--model", sizes, "--text", text, "--max-seconds", 1, "--out", tmp_path / "model"
    )
    shown = result.stdout
    assert titles(shown) == PARTS
    assert tables.number(ledger.parameters(TINY).total) in shown.partition("2. Write")[0]

    part = shown.partition("2. Write")[2].partition("3. Score")[0]
    lite = nemotron_lite.load("lite")
    expected = nemotron_lite.generate(lite, run.SAMPLE_PROMPT, options=run.SAMPLE)
    assert f"{run.SAMPLE_PROMPT}{expected}\n" in part
    assert "not the probability of any text" in part
    speeds = re.findall(r"│ +([\d,]+) │ +([\d.]+) x │ +([\d.]+) │", part)
    assert len(speeds) == 4 or ("the ordinary way, because" in part and len(speeds) == 2)
    assert speeds[0][1:] == ("1.00", "1.00")
    assert all(float(per_pass) >= 1 for *_, per_pass in speeds)

    first, second = scores(shown)
    assert set(first) == {"lite, shipped", "gzip -9", "LZMA", "6-gram of bytes"}
    assert set(second) - set(first) == {"the one just trained"}
    assert list(second.values()) == sorted(second.values())
    assert {name: second[name] for name in first} == first
    assert "3.2 M tokens of Python, not this text" in shown

    trained = nemotron_lite.load(tmp_path / "model")
    assert trained.config.pattern == "M*"
    assert trained.config.vocab_size == 300  # of the shipped tokenizer
    assert trained.tokenizer.to_str() == lite.tokenizer.to_str()
    held_out = data.prepare(root=text, tokenizer=lite.tokenizer).held_out
    again = nemotron_lite.train.evaluate(trained, held_out)
    assert second["the one just trained"] == pytest.approx(again.bits_per_byte, abs=6e-4)
    for name in ("chat", "generate --model", "info super", "make lab"):
        assert name in shown.partition("5. Go on")[2]
    assert {file: file.read_bytes() for file in tiny_lite.iterdir()} == before


def test_without_a_compiler_run_says_so(
    tiny_lite: Path, sizes: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_step._load.cache_clear()
    monkeypatch.setenv("CC", "/no/such/compiler")
    try:
        shown = call(
            "run", "--model", sizes, "--text", text, "--max-seconds", 1, "--out", tmp_path / "model"
        ).stdout
    finally:
        compiled_step._load.cache_clear()
    assert titles(shown) == PARTS
    assert len(re.findall(r"│ +([\d,]+) │ +([\d.]+) x │ +([\d.]+) │", shown)) == 2
    assert "'/no/such/compiler' names no program" in " ".join(shown.split())


def test_the_live_run_and_its_curve(
    tiny_lite: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --model the small model of the recipe is trained, over the reference curve."""
    monkeypatch.setattr(lite_recipe, "live_config", lambda: TINY.replace(pattern="M"))
    monkeypatch.setattr(
        lite_recipe,
        "live_training",
        lambda precision, **given: TrainConfig(
            seq_len=32, batch_size=2, precision=precision, **given
        ),
    )
    monkeypatch.setattr(run, "_text", lambda lite, *_: _prepared(lite, text))
    saved = tmp_path / "curve.json"
    shown = call(
        "run", "--max-seconds", 1, "--out", tmp_path / "model", "--save-curve", saved,
        "--precision", "fp32", "--seed", 5,
    ).stdout  # fmt: skip
    chart = shown.partition("4. Train")[2].partition("Read ")[0]
    assert "in fp32" in chart
    assert chart.count("*") >= 3
    assert chart.isascii()
    assert ".: the same run on a quiet machine (a quiet one), 4.500" in chart
    assert "3.2 M tokens of Python " in shown  # this is the text that it has not seen
    curve = json.loads(saved.read_text())
    assert len(curve["seconds"]) == len(curve["loss"]) <= 150
    assert curve["seconds"] == sorted(curve["seconds"])
    assert curve["loss"][-1] < curve["loss"][0]
    assert curve["config"]["seed"] == 5
    assert curve["tokens"] % 64 == 0
    (shipped_models.FOLDER / shipped_models.CURVE).unlink()
    assert shipped_models.read_live_curve() is None


def _prepared(lite: Any, text: Path) -> data.TextData:
    return data.prepare(root=text, tokenizer=lite.tokenizer)


def test_quiet_prints_results_only(
    tiny_lite: Path, sizes: Path, text: Path, tmp_path: Path
) -> None:
    result = call(
        "run", "--quiet", "--model", sizes, "--text", text, "--max-seconds", 0.3, "--out",
        tmp_path / "model",
    )  # fmt: skip
    assert result.stderr == ""
    assert titles(result.stdout) == []
    assert len(scores(result.stdout)) == 2
    assert "*" not in result.stdout.partition("4. Train")[2]


@pytest.mark.parametrize(
    ("changed", "missing", "said"),
    [(0, 0, None), (1, 0, "1 of the"), (3, 2, "3 of the"), (0, 1, "and 1 are missing")],
)
def test_another_python_is_named(changed: int, missing: int, said: str | None) -> None:
    wanted = dict(read_manifest().held_out)
    names = sorted(wanted)
    here = {name: wanted[name] for name in names[missing:]}
    here |= dict.fromkeys(names[missing : missing + changed], "0" * 64)
    remark = run.held_out_remark(wanted, here)
    assert (remark is None) == (said is None)
    assert said is None or said in str(remark)


def test_what_the_manifest_holds_out_is_scored(
    tiny_lite: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Held out are the files with the manifest's names, whatever a split here would choose."""
    files = tuple(
        Document(file.name, file.read_bytes()) for file in python_files()[:8]
    )  # a small standard library
    monkeypatch.setattr(
        "nemotron_lite.data.corpus._read", lambda *_: (data.corpus.FoundText([], {}), [*files])
    )
    wanted = replace(
        read_manifest(), held_out={files[2].name: "0" * 64, files[5].name: "1" * 64, "gone.py": "2"}
    )
    monkeypatch.setattr(data, "read_manifest", lambda: wanted)
    lite = nemotron_lite.load("lite")
    found = run._text(lite, None, "text")
    assert len(found.held_out.documents) == 2
    assert found.held_out.num_bytes == len(files[2].content) + len(files[5].content)
    shown = capsys.readouterr().out
    assert "other versions of 2 of the 3 held-out files, and 1 are missing" in shown


def test_the_field_of_json_lines(tiny_lite: Path, own_cache: None, tmp_path: Path) -> None:
    file = tmp_path / "notes.jsonl"
    bodies = [f"def f_{i}():\n    return {i}\n" * 9000 for i in range(3)]
    file.write_text("\n".join(json.dumps({"body": body}) for body in bodies))
    found = run._text(nemotron_lite.load("lite"), file, "body")
    assert found.train_bytes + found.held_out.num_bytes == sum(map(len, bodies))
    options = ("--max-seconds", 0.3, "--out", tmp_path / "model", "--quiet")
    refused = call("run", "--text", file, *options, code=1).stderr
    assert "'text'" in refused and "notes.jsonl" in refused


def test_the_recipe_of_the_live_run() -> None:
    config = lite_recipe.live_config()
    how = lite_recipe.live_training("fp32")
    assert config.vocab_size == lite_recipe.lite_config().vocab_size
    assert how.max_seconds == lite_recipe.LIVE_SECONDS
    assert {"M", "E", "*"} == set(config.pattern)
    assert ledger.parameters(config).total < ledger.parameters(lite_recipe.lite_config()).total
    assert lite_recipe.choose_precision("auto") in ("bf16", "fp32")
    assert lite_recipe.choose_precision("nvfp4") == "nvfp4"
    with pytest.raises(ValueError, match="fp7"):
        lite_recipe.choose_precision("fp7")
