"""Preparing the weights for decoding on a CPU, where that gains more than it costs.

`Nemotron.prepare_for_decoding` copies each projection matrix into a layout that oneDNN reads
faster. Two conditions decide whether `generate` calls it:

    oneDNN is the faster library here    `prefers_onednn`: float32 on a CPU, and not one of Intel's.
                                         There the copies gained nothing over MKL
    enough tokens will be written        making the copies takes as long as four to eight decoding
                                         steps of the `lite` preset

Copies are kept with the model. Where they are up to date already, nothing is copied again.

Source: measured. Left out: matrices of experts and the embedding, which are not copied.
"""

from __future__ import annotations

import torch

# Past `ops.linear`: nothing is multiplied here, the question is which library this machine uses.
from nemotron_lite.backends.cpu_linear import prefers_onednn
from nemotron_lite.layers import plain_weight
from nemotron_lite.model import Nemotron

MIN_TOKENS = 32  # fewer new tokens do not pay for the copies


def prepare_weights(model: Nemotron, max_new_tokens: int = MIN_TOKENS) -> None:
    """Prepare `model` to write this many tokens per row, if it pays."""
    if max_new_tokens < MIN_TOKENS:
        return
    weights = [w for m in model.modules() if (w := plain_weight(m)) is not None]
    largest = max(weights, key=torch.Tensor.numel, default=None)
    same = all(w.dtype == torch.float32 and w.is_cpu for w in weights)
    if largest is not None and same and prefers_onednn(largest[:1], largest):
        model.prepare_for_decoding()
