"""Prompts: rows of any lengths as one tensor, read into a cache in pieces.

Rows are padded on the right. A padding token changes neither the cache nor any logits of its row,
so a row gives what it would give alone, and any cut into pieces gives the same logits up to
rounding.

Left out: sharing of prompts that begin alike, and packing of several prompts into one row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.cache import Cache
from nemotron_lite.model import Nemotron

Prompts = Int[Tensor, "b t"] | Sequence[Sequence[int]]


def prefill(
    model: Nemotron,
    prompt: Int[Tensor, "b t"],
    lengths: list[int],
    cache: Cache,
    chunk: int | None = None,
    *,
    on_hidden: Callable[[Tensor, int], None] | None = None,
) -> Float[Tensor, "b v"]:
    """Take prompts into `cache`; the logits after each row's last token.

    Args:
        prompt: padded on the right.
        lengths: real tokens per row.
        chunk: tokens per pass; None is all at once.
        on_hidden: called after each pass with the hidden states `b s d` and the place of the first.
    """
    prompt = prompt.to(model.device)
    total = prompt.shape[1]
    if min(lengths) == total:
        for start in range(0, total, chunk or total):
            out = model(prompt[:, start : start + (chunk or total)], cache, logits_to_keep=1)
            if on_hidden is not None:
                on_hidden(out.hidden, start)
        return out.logits[:, 0]
    ends = torch.tensor(lengths, device=model.device)
    logits: Tensor | None = None
    for start in range(0, total, chunk or total):
        part = prompt[:, start : start + (chunk or total)]
        real = (ends - start).clamp(0, part.shape[1])
        out = model(part, cache, lengths=real, logits_to_keep=1)
        if on_hidden is not None:
            on_hidden(out.hidden, start)
        new = out.logits[:, 0]
        keep = (real > 0)[:, None]
        logits = new if logits is None else torch.where(keep, new, logits)
    assert logits is not None
    return logits


def pad_right(tokens: Prompts) -> tuple[Int[Tensor, "b t"], list[int]]:
    """Rows of any lengths as one tensor, padded with 0, and their lengths.

    Raises:
        ValueError: no rows, an empty one, or something else than rows of ids.
    """
    if not isinstance(tokens, Tensor):
        for row in [tokens, *tokens]:
            if isinstance(row, str):
                raise ValueError(
                    f"prompts are rows of token ids, and {row[:40]!r} is text: give "
                    "[model.tokenizer.encode(text).ids]."
                )
            if isinstance(row, int):
                raise ValueError("prompts are rows of token ids: a single one is [ids], not ids.")
    rows = tokens.tolist() if isinstance(tokens, Tensor) else [list(row) for row in tokens]
    lengths = [len(row) for row in rows] if rows and isinstance(rows[0], list) else []
    if not lengths or not min(lengths):
        raise ValueError("prompts must be rows of at least one token; start with bos_token_id.")
    longest = max(lengths)
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows]), lengths
