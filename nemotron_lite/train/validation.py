"""The validation loss: mean nats per target on batches that are not trained on.

It is computed between two updates, on the same batches each time, so that its values can be
compared. It changes nothing in the training. The model is in evaluation mode meanwhile, no gradient
is recorded, and torch's random state is put back. The matrix products have the precision of the
run. Only the backbone is measured, without the MTP module.

`evaluate.py` has the score for the end of a run: bits per byte, which can be compared between
tokenizers. That one reads all held-out files, with overlapping windows.
"""

from __future__ import annotations

import torch

from nemotron_lite.data.batches import BatchSource
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.emulated_training import EmulatedPrecision
from nemotron_lite.train.config import TrainConfig
from nemotron_lite.train.loss import count_targets, token_loss


@torch.no_grad()
def validation_loss(
    model: Nemotron, data: BatchSource, config: TrainConfig, precision: EmulatedPrecision
) -> float:
    """Mean nats per target on batches 0 to `config.eval_batches` - 1 of `data`.

    Args:
        model: of the run, left in the mode that it is in.
        data: batches of held-out text.
        config: of the run; batches have its `batch_size`, `seq_len` and `seed`.
        precision: of the run, opened.
    """
    device = model.device
    was_training = model.training
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.eval()
        try:
            total, targets = 0.0, 0
            for index in range(config.eval_batches):
                batch = data.batch(
                    index, batch_size=config.batch_size, seq_len=config.seq_len, seed=config.seed
                ).to(device)
                [count] = count_targets([batch], 0)
                with precision.autocast():
                    hidden = model.forward_hidden(batch.tokens, seq_idx=batch.seq_idx).hidden
                    loss = token_loss(
                        hidden, [], model.lm_head, batch, mtp_weight=0.0, counts=[count]
                    )
                total += loss.by_depth[0] * count
                targets += count
        finally:
            model.train(was_training)
    return total / max(1, targets)
