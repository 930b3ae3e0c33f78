"""The models that come with the package: opened by their name, never written to, small enough."""

from __future__ import annotations

import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nemotron_lite
from nemotron_lite import shipped_models
from nemotron_lite.checkpoint import CheckpointError, weight_bytes
from nemotron_lite.checkpoint.locations import resolve
from nemotron_lite.data import ConcatenatedDocuments, train_tokenizer
from nemotron_lite.files import atomic_file, atomic_folder, check_writable_folder
from nemotron_lite.model import Nemotron
from nemotron_lite.train import TrainConfig, train
from tests.cli.commands import TINY, call


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation with one small model, "mini"; the current folder is an empty one."""
    place = (tmp_path / "installed" / "models").resolve()
    monkeypatch.setattr(shipped_models, "FOLDER", tmp_path / "elsewhere")
    tokenizer = train_tokenizer(["def mean(values): return sum(values)\n"], vocab_size=270)
    nemotron_lite.save(Nemotron(TINY, seed=1), place / "mini", tokenizer)
    (place / "mini" / "record.json").write_text('{"format": 1, "scores": {}}')
    (place / "notes").mkdir()  # no model
    monkeypatch.setattr(shipped_models, "FOLDER", place)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return place / "mini"


def content(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {f.name: (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.rglob("*")}


def test_a_name_opens_the_shipped_model(shipped: Path) -> None:
    before = content(shipped)
    model = nemotron_lite.load("mini")
    assert resolve("mini") == resolve(Path("mini")) == shipped == shipped_models.folder("mini")
    for name, value in nemotron_lite.load(shipped).state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert nemotron_lite.Nemotron.from_pretrained("mini").config == model.config
    assert weight_bytes("mini") == weight_bytes(shipped) > 0
    assert shipped_models.read_record("mini") == {"format": 1, "scores": {}}
    assert content(shipped) == before


def test_a_folder_on_disk_of_the_same_name_comes_first(shipped: Path) -> None:
    other = Nemotron(TINY.replace(pattern="M*"), seed=0)
    nemotron_lite.save(other, "mini")
    assert nemotron_lite.load("mini").config.pattern == "M*"
    assert nemotron_lite.load(shipped).config.pattern == TINY.pattern


@pytest.mark.parametrize("name", ["minis", "Mini", "notes", "mini2", "m"])
def test_an_unknown_name_lists_the_shipped_ones(shipped: Path, name: str) -> None:
    with pytest.raises(
        CheckpointError, match=r"neither a folder nor a shipped .*\(shipped: mini\)"
    ):
        nemotron_lite.load(name)
    assert shipped_models.folder(name) is None
    with pytest.raises(ValueError, match=rf"no shipped model '{name}': expected one of mini"):
        shipped_models.read_record(name)


@pytest.mark.parametrize("name", ["./mini", "runs/mini", "/mini", "mini/..", "../mini", "", "."])
def test_only_a_plain_name_is_one_of_a_shipped_model(shipped: Path, name: str) -> None:
    if Path(name) == Path("mini"):  # pathlib drops "./"
        assert resolve(name) == shipped
        return
    assert shipped_models.folder(name) is None
    with pytest.raises(CheckpointError):
        nemotron_lite.load(name)


def _train(folder: Path) -> None:
    data = ConcatenatedDocuments(torch.arange(64).numpy() % 200, torch.tensor([0]).numpy())
    train(Nemotron(TINY), data, TrainConfig(steps=1, seq_len=8), out_dir=folder, progress=False)


def _atomic_file(folder: Path) -> None:
    with atomic_file(folder / "record.json") as file:
        file.write_text("{}")


def _atomic_folder(folder: Path) -> None:
    with atomic_folder(folder) as new:
        (new / "config.json").write_text("{}")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "save": lambda folder: nemotron_lite.save(Nemotron(TINY), folder),
    "save_pretrained": lambda folder: Nemotron(TINY).save_pretrained(folder),
    "train": _train,
    "atomic_file": _atomic_file,
    "atomic_folder": _atomic_folder,
    "check_writable_folder": check_writable_folder,
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("way", ["itself", "link", "dots", "below", "all"])
def test_nothing_writes_to_a_shipped_model(shipped: Path, writer: str, way: str) -> None:
    (shipped.parents[2] / "link").symlink_to(shipped)
    place = {
        "itself": shipped,
        "link": shipped.parents[2] / "link",
        "dots": shipped / ".." / "notes" / ".." / "mini",
        "below": shipped / "new",
        "all": shipped.parent,
    }[way]
    before = content(shipped.parent / "mini")
    with pytest.raises(PermissionError, match="come with the package"):
        WRITERS[writer](place)
    assert content(shipped.parent / "mini") == before
    assert sorted(p.name for p in shipped.parent.iterdir()) == ["mini", "notes"]


def test_a_read_only_installation_is_enough(shipped: Path) -> None:
    for path in (*shipped.iterdir(), shipped, shipped.parent):
        path.chmod(stat.S_IRUSR | (stat.S_IXUSR if path.is_dir() else 0))
    try:
        assert nemotron_lite.generate(nemotron_lite.load("mini"), "def", 3, temperature=0)
        assert "ME*E" in call("info", "mini").stdout
    finally:
        for path in (shipped.parent, shipped):
            path.chmod(stat.S_IRWXU)


def test_commands_take_the_name(shipped: Path, tmp_path: Path) -> None:
    before = content(shipped)
    said = call("generate", "--model", "mini", "--prompt", "def", "--max-new-tokens", 4)
    assert said.stdout.startswith("def")
    shown = call("info", "mini").stdout
    assert "Files" in shown
    assert f"{nemotron_lite.load('mini').num_parameters():,}" in shown
    call("export", "--model", "mini", "--out", tmp_path / "mini.gguf")
    refused = call("export", "--model", "mini", "--out", shipped / "mini.gguf", code=1).stderr
    assert "come with the package" in refused
    small = ("--prompts", 2, "--tokens", 16, "--held-out", 0, "--format", "nvfp4", "--text")
    text = tmp_path / "a.txt"
    text.write_text("def mean(values):\n" * 40)
    call("quantize", "--model", "mini", "--out", shipped, *small, text, code=1)
    call("quantize", "--model", "mini", "--out", tmp_path / "small", *small, text)
    assert content(shipped) == before


def test_without_a_name_commands_use_lite(shipped: Path) -> None:
    shipped.rename(shipped.parent / "lite")
    options = ("--max-new-tokens", 4, "--temperature", 0)
    said = call("generate", "--prompt", "def", *options).stdout
    assert said == call("generate", "--model", "lite", "--prompt", "def", *options).stdout
    assert "no chat template" in call("chat", code=1).stderr
