"""Atomic writes: a file or a folder is replaced as a whole, or it is not changed.

A process can be killed at any moment, and a disk can be full. Neither may leave a half-written file
under the final name, or destroy the old content before the new one is complete.

A file (`atomic_file`) is written inside a temporary folder beside the old file, flushed to the disk
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

A killed process leaves its temporary folder behind: `.nemotron-lite.writing-` and 16 hexadecimal
digits for a file, `.NAME.saving-` and 16 such digits for a folder. The next atomic write removes
it: of a file, in the same folder; of a folder, to the same path. Nothing with another name is
removed. What a running process is still writing stays: its temporary folder is locked, and the lock
ends with the process. The lock is on the folder, because a library may replace the file inside
(safetensors does). What cannot be removed, such as another user's folder, is left where it is.

The new file or folder has the permissions of the one that it replaces. A file that replaces nothing
has the usual ones (umask), also where a library would create it with others.

Both need disk space for the old and the new content at the same time. Files in the old folder that
the new one does not replace (a README, an optimizer's state) are kept, as hard links where the disk
supports them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # sys/stdio.h on macOS


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary path to write to; the file there replaces `path` when the block ends.

        with atomic_file("scores.json") as temporary:
            temporary.write_text(content)

    If the block or the disk fails, `path` stays as it was and the temporary file is removed. The
    block may replace the temporary file, and may write other files beside it, which are removed.

    Raises:
        OSError: the disk refused the write.
    """
    path = Path(path).resolve()
    with _temporary_folder(path.parent, ".nemotron-lite.writing-", 0o700) as folder:
        temporary = folder / path.name
        temporary.touch()
        permissions = _permissions(path if path.exists() else temporary)
        yield temporary
        temporary.chmod(permissions)
        _sync_file(temporary)
        temporary.replace(path)
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
            f"save into a folder inside it, such as {path / 'new'}."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    permissions = _permissions(path) if path.is_dir() else 0o777
    with _temporary_folder(
        path.parent, f".{path.name}.saving-", permissions | stat.S_IRWXU
    ) as temporary:
        yield temporary
        if path.is_dir():
            _keep_other_files(path, temporary, replaces)
            temporary.chmod(_permissions(path))
        _sync_tree(temporary)
        _put_in_place(temporary, path)
    _sync_folder(path.parent)


def check_writable_folder(path: str | Path) -> None:
    """Find out whether a folder can be created and written at `path`, before hours of work.

    A small file is written there, flushed to the disk, and removed again. A folder that does not
    exist is created for it, with its parents, and these are removed too.

    Raises:
        OSError: it cannot; the text says why and what to do.
        TypeError, ValueError: `path` is no path.
    """
    folder = folder_path(path)
    made: list[Path] = []
    try:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file; name a folder to save into.")
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        for each in reversed(missing):
            each.mkdir(exist_ok=True)
            made.append(each)
        with _temporary_folder(folder, ".nemotron-lite.writing-", 0o700) as temporary:
            (temporary / "probe").write_bytes(b"probe")
            _sync_file(temporary / "probe")
    except OSError as error:
        if error.errno is None:
            raise
        raise _with_advice(error, folder) from error
    finally:
        for each in reversed(made):
            with suppress(OSError):  # somebody else uses it by now
                each.rmdir()


def folder_path(path: str | Path) -> Path:
    """The absolute folder that a user names; a leading `~` is the home folder, links are followed.

    Raises:
        TypeError: neither text nor path.
        ValueError: empty, with a zero byte, or with the home of an unknown user.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"path={path!r} ({type(path).__name__}): expected a text or a Path.")
    text = os.fspath(path)
    if not text.strip() or "\0" in text:
        raise ValueError(f"path={text!r}: expected the name of a folder; '.' is the current one.")
    try:
        return Path(text).expanduser().resolve()
    except RuntimeError as error:
        raise ValueError(f"path={text!r}: {error} Give the whole path.") from error


_ADVICE = {
    errno.EACCES: "give yourself write permission there, or name another folder",
    errno.EPERM: "give yourself write permission there, or name another folder",
    errno.EROFS: "the file system is mounted read-only; name a folder on another one",
    errno.ENOSPC: "the disk is full; free some space, or name a folder on another disk",
    errno.EDQUOT: "your disk quota is used up; free some space, or name a folder on another disk",
    errno.ENAMETOOLONG: "the name is too long; name another folder",
    errno.ENOTDIR: "a part of this path is a file; name another folder",
    errno.EEXIST: "a part of this path is a file or a dead link; name another folder",
    errno.ELOOP: "its symbolic links lead in a circle; name another folder",
}


def _with_advice(error: OSError, folder: Path) -> OSError:
    """The same kind of error, with a text that names the folder and says what to do."""
    why = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0, "name another folder")
    made = type(error)(f"{folder} cannot be written ({why}): {advice}.")
    made.errno = error.errno
    return made


def _permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@contextmanager
def _temporary_folder(parent: Path, prefix: str, permissions: int) -> Iterator[Path]:
    """A new locked folder, which is deleted when the block ends.

    Its name is `prefix` and 16 hexadecimal digits. Folders with such a name that killed processes
    left are deleted first.
    """
    _remove_abandoned(parent, prefix)
    folder, lock = _create_and_lock(parent, prefix, permissions)
    try:
        yield folder
    finally:
        # After an exchange of two folders, the old one has this name now.
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _create_and_lock(parent: Path, prefix: str, permissions: int) -> tuple[Path, int]:
    """A new folder and the handle that holds its lock.

    Another process may take the folder for abandoned before it is locked. That process locks it
    before it deletes it, so this one waits for the lock, looks whether its folder is still there,
    and creates another one if not.
    """
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(8)}"
        folder.mkdir(permissions)
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # a disk without locks: then nobody deletes the folder either
            fcntl.flock(handle, fcntl.LOCK_EX)
        if folder.exists():
            return folder, handle
        os.close(handle)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Delete temporary folders that killed processes left, as far as this process may."""
    ours = re.compile(re.escape(prefix) + "[0-9a-f]{16}")
    with suppress(OSError):
        for name in filter(ours.fullmatch, os.listdir(parent)):
            with suppress(OSError):
                _remove_if_unlocked(parent / name)


def _remove_if_unlocked(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
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
