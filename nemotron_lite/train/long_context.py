"""The options of a long-context phase: long rows at a small constant rate.

After the decay the model is finished for short texts. The phase that teaches it long ones must not
undo that, so its rate is the one at which the decay ends, and stays there. A run without a decay
has never had that rate, but a merge of its snapshots imitates one (merging.py). Super: 4.5e-6,
global batches of 16 rows, 51 billion tokens, which is 0.2 % of its training (reference sheet 7).

    how = long_context_config(before, steps=300, seq_len=4096, batch_size=1)
    train(model, LongAndShort(long, short, short_len=512, long_only=200), how, out_dir=...)

The rows come from `data/long_context.py`. It is a run of its own, in its own folder, that starts
with the weights of the run before. How often it is validated is not taken over: give `eval_every`
together with a validation of long rows.

Left out: the optimizer's moments of that run, which the new one collects anew.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from nemotron_lite.train.config import TrainConfig

_NOT_TAKEN = ("max_seconds", "eval_every", "merge_every", "merge_windows")


def long_context_config(
    before: TrainConfig, *, steps: int, seq_len: int, **changes: Any
) -> TrainConfig:
    """The options of a long-context phase after a run.

    Args:
        before: options of the run; its `min_lr`, where a decay ends, becomes the rate of the phase.
        steps: updates of the phase.
        seq_len: tokens of a long row.
        changes: other options, such as `batch_size` (long rows in a micro-batch), `eval_every`, or
            another `lr`.

    Raises:
        TypeError, ValueError: an option that does not work, or `min_lr` is 0 and no `lr` is given.
    """
    if not before.min_lr and "lr" not in changes:
        raise ValueError("the run before has min_lr=0.0, at which nothing is learned: give lr.")
    lr = changes.pop("lr", before.min_lr)
    options = {f.name: getattr(before, f.name) for f in fields(before) if f.name not in _NOT_TAKEN}
    constant = dict(lr=lr, min_lr=lr, warmup_fraction=0.0, decay_fraction=0.0)
    return TrainConfig(**{**options, **constant, "steps": steps, "seq_len": seq_len, **changes})
