"""A learner's process sees and reaches only what it should, and all that it started ends."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

import nemotron_lite
from nemotron_lite.coursework import isolation as module
from nemotron_lite.coursework import learner_process
from nemotron_lite.coursework.isolation import (
    Isolation,
    LearnerProcess,
    find_isolation,
    hidden_folders,
    make_site,
)
from nemotron_lite.coursework.session import Session
from tests.coursework.conftest import run

PACKAGE = Path(nemotron_lite.__file__).resolve().parent


@pytest.fixture(scope="module")
def inside(isolation: Isolation, start: Callable[..., Session]) -> Session:
    if not isolation.jailed:
        pytest.skip("this system has no namespaces for its users")
    return start()


def test_the_result_says_what_holds(isolation: Isolation) -> None:
    assert isolation.network.startswith(("off", "NOT cut off: "))
    assert (isolation.network == "off") == bool(isolation.command)
    assert (isolation.files == "its own") == isolation.jailed
    assert isolation.limits.startswith("memory, size of a file, output")


def test_no_file_of_this_machine_can_be_seen(inside: Session, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("hunter2")
    home = Path.home()
    places = [str(secret), str(PACKAGE / "config.py"), str(PACKAGE.parent / "tests"),
              str(PACKAGE.parent / "exercises"), str(PACKAGE.parent / ".git")]  # fmt: skip
    seen = run(inside, f"import os\nprint([p for p in {places!r} if os.path.exists(p)])")
    assert seen == "[]\n"
    listed = run(
        inside, f"print(sorted(os.listdir({str(home)!r}) if os.path.isdir({str(home)!r}) else []))"
    )
    own = {Path(p).relative_to(home).parts[0] for p in module.sys.path if p.startswith(f"{home}/")}
    assert set(eval(listed)) <= own | {".pyenv", ".venv"}


def test_only_memory_can_be_written_to(inside: Session) -> None:
    code = """
import os, sys
wrote = []
for folder in ("/", "/usr", "/course", "/etc", sys.prefix, os.path.dirname(os.__file__)):
    try:
        with open(os.path.join(folder, "mine"), "w"):
            wrote.append(folder)
    except OSError:
        pass
print(wrote, [os.access(f, os.W_OK) for f in ("/tmp", os.path.expanduser("~"))])
"""
    assert run(inside, code) == "[] [True, True]\n"


def test_the_walls_cannot_be_taken_down(inside: Session) -> None:
    code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def tries():
    return [
        libc.umount2(b"/usr", 2), libc.umount2(b"/course", 2),
        libc.mount(b"", b"/usr", None, 32 | 4096, None),
        libc.mount(b"", b"/course", None, 32 | 4096, None),
    ]
print(tries())
if os.fork() == 0:
    libc.unshare(0x10000000 | 0x00020000)  # a user namespace of its own, with all rights in it
    open("/tmp/result", "w").write(str(tries()))
    os._exit(0)
os.wait()
print(open("/tmp/result").read())
"""
    assert run(inside, code) == "[-1, -1, -1, -1]\n[-1, -1, -1, -1]\n"


def test_no_process_and_no_network_is_there(
    inside: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours:
        code = f"""
import os, socket
print([pid for pid in os.listdir("/proc") if pid.isdigit() and int(pid) != os.getpid()])
for address in (("127.0.0.1", {ours.getsockname()[1]}), ("192.0.2.1", 9)):
    try:
        socket.create_connection(address, timeout=2)
        print("connected")
    except OSError as error:
        print("refused")
"""
        assert run(inside, code) == "[]\nrefused\nrefused\n"


def test_environment_variables_are_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_INSTRUCTOR", "hunter2")
    found = module.learner_environment(Path("/nowhere"))
    assert "hunter2" not in found.values()
    assert found["TRITON_INTERPRET"] == "1"
    assert found["PATH"] == os.environ["PATH"]


def test_memory_has_a_limit(inside: Session) -> None:
    (error,) = inside.run("big", "import torch\ntorch.ones(2**31)", 60)
    assert "allocate memory" in error["evalue"]
    assert run(inside, "print(torch.ones(2).sum().item())") == "2.0\n"


@pytest.mark.parametrize("isolated", [True, False])
def test_everything_that_was_started_ends(
    isolation: Isolation, tmp_path: Path, isolated: bool
) -> None:
    weak = Isolation((), False, "", "", "")
    site, _ = make_site(tmp_path, [])
    process = LearnerProcess(isolation if isolated else weak, site, 4)
    session = Session(process.channel)
    session.hello(120)
    sleeper = "[sys.executable, '-c', 'import time; time.sleep(600)']"
    run(session, f"import subprocess, sys\nsubprocess.Popen({sleeper})")
    below = psutil.Process(process.process.pid).children(recursive=True)
    assert below
    process.stop()
    time.sleep(0.2)
    assert not [one for one in below if one.is_running() and one.status() != "zombie"]


def test_without_namespaces_the_package_is_still_not_imported(
    start: Callable[..., Session],
) -> None:
    session = start(of=Isolation((), False, "", "", ""))
    (error,) = session.run("imports", "import nemotron_lite.course.exercises", 60)
    assert "not available where coursework is graded" in error["evalue"]
    (error,) = session.run("imports", "import nemotron_lite.ops", 60)
    assert "not available where coursework is graded" in error["evalue"]
    assert run(session, "import os\nprint(os.environ.get('HOME', '').startswith('/tmp'))")


def test_this_process_is_not_called_cut_off() -> None:
    """Compared with the routes that Linux lists; skipped on a machine without a network."""
    routes = Path("/proc/net/route")
    if not routes.is_file() or len(routes.read_text().splitlines()) < 2:
        pytest.skip("this machine has no route to anywhere, or does not list them")
    assert not learner_process.cut_off()


def test_the_probe_reports_what_it_sees(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert learner_process.probe([str(tmp_path)])["files_hidden"] is False
    assert learner_process.probe([str(tmp_path / "nothing")])["files_hidden"] is True
    assert learner_process.probe([])["own_processes"] is False


def test_the_package_is_among_what_is_hidden() -> None:
    found = hidden_folders()
    assert str(PACKAGE) in found
    assert all(Path(path).is_dir() for path in found)


def test_without_unshare_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    found = find_isolation()
    assert (found.command, found.jailed) == ((), False)
    refused = "system calls" in found.limits
    told = "off: sockets are refused ({})" if refused else "NOT cut off: {}"
    assert found.network == told.format("unshare is not installed")
    assert found.files.startswith(("only its home, and Python read-only", "yours are readable"))


def test_a_system_that_refuses_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho 'unshare: Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(module.shutil, "which", lambda name: str(refusing))
    assert "unshare: Operation not permitted" in find_isolation().network
