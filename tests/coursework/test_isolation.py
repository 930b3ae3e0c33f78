"""A learner's process sees and reaches only what it should, and all that it started ends."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

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
from nemotron_lite.coursework.session import GoneError, Session
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


# What code does to get more than its share. Each is tried with namespaces and without.

BARE = Isolation((), False, "", "", "")
TAKES_MEMORY = {
    "private memory": "import mmap\nkept = [mmap.mmap(-1, 2**30, flags=mmap.MAP_PRIVATE) "
                      "for _ in range(8)]",
    "shared memory": "import mmap\nkept = [mmap.mmap(-1, 2**30) for _ in range(8)]",
    "a file in memory": "import os\nkept = os.memfd_create('x')\nos.ftruncate(kept, 2**33)\n"
                        "os.posix_fallocate(kept, 0, 2**33)",
    "a System V segment": "import ctypes\nassert ctypes.CDLL(None).shmget(0, 2**20, 0o1600) < 0\n"
                          "raise OSError('refused')",
    "a file system of its own": "import ctypes\nlibc = ctypes.CDLL(None)\n"
        "assert libc.unshare(0x10020000) < 0\n"
        "assert libc.mount(b'x', b'/tmp', b'tmpfs', 0, 0) < 0\n"
        "raise OSError('refused')",
    "a large file": "with open('large', 'wb') as file:\n    for _ in range(1000):\n"
                    "        file.write(bytes(2**20))",
    "open files": "import os\nkept = [os.open('/dev/null', 0) for _ in range(5000)]",
    "sockets": "import socket\nsocket.socket(socket.AF_INET)",
    "sockets of this machine": "import socket\nsocket.socket(socket.AF_UNIX)",
    "another process's memory": "import ctypes, os\n"
        "assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) < 0\nraise OSError('refused')",
    "more rights": "import resource\nfor what in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE):\n"
        "    _, hard = resource.getrlimit(what)\n    assert hard > 0\n"
        "    try:\n        resource.setrlimit(what, (hard, hard + 1))\n"
        "    except (OSError, ValueError):\n        continue\n    raise RuntimeError('raised')\n"
        "raise OSError('refused')",
}  # fmt: skip


@pytest.fixture(scope="module", params=["namespaces", "none"])
def limited(
    request: pytest.FixtureRequest, isolation: Isolation, start: Callable[..., Session]
) -> Session:
    """A process with namespaces and one without, both under all limits."""
    if request.param == "namespaces" and not isolation.jailed:
        pytest.skip("this system has no namespaces for its users")
    kind = isolation if request.param == "namespaces" else BARE
    if "system calls" not in module._described(kind, module._tried(kind)[0], "").limits:
        pytest.skip("this system filters no system calls")
    return start(of=kind)


@pytest.mark.parametrize("name", TAKES_MEMORY)
def test_what_goes_beyond_a_limit_is_refused(limited: Session, name: str) -> None:
    if name == "more rights" and run(limited, "import os\nprint(os.getuid())") == "0\n":
        pytest.skip("root may raise its limits")
    (error,) = limited.run("beyond", TAKES_MEMORY[name], 60)
    assert error["ename"] in ("OSError", "PermissionError", "MemoryError"), error
    assert run(limited, "kept = None\nprint('goes on')") == "goes on\n"


def test_processes_are_limited_and_ordinary_ones_start(inside: Session) -> None:
    code = """
import os, subprocess, signal
print(subprocess.run(["echo", "started"], capture_output=True, text=True).stdout.strip())
children = []
try:
    for _ in range(1000):
        child = os.fork()
        if not child:
            signal.pause()
        children.append(child)
except OSError as error:
    print(type(error).__name__, 20 < len(children) < 200)
for child in children:
    os.kill(child, 9)
    os.waitpid(child, 0)
"""
    assert run(inside, code) == "started\nBlockingIOError True\n"


def test_this_machine_cannot_be_changed_through_proc(inside: Session) -> None:
    """Its parts are opened, and nothing is written into them."""
    code = """
import os
opened = []
for folder, _, names in os.walk("/proc/sys"):
    for name in names:
        try:
            os.close(os.open(os.path.join(folder, name), os.O_WRONLY))
            opened.append(name)
        except OSError:
            pass
