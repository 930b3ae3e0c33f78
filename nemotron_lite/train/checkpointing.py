"""Checkpoints of a run: whole or not there, and enough to go on as if nothing had happened.

A checkpoint holds what the next update depends on: weights and routing biases, AdamW's moments, the
number of the update, torch's random state, and the configs. The data order needs nothing: batch i
is a function of (seed, i).

Writing is atomic. The file is written under another name in the same folder, flushed to the disk,
and renamed; a rename replaces in one step or not at all. A process killed in the middle leaves the
previous checkpoint and a stray temporary file, which the next save removes.

These files are for resuming. To hand a model on, `nemotron_lite.save` writes the published layout.
They are read with `weights_only=True`, so a checkpoint from somewhere else cannot run code.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_PREFIX, _SUFFIX, _PARTIAL = "step-", ".pt", ".partial"


class ResumeError(RuntimeError):
    """A run that cannot be continued. The message says why and what to do instead."""


def save_checkpoint(folder: Path, step: int, content: Mapping[str, Any], *, keep: int) -> Path:
    """Write `content` as the checkpoint of `step`, then drop all but the newest `keep`.

    Returns:
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for stray in folder.glob(f"*{_PARTIAL}"):
        stray.unlink()
    path = folder / f"{_PREFIX}{step:08d}{_SUFFIX}"
    partial = path.with_name(path.name + _PARTIAL)
    with partial.open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}"))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The newest checkpoint, on the CPU.

    Raises:
        ResumeError: there is none, or it cannot be read.
    """
    found = list_checkpoints(folder)
    if not found:
        raise ResumeError(f"no checkpoint in {folder}: start without resume (--resume).")
    try:
        return torch.load(found[-1], map_location="cpu", weights_only=True)
    except Exception as error:
        raise ResumeError(
            f"{found[-1]} cannot be read ({type(error).__name__}: {error}). Delete it to go on "
            f"from {found[-2].name if len(found) > 1 else 'the start'}."
        ) from error


def check_same_run(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, may_differ: set[str]
) -> None:
    """Refuse to continue a run under a config that would make it a different one.

    Raises:
        ResumeError: the first field that differs.
    """
    for name in sorted({*saved, *now} - may_differ):
        if saved.get(name) != now.get(name):
            raise ResumeError(
                f"{name} was {saved.get(name)!r} when this run was saved and is "
                f"{now.get(name)!r} now: set it back, or start a new run in another folder."
            )
