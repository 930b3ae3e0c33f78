"""Merging during a run: weights are kept every few updates, and merges of them are scored.

    TrainConfig(..., merge_every=20, merge_windows=(100, 200, 400), eval_every=100)

keeps the weights after every 20th update in `OUT/snapshots/`. At each validation the model gets the
merged weights of each window in turn (merging.py), for the time that a validation loss takes:

    record["validation_loss"]           of the run's own weights
    record["merged_validation_loss"]    {"100": ..., "200": ..., "400": ...} of the merges

A window counts as soon as the run is that long. The run itself goes on with its own weights, bit
for bit as without merges.

A window moves with the run, and with it the weight of each snapshot in it. So no running sum gives
the merge: the snapshots themselves are kept, on disk: weights without the optimizer's moments, a
third of a checkpoint of AdamW. The longest window decides how many: 400 / 20 + 1 in the example.
Without `merge_windows`, none is removed, so that any window can be merged after the run.

A resume goes back to a checkpoint. So snapshots are kept from the oldest checkpoint on, and as far
before it as the longest window. Those after the checkpoint are removed at the resume, and made
again. A resumed run therefore has the same merges, bit for bit.

Source: reference sheet 7. Left out: snapshots of one part of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nemotron_lite.model import Nemotron
from nemotron_lite.train.checkpoint_checks import FORMAT
from nemotron_lite.train.checkpointing import list_checkpoints, save_checkpoint, step_of
from nemotron_lite.train.merging import SNAPSHOTS, merge_weights, merged_state


class Snapshots:
    """The snapshots of a run.

    Args:
        run: folder of the run.
        model: that is trained.
        every: updates between two snapshots.
        windows: lengths of the merges in updates, multiples of `every`. Without any, all snapshots
            are kept.
        fingerprint: of the run; the files hold it.
    """

    def __init__(
        self,
        run: Path,
        model: Nemotron,
        *,
        every: int,
        windows: Sequence[int],
        fingerprint: Mapping[str, Any],
    ) -> None:
        self.folder = run / SNAPSHOTS
        self.windows = tuple(windows)
        self._checkpoints = run / "checkpoints"
        self._model, self._every, self._fingerprint = model, every, fingerprint

    def start(self, step: int) -> None:
        """At the start of a run, or where it is resumed: no snapshot is newer than the weights."""
        for path in list_checkpoints(self.folder):
            if step_of(path) > step:
                path.unlink(missing_ok=True)
        self.after_update(step)

    def after_update(self, step: int) -> None:
        """Keep the weights if it is their turn, and drop what no window needs any more.

        Raises:
            OSError: the disk refused.
        """
        if step % self._every:
            return
        kept = list_checkpoints(self.folder)
        if not kept or step_of(kept[-1]) < step:
            content = {
                "format": FORMAT,
                "model": self._model.state_dict(),
                "fingerprint": dict(self._fingerprint),
                "step": step,
            }
            save_checkpoint(self.folder, step, content, keep=sys.maxsize)
        if not self.windows:
            return
        resumed_from = [step_of(path) for path in list_checkpoints(self._checkpoints)]
        needed = min([step, *resumed_from]) - max(self.windows)
        for path in kept:
            if step_of(path) < needed:
                path.unlink(missing_ok=True)

    @contextmanager
    def merged(self, window: int, step: int) -> Iterator[bool]:
        """The model with the merged weights of the window that ends after update `step`.

        Afterwards it has its own weights again, the same bits.

        Yields:
            Whether the window is complete. If not, the weights are the model's own.
        """
        wanted = range(step - window, step + 1, self._every)
        found = {step_of(path): path for path in list_checkpoints(self.folder)}
        if not all(at in found for at in wanted):
            yield False
            return
        merge = merged_state([found[at] for at in wanted], merge_weights(wanted))
        state = self._model.state_dict()
        own = {name: tensor.clone() for name, tensor in state.items()}
        try:
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.copy_(merge[name])
            yield True
        finally:
            with torch.no_grad():
                for name, tensor in state.items():
                    tensor.copy_(own[name])
