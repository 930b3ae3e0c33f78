"""`train-lite`: from the manifest to a packed model with its record, on a tiny model and text."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import nemotron_lite
from nemotron_lite import data, shipped_models
from nemotron_lite.data import CHAT_TOKENS, prepared_mixture
from nemotron_lite.data.make_manifest import PHASES
from nemotron_lite.data.manifest import TokenizerSettings, describe_sources
from nemotron_lite.data.sources import read_sources
from nemotron_lite.train import TrainConfig, lite_recipe, lite_record, lite_training
from tests.cli.commands import TINY, call
from tests.data.packages import code, corpus_of, install, prose

SETTINGS = TokenizerSettings(vocab_size=300, special_tokens=CHAT_TOKENS, train_bytes=20_000)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages, a standard library of four files, a small recipe; the manifest's path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "site"
    monkeypatch.syspath_prepend(place)
    for i, name in enumerate(("alpha", "beta")):
        module = f'"""{prose(i)}"""\n' + code(i)
        install(place, name, {f"{name}/a.py": module}, readme=prose(10 + i))
    monkeypatch.setattr(prepared_mixture, "load_corpus", lambda: corpus_of(3))
    corpus = corpus_of(3)
    manifest = describe_sources(read_sources(corpus, ["alpha", "beta"]), corpus, PHASES, SETTINGS)
    path = tmp_path / "manifest.json"
    path.write_text(manifest.to_json())
    real = data.open_mixture
    monkeypatch.setattr(data, "open_mixture", lambda **more: real(path, **more))
    monkeypatch.setattr(data, "read_manifest", lambda: manifest)
    monkeypatch.setattr(data, "prepare", _prepare)
    monkeypatch.setattr(lite_recipe, "lite_config", lambda: TINY)
    monkeypatch.setattr(
        lite_recipe,
        "lite_training",
        lambda precision, **given: TrainConfig(
            batch_size=2, seq_len=16, save_every=2, precision=precision, **given
        ),
    )
    monkeypatch.setattr(lite_training, "CALIBRATION", dict(batches=1, batch_size=2, seq_len=16))
    monkeypatch.setattr(lite_record, "NEW_TOKENS", 8)
    return path


def _prepare(*, tokenizer: Any, held_out_names: Any) -> Any:
    """The baselines of the small standard library."""
    assert set(held_out_names) == {"held.py"}
    corpus = corpus_of(3)
    found = data.measure_baselines(
        [d.content for d in corpus.train], [d.content for d in corpus.held_out]
    )

    class Prepared:
        baselines = found

    return Prepared


def test_train_lite_makes_what_is_shipped(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    options = ("train-lite", "--out", run, "--steps", 5, "--precision", "fp32")
    shown = call(*options).stdout
    assert re.findall(r"^(\d)\. (\w+)", shown, re.MULTILINE) == [
        ("1", "Read"), ("2", "Train"), ("3", "Pack"), ("4", "Score"),
    ]  # fmt: skip
    with monkeypatch.context() as installed:
        installed.setattr(shipped_models, "FOLDER", run)
        record = shipped_models.read_record("lite")
        assert nemotron_lite.load("lite", packed=True).config == TINY
    assert record["training"]["updates"] == 5
    assert record["training"]["tokens"] == 5 * 32
    assert record["training"]["config"]["precision"] == "fp32"
    assert record["text"]["differences"] == []
    assert record["text"]["held_out_bytes"] == len(code(2000))
    assert len(record["curve"]["ce"]) == 5
    assert len(record["curve"]["mtp"]) == 1
    assert {"gzip", "lzma", "ngram", "ngram_order"} == set(record["scores"]["baselines"])
    assert record["versions"]["torch"]

    held_out = data.open_mixture(batches=5, vocab_size=300).held_out
    for name, folder in (("trained", run / "model"), ("packed", run / "lite")):
        score = nemotron_lite.train.evaluate(nemotron_lite.load(folder), held_out)
        stored = record["scores"]["bits_per_byte"][name]
        assert stored == pytest.approx(score.bits_per_byte, abs=1e-4), name

    first = json.loads((run / "lite" / "record.json").read_text())
    call(*options)  # a finished run is packed and scored again
    again = json.loads((run / "lite" / "record.json").read_text())
    assert again["scores"] == first["scores"]
    refused = call(*options[:3], "--steps", 6, code=1).stderr
    assert "steps" in refused


def test_other_packages_are_named_with_the_option(machine: Path, tmp_path: Path) -> None:
    wrong = replace(data.read_manifest(), held_out={"held.py": "0" * 64})
    machine.write_text(wrong.to_json())
    options = ("train-lite", "--out", tmp_path / "run", "--steps", 1, "--precision", "fp32")
    refused = " ".join(call(*options, code=1).stderr.split())
    assert "the held-out files of the standard library are others" in refused
    assert "add --text-as-found" in refused
    assert "strict=False" not in refused
    assert not (tmp_path / "run").exists()
    call(*options, "--text-as-found")
    assert (tmp_path / "run" / "lite" / "record.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "--device tpu: expected cpu or cuda"),
        (("--steps", 0), "steps=0"),
        (("--precision", "fp9"), "fp9"),
        (("--out", "/proc/lite"), "/proc"),
    ],
)
def test_wrong_options_end_before_anything_is_read(
    machine: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[Any, ...], message: str
) -> None:
    monkeypatch.setattr(data, "open_mixture", lambda **_: pytest.fail("the text was read"))
    assert message in call("train-lite", *arguments, code=1).stderr
