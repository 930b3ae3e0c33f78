"""A folder is replaced as a whole, or file by file in an order that no program can misread."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemotron_lite import folder_replacement
from nemotron_lite.files import atomic_folder
from nemotron_lite.folder_replacement import recover

OLD = {
    "config.json": "old", "one.bin": "old", "two.bin": "old", "index": "old", "notes.txt": "mine",
    "more/own.txt": "mine", "more/a": "old",
}  # fmt: skip
NEW = {"config.json": "new", "one.bin": "new", "three.bin": "new", "more/a": "new"}
AFTER = {**NEW, "notes.txt": "mine", "more/own.txt": "mine"}


def ours(name: str) -> bool:
    return name.endswith((".json", ".bin")) or name == "index"


def write(folder: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def read(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_text() for file in files}


def visible(folder: Path) -> dict[str, str]:
    """What a program sees that reads the files it knows."""
    return {n: text for n, text in read(folder).items() if not n.startswith(".nemotron")}


def replace(path: Path) -> None:
    with atomic_folder(path, ours, last="config.json") as new:
        write(new, NEW)


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a power cut needs it, and it takes most of the time here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders cannot be exchanged, as for a mount point."""
    monkeypatch.setattr(folder_replacement, "exchange_is_safe", lambda new, path: False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write(tmp_path / "m", OLD)
    return tmp_path / "m"


def test_files_are_replaced_one_by_one(path: Path, in_place: None) -> None:
    identity = path.stat().st_ino
    replace(path)
    assert read(path) == AFTER
    assert path.stat().st_ino == identity
    assert os.listdir(path.parent) == ["m"]


def test_by_exchange_the_result_is_the_same(path: Path) -> None:
    identity = path.stat().st_ino
    replace(path)
    assert read(path) == AFTER
    assert path.stat().st_ino != identity
    assert os.listdir(path.parent) == ["m"]


def renames_of(path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many renames one replacement makes."""
    real, calls = os.rename, []

    def rename(source: Any, target: Any) -> None:
        calls.append(source)
        real(source, target)

    copy = path.parent / "copy" / "m"
    shutil.copytree(path, copy)
    with monkeypatch.context() as patch:
        patch.setattr(folder_replacement.os, "rename", rename)
        replace(copy)
    shutil.rmtree(copy.parent)
    return len(calls)


def in_a_process_that_is_killed(work: Callable[[], None]) -> int:
    """The exit code of a copy of this process that does the work."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


@pytest.mark.parametrize("after", [False, True], ids=["before a rename", "after it"])
def test_a_kill_at_any_step_leaves_the_old_or_the_new_content(
    path: Path, in_place: None, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    steps = renames_of(path, monkeypatch)
    assert steps >= 8, "three phases, and one for each file"
    real = os.rename
    seen = set()
    for step in range(steps):
        shutil.rmtree(path)
        write(path, OLD)
        calls = iter(range(steps))

        def rename(source: Any, target: Any, calls: Any = calls, step: int = step) -> None:
            number = next(calls)
            if number == step and not after:
                os._exit(9)
            real(source, target)
            if number == step:
                os._exit(9)

        with monkeypatch.context() as patch:
            patch.setattr(folder_replacement.os, "rename", rename)
            assert in_a_process_that_is_killed(lambda: replace(path)) == 9
        left = visible(path)
        if "config.json" in left:
            assert left in (OLD, AFTER), f"a mixture that can be read, after step {step}"
        recover(path)
        assert visible(path) in (OLD, AFTER)
        seen.add(visible(path)["config.json"])
        replace(path)
        assert read(path) == AFTER, "the next one leaves nothing behind"
    assert seen == {"old", "new"}


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_an_error_at_any_step_is_undone(
    path: Path, in_place: None, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    steps = renames_of(path, monkeypatch)
    real = os.rename
    for step in range(steps):
        calls = iter(range(1000))

        def rename(source: Any, target: Any, calls: Any = calls, step: int = step) -> None:
            if next(calls) == step:
                raise error
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(folder_replacement.os, "rename", rename)
            if step == steps - 1 and isinstance(error, OSError):
                replace(path)  # everything is in place by then
            else:
                with pytest.raises(type(error)) as raised:
                    replace(path)
        if step == steps - 1:
            recover(path)
            assert read(path) == AFTER
            continue
        if isinstance(error, OSError):
            kept = path / "unsaved"
            assert str(kept) in str(raised.value)
            assert read(kept) == NEW
            shutil.rmtree(kept)
        assert read(path) == OLD
        assert os.listdir(path.parent) == ["m"]


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP])
def test_files_are_copied_where_the_disk_cannot_rename_them(
    path: Path, in_place: None, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if not Path(source).name.startswith(".nemotron-lite."):
            raise OSError(code, os.strerror(code))
        real(source, target)

    monkeypatch.setattr(folder_replacement.os, "rename", rename)
    monkeypatch.setattr(folder_replacement.shutil.os, "rename", rename)
    with atomic_folder(path, ours) as new:
        write(new, NEW)
    assert read(path) == AFTER


@pytest.mark.parametrize("fails_at", [0, 1, 2])
def test_without_hard_links_other_files_are_not_touched(
    path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """Not even copied: another program may have them open."""
    write(path, {"log.csv": "1\n", "zeta": "mine"})
    kept = ("notes.txt", "log.csv", "zeta", "more/own.txt")
    before = {name: (path / name).stat().st_ino for name in kept}
    real, calls = os.link, iter(range(100))

    def link(*arguments: Any, **options: Any) -> None:
        if next(calls) >= fails_at:
            raise OSError(errno.EPERM, "Operation not permitted")
        real(*arguments, **options)

    monkeypatch.setattr(folder_replacement.os, "link", link)
    replace(path)
    assert read(path) == AFTER | {"log.csv": "1\n", "zeta": "mine"}
    assert {name: (path / name).stat().st_ino for name in kept} == before
    assert os.listdir(path.parent) == ["m"]


def test_a_running_replacement_is_waited_for(path: Path, in_place: None) -> None:
    """`recover` takes what another process is doing for finished only when it is."""
    started, seen = threading.Event(), []
    real = folder_replacement._Moves.bring

    def slowly(self: Any, folder: str) -> None:
        started.set()
        time.sleep(0.1)
        real(self, folder)

    def look() -> None:
        started.wait()
        recover(path)
        seen.append(visible(path))

    thread = threading.Thread(target=look)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_replacement._Moves, "bring", slowly)
        replace(path)
    thread.join()
    assert seen == [AFTER]


def test_many_at_once_give_one_of_them_whole(tmp_path: Path) -> None:
    """Half of them exchange the folder, half move its files."""
    write(tmp_path / "m", {"config.json": "start", "notes.txt": "mine"})
    safe = folder_replacement.exchange_is_safe
    errors = []

    def work(name: str, exchanging: bool) -> None:
        for _ in range(10):
            try:
                with atomic_folder(tmp_path / "m", ours, last="config.json") as new:
                    write(new, dict.fromkeys(("config.json", "one.bin", "two.bin"), name))
            except OSError as error:  # the folder was exchanged below a staging folder
                errors.append(error)

    def by_name(new: Path, path: Path) -> bool:
        return safe(new, path) and "exchange" in threading.current_thread().name

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_replacement, "exchange_is_safe", by_name)
        threads = [
            threading.Thread(target=work, args=(f"{kind}-{i}", True), name=f"{kind}-{i}")
            for kind in ("exchange", "move")
            for i in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = read(tmp_path / "m")
    assert found.pop("notes.txt") == "mine"
    assert sorted(found) == ["config.json", "one.bin", "two.bin"], found
    assert len(set(found.values())) == 1
