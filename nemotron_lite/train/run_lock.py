"""The lock of a run folder: two trainings never write into one folder.

Two runs in one folder would mix their log lines and delete each other's checkpoints. So a run holds
a lock on the file `run.lock` in its folder from its first look at the checkpoints to its last save.
The file says who holds it: process id, host, and since when.

The lock is flock(2). The kernel ends it with the process, also after a kill or a power cut, so a
file that is left behind locks nothing. On NFS, Linux turns flock into a lock of the server, which
other hosts see too.

Some disks have no locks (some FUSE and cluster file systems). There the file itself is the lock:
it is created only if it does not exist, and removed at the end. If its process was killed, the file
stays. A later run on the same host sees that the process is gone and takes the lock over. On
another host this cannot be known, so the error says what to look at and which file to delete.

A forked child (a worker of a data loader) gets the parent's open files, and would keep the lock
after the parent has died. So a child closes its copy as soon as it is forked.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import socket
import stat
import time
import weakref
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from nemotron_lite import input_files
from nemotron_lite.train.errors import ResumeError

LOCK = "run.lock"
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}


class RunLock(AbstractContextManager["RunLock"]):
    """Holds the lock of `folder` while the context is open.

    Raises:
        ResumeError: (on entering) another run holds it; the text says which process and host.
        OSError: (on entering) the file cannot be created.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK
        self._handle: int | None = None
        self._remove = False  # whether the existence of the file is the lock

    def __enter__(self) -> RunLock:
        handle = self._open()
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ResumeError(self._held()) from None
        except OSError as error:
            os.close(handle)
            if error.errno not in _NO_LOCKS:
                raise
            self._enter_without_flock()
            return self
        self._handle = handle
        _open_locks.add(self)
        self._write_holder(handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._remove:
            self._remove = False
            self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close the file, which ends the lock unless another process has it open too."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _open(self) -> int:
        # O_NONBLOCK: a named pipe with this name would wait for ever.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            handle = os.open(self.path, flags, 0o666)
        except OSError as error:
            raise OSError(
                f"the lock {self.path} cannot be opened ({error.strerror}): a run needs a folder "
                f"that this process may write, with a regular file or nothing at {LOCK}."
            ) from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(f"{self.path} is no regular file: remove it; a run keeps its lock there.")
        return handle

    def _enter_without_flock(self) -> None:
        """Put a file with this process's name in place, unless another living one's is there.

        The file is complete before it gets its name. A file that names nobody who lives is moved
        out of the way first; only one of several processes can move it.
        """
        own = self.path.with_name(f"{LOCK}.{secrets.token_hex(8)}")
        handle = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._write_holder(handle)
        os.close(handle)
        aside = own.with_suffix(".stale")
        try:
            holder = read_holder(self.path)
            if holder and not _is_gone(holder):
                raise ResumeError(self._held(kernel_lock=False))
            with suppress(FileNotFoundError):
                self.path.rename(aside)
                if read_holder(aside) != holder:  # its owner wrote its name a moment ago
                    aside.rename(self.path)
                    raise ResumeError(self._held(kernel_lock=False))
            try:
                os.link(own, self.path)
            except FileExistsError:  # another run was faster
                raise ResumeError(self._held(kernel_lock=False)) from None
            except OSError:  # a disk without hard links
                own.rename(self.path)
        finally:
            own.unlink(missing_ok=True)
            aside.unlink(missing_ok=True)
        self._remove = True

    def _write_holder(self, handle: int) -> None:
        os.ftruncate(handle, 0)
        os.pwrite(handle, (json.dumps(_myself()) + "\n").encode(), 0)

    def _held(self, *, kernel_lock: bool = True) -> str:
        holder = read_holder(self.path)
        folder, host = self.path.parent, holder.get("host", "unknown")
        who = f"process {holder.get('pid', 'unknown')} on host {host}, since {_since(holder)}"
        text = (
            f"{folder} is in use by another run: {who}. Wait until it has ended, or stop it with "
            "SIGTERM, which saves it; or give another out_dir (--out)."
        )
        if host != socket.gethostname() or not kernel_lock:
            text += (
                f" If you know that no such process runs on {host} any more, its lock is stale: "
                f"delete {self.path} and start again."
            )
        return text


def read_holder(path: Path) -> dict[str, Any]:
    """Who wrote the lock file: pid, host, started (seconds since 1970); {} if it does not say."""
    try:
        found = input_files.read_json(path, limit=4096, follow_links=False)
    except (OSError, input_files.FileError):
        return {}
    return {
        name: found[name]
        for name, kind in (("pid", int), ("host", str), ("time", int), ("process_start", int))
        if type(found.get(name)) is kind and len(str(found[name])) < 256
    }


def _myself() -> dict[str, Any]:
    pid = os.getpid()
    return {
        "pid": pid,
        "host": socket.gethostname(),
        "time": int(time.time()),
        "process_start": _process_start(pid),
    }


def _since(holder: dict[str, Any]) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["time"]))
    except (KeyError, OverflowError, OSError, ValueError):
        return "an unknown time"


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the process certainly ended: it ran on this host, and its pid is free or reused."""
    if holder.get("host") != socket.gethostname() or "pid" not in holder:
        return False
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except (OverflowError, OSError):  # it belongs to somebody else, or is no pid at all
        return False
    return holder.get("process_start", 0) != _process_start(holder["pid"])


def _process_start(pid: int) -> int:
    """When a process started, in ticks since boot; 0 where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


_open_locks: weakref.WeakSet[RunLock] = weakref.WeakSet()


def _close_in_child() -> None:
    for lock in list(_open_locks):
        with suppress(OSError):
            lock.close()
        lock._remove = False


os.register_at_fork(after_in_child=_close_in_child)
