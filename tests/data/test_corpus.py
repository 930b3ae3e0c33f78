"""The corpus: what is read, in which order, and a split that keeps its two sides apart."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemotron_lite.data import CorpusError, load_corpus
from nemotron_lite.data.corpus import LARGEST_HELD_OUT_FILE, SKIPPED_FOLDERS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty files of 1,000 bytes, and everything that must not be read."""
    for i in range(40):
        path = tmp_path / f"pkg{i % 3}" / f"file{i:02}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# {i:02}\n" + "x" * 995)
    (tmp_path / "copy.py").write_bytes((tmp_path / "pkg0" / "file00.py").read_bytes())
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "latin.py").write_bytes("# é".encode("latin-1"))
    (tmp_path / "notes.txt").write_text("not source")
    for name in ("test", "site-packages"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "other.py").write_text("y = 1")
    return tmp_path


def test_reads_each_usable_file_once_in_order(folder: Path) -> None:
    corpus = load_corpus(folder, held_out_bytes=5000)
    names = [d.name for d in (*corpus.train, *corpus.held_out)]
    # copy.py sorts before the file it equals, so that one is kept
    expected = {f"pkg{i % 3}/file{i:02}.py" for i in range(1, 40)} | {"copy.py"}
    assert set(names) == expected
    assert len(names) == len(expected)
    for side in (corpus.train, corpus.held_out):
        assert [d.name for d in side] == sorted(d.name for d in side)
    for document in corpus.train:
        assert document.content == (folder / document.name).read_bytes()


def test_split_is_by_name_and_repeatable(folder: Path) -> None:
    corpus = load_corpus(folder, held_out_bytes=5000)
    assert corpus.held_out_bytes == 5000
    assert load_corpus(folder, held_out_bytes=5000) == corpus
    # a larger split contains the smaller one: files are ranked, not drawn
    larger = load_corpus(folder, held_out_bytes=9000)
    assert {d.name for d in corpus.held_out} < {d.name for d in larger.held_out}


def test_fingerprint_sees_every_byte_and_the_split(folder: Path) -> None:
    before = load_corpus(folder, held_out_bytes=5000).fingerprint()
    assert load_corpus(folder, held_out_bytes=5000).fingerprint() == before
    assert load_corpus(folder, held_out_bytes=9000).fingerprint() != before
    path = folder / "pkg1" / "file01.py"
    path.write_text(path.read_text().replace("01", "99"))  # same name, same size
    assert load_corpus(folder, held_out_bytes=5000).fingerprint() != before


def test_large_files_are_never_held_out(folder: Path) -> None:
    for i in range(10):
        (folder / f"large{i}.py").write_text(str(i) * (LARGEST_HELD_OUT_FILE + 1))
    corpus = load_corpus(folder, held_out_bytes=30_000)
    assert not [d.name for d in corpus.held_out if d.name.startswith("large")]
    assert len([d for d in corpus.train if d.name.startswith("large")]) == 10


def test_too_little_text_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"has only .* Expected 20,000 held-out bytes"):
        load_corpus(folder, held_out_bytes=20_000)
    with pytest.raises(CorpusError, match=r"no folder .*nowhere"):
        load_corpus(tmp_path / "nowhere")


def test_standard_library_is_large_enough_and_clean() -> None:
    corpus = load_corpus()
    assert corpus.train_bytes > 4_000_000
    assert 192 * 1024 <= corpus.held_out_bytes < 192 * 1024 + LARGEST_HELD_OUT_FILE
    train = {d.content for d in corpus.train}
    assert not any(d.content in train for d in corpus.held_out)
    for document in corpus.train:
        assert not SKIPPED_FOLDERS & set(document.name.split("/")[:-1])


@pytest.mark.parametrize("count", [1, 3, 20])
def test_named_documents_are_held_out(folder: Path, count: int) -> None:
    """In place of a split by size: a text is split as another machine split it."""
    names = [f"pkg{i % 3}/file{i:02}.py" for i in range(1, 1 + count)]
    corpus = load_corpus(folder, held_out_names=[*names, "gone.py", "notes.txt"])
    assert sorted(d.name for d in corpus.held_out) == sorted(names)
    assert len(corpus.train) == 40 - count
    assert not {d.name for d in corpus.train} & set(names)
    assert corpus.fingerprint() != load_corpus(folder, held_out_bytes=1000).fingerprint()


@pytest.mark.parametrize("names", [[], ["gone.py"]])
def test_none_of_the_named_documents(folder: Path, names: list[str]) -> None:
    with pytest.raises(CorpusError, match=rf"0 of the {len(names)} files to hold out, and 40"):
        load_corpus(folder, held_out_names=names)
