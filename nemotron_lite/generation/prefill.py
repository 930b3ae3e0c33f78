"""Prefill: rows of any lengths as one tensor, read into a cache segment by segment.

Rows are padded on the right. A padding token changes neither the cache nor any logits of its row.
So a row gives what it would give alone, and every length of the segments gives the same
logits up to rounding.

Left out: sharing the cache of prompts that begin alike, and several prompts in one row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.cache import Cache
from nemotron_lite.model import Nemotron


def prefill(
    model: Nemotron,
    prompt: Int[Tensor, "b t"],
    lengths: list[int],
    cache: Cache,
    segment: int | None = None,
    *,
    on_hidden: Callable[[Tensor, int], None] | None = None,
) -> Float[Tensor, "b v"]:
    """Read prompts into `cache`; returns the logits after each row's last token.

    Args:
        prompt: padded on the right.
        lengths: real tokens per row.
        segment: tokens of the prompt per forward pass; None gives the whole prompt to the
            model, which cuts long ones itself (`model.segment`).
        on_hidden: called after each pass with the hidden states `b s d` and the position of the
            first.
    """
    prompt = prompt.to(model.device)
    total = prompt.shape[1]
    if min(lengths) == total:
        for start in range(0, total, segment or total):
            out = model(prompt[:, start : start + (segment or total)], cache, logits_to_keep=1)
            if on_hidden is not None:
                on_hidden(out.hidden, start)
        return out.logits[:, 0]
    ends = torch.tensor(lengths, device=model.device)
    logits: Tensor | None = None
    for start in range(0, total, segment or total):
        part = prompt[:, start : start + (segment or total)]
        real = (ends - start).clamp(0, part.shape[1])
        out = model(part, cache, lengths=real, logits_to_keep=1)
        if on_hidden is not None:
            on_hidden(out.hidden, start)
        new = out.logits[:, 0]
        keep = (real > 0)[:, None]
        logits = new if logits is None else torch.where(keep, new, logits)
    assert logits is not None
    return logits


def pad_right(rows: list[list[int]]) -> tuple[Int[Tensor, "b t"], list[int]]:
    """Rows of any lengths as one tensor, padded with 0, and their lengths."""
    lengths = [len(row) for row in rows]
    longest = max(lengths)
    padded = [row + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device="cpu"), lengths
