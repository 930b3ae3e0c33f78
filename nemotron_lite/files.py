"""Atomic writes: a file or a folder is replaced as a whole, or it is not changed.

A process can be killed at any moment, and a disk can be full. Neither may leave a half-written file
under the final name, or destroy the old content before the new one is complete.

A file (`atomic_file`) is written inside a temporary folder beside the old file, flushed to the disk
(fsync) and renamed. A rename replaces the old file in one step.

A folder (`atomic_folder`) holds many files and takes minutes to write:

    1. write everything into a temporary folder,
    2. flush it to the disk (fsync of each file and of the folder),
    3. put it in the place of the old folder,
    4. delete the old files.

How step 3 works stands in `folder_replacement.py`: the two folders are exchanged, or, where that is
impossible or would change more than the content, the files are moved one by one.

A killed process leaves its temporary folder behind: `.nemotron-lite.writing-` and 16 hexadecimal
digits for a file, `.NAME.saving-` or `.nemotron-lite.saving-` and such digits for a folder. The
next atomic write removes it: of a file, in the same folder; of a folder, to the same path. Nothing
with another name is removed. What a running process is still writing stays: its temporary folder is
locked, and the lock ends with the process. The lock is on the folder, because a library may replace
the file inside (safetensors does). What cannot be removed, such as another user's folder, is left
where it is.

A new file has the permissions of the one that it replaces. A file that replaces nothing has the
usual ones (umask), also where a library would create it with others.

Both need disk space for the old and the new content at the same time. Files in the old folder that
the new one does not replace (a README, an optimizer's state) are kept.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from nemotron_lite import folder_replacement
from nemotron_lite.folder_replacement import (
    NEW,
    SAVING,
    hidden_prefix,
    move,
    permissions,
    sync_file,
    sync_folder,
    sync_tree,
)
from nemotron_lite.shipped_models import check_not_shipped

NOT_UTF8 = "has a path that is not UTF-8, and safetensors cannot open it; rename it"

_WRITING = ".nemotron-lite.writing-"

_MAKE_SPACE = (
    "free some space (the old and the new content need it at the same time), or name a folder on "
    "another disk"
)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_ADVICE = {
    errno.EACCES: "give yourself write permission there, or name another folder",
    errno.EPERM: "give yourself write permission there, or name another folder",
    errno.EROFS: "the file system is mounted read-only; name a folder on another one",
    errno.ENOSPC: f"the disk is full; {_MAKE_SPACE}",
    errno.EDQUOT: f"your disk quota is used up; {_MAKE_SPACE}",
    errno.ENOENT: "the system allows no new folder there; name another one",
    errno.ENAMETOOLONG: "the name is too long; name another folder",
    errno.ENOTDIR: "a part of this path is a file; name another folder",
    errno.EEXIST: "a part of this path is a file or a dead link; name another folder",
    errno.ELOOP: "its symbolic links lead in a circle; name another folder",
}


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
    check_not_shipped(path)
    with _temporary_folder(path.parent, _WRITING, 0o700) as folder:
        temporary = folder / path.name
        temporary.touch()
        mode = permissions(path if path.exists() else temporary)
        yield temporary
        temporary.chmod(mode)
        sync_file(temporary)
        temporary.replace(path)
    sync_folder(path.parent)


@contextmanager
def atomic_folder(
    path: str | Path,
    replaces: Callable[[str], bool] = lambda name: True,
    last: str | None = None,
) -> Iterator[Path]:
    """A temporary folder whose files replace those of `path` when the block ends without an error.

    Args:
        path: the folder to create or to replace, as for `folder_path`. Parents are created.
        replaces: called with each name in the old folder. Where it returns True, the file belongs
            to the caller: the new folder has it only if the caller writes it again. All other files
            are kept.
        last: the file without which the folder is not complete. Where the folders cannot be
            exchanged, it is removed first and comes back last, so that no program reads a mixture.

    Raises:
        NotADirectoryError: `path` is a file.
        TypeError, ValueError: `path` is no path.
        OSError: the folder cannot be written, or the disk is full; the old folder is as it was. If
            everything was written and only the replacement failed, the text says where it is.
    """
    path = folder_path(path)
    with ExitStack() as stack:
        with _explained(path):
            if path.exists():
                folder_replacement.recover(path)
                _probe(path)  # the user may have made it read-only
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
            staging = None
            new = _beside(stack, path)
            if new is None:
                staging, new = _inside(stack, path)
        with _explained(path, _FULL):  # other errors may be about other files of the caller
            yield new
        with _explained(path):
            sync_tree(new)
            try:
                _replace(new, staging, path, replaces, last)
            except OSError as error:
                raise _kept(new, path, error) from error
    sync_folder(path.parent)


def _replace(
    new: Path,
    staging: Path | None,
    path: Path,
    replaces: Callable[[str], bool],
    last: str | None,
) -> None:
    """Put the folder `new` in the place of `path`, in the first way that works."""
    if staging is not None:
        folder_replacement.install(staging, path, replaces, last)
        return
    if not path.exists():
        folder_replacement.put_in_place(new, path)
        return
    own = os.listdir(new)
    try:
        folder_replacement.exchange(new, path, replaces)
    except OSError:
        with ExitStack() as stack:
            staging, inside = _inside(stack, path)
            for name in own:
                move(new / name, inside / name)
            try:
                folder_replacement.install(staging, path, replaces, last)
            except BaseException:
                for name in os.listdir(inside):
                    move(inside / name, new / name)
                raise


def _beside(stack: ExitStack, path: Path) -> Path | None:
    """A temporary folder that may replace `path` as a whole; None if there can be none."""
    mode = permissions(path) if path.exists() else 0o777
    try:
        folder = stack.enter_context(
            _temporary_folder(path.parent, hidden_prefix(path, "saving"), mode | stat.S_IRWXU)
        )
    except OSError:
        if path.exists():
            return None
        raise
    if path.exists() and not folder_replacement.exchange_is_safe(folder, path):
        return None
    return folder


def _inside(stack: ExitStack, path: Path) -> tuple[Path, Path]:
    """A staging folder inside `path`, and the folder in it for the new files."""
    staging = stack.enter_context(_temporary_folder(path, SAVING, 0o700))
    (staging / NEW).mkdir()
    return staging, staging / NEW


def _kept(new: Path, path: Path, error: OSError) -> OSError:
    """Keep what was written where it could not be put in place; the error that says so."""
    # One such folder and not more: saving is tried again and again, and the disk is finite.
    kept = path.parent / f"{path.name}.unsaved"
    if new.parent != path.parent:
        kept = path / "unsaved"
    try:
        if kept.exists():
            shutil.rmtree(kept)
        os.rename(new, kept)
    except OSError:
        return error
    made = type(error)(
        f"{path} could not be replaced ({error.strerror or error}); it is as it was. Everything "
        f"that was to be saved is complete in {kept}: move it where you want it."
    )
    made.errno = error.errno
    return made


def check_writable_folder(path: str | Path) -> None:
    """Find out whether a folder can be created and written at `path`, before hours of work.

    A small file is written there, flushed to the disk, and removed again. A folder that does not
    exist is created for it, with its parents, and these are removed too.

    Raises:
        OSError: it cannot; the text says why and what to do.
        TypeError, ValueError: `path` is no path.
    """
    folder = folder_path(path)
    check_utf8(folder)
    made: list[Path] = []
    with _explained(folder):
        try:
            missing = [each for each in (folder, *folder.parents) if not each.exists()]
            for each in reversed(missing):
                each.mkdir(exist_ok=True)
                made.append(each)
            _probe(folder)
        finally:
            for each in reversed(made):
                with suppress(OSError):  # somebody else uses it by now
                    each.rmdir()


def cache_folder() -> Path | None:
    """The folder of what can be made again: `nemotron_lite` in `$XDG_CACHE_HOME` or `~/.cache`.

    A relative `XDG_CACHE_HOME` is ignored, as its specification says. None if there is no home.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "nemotron_lite"
    try:
        return Path.home() / ".cache" / "nemotron_lite"
    except RuntimeError:  # HOME is not set, and the user has no entry in /etc/passwd
        return None


