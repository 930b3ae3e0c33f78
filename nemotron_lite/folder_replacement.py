"""How a finished folder takes the place of another one: by an exchange, or file by file.

**Exchange** (`exchange`). The new folder lies beside the old one, and the two names are exchanged
in one step. At every moment the path holds all of the old content or all of the new one. This is
impossible for a mount point (a Docker volume), for the current folder, below a folder that one may
not write, and on some network disks. It also gives the folder a new identity: another owner would
lose it, and a process that has it open would keep the old one.

**File by file** (`install`). The new files are complete in a staging folder inside the old one.
They are moved by renames, which take milliseconds, in this order:

    1. rename the staging folder to `.nemotron-lite.clearing-…`
    2. move the old files into it, the decisive one (config.json) first
    3. rename the staging folder to `.nemotron-lite.filling-…`
    4. move the new files out of it, the decisive one last
    5. delete the staging folder with the old files

A program that reads the folder between 2 and 4 finds no config.json and refuses it, so no program
reads a mixture. If a step fails, all moves are undone. If the process is killed, the name of the
staging folder says what is left to do, and `recover` does it: a folder that was being cleared gets
its old files back, and one that was being filled gets the rest of the new ones.

Where the disk cannot rename a file, it is copied, flushed, and removed at its old place.

Left out: two machines that save into one folder on a disk without locks.
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

SAVING = ".nemotron-lite.saving-"  # names of a staging folder; 16 digits follow
CLEARING = ".nemotron-lite.clearing-"
FILLING = ".nemotron-lite.filling-"
NEW, LAST, OLD = "new", "last", "old"  # folders inside the staging folder
_STAGING = re.compile(r"\.nemotron-lite\.(saving|clearing|filling|writing)-[0-9a-f]{16}")
_UNFINISHED = re.compile(r"\.nemotron-lite\.(clearing|filling)-[0-9a-f]{16}")

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h
_RENAME_SWAP = 2  # sys/stdio.h on macOS
_CANNOT_RENAME = (errno.EXDEV, errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

Replaces = Callable[[str], bool]


def exchange(new: Path, path: Path, replaces: Replaces) -> None:
    """Put the folder `new` at `path`; the old folder then has the name `new`.

    Args:
        new: complete, flushed (`sync_tree`) and on the same disk.
        path: an existing folder. Its files for which `replaces` is False and that `new` does not
            have are kept, as hard links.

    Raises:
        OSError: impossible here; `path` is as it was.
    """
    keep_permissions(path, new)
    with lock_folder(path):
        _keep_other_files(path, new, replaces)
        new.chmod(permissions(path))
        sync_folder(new)
        put_in_place(new, path)
    _keep_late_files(new, path, replaces)


def exchange_is_safe(new: Path, path: Path) -> bool:
    """Whether the folder `new` may replace the folder `path` as a whole.

    It may not if `path` is the current folder or holds it, if something is mounted there or inside,
    or if its owner, its group or its access list would be lost.
    """
    here, there = new.stat(), path.stat()
    try:
        current = Path.cwd()
    except OSError:  # it was removed
        current = Path("/")
    return (
        path != current
        and path not in current.parents
        and (here.st_dev, here.st_uid, here.st_gid) == (there.st_dev, there.st_uid, there.st_gid)
        and not there.st_mode & stat.S_ISGID
        and not _extended_attributes(path)
        and not _is_mounted(path)
    )


def _extended_attributes(path: Path) -> list[str]:
    """Access lists and the user's own attributes; the system sets those of `security` itself."""
    if not hasattr(os, "listxattr"):
        return []
    try:
        return [name for name in os.listxattr(path) if not name.startswith("security.")]
    except OSError:  # a disk without them
        return []


def _is_mounted(path: Path) -> bool:
    """Whether a file system is mounted at `path` or inside it."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return os.path.ismount(path)
    places = (_unescape(line.split(b" ")[4]) for line in lines)
    whole = os.fsencode(path)
    return any(place == whole or place.startswith(whole + b"/") for place in places)


def _unescape(name: bytes) -> bytes:
    """A name in /proc/self/mountinfo, which has octal codes for blanks and the like."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), name)


def _keep_other_files(old: Path, new: Path, replaces: Replaces) -> None:
    """Link what the caller neither wrote nor wants to drop into the new folder."""
    for entry in old.iterdir():
        if not replaces(entry.name) and not _STAGING.fullmatch(entry.name):
            _keep(entry, new / entry.name)


