"""Merging during a run: weights are kept every few updates, and merges of them are scored.

    TrainConfig(..., merge_every=20, merge_windows=(100, 200, 400), eval_every=100)

keeps the weights after every 20th update in `OUT/snapshots/`. At each validation the model gets the
merged weights of each window in turn (merging.py), for the time that a validation loss takes:

    record["validation_loss"]           of the run's own weights
    record["merged_validation_loss"]    {"100": ..., "200": ..., "400": ...} of the merges

A window counts as soon as the run is that long. A damaged snapshot costs the scores of its windows
and a warning, and the run goes on. The run itself goes on with its own weights, bit
for bit as without merges.

A window moves with the run, and with it the weight of each snapshot in it. So no running sum gives
the merge: the snapshots themselves are kept, on disk: weights without the optimizer's moments, a
third of a checkpoint of AdamW. All are kept, whatever the windows are, because the best merge is
known only after the run: `steps / merge_every + 1` files of 4 bytes for each weight.

A resume goes back to a checkpoint. The snapshots after it are removed (run_folder.py), and made
again. A resumed run therefore has the same merges, bit for bit.

Source: reference sheet 7. Left out: snapshots of one part of the model.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nemotron_lite.model import Nemotron
from nemotron_lite.train.checkpoint_checks import FORMAT
from nemotron_lite.train.checkpointing import (
    SNAPSHOTS,
    list_checkpoints,
    save_checkpoint,
    step_of,
)
from nemotron_lite.train.errors import ResumeError
from nemotron_lite.train.merging import merge_weights, merged_state

_log = logging.getLogger(__name__)


class Snapshots:
    """The snapshots of a run.

    Args:
        run: folder of the run.
        model: that is trained.
        every: updates between two snapshots.
        windows: lengths of the merges in updates, multiples of `every`.
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
        self._model, self._every, self._fingerprint = model, every, fingerprint

    def after_update(self, step: int) -> None:
        """Keep the weights if it is their turn.

        It is also called where a run starts or is resumed. Snapshots after that are gone by then.

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

    @contextmanager
    def merged(self, window: int, step: int) -> Iterator[bool]:
        """The model with the merged weights of the window that ends after update `step`.

        Afterwards it has its own weights again, the same bits.

        Yields:
            Whether the window is complete and intact. If not, the weights are the model's own.
        """
        wanted = range(step - window, step + 1, self._every)
        found = {step_of(path): path for path in list_checkpoints(self.folder)}
        merge = None
        if all(at in found for at in wanted):
            try:
                merge = merged_state([found[at] for at in wanted], merge_weights(wanted))
            except ResumeError as error:
                _log.warning("the merge over %d updates is not scored: %s", window, error)
        if merge is None:
            yield False
            return
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