def is_utf8(path: str | Path) -> bool:
    """Whether a path is UTF-8; safetensors opens no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_utf8(path: str | Path) -> None:
    """Refuse a path that safetensors could not open later.

    Raises:
        ValueError: the path.
    """
    if not is_utf8(path):
        raise ValueError(f"path={str(path)!a} is not UTF-8; choose another name.")


def _probe(folder: Path) -> None:
    """Write a small file into a folder and remove it again.

    Another save may exchange the folder in between, and what was written goes with the old one:
    then it is tried again.
    """
    for tries_left in reversed(range(10)):
        try:
            with _temporary_folder(folder, _WRITING, 0o700) as temporary:
                (temporary / "probe").write_bytes(b"probe")
                sync_file(temporary / "probe")
        except FileNotFoundError:
            if not tries_left or not os.path.isdir(folder):
                raise
        else:
            return


def folder_path(path: str | Path) -> Path:
    """The absolute folder that a user names to write to.

    A leading `~` is the home folder, and links are followed.

    Raises:
        TypeError: neither text nor path.
        ValueError: empty, with a zero byte, or with the home of an unknown user.
        NotADirectoryError: a file.
        PermissionError: a model that comes with the package.
    """
    if not isinstance(path, str | os.PathLike) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"path={path!r} ({type(path).__name__}): expected a text or a Path.")
    text = os.fspath(path)
    if not text.strip() or "\0" in text:
        raise ValueError(f"path={text!r}: expected the name of a folder; '.' is the current one.")
    try:
        folder = Path(text).expanduser().resolve()
    except (RuntimeError, OSError) as error:  # an unknown user, links in a circle
        raise ValueError(f"path={text!r} leads to no folder ({error}).") from error
    if os.path.exists(folder) and not os.path.isdir(folder):  # Path.exists can raise
        raise NotADirectoryError(f"{folder} is a file; name a folder to save into.")
    check_not_shipped(folder)
    return folder


@contextmanager
def _explained(folder: Path, causes: Container[int] = _ADVICE) -> Iterator[None]:
    """Say in errors of the disk which folder they are about, and what to do."""
    try:
        yield
    except OSError as error:
        code = error.errno
        if code is None or code not in causes or not error.strerror:
            raise
        made = type(error)(f"{folder} cannot be written ({error.strerror}): {_ADVICE[code]}.")
        made.errno = code
        raise made from error


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
