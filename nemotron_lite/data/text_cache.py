"""The disk cache of prepared texts: checked before use, and never a reason to fail.

A prepared text is a folder with five files and `meta.json`, which lists the size and the SHA-256 of
each file, what the text was made from (the key), and its own SHA-256. Reading compares all of them.
So a file that was cut off, a flipped bit, a version with another layout, a pipe or a link in the
place of a file are noticed, whatever happened to the disk. The caller then prepares the text again.

Folders are written atomically and flushed to the disk (`nemotron_lite/files.py`), so an interrupted
process leaves no folder that looks complete. A folder of another user is not used, because anybody
who can write a file can write its checksum too; a folder of root is.

Two processes that prepare a text at the same time: one works and the other waits, because both lock
the folder of the cache. The lock only saves work. Where a disk has no locks, or a process holds the
lock for minutes, both prepare the text, and the last one's folder stays.

Left out: removing old texts. The whole cache can be deleted at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from nemotron_lite.data.baselines import Baselines
from nemotron_lite.data.batches import ConcatenatedDocuments
from nemotron_lite.data.text_data import HeldOut, TextData
from nemotron_lite.files import atomic_folder
from nemotron_lite.input_files import parse_json, read_bytes

FORMAT = 3  # raise it when the files, the rules of the corpus or the tokenizer's change
META = "meta.json"
FILES = (
    "tokenizer.json", "train.npy", "train_starts.npy", "held_out.npy", "held_out_starts.npy",
)  # fmt: skip
WAIT = 300.0  # seconds for another process that prepares a text
_CHUNK = 1 << 20

_log = logging.getLogger(__name__)

Key = Mapping[str, str | int]


class DamagedCacheError(ValueError):
    """A cached text that cannot be used. The message names the folder and the fault."""


def cache_folder() -> Path | None:
    """The folder of prepared texts: `nemotron_lite` in `$XDG_CACHE_HOME` or `~/.cache`.

    A relative `XDG_CACHE_HOME` is ignored, as its specification says. None if there is no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "nemotron_lite"
    try:
        return Path.home() / ".cache" / "nemotron_lite"
    except RuntimeError:  # HOME is not set, and the user has no entry in /etc/passwd
        return None


def text_folder(cache: Path, key: Key) -> Path:
    """The folder of the text with this key."""
    return cache / f"text-{_sha256(_json(key))[:16]}"


def write_text(folder: Path, files: Mapping[str, bytes], meta: Mapping[str, Any]) -> None:
    """Write a prepared text; whatever is at `folder` is replaced.

    Args:
        files: name to content, for each name of `FILES`.
        meta: what `make_text` needs beside the files, and the key.

    Raises:
        OSError, ValueError: the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        folder.unlink()  # the entry itself, never what a link points to
    elif folder.is_dir():
        with suppress(OSError):  # a folder of ours that we could not list could not be replaced
            folder.chmod(stat.S_IRWXU | stat.S_IMODE(folder.stat().st_mode))
    listed = {name: {"bytes": len(files[name]), "sha256": _sha256(files[name])} for name in FILES}
    content = {**meta, "files": listed}
    with atomic_folder(folder) as temporary:
        for name in FILES:
            (temporary / name).write_bytes(files[name])
        (temporary / META).write_bytes(_signed(content))


def read_text(folder: Path, key: Key) -> TextData | None:
    """The text in a folder, checked; None if nothing is there.

    Raises:
        DamagedCacheError: something is there that is not this text, or not all of it.
    """
    try:
        found = os.lstat(folder)
    except OSError:  # nothing there, or a cache that cannot be entered
        return None
    if not stat.S_ISDIR(found.st_mode):
        raise DamagedCacheError(f"{folder} is not a folder")
    if found.st_uid not in (os.geteuid(), 0):
        raise DamagedCacheError(f"{folder} belongs to another user (id {found.st_uid})")
    try:
        return _open(folder, key)
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise DamagedCacheError(f"{folder} is incomplete: it has no {missing}") from error
    except DamagedCacheError:
        raise
    except Exception as error:  # whatever a library says about content that was not ours
        raise DamagedCacheError(f"{folder} is damaged ({error})") from error


def make_text(files: Mapping[str, bytes], meta: Mapping[str, Any]) -> TextData:
    """A text from the contents of its files."""
    return _make(
        files, meta, {name: _sha256(files[name]) for name in FILES}, _array(files["train.npy"])
    )


@contextmanager
def locked(cache: Path) -> Iterator[None]:
    """Hold the lock of the cache, if there is one to have."""
    handle = -1
    with suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
        handle = os.open(cache, os.O_RDONLY | os.O_DIRECTORY)
        _wait_for_lock(handle)
    try:
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def npy(array: np.ndarray) -> bytes:
    """An array as the content of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _open(folder: Path, key: Key) -> TextData:
    meta = _verified(read_bytes(folder / META, follow_links=False), folder)
    if meta.get("format") != FORMAT or meta.get("key") != dict(key):
        raise DamagedCacheError(f"{folder} holds another text, or one of another version")
    contents: dict[str, bytes] = {}
    checksums: dict[str, str] = {}
    for name in FILES:
        size = meta["files"][name]["bytes"]
        if name == "train.npy":  # large, and read through a memory map later
            checksums[name] = _file_sha256(folder / name, size)
        else:
            contents[name] = read_bytes(folder / name, limit=size, follow_links=False)
            checksums[name] = _sha256(contents[name])
        if checksums[name] != meta["files"][name]["sha256"]:
            raise DamagedCacheError(f"{folder / name} is damaged (its checksum differs)")
    tokens = np.load(folder / "train.npy", mmap_mode="r", allow_pickle=False)
    return _make(contents, meta, checksums, tokens)


