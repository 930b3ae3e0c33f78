"""A folder that nobody prepared: what cannot be read is counted, and never ends or blocks a run."""

from __future__ import annotations

import json
import logging
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nemotron_lite import input_files
from nemotron_lite.data import CorpusError, corpus, load_corpus, text_files
from nemotron_lite.data.corpus import LARGEST_HELD_OUT_FILE
from nemotron_lite.data.text_files import read_folder

NOBODY = 65534
HELD_OUT = 3000


@contextmanager
def without_root() -> Iterator[None]:
    """Permissions hold for everybody but root, so a test of root becomes another user."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Twenty usable files, in a place that another user can read (pytest's own he cannot)."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        place = Path(made, "text")
        place.mkdir()
        for i in range(20):
            (place / f"file{i:02}.py").write_text(f"# {i}\n" + "x" * 995)
        yield place


def dangling(place: Path) -> None:
    (place / ".#x.py").symlink_to("user@host.1:2")


def loop(place: Path) -> None:
    (place / "a.py").symlink_to("b.py")
    (place / "b.py").symlink_to("a.py")


def pipe(place: Path) -> None:
    os.mkfifo(place / "pipe.py")


def linked_device(place: Path) -> None:
    (place / "zero.py").symlink_to("/dev/zero")


def unix_socket(place: Path) -> None:
    here = os.getcwd()
    os.chdir(place)  # the name of a socket has at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind("socket.py")
    finally:
        os.chdir(here)


def unreadable(place: Path) -> None:
    (place / "secret.py").write_text("x = 1")
    (place / "secret.py").chmod(0)


def unreadable_folder(place: Path) -> None:
    (place / "closed").mkdir(mode=0)


def latin(place: Path) -> None:
    (place / "latin.py").write_bytes("# é".encode("latin-1"))


def utf16(place: Path) -> None:
    (place / "wide.py").write_bytes("x = 'abc'".encode("utf-16"))


def zeros(place: Path) -> None:
    (place / "zeros.py").write_bytes(b"abc" + bytes(100))


def sparse(place: Path) -> None:
    with (place / "sparse.py").open("wb") as file:
        file.truncate(1 << 40)


def link_to_itself(place: Path) -> None:
    (place / "again").symlink_to(place)
    (place / "folder.py").symlink_to(place)


def empty(place: Path) -> None:
    (place / "empty.py").touch()


def copies(place: Path) -> None:
    (place / "zz_link.py").symlink_to("file00.py")
    os.link(place / "file01.py", place / "zz_hard.py")


@pytest.mark.parametrize(
    ("spoil", "skipped"),
    [
        (dangling, {"links to nothing": 1}),
        (loop, {"links to nothing": 2}),
        (pipe, {"pipes, sockets or devices": 1}),
        (linked_device, {"pipes, sockets or devices": 1}),
        (unix_socket, {"pipes, sockets or devices": 1}),
        (unreadable, {"files that cannot be read": 1}),
        (unreadable_folder, {"folders that cannot be read": 1}),
        (latin, {"files that are not UTF-8": 1}),
        (utf16, {"binary files": 1}),
        (zeros, {"binary files": 1}),
        (sparse, {"files above 64 MiB": 1}),
        (link_to_itself, {}),
        (empty, {}),
        (copies, {}),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_cannot_be_read_is_left_out_and_counted(
    folder: Path,
    spoil: Callable[[Path], None],
    skipped: dict[str, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = load_corpus(folder, held_out_bytes=HELD_OUT)
    assert wanted.skipped == {} and not caplog.records
    spoil(folder)
    with without_root():
        found = load_corpus(folder, held_out_bytes=HELD_OUT)
    assert (found.train, found.held_out) == (wanted.train, wanted.held_out)
    assert found.fingerprint() == wanted.fingerprint()
    assert found.skipped == skipped
    lines = [record.getMessage() for record in caplog.records]
    if skipped:
        [(kind, count)] = skipped.items()
        assert lines == [f"{folder}: left out of the text: {kind} ({count})."]
    else:
        assert lines == []


def test_a_folder_that_is_nested_deeper_than_calls_may_be(folder: Path) -> None:
    deep = folder
    for _ in range(1200):
        deep /= "d"
        deep.mkdir()
    (deep / "last.py").write_text("last = 1")
    try:
        found = load_corpus(folder, held_out_bytes=HELD_OUT)
        assert b"last = 1" in {d.content for d in (*found.train, *found.held_out)}
    finally:  # pytest's own cleaning up recurses
        (deep / "last.py").unlink()
        while deep != folder:
            deep.rmdir()
            deep = deep.parent


def test_several_kinds_are_one_line(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for spoil in (dangling, pipe, latin, zeros, loop):
        spoil(folder)
    load_corpus(folder, held_out_bytes=HELD_OUT)
    [record] = caplog.records
    assert record.getMessage().endswith(
        "binary files (1), files that are not UTF-8 (1), links to nothing (3), pipes, sockets or "
        "devices (1)."
    )
    assert record.levelno == logging.WARNING and record.name.startswith("nemotron_lite.data")


def test_a_file_that_is_deleted_while_the_folder_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = text_files.read_bytes

    def read_and_delete(path: Path) -> bytes:
        content = read(path)
        for name in ("file07.py", "file08.py"):
            (folder / name).unlink(missing_ok=True)
        return content

    monkeypatch.setattr(text_files, "read_bytes", read_and_delete)
    found = load_corpus(folder, held_out_bytes=HELD_OUT)
    assert found.skipped == {"files that cannot be read": 2}
    assert len(found.train) + len(found.held_out) == 18


def test_a_file_that_is_deleted_between_status_and_reading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def vanish(path: Path) -> bytes:
        raise FileNotFoundError(path)

    monkeypatch.setattr(text_files, "read_bytes", vanish)
    assert read_folder(folder, (".py",)).skipped == {"files that cannot be read": 20}


def test_names_that_are_not_utf8(folder: Path) -> None:
    name = os.fsencode(folder) + b"/caf\xe9.py"
    with open(name, "wb") as file:
        file.write(b"# not UTF-8 in its name only\n" + b"y" * 500)
    found = load_corpus(folder, held_out_bytes=HELD_OUT)
    names = [os.fsencode(d.name) for d in (*found.train, *found.held_out)]
    assert b"caf\xe9.py" in names and len(names) == 21
    assert len(found.fingerprint()) == 64


def test_files_outside_are_read_through_links(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.py").write_text("outside = True")
    (folder / "link.py").symlink_to(tmp_path / "outside.py")
    found = load_corpus(folder, held_out_bytes=HELD_OUT)
    assert b"outside = True" in {d.content for d in (*found.train, *found.held_out)}


def test_one_file_is_cut_at_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "book.txt"
    content = "".join(f"line {i} é\n" for i in range(20_000))
    file.write_text(content, encoding="utf-8")
    found = load_corpus(file, held_out_bytes=HELD_OUT)
    documents = sorted((*found.train, *found.held_out), key=lambda d: d.name)
    assert b"".join(d.content for d in documents).decode() == content
    assert all(len(d.content) <= LARGEST_HELD_OUT_FILE for d in documents)
    assert all(d.content.endswith(b"\n") for d in documents)
    assert len(found.held_out) == 1


@pytest.mark.parametrize("character", ["é", "漢", "🙂", "a"])
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_a_line_without_end_is_cut_between_characters(character: str, offset: int) -> None:
    content = ("a" * offset + character * 40_000).encode()
    pieces = list(corpus._pieces(content))
    assert b"".join(pieces) == content
    for piece in pieces:
        piece.decode("utf-8")
        assert 0 < len(piece) <= LARGEST_HELD_OUT_FILE
    assert len(pieces) <= len(content) // (LARGEST_HELD_OUT_FILE - 4) + 1


def test_a_folder_without_source_gives_its_own_texts(tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()  # a name that is left out of source code
    (tmp_path / "test" / "a.txt").write_text("text " * 20_000)
    (tmp_path / "b.md").write_text("# words\n" * 900)
    (tmp_path / "c.rst").write_text("not read")
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} " * 50}) + "\n" for i in range(9))
    )
    found = load_corpus(tmp_path, held_out_bytes=HELD_OUT)
    names = {d.name for d in (*found.train, *found.held_out)}
    assert {"b.md", "test/a.txt#000000", "test/a.txt#000003", "d.jsonl:1", "d.jsonl:9"} <= names
    assert not any("rst" in name for name in names)
    (tmp_path / "one.py").write_text("x = 1\n" * 3000)
    found = load_corpus(tmp_path, held_out_bytes=0)
    assert [d.name for d in found.train] == ["one.py"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "there is no folder"),
        (lambda p: p.symlink_to("nowhere"), "there is no folder"),
        (lambda p: p.symlink_to(p), "cannot be read"),
        (lambda p: os.mkfifo(p), "a named pipe"),
        (lambda p: p.symlink_to("/dev/zero"), "a device"),
        (lambda p: p.write_bytes(b"\xff\xfe"), "is no text in UTF-8"),
        (lambda p: p.write_bytes(b"a\0b"), "is no text in UTF-8 .binary"),
        (lambda p: p.touch(), "has only 0 bytes in 0 usable files"),
        (lambda p: p.mkdir(), "has only 0 bytes in 0 usable files"),
        (lambda p: (p.mkdir(), dangling(p)), r"left out: links to nothing \(1\)"),
        (lambda p: (p.write_text("x"), p.chmod(0)), "Permission denied"),
        (lambda p: p.mkdir(mode=0), r"left out: folders that cannot be read \(1\)"),
    ],
)
def test_a_place_without_text(folder: Path, make: Callable[[Path], object], words: str) -> None:
    place = folder.parent / "place"
    make(place)
    with without_root(), pytest.raises(CorpusError, match=words):
        load_corpus(place, held_out_bytes=10)


def test_a_path_that_is_none() -> None:
    with pytest.raises(CorpusError, match="cannot be read"):
        load_corpus("a\0b")
    with pytest.raises(CorpusError, match=r"cannot be read \(File name too long"):
        load_corpus("a" * 5000)


def test_a_text_that_is_too_large_for_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "TEXT_LIMIT", 5000)
    with pytest.raises(CorpusError, match="more than 5,000 bytes of text: give a part"):
        load_corpus(folder, held_out_bytes=100)
    (folder / "one.txt").write_text("x" * 5001)
    with pytest.raises(CorpusError, match="has 5,001 bytes; expected at most 5,000"):
        load_corpus(folder / "one.txt", held_out_bytes=100)
    assert input_files.LIMIT == 64 << 20
