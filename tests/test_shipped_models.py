"""The models that come with the package: opened by their name, never written to, small enough.

The tests up to `test_without_a_name_commands_use_lite` have a small model in their place; those
after it read the real ones.
"""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

import nemotron_lite
from nemotron_lite import shipped_models
from nemotron_lite.checkpoint import CheckpointError, weight_bytes
from nemotron_lite.checkpoint.locations import resolve
from nemotron_lite.config import NemotronConfig
from nemotron_lite.data import (
    ConcatenatedDocuments,
    HeldOut,
    encode_documents,
    load_corpus,
    read_manifest,
    train_tokenizer,
)
from nemotron_lite.files import atomic_file, atomic_folder, check_writable_folder
from nemotron_lite.generation.options import SpeculationOptions
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.packed_layers import PackedWeight
from nemotron_lite.train import TrainConfig, evaluate, lite_recipe, train
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


PACKAGE = Path(nemotron_lite.__file__).parent
NAMES = shipped_models.names()
PRESET = NemotronConfig.from_preset("lite")


@pytest.fixture(scope="module")
def lite() -> Nemotron:
    """The shipped model, decoded once."""
    return nemotron_lite.load("lite")


def test_lite_is_shipped() -> None:
    assert NAMES == ["lite"]


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_is_small(name: str) -> None:
    sizes = {file.name: file.stat().st_size for file in (shipped_models.FOLDER / name).rglob("*")}
    assert sum(sizes.values()) <= shipped_models.LARGEST, sizes


def packed_files() -> set[Path]:
    """The files that a wheel takes from the folder of the shipped models."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["nemotron_lite"]
    found = {file for pattern in patterns for file in PACKAGE.glob(pattern) if file.is_file()}
    return {file for file in found if shipped_models.FOLDER in file.parents}


def test_a_wheel_holds_every_file_of_them() -> None:
    files = {file for file in shipped_models.FOLDER.rglob("*") if file.is_file()}
    assert packed_files() == files
    names = {file.name for file in files}
    assert {"config.json", "model.safetensors", "tokenizer.json", "record.json"} <= names


def test_lite_opens_in_float32_with_the_tokenizer_of_its_manifest(lite: Nemotron) -> None:
    assert {p.dtype for p in lite.parameters()} == {torch.float32}
    assert lite.config.replace(max_position_embeddings=PRESET.max_position_embeddings) == PRESET
    settings = read_manifest().tokenizer
    assert lite.tokenizer.get_vocab_size() == settings.vocab_size == lite.config.vocab_size
    ids = [lite.tokenizer.token_to_id(text) for text in settings.special_tokens]
    assert ids == list(range(1, len(ids) + 1))
    assert len(lite.tokenizer.encode("1234").ids) == 4


def test_lite_is_packed_and_computes_the_same(lite: Nemotron) -> None:
    packed = nemotron_lite.load("lite", packed=True)
    kinds = {type(module) for module in packed.modules()}
    assert any(issubclass(kind, PackedWeight) for kind in kinds)
    tokens = torch.tensor([lite.tokenizer.encode("def mean(values):\n    return").ids])
    torch.testing.assert_close(packed(tokens).logits, lite(tokens).logits, atol=1e-2, rtol=1e-3)


def test_drafts_of_lite_change_nothing_and_are_often_right(lite: Nemotron) -> None:
    prompt = "import os\nimport sys\n\n\ndef "
    plain = nemotron_lite.generate(lite, prompt, 48, temperature=0, stop=())
    drafts = SpeculationOptions(draft_length=4, adaptive=False)
    drafted, found = nemotron_lite.generate(
        lite, prompt, 48, temperature=0, stop=(), speculation=drafts, return_statistics=True
    )
    assert drafted == plain
    assert found.acceptance_length > 1.2


def test_the_record_of_lite_is_whole() -> None:
    record = shipped_models.read_record("lite")
    config = TrainConfig(**record["training"]["config"])
    assert record["training"]["updates"] == config.steps
    assert record["training"]["tokens"] == config.steps * config.tokens_per_step
    curve = record["curve"]
    points = len(curve["tokens"])
    assert 100 < points <= 300
    assert {len(curve["ce"]), len(curve["lr"]), *map(len, curve["mtp"])} == {points}
    assert len(curve["mtp"]) == PRESET.mtp_depths
    assert curve["tokens"] == sorted(curve["tokens"])
    assert curve["tokens"][-1] == record["training"]["tokens"]
    assert curve["ce"][0] > 5 > 4 > curve["ce"][-1]
    manifest = read_manifest()
    assert record["text"]["manifest_sha256"] == sha256(manifest.to_json().encode()).hexdigest()
    assert record["text"]["differences"] == []
    assert record["text"]["held_out_files"] == len(manifest.held_out)
    scores = record["scores"]
    for bits in scores["bits_per_byte"].values():
        assert 1 < bits < min(scores["baselines"]["ngram"], scores["baselines"]["gzip"])
    assert scores["acceptance"]["draft_length"] == 4
    assert {"0.0", "0.7"} == set(scores["acceptance"]["temperature"])
    assert record["machine"]["cores"] >= 1
    assert {"python", "torch", "numpy", "tokenizers"} <= set(record["versions"])


def test_the_recorded_score_is_that_of_the_files(lite: Nemotron) -> None:
    """On a few held-out files; all of them take a minute here."""
    manifest = read_manifest()
    found = load_corpus(held_out_names=manifest.held_out).held_out
    same = [d for d in found if sha256(d.content).hexdigest() == manifest.held_out[d.name]]
    few = sorted(same, key=lambda document: document.name)[::8]
    if not few:
        pytest.skip("this Python has other versions of all the held-out files")
    tokens = encode_documents(lite.tokenizer, [document.content.decode() for document in few])
    score = evaluate(lite, HeldOut(tuple(tokens), sum(len(d.content) for d in few)))
    recorded = shipped_models.read_record("lite")["scores"]["bits_per_byte"]["packed"]
    assert abs(score.bits_per_byte / recorded - 1) < 0.2


def test_the_curve_of_the_live_run_is_that_of_the_recipe() -> None:
    curve = shipped_models.read_live_curve()
    assert curve is not None
    assert len(curve["seconds"]) == len(curve["loss"]) <= 150
    expected = lite_recipe.live_training(curve["config"]["precision"]).to_dict()
    assert curve["config"] == expected
    assert curve["pattern"] == lite_recipe.live_config().pattern
    assert curve["seconds"][-1] == pytest.approx(lite_recipe.LIVE_SECONDS, rel=0.1)
    assert curve["loss"][0] > 6 > curve["loss"][-1]
