"""Start a learner's process, separated from this machine as far as the system allows.

Linux lets an ordinary user make namespaces, unless its administrator forbids it. With all of them a
learner's process has no network, sees no other process, and has a file system of its own in which
the instructor's files, the submissions and this package do not exist (`jail`). Each kind of
isolation is tried once, by starting a process that reports what it sees. Where the strongest does
not work, the next one is taken, and the result says what is missing.

Memory and time are limited in every case, and your environment variables are not passed on.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

import nemotron_lite
from nemotron_lite.coursework.learner_package import write_package
from nemotron_lite.coursework.wire import Channel

JAIL = Path(__file__).with_name("jail.py")
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL")
ALL_NAMESPACES = (
    "--map-root-user", "--net", "--pid", "--ipc", "--mount", "--fork", "--kill-child",
    "--mount-proc",
)  # fmt: skip
NAMESPACES = (
    (ALL_NAMESPACES, True),
    (("--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"), False),
    (("--map-root-user", "--net"), False),
)


@dataclass(frozen=True)
class Limits:
    """Limits of one submission.

    Attributes:
        cell_seconds: for a cell, and for all checks of an exercise.
        seconds: for the whole submission.
        memory_gib: of each process, 0 for no limit.
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


def hidden_folders() -> list[str]:
    """Folders with things that score: this package, its kernels, and the checkout they lie in."""
    package = Path(nemotron_lite.__file__).resolve().parent
    found = {package, package.parent / "nemotron_kernels"}
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file():
        found.add(checkout)
    return sorted(str(path) for path in found if path.is_dir())


def _start_command(
    isolation: Isolation, site: Path, home: Path, arguments: Sequence[str]
) -> list[str]:
    """The command that runs learner_process with these arguments."""
    code = (
        "import sys; sys.path.insert(0, {site!r}); "
        "from nemotron_lite.coursework.learner_process import main; main()"
    )
    jailed = isolation.jailed
    code = code.replace("{site!r}", "'{site}'" if jailed else repr(str(site)))
    run = [sys.executable, "-I", "-B", "-c", code, *arguments]
    if not jailed:
        return [*isolation.command, *run]
    hidden = hidden_folders()
    jail = [sys.executable, "-I", "-B", str(JAIL), str(site), str(home), *hidden, "--"]
    return [*isolation.command, *jail, *run]


def find_isolation() -> Isolation:
    """The strongest isolation that this system allows; each kind is tried."""
    reason = "unshare is not installed"
    unshare = shutil.which("unshare")
    for options, jailed in NAMESPACES if unshare else ():
        candidate = Isolation((str(unshare), *options), jailed, "", "", "")
        with tempfile.TemporaryDirectory(prefix="grading-") as folder:
            site, home = make_site(Path(folder), ())
            try:
                run = subprocess.run(
                    _start_command(candidate, site, home, ["probe", *hidden_folders()]),
                    capture_output=True,
                    text=True,
                    timeout=60,
                    check=False,
                    env=learner_environment(home),
                )
            except subprocess.TimeoutExpired:
                reason = "unshare did not end within 60 s"
                continue
        if run.returncode == 0:
            seen = json.loads(run.stdout)
            if seen["cut_off"] and (seen["files_hidden"] or not jailed):
                return Isolation(
                    candidate.command,
                    jailed,
                    "off",
                    "its own" if seen["own_processes"] else "yours are visible",
                    "its own" if jailed else "yours are readable",
                )
        reason = (run.stderr.strip().splitlines() or ["unshare failed"])[-1]
    return Isolation((), False, f"NOT cut off: {reason}", "yours are visible", "yours are readable")


def make_site(folder: Path, cells: Sequence[str]) -> tuple[Path, Path]:
    """The folders `site`, with what a learner's process may import, and an empty `home`."""
    site, home = folder / "site", folder / "home"
    home.mkdir()
    write_package(site, cells)
    return site, home


def learner_environment(home: Path) -> dict[str, str]:
    """Environment variables of a learner's process: of yours only those that find programs."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    places = dict.fromkeys(("HOME", "TMPDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR"), str(home))
    fixed = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "TRITON_INTERPRET": "1"}
    return {**kept, **places, **fixed, "TRITON_CACHE_DIR": "/tmp/triton", "USER": "learner"}


class LearnerProcess:
    """A running learner's process and the channel to it."""

    def __init__(self, isolation: Isolation, site: Path, memory_gib: float | int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="grading-")
        home = Path(self._folder.name).resolve() / "home"
        home.mkdir()
        there_read, here_write = os.pipe()
        here_read, there_write = os.pipe()
        arguments = [str(there_read), str(there_write), str(memory_gib), str(home)]
        with (home.parent / "log.txt").open("w") as log:
            self.process = subprocess.Popen(
                _start_command(isolation, site, home, arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=home,
                env=learner_environment(home),
                pass_fds=(there_read, there_write),
                start_new_session=True,
            )
        os.close(there_read)
        os.close(there_write)
        self.channel = Channel(here_read, here_write)

    def log(self) -> str:
        """The end of what the process printed outside of cells."""
        path = Path(self._folder.name, "log.txt")
        with suppress(OSError), path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2000))
            return file.read().decode(errors="replace")
        return ""

    def stop(self) -> None:
        """End the process with everything that it started."""
        self.channel.close()
        kill_with_children(self.process.pid)
        self.process.wait()
        with suppress(OSError):
            self._folder.cleanup()


def kill_with_children(pid: int) -> None:
    """Kill a process and all its descendants."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
