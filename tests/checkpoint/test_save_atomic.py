"""If saving fails at any moment, the folder has one complete checkpoint: the old or the new."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite import Nemotron, NemotronConfig, files, folder_replacement, load, save
from nemotron_lite.checkpoint import saving
from nemotron_lite.files import atomic_folder

Make = Callable[..., Nemotron]


class Stop(BaseException):
    """Like KeyboardInterrupt: no `except Exception` catches it."""


def fail_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int) -> None:
    """Make one call of a function raise after it has done its work; `call` is its number."""
    real, calls = getattr(module, name), iter(range(1, 1000))

    def run(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        if next(calls) == call:
            raise Stop
        return result

    monkeypatch.setattr(module, name, run)


def contents(folder: Path) -> dict[str, bytes]:
    found = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}


@pytest.fixture(params=[True, False], ids=["exchange", "two renames"])
def exchange(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Runs a test with and without the system call that exchanges two folders."""
    if not request.param:
        monkeypatch.setattr(folder_replacement, "_exchange_names", lambda one, other: False)
    return request.param


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (saving, "_write_shard", 1),
        (saving, "_write_shard", 2),
        (saving, "_write_json", 1),
        (saving, "_write_json", 2),
        (folder_replacement, "_keep_other_files", 1),
        (files, "sync_tree", 1),
    ],
)
def test_interruption_leaves_the_old_checkpoint(
    tmp_path: Path,
    tiny: NemotronConfig,
    make: Make,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    name: str,
    call: int,
) -> None:
    save(make(tiny, seed=1), tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    before = contents(tmp_path / "m")
    fail_at(monkeypatch, module, name, call)
    other = make(tiny.replace(vocab_size=90), seed=2)
    with pytest.raises(Stop):
        save(other, tmp_path / "m", max_shard_bytes=40_000)
    assert contents(tmp_path / "m") == before
    assert os.listdir(tmp_path) == ["m"], "no temporary folder is left"


@pytest.mark.parametrize("call", [1, 2])
def test_where_two_renames_fail_the_files_are_moved_one_by_one(
    tmp_path: Path, tiny: NemotronConfig, make: Make, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    save(make(tiny, seed=1), tmp_path / "m")
    (tmp_path / "m" / "notes.txt").write_text("mine")
    monkeypatch.setattr(folder_replacement, "_exchange_names", lambda one, other: False)
    real, calls = os.rename, iter(range(1, 100))

    def rename(source: Any, target: Any) -> None:
        if next(calls) == call:
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(source, target)

    monkeypatch.setattr(folder_replacement.os, "rename", rename)
    save(make(tiny, seed=2), tmp_path / "m")
    monkeypatch.undo()
    save(make(tiny, seed=2), tmp_path / "expected")
    expected = contents(tmp_path / "expected") | {"notes.txt": b"mine"}
    assert contents(tmp_path / "m") == expected
    assert sorted(os.listdir(tmp_path)) == ["expected", "m"]


def test_where_no_rename_works_the_old_checkpoint_stays(
    tmp_path: Path, tiny: NemotronConfig, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(make(tiny, seed=1), tmp_path / "m")
    before = contents(tmp_path / "m")
    monkeypatch.setattr(folder_replacement, "_exchange_names", lambda one, other: False)

    def rename(source: Any, target: Any) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(folder_replacement.os, "rename", rename)
    with pytest.raises(OSError, match="the disk is gone"):
        save(make(tiny, seed=2), tmp_path / "m")
    assert contents(tmp_path / "m") == before
    assert os.listdir(tmp_path) == ["m"]


def test_overwriting_replaces_the_checkpoint_and_keeps_other_files(
    tmp_path: Path, tiny: NemotronConfig, make: Make, exchange: bool
) -> None:
    save(make(tiny, seed=1), tmp_path / "m", max_shard_bytes=40_000)
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "m" / "optimizer").mkdir()
    (tmp_path / "m" / "optimizer" / "state.pt").write_bytes(b"moments")
    other = make(tiny.replace(vocab_size=90), seed=2)
    save(other, tmp_path / "m")
    assert sorted(contents(tmp_path / "m")) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "optimizer/state.pt",
    ], "old shards and the old index are removed, other files are kept"
    loaded = load(tmp_path / "m")
    assert loaded.config.vocab_size == 90
    for name, tensor in other.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    assert os.listdir(tmp_path) == ["m"]


def test_two_folders_are_exchanged_by_one_system_call(tmp_path: Path) -> None:
    """Linux and macOS have it. On a disk that does not support it, this test is skipped."""
    if sys.platform not in ("linux", "darwin"):
        pytest.skip("no system call for it")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "from-a").touch()
    if not folder_replacement._exchange_names(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this disk cannot exchange folders")
    assert os.listdir(tmp_path / "b") == ["from-a"]


SAVE_FOR_EVER = """
import sys
import torch
from nemotron_lite import Nemotron, NemotronConfig, save

model = Nemotron(NemotronConfig(pattern="M*E", vocab_size=64, hidden_size=256))
for step in range(1_000_000):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(step)
    save(model, sys.argv[1], max_shard_bytes=1_000_000)
    print(step, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_a_complete_checkpoint(tmp_path: Path) -> None:
    """The process is killed at three moments while it saves, and cannot clean up."""
    target = tmp_path / "m"
    for pause in (0.0, 0.04, 0.09):
        with subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(target)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        ) as process:
            assert process.stdout is not None
            done = [process.stdout.readline() for _ in range(2)]
            time.sleep(pause)
            process.kill()
            done += process.stdout.readlines()
        last = int(done[-1])
        values = {float(v) for t in load(target).state_dict().values() for v in t.unique()}
        assert len(values) == 1, "parts of two checkpoints"
        assert values <= {float(last), float(last + 1)}
    save(load(target), target)
    assert os.listdir(tmp_path) == ["m"], (
        "the next save removes the temporary folders of killed ones"
    )


def test_the_folder_of_a_running_save_is_not_removed(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "m") as first:
        (first / "one").touch()
        with atomic_folder(tmp_path / "m") as second:
            (second / "two").touch()
        assert os.listdir(tmp_path / "m") == ["two"]
    assert sorted(os.listdir(tmp_path / "m")) == ["one"]


def test_saving_over_a_file_is_refused(tmp_path: Path, tiny: NemotronConfig, make: Make) -> None:
    (tmp_path / "m").write_text("a file")
    with pytest.raises(NotADirectoryError, match="name a folder to save into"):
        save(make(tiny), tmp_path / "m")
    assert (tmp_path / "m").read_text() == "a file"


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path, tiny: NemotronConfig, make: Make) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(make(tiny), tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "real").config == tiny


def test_parents_are_made_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").touch()
    assert os.listdir(tmp_path / "a" / "b") == ["file"]
    with pytest.raises(IsADirectoryError), atomic_folder(tmp_path / "a" / "c") as folder:
        folder.write_text("this cannot work")
    assert os.listdir(tmp_path / "a") == ["b"]
