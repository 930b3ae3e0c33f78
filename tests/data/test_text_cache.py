"""The disk cache: any damage is noticed, named in one line and repaired; no cache is no error."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from nemotron_lite import data
from nemotron_lite.data import (
    TextData,
    cache_folder,
    load_corpus,
    prepare,
    prepared_text,
    text_cache,
)
from nemotron_lite.data.text_cache import FILES, META
from tests.data.test_text_files import without_root

SMALL = dict(vocab_size=300, held_out_bytes=3_000)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small corpus: copies of some short standard library files."""
    folder = tmp_path_factory.mktemp("root")
    short = [d for d in load_corpus().train if 1000 < len(d.content) < 3000]
    for i, document in enumerate(short[:10]):
        (folder / f"{i:02}.py").write_bytes(document.content)
    return folder


@pytest.fixture(scope="module")
def original(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextData, Path]:
    """A prepared text, and its cache folder, which no test changes."""
    cache = tmp_path_factory.mktemp("original")
    return prepare(root=root, cache=cache, **SMALL), cache


@pytest.fixture
def cache(original: tuple[TextData, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(original[1], tmp_path / "cache"))


def only_folder(cache: Path) -> Path:
    [folder] = cache.iterdir()
    return folder


def same(one: TextData, other: TextData) -> bool:
    arrays = [
        (one.train.tokens, other.train.tokens), (one.train.starts, other.train.starts),
        *zip(one.held_out.documents, other.held_out.documents, strict=True),
    ]  # fmt: skip
    return (
        all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in arrays)
        and one.tokenizer.to_str() == other.tokenizer.to_str()
        and one.baselines == other.baselines
        and (one.train_bytes, one.held_out.num_bytes, one.fingerprint())
        == (other.train_bytes, other.held_out.num_bytes, other.fingerprint())
    )


