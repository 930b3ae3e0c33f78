"""Start a learner's process, separated from this machine as far as the system allows.

Linux lets an ordinary user make namespaces, unless its administrator forbids it. With all of them a
learner's process has no network, sees no other process, and has a file system of its own in which
the instructor's files, the submissions and this package do not exist (`jail`). Each kind of
isolation is tried once, by starting a process that reports what it sees. Where the strongest does
not work, the next one is taken, and the result says what is missing.

Limits that need no namespace are set in every case (`learner_limits`): resources, system calls,
and, where there is no own file system, the paths that can be opened. The memory of all processes of
a submission together is watched from here. Your environment variables are not passed on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import nemotron_lite
from nemotron_lite.coursework import jail
from nemotron_lite.coursework.learner_package import write_package
from nemotron_lite.coursework.scratch import make_folder, remove_folder, scratch_folder
from nemotron_lite.coursework.wire import Channel

JAIL = Path(jail.__file__)
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL")
SEPARATE = ("--net", "--pid", "--ipc", "--mount", "--fork", "--kill-child", "--mount-proc")
NAMESPACES = (  # options of unshare, and whether `jail` runs in them
    (SEPARATE, True),  # for root
    (("--map-root-user", *SEPARATE), True),
    (("--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"), False),
    (("--map-root-user", "--net"), False),
)
GIB = 2**30
IMPORTS_GIB = 1  # added to the memory of a submission for what a learner's process imports
WATCHED = 0.5  # seconds between two looks at the memory
LOG_SHOWN = 2000  # bytes


@dataclass(frozen=True)
class Limits:
    """Limits of one submission.

    Attributes:
        cell_seconds: for a cell, and for all checks of an exercise.
        seconds: for the whole submission.
        memory_gib: of each process, and of all processes together, 0 for no limit.
    """

    cell_seconds: float | int = 60
    seconds: float | int = 600
    memory_gib: float | int = 4


@dataclass(frozen=True)
class Isolation:
    """How a learner's process is separated from the machine, and the command that does it."""

    command: tuple[str, ...]
    jailed: bool
    network: str
    processes: str
    files: str
    limits: str = ""


def hidden_folders() -> list[str]:
    """Folders with things that score: this package, its kernels, and the checkout they lie in."""
    package = Path(nemotron_lite.__file__).resolve().parent
    found = {package, package.parent / "nemotron_kernels"}
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file():
        found.add(checkout)
    return sorted(str(path) for path in found if path.is_dir())


def _readable(site: Path) -> list[str]:
    """What a process without a file system of its own may read."""
    return [*jail.SYSTEM, *map(str, jail.python_folders()), str(site)]


def _start_command(
    isolation: Isolation, site: Path, home: Path, about: dict[str, Any]
) -> list[str]:
    """The command that runs learner_process, which gets `about` as its argument."""
    code = (
        "import sys; sys.path.insert(0, {site!r}); "
        "from nemotron_lite.coursework.learner_process import main; main()"
    )
    jailed = isolation.jailed
    code = code.replace("{site!r}", "'{site}'" if jailed else repr(str(site)))
    job = {"home": str(home), "readable": [] if jailed else _readable(site), **about}
    run = [sys.executable, "-I", "-B", "-c", code, json.dumps(job)]
    if not jailed:
        return [*isolation.command, *run]
    hidden = hidden_folders()
    walls = [sys.executable, "-I", "-B", str(JAIL), str(site), str(home), *hidden, "--"]
    return [*isolation.command, *walls, *run]


def find_isolation() -> Isolation:
    """The strongest isolation that this system allows; each kind is tried."""
    reason = "unshare is not installed"
    unshare = shutil.which("unshare")
    kinds = [kind for kind in NAMESPACES if kind[0] is not SEPARATE or os.geteuid() == 0]
    for options, jailed in kinds if unshare else ():
        candidate = Isolation((str(unshare), *options), jailed, "", "", "")
        seen, failed = _tried(candidate)
        if seen.get("cut_off") and (seen.get("files_hidden") or not jailed):
            return _described(candidate, seen, "")
        reason = failed or reason
    bare = Isolation((), False, "", "", "")
    return _described(bare, _tried(bare)[0], reason)


def _tried(candidate: Isolation) -> tuple[dict[str, Any], str]:
    """What a process that is started in this way says about itself, and why it failed if it did."""
    with scratch_folder("grading-") as folder:
        site, home = make_site(folder, ())
        try:
            run = subprocess.run(
                _start_command(candidate, site, home, {"hidden": hidden_folders()}),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=60,
                check=False,
                env=learner_environment(home),
            )
        except subprocess.TimeoutExpired:
            return {}, "unshare did not end within 60 s"
        except OSError as error:
            return {}, str(error)
    errors = run.stderr.decode(errors="replace").strip().splitlines()
    if run.returncode:
        return {}, (errors or ["unshare failed"])[-1]
    seen: dict[str, Any] = json.loads(run.stdout)
    return seen, ""