for name in ("/proc/sysrq-trigger", "/proc/1/oom_score_adj/../../sysrq-trigger"):
    try:
        os.close(os.open(name, os.O_WRONLY))
        opened.append(name)
    except OSError:
        pass
print(opened, os.getuid() != 0)
"""
    assert run(inside, code) == "[] True\n"


def test_without_namespaces_only_its_own_files_can_be_opened(
    start: Callable[..., Session], tmp_path: Path
) -> None:
    seen = module._tried(BARE)[0]
    if not seen.get("paths_limited"):
        pytest.skip("this system has no Landlock")
    (tmp_path / "submission.ipynb").write_text("of another learner")
    session = start(of=BARE)
    parent = os.getpid()
    code = f"""
import os
found = []
places = [{str(tmp_path)!r}, {str(tmp_path / "submission.ipynb")!r}, {str(PACKAGE.parent)!r},
          {str(PACKAGE / "course/exercises.py")!r}, "/root", "/home", "/etc/passwd", "/dev/shm",
          "/proc/{parent}/environ", "/proc/{parent}/mem", "/tmp", "/"]
for place in places:
    for how in (os.O_RDONLY, os.O_WRONLY, os.O_RDONLY | os.O_DIRECTORY, os.O_RDWR | os.O_CREAT):
        try:
            os.close(os.open(place, how))
            found.append(place)
        except OSError:
            pass
for place in ("/dev/shm/mine", "/tmp/mine", {str(tmp_path / "mine")!r}):
    for make in (os.mkdir, os.mkfifo, lambda p: os.symlink("x", p), lambda p: open(p, "w")):
        try:
            make(place)
            found.append(place)
        except OSError:
            pass
open("own", "w").write("own")
print(found, open("own").read())
"""
    assert run(session, code) == "[] own\n"
    if seen["signals_refused"]:
        code = f"import os\ntry:\n    os.kill({parent}, 0)\nexcept OSError:\n    print('refused')"
        assert run(session, code) == "refused\n"
    assert sorted(os.listdir(tmp_path)) == ["submission.ipynb"]


def test_the_memory_of_all_processes_together_is_watched(
    isolation: Isolation, tmp_path: Path
) -> None:
    site, _ = make_site(tmp_path, [])
    process = LearnerProcess(isolation, site, 0.75)
    session = Session(process.channel)
    session.hello(120)
    code = """
import os, signal
for _ in range(8):
    if os.fork() == 0:
        kept = bytearray(500 * 2**20)
        signal.pause()
signal.pause()
"""
    begun = time.monotonic()
    with pytest.raises(GoneError, match="more memory than the limit"):
        session.run("many", code, 100)
    assert time.monotonic() - begun < 60
    process.stop()


def test_the_log_cannot_be_replaced_and_its_size_is_limited(tmp_path: Path) -> None:
    site, _ = make_site(tmp_path, [])
    process = LearnerProcess(BARE, site, 4)
    session = Session(process.channel)
    session.hello(120)
    flood = "import os\ntry:\n    while True:\n        os.write(2, b'\\xff\\x00' * 2**19)\n"
    (told,) = session.run("flood", flood + "except OSError as error:\n    print(error.errno)", 60)
    assert told["text"] == "27\n"  # EFBIG
    assert len(process.log()) <= 2000
    process.stop()


def open_files() -> set[str]:
    """What this process has open; what other tests left open is closed first.

    Files in /proc do not count: the watch of `openmp` opens and closes them all the time.
    """
    gc.collect()
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the listing itself
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return {file for file in found if not file.startswith("/proc/")}


def test_a_process_that_cannot_be_started_leaves_nothing(
    isolation: Isolation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_files()
    monkeypatch.setattr(module, "make_folder", lambda prefix: tmp_path / "made")
    (tmp_path / "made").mkdir()

    def refuse(*args: Any, **options: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(module.subprocess, "Popen", refuse)
    with pytest.raises(BlockingIOError):
        LearnerProcess(isolation, tmp_path, 4)
    assert open_files() <= before
    assert not (tmp_path / "made").exists()
