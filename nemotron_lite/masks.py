"""Who sees whom: the causal mask, and concatenated documents in one row.

A training row can hold several documents, one after the other. `seq_idx` says which document each
token belongs to. No operation may carry anything across a boundary: attention masks, convolutions
see zeros, and the SSM state starts from zero again.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def document_starts(seq_idx: Int[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """True where a token belongs to another document than the token before it.

    The first token of a row is never marked: its document may have begun before the row.
    """
    starts = torch.zeros_like(seq_idx, dtype=torch.bool)
    starts[:, 1:] = seq_idx[:, 1:] != seq_idx[:, :-1]
    return starts


def number_documents(seq_idx: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """The same documents counted 0, 1, 2 ... along each row.

    A number that returns later in a row (0, 1, 0) is a new document. Operations that look at more
    than the previous token compare these numbers, so that all of them separate documents at the
    same places.
    """
    return document_starts(seq_idx).cumsum(1)


def keys_seen(starts: int | Int[Tensor, "b"], queries: int, keys: int) -> int:
    """How many keys the last query of the longest row sees.

    Raises:
        ValueError: `starts` below 0, or beyond the keys.
    """
    if isinstance(starts, int):
        first = last = starts
    else:
        values = starts.tolist() or [0]
        first, last = min(values), max(values)
    seen = last + queries
    if seen > keys or first < 0:
        raise ValueError(
            f"causal_attention: {keys} keys do not cover starts={starts} cached and {queries} new "
            "tokens: starts must be 0 or more. Append the new keys and values before calling."
        )
    return seen


def visible_keys(
    queries: int,
    keys: int,
    starts: int | Int[Tensor, "b"],
    documents: Int[Tensor, "b t"] | None,
    device: torch.device,
) -> Bool[Tensor, "*mask t s"]:
    """True where a query sees a key, as `t s` or `b 1 t s`.

    Query i of row r is at position `starts[r] + i` and sees the keys up to there; with
    `documents` (from `number_documents`), only those of its own document.
    """
    key = torch.arange(keys, device=device)
    query = torch.arange(queries, device=device)
    if isinstance(starts, int):
        visible = key <= (query + starts)[:, None]
    else:
        query = query + starts.to(device)[:, None]
        visible = (key <= query[:, :, None]).unsqueeze(1)
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :]).unsqueeze(1)
    return visible
