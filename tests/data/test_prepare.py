"""`prepare`: built once, opened afterwards, and never half there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nemotron_lite import data
from nemotron_lite.data import decode, load_corpus, prepare, prepared_text


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus: copies of some short standard library files."""
    folder = tmp_path_factory.mktemp("root")
    short = [d for d in load_corpus().train if 2000 < len(d.content) < 8000]
    for i, document in enumerate(short[:20]):
        (folder / f"{i:02}.py").write_bytes(document.content)
    return folder


SMALL = dict(vocab_size=400, held_out_bytes=10_000)


def test_tokens_are_the_files_and_nothing_else(root: Path, tmp_path: Path) -> None:
    prepared = prepare(root=root, cache=tmp_path, **SMALL)
    corpus = load_corpus(root, held_out_bytes=10_000)
    documents = np.split(np.asarray(prepared.train.tokens), prepared.train.starts[1:])
    assert len(documents) == len(corpus.train)
    for tokens, document in zip(documents, corpus.train, strict=True):
        assert decode(prepared.tokenizer, tokens.tolist()).encode() == document.content
    for tokens, document in zip(prepared.held_out.documents, corpus.held_out, strict=True):
        assert decode(prepared.tokenizer, tokens.tolist()).encode() == document.content
    assert prepared.held_out.num_bytes == corpus.held_out_bytes
    assert prepared.train_bytes == corpus.train_bytes
    batch = prepared.batch(0, batch_size=2, seq_len=32, seed=0)
    assert batch.tokens.shape == (2, 32)
    assert int(batch.tokens.max()) < 400


def test_second_call_opens_the_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(root=root, cache=tmp_path, **SMALL)
    monkeypatch.setattr(prepared_text, "_build", None)  # a second build would fail
    second = prepare(root=root, cache=tmp_path, **SMALL)
    assert np.array_equal(first.train.tokens, second.train.tokens)
    assert first.baselines == second.baselines
    assert second.tokenizer.to_str() == first.tokenizer.to_str()
    assert isinstance(second.train.tokens, np.memmap)


def test_other_settings_or_other_text_is_another_folder(root: Path, tmp_path: Path) -> None:
    prepare(root=root, cache=tmp_path, **SMALL)
    prepare(root=root, cache=tmp_path, vocab_size=300, held_out_bytes=10_000)
    assert len(list(tmp_path.iterdir())) == 2
    (root / "new.py").write_text("answer = 42\n")
    prepare(root=root, cache=tmp_path, **SMALL)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failed_build_leaves_nothing(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared_text, "measure_baselines", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(root=root, cache=tmp_path, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data.cache_folder() == tmp_path / "nemotron_lite"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_folder() == Path.home() / ".cache" / "nemotron_lite"


def test_named_documents_are_held_out(tmp_path: Path) -> None:
    root = tmp_path / "text"
    root.mkdir()
    for i in range(6):
        (root / f"m{i}.py").write_text(f"value_{i} = {i}\n" * 40)
    options = dict(root=root, vocab_size=260, cache=tmp_path / "cache", special_tokens=())
    data = prepare(**options, held_out_names=["m4.py", "m1.py"])
    texts = [decode(data.tokenizer, document) for document in data.held_out.documents]
    assert texts == [(root / name).read_text() for name in ("m1.py", "m4.py")]
    assert data.held_out.num_bytes == sum(len(text) for text in texts)
    other = prepare(**options, held_out_names=["m4.py"])
    assert other.held_out.num_bytes == len(texts[1])
    assert other.fingerprint() != data.fingerprint()
