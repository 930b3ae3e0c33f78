"""Atomic writes: a file or a folder is replaced as a whole, or it is not changed.

A process can be killed at any moment, and a disk can be full. Neither may leave a half-written file
under the final name, or destroy the old content before the new one is complete.

A file (`atomic_file`) is written under a temporary name in the same folder, flushed to the disk
(fsync) and renamed. A rename replaces the old file in one step.

A folder (`atomic_folder`) holds many files and takes minutes to write:

    1. write everything into a new folder beside the old one,
    2. flush it to the disk (fsync of each file and of the folder),
    3. exchange the two names in one step,
    4. delete the old folder, which now has the temporary name.

A rename cannot replace a folder that is not empty. Linux can exchange two folders in one step
(renameat2 with RENAME_EXCHANGE), and so can macOS (renamex_np with RENAME_SWAP). Where the system
or the disk supports neither, the old folder is first renamed to `.NAME.old-...`, and renamed back
if the second rename fails. A process that is killed exactly between these two renames leaves the
old folder complete under that name.

A killed process leaves its temporary file `.NAME.writing-...` or folder `.NAME.saving-...` behind.
The next atomic write removes it: of a file, in the same folder; of a folder, to the same path. What
a running process is still writing is not removed. It is locked, and a lock ends with its process.

Both need disk space for the old and the new content at the same time. Files in the old folder that
the new one does not replace (a README, an optimizer's state) are kept, as hard links where the disk
supports them.
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # sys/stdio.h on macOS


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; the file there replaces `path` when the block ends.

        with atomic_file("scores.json") as temporary:
            temporary.write_text(content)

    If the block or the disk fails, `path` stays as it was and the temporary file is removed.

    Raises:
        OSError: the disk refused the write.
    """
    path = Path(path).resolve()
    _remove_abandoned(path.parent.glob(".*.writing-*"))
    temporary = path.with_name(f".{path.name}.writing-{secrets.token_hex(4)}")
    lock = os.open(temporary, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        _try_lock(lock)
        yield temporary
        _sync_file(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(lock)
    _sync_folder(path.parent)


@contextmanager
def atomic_folder(
    path: Path, replaces: Callable[[str], bool] = lambda name: True
) -> Iterator[Path]:
    """A temporary folder that replaces `path` when the block ends without an error.

    Args:
        path: the folder to create or to replace. Parents are created.
        replaces: called with each file name in the old folder. Where it returns True, the file
            belongs to the caller: the new folder has it only if the caller writes it again. All
            other files are kept.

    Raises:
        NotADirectoryError: `path` is a file.
        ValueError: `path` is the current folder or one of its parents, which cannot be exchanged
            safely.
        OSError: the disk refused the write; the old folder is as it was.
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file; name a folder to save into.")
    here = Path.cwd()
    if path == here or path in here.parents:
        raise ValueError(
            f"{path} is the current folder (or holds it), which cannot be replaced as a whole; "
            f"save into a folder inside it, such as {path / 'checkpoint'}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent.glob(f".{glob.escape(path.name)}.saving-*"))
    temporary = path.parent / f".{path.name}.saving-{secrets.token_hex(4)}"
    temporary.mkdir()
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _try_lock(lock)
        yield temporary
        if path.is_dir():
            _keep_other_files(path, temporary, replaces)
        _sync_tree(temporary)
        _put_in_place(temporary, path)
    finally:
        # Here `temporary` is a half-written new folder, or the old one after the exchange.
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)
    _sync_folder(path.parent)


def _try_lock(handle: int) -> bool:
    """Lock an open file or folder. False if it is locked already, or the disk has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(candidates: Iterable[Path]) -> None:
    """Delete temporary files and folders that a killed process left."""
    for left in candidates:
        try:
            handle = os.open(left, os.O_RDONLY)
        except FileNotFoundError:  # its process has just finished
            continue
        try:
            if _try_lock(handle):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _keep_other_files(old: Path, new: Path, replaces: Callable[[str], bool]) -> None:
    """Link what the caller neither wrote nor wants to drop into the new folder."""
    for entry in old.iterdir():
        target = new / entry.name
        if target.exists() or replaces(entry.name):
            continue
        if entry.is_symlink() or not entry.is_dir():
            _link(entry, target)
        else:
            shutil.copytree(entry, target, symlinks=True, copy_function=_link)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # no hard links on this disk
        shutil.copy2(source, target, follow_symlinks=False)


def _sync_tree(folder: Path) -> None:
    """Wait until every file and folder inside `folder` is on the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            if file.is_file() and not file.is_symlink():
                _sync_file(file)
        _sync_folder(Path(root))


def _sync_file(file: Path) -> None:
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network disks cannot sync a folder; its files are already on the disk
    finally:
        os.close(handle)


def _put_in_place(new: Path, path: Path) -> None:
    """Rename `new` to `path`. A folder that is already at `path` takes the name of `new`."""
    if not path.exists():
        os.rename(new, path)
        return
    if _exchange(new, path):
        return
    aside = path.parent / f".{path.name}.old-{secrets.token_hex(4)}"
    try:
        os.rename(path, aside)
        os.rename(new, path)
    except BaseException:
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        raise
    os.rename(aside, new)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step. False if the system or the disk does not support it."""
    libc = ctypes.CDLL(None)
    a, b = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(a, b, _RENAME_SWAP) == 0)
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE) == 0)
    return False
