"""The trained model of the benchmarks: the shipped one, its text, and what a record says of it."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.model import shipped
from nemotron_lite import Nemotron, load, save
from nemotron_lite.data import Document, corpus, read_manifest, train_tokenizer
from nemotron_lite.quantization import quantizable_modules, quantize_model, single_format
from tests.checkpoint.tiny import randomize
from tests.cli.commands import TINY


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[Document]:
    """A standard library of a few files. Of two held-out ones, one differs from the manifest."""
    paths = sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))
    found = [Document(path.name, path.read_bytes()) for path in paths]
    monkeypatch.setattr(corpus, "_read", lambda *_: (corpus.FoundText([], {}), [*found]))
    sha256 = hashlib.sha256(found[1].content).hexdigest()
    held_out = {found[1].name: sha256, found[2].name: "0" * 64, "gone.py": "1" * 64}
    manifest = replace(read_manifest(), held_out=held_out)
    monkeypatch.setattr(shipped, "read_manifest", lambda: manifest)
    return found


@pytest.fixture
def model() -> Nemotron:
    model = Nemotron(TINY, seed=0)
    randomize(model.state_dict().items(), 3)
    return model


def test_the_shipped_model_and_its_text(files: list[Document], tmp_path: Path) -> None:
    trained = shipped.open_trained(cache=tmp_path)
    assert not trained.model.training
    assert trained.model.dtype == torch.float32
    assert trained.data.tokenizer.to_str() == trained.model.tokenizer.to_str()
    held_out = [files[1].content, files[2].content]
    texts = [trained.model.tokenizer.decode(d.tolist()) for d in trained.data.held_out.documents]
    assert [text.encode() for text in texts] == held_out
    assert trained.about == {
        "model": "lite", "shipped": True, "parameters": trained.model.num_parameters(),
        "stored_as": ["BF16", "F32", "FP8", "NVFP4"],
        "held_out": {
            "files": 2, "bytes": sum(map(len, held_out)), "files_as_in_the_manifest": 1,
        },
    }  # fmt: skip


def test_another_model_reads_with_its_own_tokens(
    files: list[Document], model: Nemotron, tmp_path: Path
) -> None:
    folder = tmp_path / "mine"
    save(model, folder)
    with pytest.raises(ValueError, match=r"mine has no tokenizer\.json"):
        shipped.open_trained(folder, cache=tmp_path)
    tokenizer = train_tokenizer([file.content.decode() for file in files], vocab_size=300)
    save(model, folder, tokenizer)
    trained = shipped.open_trained(folder, cache=tmp_path)
    assert (trained.about["model"], trained.about["shipped"]) == ("mine", False)
    assert trained.about["stored_as"] == ["F32"]
    assert max(int(d.max()) for d in trained.data.held_out.documents) < 300


def test_what_was_packed_is_recognized(
    model: Nemotron, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(model, tmp_path / "before")
    packed = load(tmp_path / "before")
    quantize_model(packed, single_format(quantizable_modules(packed), "nvfp4"))
    save(packed.to(torch.bfloat16), tmp_path / "packed")
    monkeypatch.setattr(shipped, "LITE", str(tmp_path / "packed"))
    assert shipped.is_before_packing(load(tmp_path / "before"))
    assert not shipped.is_before_packing(load(tmp_path / "packed", dtype=torch.float32))
    assert not shipped.is_before_packing(Nemotron(TINY, seed=1)), "another run"
    assert not shipped.is_before_packing(Nemotron(TINY.replace(pattern="M*E"), seed=0))
