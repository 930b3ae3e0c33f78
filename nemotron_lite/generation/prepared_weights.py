"""Preparing the weights for decoding on a CPU, where that gains more than it costs.

`Nemotron.prepare_for_decoding` copies each projection matrix into a layout that oneDNN reads
faster. Two conditions decide whether `generate` calls it:

    the copy is faster here       for the number of rows that a step multiplies, as measured on this
                                  machine (backends/measured_products.py)
    enough tokens are written     making the copies takes as long as four to eight decoding steps of
                                  the `lite` preset

Copies are kept with the model. Where they are up to date already, nothing is copied again. Each
product still asks which matrix to take, because a step for other rows may follow.

Source: measured. Left out: matrices of experts and the embedding, which are not copied.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Past `ops.linear`: nothing is multiplied here, the question is which library this machine uses.
from nemotron_lite.backends.cpu_linear import prefers_prepacked
from nemotron_lite.layers import plain_weight
from nemotron_lite.model import Nemotron

MIN_TOKENS = 32  # fewer new tokens do not pay for the copies


def prepare_weights(
    model: Nemotron, max_new_tokens: int = MIN_TOKENS, rows: Sequence[int] = (1,)
) -> None:
    """Prepare `model` to write this many tokens per row, if it pays.

    Args:
        model: stays as it is on a GPU and in other dtypes than float32.
        max_new_tokens: per row.
        rows: how many rows the products of a step may have; with a draft, each row has several.
    """
    if max_new_tokens < MIN_TOKENS:
        return
    weights = [w for m in model.modules() if (w := plain_weight(m)) is not None]
    largest = max(weights, key=torch.Tensor.numel, default=None)
    same = all(w.dtype == torch.float32 and w.is_cpu for w in weights)
    if largest is not None and same and any(prefers_prepacked(n, largest.numel()) for n in rows):
        model.prepare_for_decoding()
