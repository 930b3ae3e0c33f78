"""Checkpoint files are complete or absent; a changed byte anywhere is noticed; code is not run."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite.train import ResumeError, checkpointing
from nemotron_lite.train.checkpointing import list_checkpoints, read_checkpoint, save_checkpoint


def content(step: int) -> dict[str, Any]:
    return {"step": step, "w": torch.full((300,), float(step)), "names": ["a", "b"]}


def test_a_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "checkpoints", 7, content(7), keep=1)
    found = read_checkpoint(path)
    assert found["step"] == 7
    assert found["names"] == ["a", "b"]
    assert torch.equal(found["w"], torch.full((300,), 7.0))
    assert torch.load(path, weights_only=True)["step"] == 7  # torch opens it too


def test_only_the_newest_are_kept_by_number_and_not_by_name(tmp_path: Path) -> None:
    for step in (1, 2, 99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, content(step), keep=2)
        (tmp_path / "step-notes.pt").write_text("a file of the user")
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "step-99999999.pt",
        "step-100000000.pt",
    ]
    assert (tmp_path / "step-notes.pt").exists()


def test_a_flip_of_any_byte_is_noticed(tmp_path: Path) -> None:
    """Each byte of a small file once, also those of headers and padding."""
    path = save_checkpoint(tmp_path, 1, {"step": 1, "w": torch.arange(3.0)}, keep=1)
    whole = path.read_bytes()
    generator = random.Random(0)
    places = range(0, len(whole), 5) if len(whole) > 800 else range(len(whole))
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ResumeError, match=r"step-00000001.pt is damaged"):
            read_checkpoint(path)
    for place in range(len(whole) - 60, len(whole)):  # the checksum itself
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ResumeError, match="is damaged"):
            read_checkpoint(path)
    path.write_bytes(whole)
    assert read_checkpoint(path)["step"] == 1


def test_a_truncated_or_longer_file_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, content(1), keep=1)
    whole = path.read_bytes()
    lengths = [*range(0, len(whole), 97), *range(len(whole) - 80, len(whole))]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(ResumeError, match="is damaged"):
            read_checkpoint(path)
    for more in (b"\0", b"x" * 100, whole):
        path.write_bytes(whole + more)
        with pytest.raises(ResumeError, match="is damaged"):
            read_checkpoint(path)


def test_a_file_of_torch_alone_is_checked_by_the_sums_of_its_entries(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001.pt"
    torch.save(content(1), path)
    assert read_checkpoint(path)["step"] == 1
    whole = bytearray(path.read_bytes())
    place = whole.find(torch.full((300,), 1.0).numpy().tobytes())
    whole[place + 5] ^= 1
    path.write_bytes(whole)
    assert torch.load(path, weights_only=True)["step"] == 1  # torch itself does not look
    with pytest.raises(ResumeError, match=r"checksum of its entry .* does not fit"):
        read_checkpoint(path)


@pytest.mark.parametrize("kind", ["folder", "pipe", "nothing", "dangling", "empty", "text"])
def test_what_is_no_checkpoint_is_named_and_does_not_hang(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "step-00000003.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind != "nothing":
        path.write_bytes(b"" if kind == "empty" else b"hello " * 100)
    why = r"is damaged and cannot be used \(.+\)"
    if kind in ("nothing", "dangling"):
        why = "cannot be used: there is no such file"
    with pytest.raises(ResumeError, match=rf"step-00000003.pt {why}"):
        read_checkpoint(path)


@pytest.mark.parametrize("at", [0, 20, 400])
def test_a_failed_write_keeps_the_old_checkpoint_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """The disk refuses after `at` bytes. torch reports this as an error of its archive."""
    save_checkpoint(tmp_path, 1, content(1), keep=1)
    written = 0

    def write(self: Any, data: Any, real: Any = checkpointing._SummingFile.write) -> int:
        nonlocal written
        if written + len(data) > at:
            self.error = OSError(28, "No space left on device")
            raise self.error
        written += len(data)
        return real(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(checkpointing._SummingFile, "write", write)
        with pytest.raises(OSError, match=r"No space left.*last checkpoint is .*step-00000001.pt"):
            save_checkpoint(tmp_path, 2, content(2), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert read_checkpoint(tmp_path / "step-00000001.pt")["step"] == 1
    save_checkpoint(tmp_path, 3, content(3), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003.pt"]


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    path = save_checkpoint(tmp_path, 1, {"step": Attack()}, keep=1)
    with pytest.raises(ResumeError, match="is damaged"):
        read_checkpoint(path)
    assert not (tmp_path / "owned").exists()