def _make(
    files: Mapping[str, bytes],
    meta: Mapping[str, Any],
    checksums: Mapping[str, str],
    tokens: np.ndarray,
) -> TextData:
    held_out = _array(files["held_out.npy"]).astype(np.int64)
    bounds = _array(files["held_out_starts.npy"])[1:]
    return TextData(
        tokenizer=Tokenizer.from_str(files["tokenizer.json"].decode()),
        train=ConcatenatedDocuments(tokens, _array(files["train_starts.npy"])),
        held_out=HeldOut(tuple(np.split(held_out, bounds)), meta["held_out_bytes"]),
        baselines=Baselines(**meta["baselines"]),
        train_bytes=meta["train_bytes"],
        checksum=_sha256(_json(dict(checksums))),
    )


def describe(
    key: Key, train_bytes: int, held_out_bytes: int, baselines: Baselines
) -> dict[str, Any]:
    """The part of `meta.json` that does not follow from the files."""
    sizes = {"train_bytes": train_bytes, "held_out_bytes": held_out_bytes}
    return {"format": FORMAT, "key": dict(key), **sizes, "baselines": asdict(baselines)}


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _signed(content: Mapping[str, Any]) -> bytes:
    """An object with its own checksum, as a file."""
    return _json({"content": content, "sha256": _sha256(_json(content))})


def _verified(file: bytes, folder: Path) -> dict[str, Any]:
    """The content of `meta.json`, if every byte of it is as it was written."""
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        content = parse_json(file.decode())["content"]
        if _signed(content) == file:
            return dict(content)
    raise DamagedCacheError(f"{folder / META} is damaged (its checksum differs)")


def _file_sha256(path: Path, size: int) -> str:
    """The checksum of a regular file; it is read in pieces, so that it need not fit in memory."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(handle, "rb") as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_size != size:
            raise DamagedCacheError(f"{path} is damaged (expected a file of {size:,} bytes)")
        digest = hashlib.sha256()
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


def _array(content: bytes) -> np.ndarray:
    found: np.ndarray = np.load(io.BytesIO(content), allow_pickle=False)
    return found


def _wait_for_lock(handle: int) -> None:
    """Take the lock, or give up after `WAIT` seconds: a stopped process may hold it for ever."""
    started = time.monotonic()
    said = False
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() - started > WAIT:
                return
            if not said:
                _log.warning("Waiting for another process that prepares a text.")
                said = True
            time.sleep(0.05)