def flip(file: Path, at: float, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1 << bit
    file.write_bytes(content)


def _replace(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def spoil(file: Path) -> None:
        file.unlink()
        make(file)

    return spoil


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(here)


FILE_DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda f: f.write_bytes(b""),
    "half": lambda f: f.write_bytes(f.read_bytes()[: f.stat().st_size // 2]),
    "one byte less": lambda f: f.write_bytes(f.read_bytes()[:-1]),
    "one byte more": lambda f: f.write_bytes(f.read_bytes() + b"\n"),
    "zeros": lambda f: f.write_bytes(bytes(f.stat().st_size)),
    "first bit": lambda f: flip(f, 0.0),
    "bit": lambda f: flip(f, 0.31, 4),
    "another bit": lambda f: flip(f, 0.77, 7),
    "last bit": lambda f: flip(f, 1.0, 1),
    "pipe": _replace(os.mkfifo),
    "socket": _replace(_socket),
    "folder": _replace(Path.mkdir),
    "dangling link": _replace(lambda f: f.symlink_to("nowhere")),
    "link to itself": _replace(lambda f: f.symlink_to(f)),
    "link to a device": _replace(lambda f: f.symlink_to("/dev/zero")),
    "sparse": lambda f: os.truncate(f, 1 << 40),
    "other numbers": lambda f: f.write_bytes(
        f.read_bytes().replace(b"1", b"2") if f.suffix == ".json" else f.read_bytes()[::-1]
    ),
}


@pytest.mark.parametrize("damage", FILE_DAMAGE)
@pytest.mark.parametrize("name", [*FILES, META])
def test_a_damaged_file_is_noticed(cache: Path, root: Path, name: str, damage: str) -> None:
    file = only_folder(cache) / name
    FILE_DAMAGE[damage](file)
    corpus = load_corpus(root, held_out_bytes=SMALL["held_out_bytes"])
    key = (
        json.loads((only_folder(cache) / META).read_text())["content"]["key"]
        if (name != META)
        else {"text": corpus.fingerprint()}
    )
    with pytest.raises(text_cache.DamagedCacheError) as caught:
        text_cache.read_checked(only_folder(cache), key, FILES, text_cache.text_of)
    assert str(only_folder(cache)) in str(caught.value)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "damage"),
    [(META, "bit"), ("train.npy", "half"), ("tokenizer.json", "pipe"), ("held_out.npy", "folder")],
)
def test_a_damaged_cache_is_named_in_one_line_and_repaired(
    original: tuple[TextData, Path],
    cache: Path,
    root: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: str,
) -> None:
    FILE_DAMAGE[damage](only_folder(cache) / name)
    assert same(prepare(root=root, cache=cache, **SMALL), original[0])
    [record] = caplog.records
    message = record.getMessage()
    assert str(only_folder(cache)) in message and message.endswith(" The text is prepared again.")
    assert "\n" not in message
    caplog.clear()
    assert same(prepare(root=root, cache=cache, **SMALL), original[0])
    assert caplog.records == []


def test_every_byte_of_the_description_is_checked(cache: Path) -> None:
    """A flipped bit anywhere in meta.json, also where it is only white space, is damage."""
    file = only_folder(cache) / META
    content = file.read_bytes()
    for i in range(0, len(content), 3):
        damaged = bytearray(content)
        damaged[i] ^= 1 << (i % 8)
        with pytest.raises(text_cache.DamagedCacheError):
            text_cache._verified(bytes(damaged), file.parent)
    assert text_cache._verified(content, file.parent)["format"] == text_cache.FORMAT


PLACE_DAMAGE: dict[str, Callable[[Path], object]] = {
    "a file": lambda p: p.write_text("x"),
    "a pipe": lambda p: os.mkfifo(p),
    "a link": lambda p: p.symlink_to("../precious"),
    "a dangling link": lambda p: p.symlink_to("nowhere"),
    "a link to itself": lambda p: p.symlink_to(p.name),
    "an empty folder": lambda p: p.mkdir(),
    "a folder of something else": lambda p: (p.mkdir(), (p / "notes.txt").write_text("x")),
}


@pytest.mark.parametrize("damage", PLACE_DAMAGE)
def test_something_else_in_the_place_of_the_folder(
    original: tuple[TextData, Path],
    cache: Path,
    root: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    precious = cache.parent / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    folder = only_folder(cache)
    shutil.rmtree(folder)
    PLACE_DAMAGE[damage](folder)
    assert same(prepare(root=root, cache=cache, **SMALL), original[0])
    assert len(caplog.records) == 1 and str(folder) in caplog.records[0].getMessage()
    assert same(prepare(root=root, cache=cache, **SMALL), original[0])
    assert len(caplog.records) == 1
    assert folder.is_dir() and not folder.is_symlink()
    assert (precious / "thesis.tex").read_text() == "years of work"
    assert only_folder(cache) == folder, "nothing is left behind"


def test_another_version_or_another_text(
    original: tuple[TextData, Path], cache: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = only_folder(cache) / META
    content = json.loads(file.read_text())["content"]
    for change in ({"format": 1}, {"key": {**content["key"], "text": "0" * 64}}):
        file.write_bytes(text_cache._signed({**content, **change}))
        caplog.clear()
        assert same(prepare(root=root, cache=cache, **SMALL), original[0])
        assert "another text, or one of another version" in caplog.records[0].getMessage()


def test_a_folder_of_another_user_is_not_trusted(
    original: tuple[TextData, Path],
    cache: Path,
    root: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner = only_folder(cache).stat().st_uid
    monkeypatch.setattr(text_cache.os, "geteuid", lambda: 4711)
    if owner == 0:  # root's are trusted: pretend that it is somebody else's
        lstat = os.lstat

        class Foreign:
            def __init__(self, path: Path) -> None:
                found = lstat(path)
                self.st_mode, self.st_uid = found.st_mode, 1234

        monkeypatch.setattr(text_cache.os, "lstat", Foreign)
    assert same(prepare(root=root, cache=cache, **SMALL), original[0])
    assert "belongs to another user" in caplog.records[0].getMessage()


@pytest.mark.parametrize("what", ["a file", "below a file", "read-only", "a link to itself"])
def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(
    original: tuple[TextData, Path],
    root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    base = tmp_path / "base"
    if what == "a file":
        base.mkdir()
        (base / "nemotron_lite").write_text("x")
    elif what == "below a file":
        base.write_text("x")
    elif what == "read-only":
        base.mkdir(mode=0o555)
    else:
        base.symlink_to(base)
    for parent in (root, *root.parents[:3], *tmp_path.parents[:3], tmp_path):
        parent.chmod(parent.stat().st_mode | 0o055)
    monkeypatch.setenv("XDG_CACHE_HOME", str(base))
    with without_root():
        assert same(prepare(root=root, **SMALL), original[0])
        with pytest.raises(OSError):
            (base / "nemotron_lite").mkdir()
    [record] = caplog.records
    message = record.getMessage()
    assert str(base / "nemotron_lite") in message and "set XDG_CACHE_HOME" in message
    assert "\n" not in message


def test_a_full_disk(
    original: tuple[TextData, Path],
    root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert same(prepare(root=root, cache=tmp_path, **SMALL), original[0])
    assert "No space left on device" in caplog.records[0].getMessage()
    assert list(tmp_path.iterdir()) == []


def test_places_of_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/folder")
    assert cache_folder() == Path.home() / ".cache" / "nemotron_lite"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "no such home"))
    assert cache_folder() == tmp_path / "no such home" / ".cache" / "nemotron_lite"


def test_no_home_at_all(
    original: tuple[TextData, Path],
    root: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert cache_folder() is None
    assert same(prepare(root=root, **SMALL), original[0])
    assert "Set XDG_CACHE_HOME" in caplog.records[0].getMessage()


def test_the_key_holds_everything_that_the_text_depends_on(
    original: tuple[TextData, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = json.loads((only_folder(original[1]) / META).read_text())["content"]
    assert set(meta["key"]) == {
        "python", "tokenizers", "numpy", "zlib", "vocab_size", "special_tokens",
        "held_out_bytes", "begin", "end", "text",
    }  # fmt: skip
    prepare(root=root, cache=tmp_path, **SMALL)
    monkeypatch.setattr(prepared_text.tokenizers, "__version__", "99")
    prepare(root=root, cache=tmp_path, **SMALL)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_fingerprint_is_of_tokens_and_tokenizer(
    original: tuple[TextData, Path], root: Path, tmp_path: Path
) -> None:
    other = prepare(root=root, cache=tmp_path, vocab_size=301, held_out_bytes=3_000)
    assert len(original[0].fingerprint()) == 64
    assert other.fingerprint() != original[0].fingerprint()
    assert asdict(other.baselines) == asdict(original[0].baselines)


def test_two_at_the_same_time_build_once(
    original: tuple[TextData, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, built = prepared_text._build, []

    def count(*arguments: object) -> object:
        built.append(1)
        return build(*arguments)

    monkeypatch.setattr(prepared_text, "_build", count)
    found: list[TextData] = []
    threads = [
        threading.Thread(target=lambda: found.append(prepare(root=root, cache=tmp_path, **SMALL)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(same(one, original[0]) for one in found)
    assert len(built) == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_a_lock_that_is_never_given_back(
    original: tuple[TextData, Path],
    root: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    program = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), 2); print(flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None and holder.stdin is not None
    holder.stdout.readline()
    monkeypatch.setattr(text_cache, "WAIT", 0.2)
    assert same(prepare(root=root, cache=tmp_path, **SMALL), original[0])
    assert caplog.records[0].getMessage().startswith("Waiting for another process")
    holder.communicate(b"\n", timeout=20)
    assert data.prepare is prepare