def _keep(source: Path, target: Path) -> None:
    if source.is_symlink() or not source.is_dir():
        if not os.path.lexists(target):
            os.link(source, target, follow_symlinks=False)
        return
    if not target.exists():
        target.mkdir()
        shutil.copystat(source, target)
    for entry in source.iterdir():
        _keep(entry, target / entry.name)


def _keep_late_files(old: Path, path: Path, replaces: Replaces) -> None:
    """Link what another process has written into the old folder just before the exchange."""
    for entry in old.iterdir():
        if not replaces(entry.name) and not _STAGING.fullmatch(entry.name):
            with suppress(OSError):
                _keep(entry, path / entry.name)


def put_in_place(new: Path, path: Path) -> None:
    """Rename `new` to `path`. A folder that is already at `path` takes the name of `new`."""
    if not path.exists():
        os.rename(new, path)
        return
    if _exchange_names(new, path):
        return
    aside = path.parent / f"{hidden_prefix(path, 'old')}{secrets.token_hex(4)}"
    try:
        os.rename(path, aside)
        os.rename(new, path)
    except BaseException:
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        raise
    os.rename(aside, new)


def hidden_prefix(path: Path, what: str) -> str:
    """`.NAME.what-`: how the name of a folder that stands in for `path` begins."""
    # The longest name of a file has 255 bytes; a prefix and up to 16 digits are added.
    name = os.fsdecode(os.fsencode(path.name)[:200])
    return f".{name}.{what}-"


def _exchange_names(one: Path, other: Path) -> bool:
    """Exchange two names in one step. False if the system or the disk does not support it."""
    libc = ctypes.CDLL(None)
    a, b = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(a, b, _RENAME_SWAP) == 0)
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(_AT_FDCWD, a, _AT_FDCWD, b, _RENAME_EXCHANGE) == 0)
    return False


def install(staging: Path, path: Path, replaces: Replaces, last: str | None) -> None:
    """Move the files of `staging/new` into the folder `path`, file by file.

    Args:
        staging: a locked folder inside `path`, called `.nemotron-lite.saving-…`, with flushed files
            (`sync_tree`). Afterwards it holds the old files.
        path: an existing folder.
        replaces: which of its entries are removed even if `staging/new` has none of that name.
        last: the decisive file, which is removed first and moved last; None if there is none.

    Raises:
        OSError: a move failed, and all were undone.
    """
    for folder in (NEW, LAST, OLD):
        (staging / folder).mkdir(exist_ok=True)
    keep_permissions(path, staging / NEW)
    if last is not None and (staging / NEW / last).exists():
        os.rename(staging / NEW / last, staging / LAST / last)
    for folder in (NEW, LAST, "."):
        sync_folder(staging / folder)
    with lock_folder(path):
        recover(path)  # what a process left that was killed since this one began
        old = _old_entries(staging, path, replaces, last)
        moves = _Moves(staging, path)
        try:
            moves.rename_staging(CLEARING)
            for name in old:
                moves.put_away(name)
                if name == last:
                    sync_folder(path)
            moves.rename_staging(FILLING)
            moves.bring(NEW)
            moves.bring(LAST)
        except BaseException:
            moves.undo()
            for name in list(_files_in(moves.staging / LAST)):
                os.rename(moves.staging / LAST / name, moves.staging / NEW / name)
            raise
        with suppress(OSError):  # all is in place, and `recover` would do the rest
            moves.rename_staging(SAVING)


class _Moves:
    """The moves of one installation, each noted before it is made, so that it can be undone."""

    def __init__(self, staging: Path, path: Path) -> None:
        self.staging, self.path = staging, path
        self._put_away: list[str] = []
        self._brought: list[tuple[str, str]] = []

    def rename_staging(self, prefix: str) -> None:
        """Say on the disk what is done next; all moves so far are on the disk then."""
        sync_folder(self.path)
        name = self.path / (prefix + self.staging.name.rpartition("-")[2])
        os.rename(self.staging, name)
        self.staging = name
        sync_folder(self.path)

    def put_away(self, name: str) -> None:
        """Move an old file or folder into the staging folder."""
        self._put_away.append(name)
        move(self.path / name, self.staging / OLD / name)

    def bring(self, folder: str) -> None:
        """Move the files of a folder inside the staging folder to their places."""
        for name in list(_files_in(self.staging / folder)):
            self._brought.append((folder, name))
            move(self.staging / folder / name, self.path / name)
        sync_folder(self.path)

    def undo(self) -> None:
        """Put every file back where it was.

        Raises:
            OSError: a move failed; the staging folder keeps its name, and `recover` will do it.
        """
        for folder, name in reversed(self._brought):
            _move_back(self.path / name, self.staging / folder / name)
        if self.staging.name.startswith(FILLING):
            self.rename_staging(CLEARING)
        for name in reversed(self._put_away):
            _move_back(self.staging / OLD / name, self.path / name)
        if self.staging.name.startswith(CLEARING):
            self.rename_staging(SAVING)


