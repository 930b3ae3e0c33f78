"""Text that a tiny model can learn in seconds, and the loss of a model on it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite import Nemotron


def text(seed: int, rows: int = 4, length: int = 48) -> Tensor:
    """Rows with x[t+1] = x[t] + step; the step differs by row and changes once in the middle."""
    draw = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 4, (rows, 1), generator=draw).expand(rows, length).clone()
    steps[:, length // 2 :] = torch.randint(1, 4, (rows, 1), generator=draw)
    start = torch.randint(0, 32, (rows, 1), generator=draw)
    return (start + steps.cumsum(1)) % 32


@torch.no_grad()
def loss_of(model: Nemotron, batch: Tensor) -> float:
    """Nats per token."""
    logits = model(batch).logits[:, :-1].flatten(0, 1)
    return float(F.cross_entropy(logits.double(), batch[:, 1:].flatten()))
