"""`nemotron-lite export`: options, results and errors; tests/export reads the files."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
import pytest
from typer.testing import CliRunner, Result

import nemotron_lite
from nemotron_lite.cli import app
from tests.export.llama import packed_model, small_model


def export(model: Path, out: Path, *more: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, ["export", "--model", str(model), "--out", str(out), *more])
    assert result.exit_code == code, result.output + result.stderr
    return result


def formats(file: Path) -> set[str]:
    return {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    nemotron_lite.save(small_model(), tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_becomes_a_file(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "model.gguf"
    shown = export(folder, out, "--to", "gguf", "--dtype", "bfloat16")
    assert re.search(r"^The model is in .*model\.gguf \(\d+ KiB\)\.\n$", shown.stdout)
    assert "writing: 100%" in shown.stderr
    assert formats(out) == {"F32", "BF16"}
    assert any("nextn" in tensor.name for tensor in gguf.GGUFReader(out).tensors)


def test_quiet_and_without_mtp(folder: Path, tmp_path: Path) -> None:
    shown = export(folder, tmp_path / "model.gguf", "--quiet", "--no-mtp")
    assert shown.stderr == ""
    assert formats(tmp_path / "model.gguf") == {"F32"}
    names = [tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert not any("nextn" in name for name in names)


def test_packed_weights(tmp_path: Path) -> None:
    nemotron_lite.save(packed_model(), tmp_path / "model")
    out = tmp_path / "model.gguf"
    assert "--unpack" in export(tmp_path / "model", out, "--packed", code=1).stderr
    assert not out.exists()
    export(tmp_path / "model", out, "--packed", "--unpack")
    assert "NVFP4" in formats(out)
    export(tmp_path / "model", out)
    assert "NVFP4" not in formats(out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "onnx"], "--to onnx: expected one of gguf."),
        (["--dtype", "int8"], "--dtype int8: expected one of float32, bfloat16, float16."),
        (["--unpack"], "add --packed"),
        (["--packed"], "is quantized"),
    ],
)
def test_wrong_options(options: list[str], words: str, folder: Path, tmp_path: Path) -> None:
    shown = export(folder, tmp_path / "model.gguf", *options, code=1)
    assert words in shown.stderr
    assert not (tmp_path / "model.gguf").exists()


def test_wrong_outputs_are_refused_before_the_model_is_read(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("the model was read")

    monkeypatch.setattr("nemotron_lite.cli.export.read_model", read)
    assert "is a folder" in export(folder, tmp_path, code=1).stderr
    (tmp_path / "file").touch()
    assert "is a file" in export(folder, tmp_path / "file" / "model.gguf", code=1).stderr
