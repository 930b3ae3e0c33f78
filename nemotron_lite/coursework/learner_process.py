"""The process in which a learner's code runs: how it starts, and what limits it.

It has the notebook and nothing that scores. The grading process (`session`, on the other end of two
pipes) sends requests, and each gets one answer (`learner_answers`).

The code in here can do to this process what it likes: forge an answer, write into the pipe, end the
process. It can only answer for itself: inputs are hidden until they are sent, the expected values
and the comparisons are elsewhere, and an answer that is malformed counts as wrong. What does not
react to its time limit is killed from outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

GIB = 2**30


def limit_memory(gib: float) -> bool:
    """Limit the memory of this process and of each child; False if the system cannot."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux" or not gib:
        return False
    amount = int(gib * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (amount, amount))
    return True


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


def probe(hidden: list[str]) -> dict[str, bool]:
    """What separates this process from the machine; `hidden` are folders it should not see."""
    seen = [path for path in hidden if _entries(path)]
    return {"cut_off": cut_off(), "own_processes": os.getpid() == 1, "files_hidden": not seen}


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
    """Serve on the two pipes whose numbers stand in the arguments, or answer `probe`."""
    die_with_parent()
    command, *rest = sys.argv[1:]
    if command == "probe":
        json.dump(probe(rest), sys.stdout)
        return
    reading, writing, memory_gib, home = int(command), int(rest[0]), float(rest[1]), rest[2]
    if Path(home).is_dir():
        os.chdir(home)
    limited = limit_memory(memory_gib)
    sys.meta_path.insert(0, OnlyHere)
    import torch

    from nemotron_lite.coursework.learner_answers import Learner
    from nemotron_lite.coursework.wire import Channel

    torch.set_num_threads(1)
    channel = Channel(reading, writing)
    learner = Learner(channel)
    channel.send({"id": 0, "memory_limited": limited, "cut_off": cut_off()}, b"")
    learner.serve()


if __name__ == "__main__":
    main()
