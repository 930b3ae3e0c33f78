"""Checkpoint files are complete or absent; the newest few are kept; unreadable ones are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite.train import ResumeError, checkpointing
from nemotron_lite.train.checkpointing import (
    check_same_run,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


def test_newest_is_read_and_only_the_last_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 30, 100):
        save_checkpoint(folder, step, {"step": step, "w": torch.full((3,), float(step))}, keep=2)
    assert [p.name for p in list_checkpoints(folder)] == ["step-00000030.pt", "step-00000100.pt"]
    content = load_checkpoint(folder)
    assert content["step"] == 100
    assert content["w"].tolist() == [100.0] * 3


def test_a_failed_write_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)
    real = torch.save

    def half(content: Any, file: Any) -> None:
        real(content, file)
        file.truncate(20)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointing.torch, "save", half)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, {"step": 2}, keep=1)
    assert load_checkpoint(tmp_path)["step"] == 1
    monkeypatch.setattr(checkpointing.torch, "save", real)
    save_checkpoint(tmp_path, 3, {"step": 3}, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003.pt"]  # and no temporary file


def test_an_unreadable_file_is_named_with_an_older_one_to_use(tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="no checkpoint in"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=2)
    newest = save_checkpoint(tmp_path, 2, {"step": 2}, keep=2)
    newest.write_bytes(newest.read_bytes()[:50])
    with pytest.raises(ResumeError, match=r"step-00000002.pt cannot be read .*step-00000001.pt"):
        load_checkpoint(tmp_path)
    newest.unlink()
    assert load_checkpoint(tmp_path)["step"] == 1


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    save_checkpoint(tmp_path, 1, {"step": Attack()}, keep=1)
    with pytest.raises(ResumeError, match="cannot be read"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_differences_between_two_configs_are_named() -> None:
    check_same_run({"lr": 1, "keep": 2}, {"lr": 1, "keep": 3}, may_differ={"keep"})
    with pytest.raises(ResumeError, match="lr was 1 when this run was saved and is 2 now"):
        check_same_run({"lr": 1}, {"lr": 2}, may_differ=set())
    with pytest.raises(ResumeError, match=r"another version .*version: new\. Start a new run"):
        check_same_run({}, {"new": 1}, may_differ=set())


def test_a_run_of_another_version_is_not_asked_to_set_a_field_back() -> None:
    saved, now = {"accumulation": 1, "lr": 1}, {"micro_batches": 1, "lr": 2}
    with pytest.raises(ResumeError, match="another version of nemotron_lite") as error:
        check_same_run(saved, now, may_differ=set())
    assert "only in its config: accumulation;" in str(error.value)
    assert "this version: micro_batches." in str(error.value)
    check_same_run({"lr": 1, "old": 1}, {"lr": 1, "new": 1}, may_differ={"old", "new"})
