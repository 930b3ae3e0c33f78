"""The positions of one call's tokens, given to every layer.

A forward pass may read a whole batch of sequences from their first token, one more segment of a
prompt whose beginning is already in the cache, one decoded token per row, or rows of concatenated
documents. What differs between these is a handful of numbers. They are passed on together as a
`ForwardContext`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class RouterStats(NamedTuple):
    """What one router decided: for balancing the load of the experts, and to be looked at."""

    name: str  # the layer's path in the model, e.g. "backbone.layers.1.mixer"
    scores: Float[Tensor, "b t e"]  # sigmoid scores s, with gradient
    indices: Int[Tensor, "b t k"]  # chosen experts


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Positions of `t` new tokens in each of `b` rows.

    Attributes:
        starts: tokens that each row had before; one number when all rows agree, else one per row.
        lengths: how many of the t tokens are real, row by row; None when all are. Rows are padded
            on the right.
        seq_idx: `b t`, the document of each token in rows of concatenated documents; None when a
            row is one text.
        draft: the tokens are a draft. Layers compute as usual, but do not advance their caches.
            They keep what `LayerCache.accept` needs to take in a part of the draft later.
        last_only: the output of each row's last real token is all that is needed, `b 1 d`. A layer
            takes all tokens into its cache, but may compute less.
        router_stats: routers append what they decided here; None where nobody asks.
    """

    starts: int | Int[Tensor, "b"] = 0
    lengths: Int[Tensor, "b"] | None = None
    seq_idx: Int[Tensor, "b t"] | None = None
    draft: bool = False
    last_only: bool = False
    router_stats: list[RouterStats] | None = None

    def real_tokens(self, x: Float[Tensor, "b t d"]) -> Bool[Tensor, "b t"] | None:
        """True where a token is real and not padding; None when all are."""
        if self.lengths is None:
            return None
        return torch.arange(x.shape[1], device=x.device) < self.lengths.to(x.device)[:, None]

    def last_tokens(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b 1 d"]:
        """The last real token of each row (the first one where a row has none)."""
        if self.lengths is None:
            return x[:, -1:]
        place = (self.lengths.to(x.device) - 1).clamp(min=0)
        return x[torch.arange(len(place), device=x.device), place].unsqueeze(1)

    def kept(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b _ d"]:
        """The tokens whose output is needed: all, or `last_tokens` with `last_only`."""
        return self.last_tokens(x) if self.last_only else x

    def at_last(self, x: Float[Tensor, "b t d"]) -> ForwardContext:
        """The context of `last_tokens(x)`."""
        if self.lengths is None:
            return ForwardContext(self.starts + x.shape[1] - 1)
        return ForwardContext((self.starts + self.lengths - 1).clamp(min=0))
