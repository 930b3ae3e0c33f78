"""What all tests of commands share: a terminal of known width, and little text to prepare."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nemotron_lite import Nemotron, cli, data, save, shipped_models
from tests.cli.commands import TINY, python_files


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for console in (cli.out, cli.err):
        monkeypatch.setattr(console, "_width", 150)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared text goes into the test's folder, and few bytes of it are held out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepare = data.prepare
    monkeypatch.setattr(data, "prepare", lambda **kw: prepare(held_out_bytes=2_000, **kw))


@pytest.fixture
def tiny_lite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installation whose shipped model "lite" has a few thousand parameters."""
    texts = [file.read_text() for file in python_files()[:6]]
    tokenizer = data.train_tokenizer(
        texts, vocab_size=TINY.vocab_size, special_tokens=data.CHAT_TOKENS
    )
    folder = tmp_path / "installed" / "models" / "lite"
    save(Nemotron(TINY, seed=1), folder, tokenizer)
    record = {"training": {"tokens": 3_200_000}}
    (folder / shipped_models.RECORD).write_text(json.dumps(record))
    curve = {"seconds": [0.5, 1.0, 1.5, 2.0], "loss": [5.5, 5.0, 4.0, 3.5]}
    (folder.parent / shipped_models.CURVE).write_text(
        json.dumps({**curve, "machine": {"cpu": "a quiet one"}})
    )
    monkeypatch.setattr(shipped_models, "FOLDER", folder.parent)
    return folder