def _described(kind: Isolation, seen: dict[str, Any], reason: str) -> Isolation:
    """The isolation with what holds, in words, as the process has seen it."""
    network = "off"
    if not seen.get("cut_off"):
        network = (
            f"off: sockets are refused ({reason})"
            if seen.get("sockets_refused")
            else f"NOT cut off: {reason}"
        )
    files = "its own"
    if not kind.jailed:
        files = "yours are readable"
        if seen.get("paths_limited") and seen.get("root_hidden"):
            files = "only its home, and Python read-only"
            files += "" if seen.get("files_hidden") else ", which has this package in it"
        if os.geteuid() == 0:
            files += "; the code runs as root"
    held = ["memory", "size of a file", "output"] if seen else []
    held += ["number of processes"] if seen.get("processes_limited") else []
    held += ["system calls"] if seen.get("calls_refused") else []
    processes = "its own"
    if not seen.get("own_processes"):
        processes = "yours are not listed" if seen.get("processes_hidden") else "yours are visible"
        processes += "" if seen.get("signals_refused") else ", and can be sent signals"
    return Isolation(kind.command, kind.jailed, network, processes, files, ", ".join(held))


def make_site(folder: Path, cells: Sequence[str]) -> tuple[Path, Path]:
    """The folders `site`, with what a learner's process may import, and an empty `home`."""
    site, home = folder / "site", folder / "home"
    home.mkdir()
    write_package(site, cells)
    return site, home


def learner_environment(home: Path) -> dict[str, str]:
    """Environment variables of a learner's process: of yours only those that find programs."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    places = ("HOME", "TMPDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "TRITON_CACHE_DIR")
    one_thread = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    fixed = {**dict.fromkeys(one_thread, "1"), "GOMP_SPINCOUNT": "0", "TRITON_INTERPRET": "1"}
    return {**kept, **dict.fromkeys(places, str(home)), **fixed, "USER": "learner"}


class LearnerProcess:
    """A running learner's process and the channel to it.

    Raises:
        OSError: the system has no more processes, files or room for it.
    """

    def __init__(self, isolation: Isolation, site: Path, memory_gib: float | int) -> None:
        self._folder = make_folder("grading-")
        # A file without a name: nobody can put a pipe or a link in its place.
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        pipes: list[int] = []
        try:
            home = self._folder / "home"
            home.mkdir()
            pipes += os.pipe()
            pipes += os.pipe()
            there_read, here_write, here_read, there_write = pipes
            about = {"pipes": [there_read, there_write], "memory_gib": memory_gib}
            self.process = subprocess.Popen(
                _start_command(isolation, site, home, about),
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                cwd=home,
                env=learner_environment(home),
                pass_fds=(there_read, there_write),
                start_new_session=True,
            )
        except BaseException:
            for pipe in pipes:
                os.close(pipe)
            self._log.close()
            remove_folder(self._folder)
            raise
        os.close(there_read)
        os.close(there_write)
        self.channel = Channel(here_read, here_write)
        self._stopped = threading.Event()
        if memory_gib:
            most = int((memory_gib + IMPORTS_GIB) * GIB)
            threading.Thread(target=self._watch, args=(most,), daemon=True).start()

    def _watch(self, most: int) -> None:
        """End the process when it and its children together use more than `most` bytes."""
        while not self._stopped.wait(WATCHED):
            if memory_of(self.process.pid, most) > most:
                kill_with_children(self.process.pid)
                return

    def log(self) -> str:
        """The end of what the process printed outside of cells."""
        with suppress(OSError):
            handle = self._log.fileno()
            start = max(0, os.fstat(handle).st_size - LOG_SHOWN)
            return os.pread(handle, LOG_SHOWN, start).decode(errors="replace")
        return ""

    def stop(self) -> None:
        """End the process with everything that it started."""
        self._stopped.set()
        self.channel.close()
        kill_with_children(self.process.pid)
        self.process.wait()
        self._log.close()
        remove_folder(self._folder)


def memory_of(pid: int, enough: int) -> int:
    """Bytes of memory of a process and all its descendants.

    Pages that several of them share count once, unless the sum without that is below `enough`:
    dividing them takes the system longer.
    """
    found: list[psutil.Process] = []
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        found = [process, *process.children(recursive=True)]
    total = sum(_bytes(one, "rss") for one in found)
    return total if total <= enough else sum(_bytes(one, "pss") for one in found)


def _bytes(process: psutil.Process, kind: str) -> int:
    with suppress(psutil.Error, OSError):
        if kind == "rss":
            return int(process.memory_info().rss)
        return int(getattr(process.memory_full_info(), kind))
    return 0


def kill_with_children(pid: int) -> None:
    """Kill a process and all its descendants."""
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        children: list[psutil.Process] = []
        with suppress(psutil.Error):
            children = process.children(recursive=True)
        for one in [process, *children]:
            with suppress(psutil.Error):
                one.kill()
