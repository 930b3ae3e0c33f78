"""A resume that is another run is refused with a table; what may change is accepted by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.model import Nemotron
from nemotron_lite.train import ResumeError, TrainConfig, fingerprint, train
from nemotron_lite.train.fingerprint import compare_runs, run_fingerprint

RECIPE: dict[str, Any] = dict(steps=3, batch_size=2, seq_len=24)


def other_text(text: ConcatenatedDocuments) -> ConcatenatedDocuments:
    tokens = np.array(text.tokens)
    tokens[-1] = (tokens[-1] + 1) % 90
    return ConcatenatedDocuments(tokens, text.starts)


def with_tokenizer(model: Nemotron, word: str) -> Nemotron:
    model.tokenizer = Tokenizer(models.WordLevel({"a": 0, word: 1}, unk_token="a"))
    return model


def go(model: Nemotron, text: Any, folder: Path, **options: Any) -> Any:
    config = TrainConfig(**{**RECIPE, **options.pop("config", {})})
    return train(model, text, config, out_dir=folder, progress=False, **options)


def test_a_text_that_differs_in_one_token_is_another_run(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    go(model, text, tmp_path)
    changed = other_text(text)
    with pytest.raises(ResumeError) as error:
        go(model, changed, tmp_path, resume=True)
    message = str(error.value)
    assert "1 thing differs" in message
    assert text.fingerprint()[:30] in message
    assert changed.fingerprint()[:30] in message
    assert "allow_changes=['text'] (--allow-changed text)" in message
    result = go(model, changed, tmp_path, resume=True, allow_changes=["text"])
    assert any(note.startswith("text was") for note in result.notes)


CHANGES: dict[str, Any] = {
    "steps": 9, "batch_size": 3, "seq_len": 25, "gradient_accumulation_steps": 2, "lr": 1e-3,
    "min_lr": 1e-6, "warmup_fraction": 0.1, "decay_fraction": 0.1, "betas": (0.8, 0.9),
    "eps": 1e-7, "weight_decay": 0.0, "grad_clip": 2.0, "mtp_weight": 0.1,
    "mtp_target": "backbone", "balance_weight": 0.1, "bias_rate": 0.1, "precision": "bf16",
    "seed": 5, "optimizer": "muon",
}  # fmt: skip
FREE: dict[str, Any] = {
    "max_seconds": 600.0, "save_every": 2, "save_every_seconds": 5.0, "keep_checkpoints": 7,
    "eval_every": 3, "eval_batches": 2, "gradient_checkpointing": True,
    "merge_every": 2, "merge_windows": (),
}  # fmt: skip


def test_each_option_is_compared_or_free_and_accepted_by_its_name(
    model: Nemotron, text: ConcatenatedDocuments
) -> None:
    saved = run_fingerprint(model, text, TrainConfig(**RECIPE))
    options = TrainConfig(**RECIPE, merge_every=1).to_dict()
    assert set(CHANGES) | set(FREE) == set(options)
    assert set(FREE) == fingerprint.FREE
    for name, value in (CHANGES | FREE).items():
        now = run_fingerprint(model, text, TrainConfig(**{**RECIPE, name: value}))
        if name in FREE:
            assert compare_runs(saved, now, allow_changes=(), folder="run") == []
            continue
        with pytest.raises(ResumeError, match=rf"(?s)1 thing differs.*\n  {name} "):
            compare_runs(saved, now, allow_changes=("text",), folder="run")
        [note] = compare_runs(saved, now, allow_changes=(name,), folder="run")
        assert note.startswith(f"{name} was")


def test_the_table_lists_everything_that_differs(
    model: Nemotron, text: ConcatenatedDocuments
) -> None:
    saved = run_fingerprint(model, text, TrainConfig(**RECIPE))
    now = run_fingerprint(
        Nemotron(model.config.replace(moe_intermediate_size=16)), other_text(text),
        TrainConfig(**{**RECIPE, "lr": 0.5, "seed": 9}),
    )  # fmt: skip
    with pytest.raises(ResumeError) as error:
        compare_runs(saved, now, allow_changes=(), folder="run")
    lines = str(error.value).splitlines()
    assert "4 things differ" in lines[0]
    assert lines[1].split() == ["in", "the", "run", "now"]
    assert [line.split()[0] for line in lines[2:-1]] == [
        "text", "lr", "seed", "model.moe_intermediate_size",
    ]  # fmt: skip
    assert lines[-2].split()[1:] == ["24", "16"]
    assert "model.moe_intermediate_size can never change" in lines[-1]


def test_the_tokenizer_never_changes(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    go(with_tokenizer(model, "b"), text, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == model.tokenizer.to_str()
    with pytest.raises(ResumeError, match=r"tokenizer can never change.*--init-from"):
        go(with_tokenizer(model, "c"), text, tmp_path, resume=True)
    with pytest.raises(ValueError, match="tokenizer may never change"):
        go(with_tokenizer(model, "c"), text, tmp_path, resume=True, allow_changes=["tokenizer"])
    assert go(with_tokenizer(model, "b"), text, tmp_path, resume=True).notes == []


@pytest.mark.parametrize("names", [["learning_rate"], ["lr", "model.hidden_size"], ["versions"]])
def test_an_unknown_name_is_refused_with_the_known_ones(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path, names: list[str]
) -> None:
    go(model, text, tmp_path)
    with pytest.raises(ValueError, match=r"--allow-changed.*expected some of .*lr,.*text"):
        go(model, text, tmp_path, resume=True, allow_changes=names)


def test_other_versions_are_reported_and_not_refused(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(model, text, tmp_path)
    monkeypatch.setattr(fingerprint.torch, "__version__", "9.9.9")
    result = go(model, text, tmp_path, resume=True)
    assert len(result.notes) == 1
    assert "and is 9.9.9 now: losses may differ in the last digits" in result.notes[0]


def test_a_source_without_a_fingerprint_works_as_before(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    class Plain:
        def batch(self, index: int, **arguments: Any) -> Any:
            return text.batch(index, **arguments)

    class Attribute(Plain):
        fingerprint = "a text of mine"

    class Wrong(Plain):
        def fingerprint(self) -> int:
            return 5

    go(model, Plain(), tmp_path / "plain")
    assert go(model, Plain(), tmp_path / "plain", resume=True).notes == []
    [note] = go(model, text, tmp_path / "plain", resume=True).notes
    assert "the text was not compared" in note
    go(model, Attribute(), tmp_path / "attribute")
    assert go(model, Attribute(), tmp_path / "attribute", resume=True).notes == []
    with pytest.raises(TypeError, match="the fingerprint of Wrong is int"):
        go(model, Wrong(), tmp_path / "wrong")


def test_a_fingerprint_is_of_the_content(text: ConcatenatedDocuments) -> None:
    again = ConcatenatedDocuments(np.array(text.tokens), np.array(text.starts))
    assert again.fingerprint() == text.fingerprint()
    joined = ConcatenatedDocuments(text.tokens, text.starts, isolate_documents=False)
    fewer = ConcatenatedDocuments(text.tokens, text.starts[:-1])
    found = {t.fingerprint() for t in (text, other_text(text), joined, fewer)}
    assert len(found) == 4


def test_an_option_that_an_older_version_did_not_have_has_its_old_value(
    model: Nemotron, text: ConcatenatedDocuments
) -> None:
    now = run_fingerprint(model, text, TrainConfig(**RECIPE))
    old = {**now, "options": {k: v for k, v in now["options"].items() if k != "optimizer"}}
    compare_runs(old, now, allow_changes=(), folder="runs/a")
    muon = run_fingerprint(model, text, TrainConfig(**RECIPE, optimizer="muon"))
    with pytest.raises(ResumeError, match=r"optimizer +adamw +muon"):
        compare_runs(old, muon, allow_changes=(), folder="runs/a")
