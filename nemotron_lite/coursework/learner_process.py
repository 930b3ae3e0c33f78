"""The process in which a learner's code runs: how it starts, and what limits it.

It has the notebook and nothing that scores. The grading process (`session`, on the other end of two
pipes) sends requests, and each gets one answer (`learner_answers`).

The code in here can do to this process what it likes: forge an answer, write into the pipe, end the
process. It can only answer for itself: inputs are hidden until they are sent, the expected values
and the comparisons are elsewhere, and an answer that is malformed counts as wrong. What does not
react to its time limit is killed from outside. `learner_limits` says what Linux refuses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from nemotron_lite.coursework import learner_limits as limits


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def cut_off() -> bool:
    """Whether this process has no network: every interface except loopback is down.

    Interfaces may exist: a new namespace can start with tunnels that are down.
    """
    if sys.platform != "linux":
        return False
    import fcntl
    import socket
    import struct

    def up(handle: socket.socket, name: str) -> bool:
        get_flags, is_up = 0x8913, 0x1  # SIOCGIFFLAGS, IFF_UP of Linux
        found = fcntl.ioctl(handle, get_flags, struct.pack("16sh14x", name.encode(), 0))
        return bool(int(struct.unpack("16sh14x", found)[1]) & is_up)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        names = {name for _, name in socket.if_nameindex()} - {"lo"}
        return not any(up(handle, name) for name in names)


def sockets_refused() -> bool:
    """Whether this process cannot make a socket, and so has no network in any case."""
    import socket

    try:
        socket.socket().close()
    except PermissionError:
        return True
    return False


def probe(hidden: list[str]) -> dict[str, bool]:
    """What separates this process from the machine; `hidden` are folders it should not see."""
    seen = [path for path in hidden if _entries(path)]
    return {
        "own_processes": os.getpid() == 1,
        "files_hidden": not seen,
        "root_hidden": not _entries("/"),
        "processes_hidden": not _entries("/proc"),
        "signals_refused": _refused(os.getppid()),
    }


def _refused(process: int) -> bool:
    """Whether this process may not send a signal to another one; signal 0 only asks."""
    try:
        os.kill(process, 0)
    except OSError:
        return True
    return False


def _entries(path: str) -> set[str]:
    with contextlib.suppress(OSError):
        return set(os.listdir(path)) - {".venv"}
    return set()


class OnlyHere:
    """An import hook: of this package only what lies in the learner's copy of it is found.

    The same package may be installed on this machine, where the usual search would find it.
    """

    site = str(Path(__file__).resolve().parents[2])

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> Any:
        """Find a module of this package in the copy, or refuse it."""
        top = name.partition(".")[0]
        if top not in ("nemotron_lite", "nemotron_kernels"):
            return None
        found = PathFinder.find_spec(name, path)
        if found is None or not str(found.origin).startswith(cls.site):
            raise ModuleNotFoundError(
                f"{name} is not available where coursework is graded: an answer can use torch and "
                "what the handed-out cells import.",
                name=name,
            )
        return found


def main() -> None:
    """Serve on two pipes, or say what separates this process from the machine.

    The argument is JSON: `pipes`, two file numbers; or `hidden`, folders to look for; `home`, the
    folder to work in; `memory_gib`; and `readable`, the paths to which reading is limited, none in
    `jail`.
    """
    die_with_parent()
    job = json.loads(sys.argv[1])
    home = job["home"] if Path(job["home"]).is_dir() else str(Path.home())
    os.chdir(home)
    facts = {
        "processes_limited": limits.limit_files_and_processes(),
        "paths_limited": bool(job["readable"]) and limits.limit_paths(job["readable"], [home]),
        "cut_off": cut_off(),
    }
    if "hidden" in job:
        facts["calls_refused"] = limits.refuse_system_calls()
        facts["sockets_refused"] = sockets_refused()
        json.dump({**facts, **probe(job["hidden"])}, sys.stdout)
        return
    sys.meta_path.insert(0, OnlyHere)
    import torch

    from nemotron_lite.coursework.learner_answers import Learner
    from nemotron_lite.coursework.wire import Channel

    torch.set_num_threads(1)
    channel = Channel(*job["pipes"])
    learner = Learner(channel)
    facts["memory_limited"] = limits.limit_memory(job["memory_gib"])
    facts["calls_refused"] = limits.refuse_system_calls()
    facts["cut_off"] = facts["cut_off"] or sockets_refused()
    channel.send({"id": 0, **facts}, b"")
    learner.serve()


if __name__ == "__main__":
    main()
