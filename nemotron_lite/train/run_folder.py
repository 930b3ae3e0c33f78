"""The folder of one run: its lock, its checkpoints, its log, its tokenizer.

    OUT/run.lock         who trains here now (run_lock.py)
    OUT/checkpoints/     step-00000120.pt, the newest few (checkpointing.py)
    OUT/snapshots/       weights to merge, if the run keeps them (snapshots.py)
    OUT/log.jsonl        one record per update (run_log.py)
    OUT/tokenizer.json   of the text that the run started with

A folder belongs to one run. A new run is refused where checkpoints or snapshots are, and a resume
is refused if it is not the same run (fingerprint.py). A resume goes back to a checkpoint and
removes the snapshots after it, because the run may make other weights from there on. The folder is
tried before the first update, because a folder that cannot be written would be found out only after
hours, at the first save.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch

from nemotron_lite.files import atomic_file, check_writable_folder
from nemotron_lite.model import Nemotron
from nemotron_lite.train.checkpoint_checks import check_contents, check_outline
from nemotron_lite.train.checkpointing import (
    DAMAGED,
    SNAPSHOTS,
    list_checkpoints,
    read_checkpoint,
    save_checkpoint,
    step_of,
)
from nemotron_lite.train.errors import ResumeError
from nemotron_lite.train.fingerprint import compare_runs
from nemotron_lite.train.run_lock import RunLock
from nemotron_lite.train.run_log import RunLog, open_log

TOKENIZER = "tokenizer.json"


class RunFolder(AbstractContextManager["RunFolder"]):
    """The folder of a run, locked from `open` to the end of the context.

    Attributes:
        notes: sentences about what differs or was repaired, for the user.
        save_failed: whether a checkpoint could not be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.notes: list[str] = []
        self.save_failed = False
        self._lock = RunLock(path)
        self._log: RunLog | None = None

    def open(self, resume: bool) -> None:
        """Lock the folder, and find out whether it can be written.

        Raises:
            ResumeError: another process uses it; or it holds a run and `resume` is False; or it
                holds none and `resume` is True.
            OSError: it cannot be created or written.
        """
        if resume and not _exists(self.checkpoints):
            raise ResumeError(_no_checkpoint(self.checkpoints))
        check_writable_folder(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.__enter__()
        try:
            check_writable_folder(self.checkpoints)
            found = list_checkpoints(self.checkpoints)
            if resume and not found:
                raise ResumeError(_no_checkpoint(self.checkpoints))
            if found and not resume:
                raise ResumeError(
                    f"{self.path} already holds a run: give resume=True (--resume) to continue it, "
                    "or another out_dir (--out)."
                )
            snapshots = self.path / SNAPSHOTS
            if list_checkpoints(snapshots) and not resume:
                raise ResumeError(
                    f"{snapshots} holds weights of an earlier run, which has no checkpoint to "
                    "continue from: move that folder away or delete it, or give another out_dir "
                    "(--out)."
                )
        except BaseException:
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the log and end the lock."""
        if self._log is not None:
            self._log.close()
        self._lock.__exit__(None, None, None)

    def remove_snapshots_after(self, step: int) -> None:
        """At a resume after `step` updates: no snapshot may be of what the run does not continue.

        This holds without merges too, because a later resume may merge again.
        """
        later = [path for path in list_checkpoints(self.path / SNAPSHOTS) if step_of(path) > step]
        for path in later:
            path.unlink(missing_ok=True)
        if later:
            self.notes.append(
                f"the snapshots after update {step}, where the run continues, were removed"
            )

    def open_log(self, step: int, kinds: Collection[str]) -> None:
        """Open the log after `step` updates; its later records are removed."""
        self._log, notes = open_log(self.path, step, kinds)
        self.notes += notes

    def log(self, record: Mapping[str, Any]) -> None:
        """Append a record to the log.

        Raises:
            OSError: the disk refused.
        """
        assert self._log is not None
        try:
            self._log.write(record)
        except OSError as error:
            raise OSError(
                f"the log in {self.path} cannot be written ({error.strerror or error}), so the run "
                "stops: free space or choose another disk, then continue with resume=True "
                "(--resume)."
            ) from error

    def save(self, step: int, content: Mapping[str, Any], *, keep: int) -> Path:
        """Write a checkpoint (see `save_checkpoint`)."""
        self.save_failed = True
        path = save_checkpoint(self.checkpoints, step, content, keep=keep)
        self.save_failed = False
        return path

    def write_tokenizer(self, tokenizer: Any) -> None:
        """Keep the tokenizer of a new run, for a resume with other text."""
        if tokenizer is None:
            return
        with atomic_file(self.path / TOKENIZER) as temporary:
            temporary.write_text(tokenizer.to_str(), encoding="utf-8")

    def read_newest(
        self,
        model: Nemotron,
        optimizer: torch.optim.Optimizer,
        fingerprint: Mapping[str, Any],
        *,
        allow_changes: Collection[str],
        skip_damaged: bool,
    ) -> dict[str, Any]:
        """The newest checkpoint, fully checked; with `skip_damaged`, the newest intact one.

        Returns:
            What the file holds, and its `path`.

        Raises:
            ResumeError: it is damaged, does not fit the model, or is of another run.
        """
        found = list_checkpoints(self.checkpoints)
        for number, path in enumerate(reversed(found), 1):
            try:
                saved = self._read(path, model, optimizer, fingerprint, allow_changes)
            except _DamagedError as error:
                if not skip_damaged:
                    raise ResumeError(self._advice(str(error), found[:-number])) from error
                self._skip(path, str(error))
            else:
                return saved
        raise ResumeError(
            f"none of the {len(found)} checkpoints in {self.checkpoints} is intact. Start a new "
            "run in another folder."
        )

    def _read(
        self,
        path: Path,
        model: Nemotron,
        optimizer: torch.optim.Optimizer,
        fingerprint: Mapping[str, Any],
        allow_changes: Collection[str],
    ) -> dict[str, Any]:
        try:
            saved = read_checkpoint(path)
            check_outline(path, saved)
        except ResumeError as error:
            raise _DamagedError(str(error)) from error
        notes = compare_runs(
            saved["fingerprint"], fingerprint, allow_changes=allow_changes, folder=str(self.path)
        )
        try:
            check_contents(path, saved, model, optimizer)
        except ResumeError as error:
            raise _DamagedError(str(error)) from error
        self.notes += notes
        return {**saved, "path": path}

    def _advice(self, problem: str, older: list[Path]) -> str:
        for path in reversed(older):
            with suppress(ResumeError):
                check_outline(path, read_checkpoint(path))
                return (
                    f"{problem} The newest intact checkpoint is {path.name}: resume from it with "
                    "skip_damaged=True (--skip-damaged), which renames the damaged file."
                )
        return f"{problem} There is no older intact checkpoint. Start a new run in another folder."

    def _skip(self, path: Path, problem: str) -> None:
        aside = path.with_name(path.name + DAMAGED)
        number = 1
        while os.path.lexists(aside):
            number += 1
            aside = path.with_name(f"{path.name}{DAMAGED}-{number}")
        path.rename(aside)
        self.notes.append(f"{problem} It was renamed to {aside.name}.")


class _DamagedError(Exception):
    """One checkpoint that cannot be used; an older one may be."""


def _exists(folder: Path) -> bool:
    with suppress(OSError):
        return folder.is_dir()
    return False


def _no_checkpoint(folder: Path) -> str:
    return f"no checkpoint in {folder}: start the run without resume=True (--resume)."
