"""Checkpoints of a training run, from which it can be resumed exactly.

A checkpoint holds everything that the next update depends on: weights and routing biases, AdamW's
moments, the number of the update, torch's random state, and the configs. The order of the data
needs no entry: batch i is a function of (seed, i).

Writing is atomic (`nemotron_lite/files.py`). A process that is killed while it writes leaves the
previous checkpoint and a temporary file, which the next save removes.

These files are only for resuming. To publish a model or to load it elsewhere, use
`nemotron_lite.save`, which writes Hugging Face's layout. Checkpoints are read with
`weights_only=True`, so a file from an unknown source cannot run code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemotron_lite.files import atomic_file

_PREFIX, _SUFFIX = "step-", ".pt"


class ResumeError(RuntimeError):
    """A run that cannot be resumed. The message says why, and what to do instead."""


def save_checkpoint(folder: Path, step: int, content: Mapping[str, Any], *, keep: int) -> Path:
    """Write `content` as the checkpoint of `step`, then drop all but the newest `keep`.

    Returns:
        The path of the new checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_PREFIX}{step:08d}{_SUFFIX}"
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        torch.save(dict(content), file)
    for old in list_checkpoints(folder)[:-keep]:
        old.unlink()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}"))


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """Read the newest checkpoint onto the CPU.

    Raises:
        ResumeError: there is none, or it cannot be read.
    """
    found = list_checkpoints(folder)
    if not found:
        raise ResumeError(
            f"no checkpoint in {folder}: start the run without resume=True (--resume)."
        )
    try:
        return torch.load(found[-1], map_location="cpu", weights_only=True)
    except Exception as error:
        raise ResumeError(
            f"{found[-1]} cannot be read ({type(error).__name__}: {error}). Delete it to resume "
            f"from {found[-2].name if len(found) > 1 else 'the start'}."
        ) from error


def check_same_run(
    saved: Mapping[str, Any], now: Mapping[str, Any], *, may_differ: set[str]
) -> None:
    """Refuse to resume a run with another config than it was started with.

    Raises:
        ResumeError: names the fields that only one of the two configs has, or else the first field
            that differs.
    """
    only_saved = sorted(set(saved) - set(now) - may_differ)
    only_now = sorted(set(now) - set(saved) - may_differ)
    if only_saved or only_now:
        raise ResumeError(
            "this run was saved by another version of nemotron_lite and cannot be resumed by this "
            f"one. Fields only in its config: {', '.join(only_saved) or 'none'}; fields only in "
            f"the config of this version: {', '.join(only_now) or 'none'}. Start a new run in "
            "another folder, or resume with the version that saved it."
        )
    for name in sorted(set(saved) - may_differ):
        if saved.get(name) != now.get(name):
            raise ResumeError(
                f"{name} was {saved.get(name)!r} when this run was saved and is "
                f"{now.get(name)!r} now: set it back, or start a new run in another folder."
            )
