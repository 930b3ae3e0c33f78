"""Two runs never share a folder; a lock ends with its process, and a stale one is explained."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest

from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.model import Nemotron
from nemotron_lite.train import ResumeError, TrainConfig, run_lock, train
from nemotron_lite.train.run_lock import LOCK, RunLock, read_holder

WITH_AND_WITHOUT = pytest.mark.parametrize("disk_has_locks", [True, False])


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """A disk without flock, if the test says so."""
    if request.getfixturevalue("disk_has_locks"):
        return

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)


@WITH_AND_WITHOUT
@pytest.mark.usefixtures("disk")
def test_a_second_run_is_refused_with_the_holder(tmp_path: Path, disk_has_locks: bool) -> None:
    with RunLock(tmp_path):
        assert read_holder(tmp_path / LOCK)["pid"] == os.getpid()
        with pytest.raises(ResumeError) as error, RunLock(tmp_path):
            pass
        assert f"in use by another run: process {os.getpid()} on host" in str(error.value)
        assert socket.gethostname() in str(error.value)
        assert ("its lock is stale" in str(error.value)) is not disk_has_locks
        assert sorted(p.name for p in tmp_path.iterdir()) == [LOCK]
    with RunLock(tmp_path):
        pass


@WITH_AND_WITHOUT
@pytest.mark.usefixtures("disk")
def test_a_killed_process_leaves_a_free_folder(tmp_path: Path, disk_has_locks: bool) -> None:
    ready, child = os.pipe()
    pid = os.fork()
    if not pid:  # a process that is killed while it holds the lock
        RunLock(tmp_path).__enter__()
        os.write(child, b"x")
        signal.pause()
    os.read(ready, 1)
    with pytest.raises(ResumeError, match=f"process {pid}"), RunLock(tmp_path):
        pass
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ready)
    os.close(child)
    assert (tmp_path / LOCK).exists()
    with RunLock(tmp_path):
        assert read_holder(tmp_path / LOCK)["pid"] == os.getpid()


@pytest.mark.parametrize("disk_has_locks", [False])
@pytest.mark.usefixtures("disk")
def test_a_stale_lock_of_another_host_is_explained(tmp_path: Path, disk_has_locks: bool) -> None:
    holder = {"pid": 4_000_000, "host": "node17", "time": 1_700_000_000, "process_start": 5}
    (tmp_path / LOCK).write_text(json.dumps(holder))
    with pytest.raises(ResumeError) as error, RunLock(tmp_path):
        pass
    for part in ("process 4000000 on host node17, since 2023", "delete", str(tmp_path / LOCK)):
        assert part in str(error.value)
    (tmp_path / LOCK).write_text(json.dumps({**holder, "host": socket.gethostname()}))
    with RunLock(tmp_path):  # the same host knows that the process is gone
        pass
    reused = {**holder, "host": socket.gethostname(), "pid": os.getpid()}
    (tmp_path / LOCK).write_text(json.dumps(reused))  # its number belongs to another process now
    with RunLock(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


CONTENTS = [b"", b"{", b"[]", b"\0" * 50, b"{" * 100_000, b'{"pid": "x", "host": 5}', b"x" * 9999,
            b'{"pid": 1e999}', b'{"pid": 99999999999999999999999, "host": "a"}']  # fmt: skip


@WITH_AND_WITHOUT
@pytest.mark.usefixtures("disk")
@pytest.mark.parametrize("content", CONTENTS, ids=range(len(CONTENTS)))
def test_a_damaged_lock_file_locks_nothing_and_is_never_a_raw_error(
    tmp_path: Path, disk_has_locks: bool, content: bytes
) -> None:
    (tmp_path / LOCK).write_bytes(content)
    try:
        with RunLock(tmp_path):
            pass
    except ResumeError as error:  # it names somebody, on a host that cannot be asked
        assert not disk_has_locks
        assert "delete" in str(error)  # noqa: PT017
    with (tmp_path / LOCK).open("wb") as file:
        file.write(content)
        if disk_has_locks:
            fcntl.flock(file, fcntl.LOCK_EX)
            with pytest.raises(ResumeError, match="in use by another run"), RunLock(tmp_path):
                pass


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "device"])
def test_what_is_no_file_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / LOCK
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "other")
    with pytest.raises(OSError, match=LOCK), RunLock(tmp_path):
        pass
    assert not (tmp_path / "other").exists()


def test_a_forked_worker_does_not_keep_the_lock(tmp_path: Path) -> None:
    lock = RunLock(tmp_path).__enter__()
    ready, child = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(child, b"x")
        signal.pause()
    try:
        os.read(ready, 1)
        lock.close()  # as the death of the parent would
        with RunLock(tmp_path):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        os.close(child)


class WaitingText:
    """A text that tells when its first batch is asked for, and waits for leave."""

    def __init__(self, text: ConcatenatedDocuments, began: Any, go_on: Any) -> None:
        self.text, self.began, self.go_on = text, began, go_on

    def batch(self, index: int, **arguments: Any) -> Any:
        self.began.set()
        assert self.go_on.wait(60)
        return self.text.batch(index, **arguments)


def _train(model: Nemotron, data: Any, folder: Path) -> None:
    train(model, data, TrainConfig(steps=3, seq_len=24), out_dir=folder, progress=False)


@pytest.mark.parametrize("resume", [False, True])
def test_a_training_keeps_another_process_out(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path, resume: bool
) -> None:
    fork = multiprocessing.get_context("fork")
    began, go_on = fork.Event(), fork.Event()
    waiting = WaitingText(text, began, go_on)
    process = fork.Process(target=_train, args=(model, waiting, tmp_path))
    process.start()
    assert began.wait(60)
    config = TrainConfig(steps=3, seq_len=24)
    (tmp_path / "checkpoints").mkdir(exist_ok=True)
    with pytest.raises(ResumeError, match=f"process {process.pid}"):
        train(model, text, config, out_dir=tmp_path, resume=resume, progress=False)
    go_on.set()
    process.join(60)
    assert process.exitcode == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    result = train(model, text, config, out_dir=tmp_path, resume=True, progress=False)
    assert result.step == 3
