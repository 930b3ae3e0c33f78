"""The disk cache of prepared texts: checked before use, and never a reason to fail.

A prepared text is a folder with five files (a mixture has more) and `meta.json`, which lists the
size and the SHA-256 of each file, what the text was made from (the key), and its own SHA-256.
Reading compares all of them.
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
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer

from nemotron_lite.data.baselines import Baselines
from nemotron_lite.data.batches import ConcatenatedDocuments
from nemotron_lite.data.text_data import HeldOut, TextData
from nemotron_lite.files import atomic_folder, cache_folder
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
T = TypeVar("T")


class DamagedCacheError(ValueError):
    """A cached text that cannot be used. The message names the folder and the fault."""


def text_folder(cache: Path, key: Key) -> Path:
    """The folder of the text with this key."""
    return cache / f"text-{_sha256(_json(key))[:16]}"


def write_text(folder: Path, files: Mapping[str, bytes], meta: Mapping[str, Any]) -> None:
    """Write the files of a prepared text or mixture; whatever is at `folder` is replaced.

    Args:
        files: name to content.
        meta: what is needed beside the files, and the key.

    Raises:
        OSError, ValueError: the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        folder.unlink()  # the entry itself, never what a link points to
    elif folder.is_dir():
        with suppress(OSError):  # a folder of ours that we could not list could not be replaced
            folder.chmod(stat.S_IRWXU | stat.S_IMODE(folder.stat().st_mode))
    listed = {name: {"bytes": len(file), "sha256": _sha256(file)} for name, file in files.items()}
    content = {**meta, "files": listed}
    with atomic_folder(folder) as temporary:
        for name, file in files.items():
            (temporary / name).write_bytes(file)
        (temporary / META).write_bytes(_signed(content))


@dataclass(frozen=True)
class CachedFiles:
    """The checked files of a folder.

    Attributes:
        meta: what `meta.json` says.
        contents: name and content of every file, except those that are mapped.
        arrays: name and memory map of the large arrays.
        checksums: SHA-256 of every file.
    """

    meta: dict[str, Any]
    contents: dict[str, bytes]
    arrays: dict[str, np.ndarray]
    checksums: dict[str, str]


