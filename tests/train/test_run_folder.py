"""What a run leaves behind when something goes wrong: the last checkpoint, and words."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemotron_lite.data import ConcatenatedDocuments
from nemotron_lite.model import Nemotron
from nemotron_lite.train import Callback, ResumeError, TrainConfig, loop, train
from nemotron_lite.train.checkpointing import list_checkpoints
from nemotron_lite.train.signals import StopOnSignal

RECIPE = dict(steps=6, batch_size=2, seq_len=24, save_every=2)


def go(model: Nemotron, text: Any, folder: Path, **options: Any) -> Any:
    config = TrainConfig(**{**RECIPE, **options.pop("config", {})})
    return train(model, text, config, out_dir=folder, progress=False, **options)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_folder_that_safetensors_cannot_open_is_refused_before_the_run(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    seen: list[Any] = []
    with pytest.raises(ValueError, match="is not UTF-8; choose another name"):
        go(model, text, tmp_path / os.fsdecode(b"run-\xff"), on_step=seen.append)
    assert not seen and list(tmp_path.iterdir()) == []


def test_a_full_disk_stops_with_words_and_leaves_no_partial_file(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the full disk; it is set after update 3."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))

    try:
        with pytest.raises(OSError, match="so the run stops") as error:
            go(model, text, tmp_path, on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for part in ("step-00000004.pt", "The last checkpoint is", "step-00000002.pt", "--resume"):
        assert part in str(error.value)
    assert names(tmp_path) == ["step-00000002.pt"]
    result = go(model, text, tmp_path, resume=True)
    assert result.step == 6
    assert steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_a_log_that_cannot_be_written_saves_the_run_first(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "run"

    def fill(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            size = (folder / "log.jsonl").stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, limits[1]))

    try:
        with pytest.raises(OSError, match=r"the log in .* cannot be written") as error:
            go(model, text, folder, on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "could not be saved" in "".join(error.value.__notes__)
    assert names(folder) == ["step-00000002.pt"]
    assert go(model, text, folder, resume=True).step == 6
    assert steps(folder) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("where", ["file", "below a file", "checkpoints is a file"])
def test_a_folder_that_cannot_be_written_is_found_before_the_first_update(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path, where: str
) -> None:
    folder = tmp_path / "run"
    if where == "checkpoints is a file":
        folder.mkdir()
        (folder / "checkpoints").write_text("x")
    else:
        folder.write_text("x")
        folder = folder / "below" if where == "below a file" else folder
    calls: list[Any] = []
    with pytest.raises(OSError, match="file"):
        go(model, text, folder, on_step=calls.append)
    assert calls == []


def test_damaged_newest_checkpoint_names_the_intact_one_and_the_option(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    whole = go(Nemotron(model.config, seed=0), text, tmp_path / "whole").history
    folder = tmp_path / "run"
    go(model, text, folder)
    newest = folder / "checkpoints" / "step-00000006.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 8
    newest.write_bytes(content)
    with pytest.raises(ResumeError, match="is damaged") as error:
        go(model, text, folder, resume=True)
    assert "newest intact checkpoint is step-00000004.pt" in str(error.value)
    assert "skip_damaged=True (--skip-damaged)" in str(error.value)
    assert names(folder) == ["step-00000004.pt", "step-00000006.pt"]
    result = go(model, text, folder, resume=True, skip_damaged=True)
    assert [r["loss"] for r in result.history] == [r["loss"] for r in whole[4:]]
    assert names(folder) == ["step-00000004.pt", "step-00000006.pt", "step-00000006.pt.damaged"]
    assert any("step-00000006.pt.damaged" in note for note in result.notes)
    assert steps(folder) == [1, 2, 3, 4, 5, 6]


def test_without_any_intact_checkpoint_nothing_is_renamed_silently(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    go(model, text, tmp_path)
    for path in list_checkpoints(tmp_path / "checkpoints"):
        path.write_bytes(b"")
    with pytest.raises(ResumeError, match="There is no older intact checkpoint"):
        go(model, text, tmp_path, resume=True)
    assert names(tmp_path) == ["step-00000004.pt", "step-00000006.pt"]
    with pytest.raises(ResumeError, match="none of the 2 checkpoints"):
        go(model, text, tmp_path, resume=True, skip_damaged=True)


def test_resuming_where_nothing_is_leaves_nothing(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    with pytest.raises(ResumeError, match="no checkpoint in"):
        go(model, text, tmp_path / "new", resume=True)
    assert list(tmp_path.iterdir()) == []


def test_saving_every_so_often_is_the_default(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that is read twice per update and jumps by 100 seconds: an update takes 200."""
    clock = iter(np.arange(0.0, 1e9, 100.0).tolist())
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    saved: list[str] = []

    class Note(Callback):
        def on_save(self, path: Path) -> None:
            saved.append(path.name)

    options = dict(steps=8, batch_size=2, seq_len=24, keep_checkpoints=9)
    train(model, text, TrainConfig(**options), out_dir=tmp_path, progress=False, callbacks=[Note()])
    assert TrainConfig(steps=1).save_every_seconds == 600.0
    assert saved == ["step-00000003.pt", "step-00000006.pt", "step-00000008.pt"]
    saved.clear()
    config = TrainConfig(save_every_seconds=None, **options)
    folder = tmp_path / "never"
    train(model, text, config, out_dir=folder, progress=False, callbacks=[Note()])
    assert saved == ["step-00000008.pt"]


def test_a_closed_terminal_sends_its_signal_twice_and_the_run_is_saved(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    before = signal.getsignal(signal.SIGHUP)

    def hang_up(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGHUP)

    result = go(model, text, tmp_path, on_step=hang_up)
    assert result.interrupted
    assert names(tmp_path)[-1] == "step-00000003.pt"
    assert signal.getsignal(signal.SIGHUP) is before


def test_nohup_is_respected(request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    with StopOnSignal() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_an_error_of_the_data_saves_the_updates_before_it(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    class Failing:
        def batch(self, index: int, **arguments: Any) -> Any:
            if index == 3:
                raise OSError("the disk of the text is gone")
            return text.batch(index, **arguments)

    whole = train(
        Nemotron(model.config, seed=0), text, TrainConfig(**RECIPE), progress=False
    ).history
    with pytest.raises(OSError, match="is gone") as error:
        go(model, Failing(), tmp_path)
    assert "step-00000003.pt" in error.value.__notes__[0]
    rest = go(model, text, tmp_path, resume=True).history
    assert [r["loss"] for r in rest] == [r["loss"] for r in whole[3:]]


def test_weights_that_may_be_wrong_are_not_saved(
    model: Nemotron, text: ConcatenatedDocuments, tmp_path: Path
) -> None:
    def spoil(record: dict[str, Any]) -> None:
        if record["step"] == 3:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("nan")

    with pytest.raises(FloatingPointError):
        go(model, text, tmp_path, on_step=spoil)
    assert names(tmp_path) == ["step-00000002.pt"]
