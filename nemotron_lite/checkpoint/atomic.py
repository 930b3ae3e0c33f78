"""A folder that appears whole or not at all.

Weights are many files and take minutes to write. A process can be killed at any of those moments,
so none of them may be one in which the old folder is gone and the new one is half there:

    1. write everything into a new folder beside the old one,
    2. ask the disk to keep it (fsync of each file and of the folder),
    3. exchange the two names in one step,
    4. delete the old folder, which now has the temporary name.

A rename replaces a file but not a folder with something in it. Linux can exchange two folders in
one step (renameat2 with RENAME_EXCHANGE), macOS too (renamex_np with RENAME_SWAP). On a system or
disk that can do neither, the old folder is moved aside, and back again if the second move fails;
being killed exactly between those two moves leaves it whole under the name `.NAME.old-...` beside.

What a killed process leaves beside the folder, `.NAME.saving-...`, is removed by the next save; a
lock, which ends with its process, tells it from the folder of a save that is still going on.

The price is room for both folders at once. Files in the old folder that the new one does not write
(a README, an optimiser's state) are carried over, as hard links where the disk has them.
"""

from __future__ import annotations

import ctypes
import fcntl
import glob
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # sys/stdio.h on macOS


@contextmanager
def new_folder(path: Path, replaces: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """A temporary folder that takes the place of `path` when the block ends without an error.

    Args:
        path: the folder to create or to replace. Parents are created.
        replaces: called with the names in the old folder; those it is True for are the caller's and
            are gone afterwards unless written anew. All others are carried over.

    Raises:
        NotADirectoryError: `path` is a file.
        ValueError: `path` is the current folder or holds it, which cannot be exchanged safely.
        OSError: the disk refused; the old folder is as it was.
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
    _remove_abandoned(path)
    temporary = path.parent / f".{path.name}.saving-{secrets.token_hex(4)}"
    temporary.mkdir()
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _try_lock(lock)
        yield temporary
        if path.is_dir():
            _carry_over(path, temporary, replaces)
        _sync(temporary)
        _put_in_place(temporary, path)
    finally:
        # What is left here is a half-written new folder, or the old one after the exchange.
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)
    _sync_folder(path.parent)


def _try_lock(handle: int) -> bool:
    """Lock an open folder for this process; False if another has it or the disk knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(path: Path) -> None:
    """Delete what earlier saves of `path` left when they were killed."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.saving-*"):
        handle = os.open(left, os.O_RDONLY)
        try:
            if _try_lock(handle):
                shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(handle)


def _carry_over(old: Path, new: Path, replaces: Callable[[str], bool]) -> None:
    """Bring along what the caller neither wrote nor means to drop."""
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


def _sync(folder: Path) -> None:
    """Wait until every file of `folder` is on the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            if file.is_file() and not file.is_symlink():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network disks cannot sync a folder; its files are synced
    finally:
        os.close(handle)


def _put_in_place(new: Path, path: Path) -> None:
    """Give `new` the name `path`; a folder that had it takes the name of `new`."""
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
    """Swap two names in one step; False where the system or the disk cannot."""
    libc = ctypes.CDLL(None)
    a, b = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(a, b, _RENAME_SWAP) == 0)
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE) == 0)
    return False