def read_checked(
    folder: Path, key: Key, names: Collection[str], make: Callable[[CachedFiles], T]
) -> T | None:
    """What `make` builds of the files in a folder, after they are checked; None without a folder.

    Args:
        names: of the files. Tokens to train on (`train….npy`) are mapped, not read.

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
        return make(_open(folder, key, names))
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).name
        raise DamagedCacheError(f"{folder} is incomplete: it has no {missing}") from error
    except DamagedCacheError:
        raise
    except Exception as error:  # whatever a library says about content that was not ours
        raise DamagedCacheError(f"{folder} is damaged ({error})") from error


def in_memory(files: Mapping[str, bytes], meta: Mapping[str, Any]) -> CachedFiles:
    """The contents of files as if they had been read."""
    mapped = {name for name in files if _is_mapped(name)}
    return CachedFiles(
        dict(meta),
        {name: file for name, file in files.items() if name not in mapped},
        {name: array(files[name]) for name in mapped},
        {name: _sha256(file) for name, file in files.items()},
    )


def text_of(found: CachedFiles) -> TextData:
    """The prepared text in the files of `FILES`."""
    return TextData(
        tokenizer=Tokenizer.from_str(found.contents["tokenizer.json"].decode()),
        train=ConcatenatedDocuments(
            found.arrays["train.npy"], array(found.contents["train_starts.npy"])
        ),
        held_out=held_out_documents(found),
        baselines=Baselines(**found.meta["baselines"]),
        train_bytes=found.meta["train_bytes"],
        checksum=checksum(found),
    )


def held_out_documents(found: CachedFiles) -> HeldOut:
    """The held-out documents in `held_out.npy` and `held_out_starts.npy`."""
    tokens = array(found.contents["held_out.npy"]).astype(np.int64)
    bounds = array(found.contents["held_out_starts.npy"])[1:]
    return HeldOut(tuple(np.split(tokens, bounds)), found.meta["held_out_bytes"])


def checksum(found: CachedFiles) -> str:
    """One SHA-256 for all files."""
    return _sha256(_json(found.checksums))


def through_cache(
    cache: str | Path | None,
    key: Key,
    names: Collection[str],
    make: Callable[[CachedFiles], T],
    build: Callable[[], tuple[dict[str, bytes], dict[str, Any]]],
) -> T:
    """What is in the cache under a key, or else what `build` gives, which is then kept there.

    Args:
        cache: folder for the results; `cache_folder()` by default.
        names: of the files.
        make: turns the files into the result.
        build: gives the files and the part of `meta.json` that does not follow from them.

    Raises:
        TypeError, ValueError: `cache` is no path.
    """
    place = _place(cache)
    if place is None:
        _log.warning(
            "There is no home directory to keep the prepared text in, so it is prepared again each "
            "time. Set XDG_CACHE_HOME to a folder that can be written."
        )
        return make(in_memory(*build()))
    folder = text_folder(place, key)
    found, _ = _look(folder, key, names, make)
    if found is not None:
        return found
    with locked(place):
        # Another process may have prepared it in the meantime.
        found, fault = _look(folder, key, names, make)
        if found is not None:
            return found
        if fault:
            _log.warning("%s. The text is prepared again.", fault)
        files, about = build()
        meta = {"format": FORMAT, "key": dict(key), **about}
        try:
            write_text(folder, files, meta)
        except (OSError, ValueError) as error:
            cause = getattr(error, "strerror", None) or error
            remedy = "give another cache=" if cache is not None else "set XDG_CACHE_HOME"
            _log.warning(
                "The prepared text cannot be kept in %s (%s), so it is prepared again each time. "
                "To keep it, %s: a folder that can be written.",
                place,
                cause,
                remedy,
            )
        else:
            found, _ = _look(folder, key, names, make)
    return found if found is not None else make(in_memory(files, meta))


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


def npy(values: np.ndarray) -> bytes:
    """An array as the content of a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    return buffer.getvalue()


def _open(folder: Path, key: Key, names: Collection[str]) -> CachedFiles:
    meta = _verified(read_bytes(folder / META, follow_links=False), folder)
    if meta.get("format") != FORMAT or meta.get("key") != dict(key):
        raise DamagedCacheError(f"{folder} holds another text, or one of another version")
    found = CachedFiles(meta, {}, {}, {})
    for name in names:
        size = meta["files"][name]["bytes"]
        if _is_mapped(name):
            found.checksums[name] = _file_sha256(folder / name, size)
        else:
            found.contents[name] = read_bytes(folder / name, limit=size, follow_links=False)
            found.checksums[name] = _sha256(found.contents[name])
        if found.checksums[name] != meta["files"][name]["sha256"]:
            raise DamagedCacheError(f"{folder / name} is damaged (its checksum differs)")
        if name not in found.contents:
            found.arrays[name] = np.load(folder / name, mmap_mode="r", allow_pickle=False)
    return found


def _place(cache: str | Path | None) -> Path | None:
    """The folder of the cache, if there is one."""
    if cache is None:
        return cache_folder()
    if not isinstance(cache, str | os.PathLike):
        raise TypeError(f"cache is {type(cache).__name__}: expected the path of a folder.")
    try:
        if b"\0" in os.fsencode(cache):
            raise ValueError("a zero byte")
    except ValueError as error:  # or half of a surrogate pair
        raise ValueError(f"cache={cache!r} is no path ({error}).") from error
    return Path(cache)


def _look(
    folder: Path, key: Key, names: Collection[str], make: Callable[[CachedFiles], T]
) -> tuple[T | None, str]:
    """What is cached, or the fault of what is there; neither if nothing is there."""
    try:
        return read_checked(folder, key, names, make), ""
    except DamagedCacheError as error:
        return None, str(error)


def _is_mapped(name: str) -> bool:
    """Whether a file is large: tokens to train on, which are read through a memory map."""
    return name.startswith("train") and not name.endswith("_starts.npy")


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


def array(content: bytes) -> np.ndarray:
    """The array in the content of a .npy file."""
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