def _old_entries(staging: Path, path: Path, replaces: Replaces, last: str | None) -> list[str]:
    """What to put away before the new files come, the decisive file first."""
    found = [
        name for name in sorted(os.listdir(path)) if replaces(name) and not _STAGING.fullmatch(name)
    ]
    # Inside a folder that is kept, only what a new file replaces.
    found += [
        name
        for folder in (LAST, NEW)
        for name in _files_in(staging / folder)
        if Path(name).parts[0] not in found and os.path.lexists(path / name)
    ]
    return sorted(found, key=lambda name: name != last)


def recover(path: Path) -> None:
    """Finish what a killed process left when it installed files into the folder `path`.

    Waits for a process that is installing there now. Afterwards the folder is complete: it has the
    old files if the process was killed early, else the new ones. Nothing happens in other folders.

    Raises:
        OSError: the folder cannot be written.
    """
    while unfinished := _unfinished(path):
        staging = path / unfinished[0]
        try:
            handle = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # finished by now
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            if staging.exists():
                _finish(staging, path)
        finally:
            os.close(handle)


def _unfinished(path: Path) -> list[str]:
    try:
        return [name for name in os.listdir(path) if _UNFINISHED.fullmatch(name)]
    except OSError:
        return []


def _finish(staging: Path, path: Path) -> None:
    moves = _Moves(staging, path)
    if staging.name.startswith(CLEARING):
        for name in list(_files_in(staging / OLD)):
            _move_back(staging / OLD / name, path / name)
    else:
        moves.bring(NEW)
        moves.bring(LAST)
    moves.rename_staging(SAVING)
    shutil.rmtree(moves.staging, ignore_errors=True)


def _files_in(folder: Path) -> Iterator[str]:
    """All files inside a folder, as paths from there."""
    for root, folders, names in os.walk(folder):
        links = [name for name in folders if Path(root, name).is_symlink()]
        for name in sorted(names + links):
            yield str(Path(root, name).relative_to(folder))


def move(source: Path, target: Path) -> None:
    """Rename a file or folder, or copy it, flush it and remove it where it was."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.rename(source, target)
        return
    except OSError as error:
        if error.errno not in _CANNOT_RENAME:
            raise
    try:
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, target, symlinks=True)
            sync_tree(target)
            shutil.rmtree(source)
        else:
            shutil.copy2(source, target, follow_symlinks=False)
            if not target.is_symlink():
                sync_file(target)
            source.unlink()
    except BaseException:
        # What is still at its old place is what counts.
        if os.path.lexists(source):
            _remove(target)
        raise


def _move_back(source: Path, target: Path) -> None:
    if not os.path.lexists(source):
        return
    if os.path.lexists(target):  # a copy of it was not complete
        _remove(source)
    else:
        move(source, target)


def _remove(path: Path) -> None:
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Let one process at a time replace what is in a folder, where the disk has locks."""
    while True:
        handle = os.open(path, os.O_RDONLY)
        try:
            with suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
            if os.fstat(handle).st_ino == path.stat().st_ino:
                yield
                return
        finally:
            os.close(handle)


def keep_permissions(old: Path, new: Path) -> None:
    """Give each file of the folder `new` the permissions of the file that it replaces."""
    for name in _files_in(new):
        before = old / name
        if before.is_file() and not before.is_symlink():
            (new / name).chmod(permissions(before) | stat.S_IRUSR)


def permissions(path: Path) -> int:
    """The bits that `chmod` sets."""
    return stat.S_IMODE(path.stat().st_mode)


def sync_tree(folder: Path) -> None:
    """Wait until every file and folder inside `folder` is on the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            file = Path(root, name)
            if file.is_file() and not file.is_symlink():
                sync_file(file)
        sync_folder(Path(root))


def sync_file(file: Path) -> None:
    """Wait until a file is on the disk."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass  # some network disks cannot sync a folder; its files are already on the disk
    finally:
        os.close(handle)
