"""Where the tokens of one call stand, told once to every layer.

A forward pass may be a whole batch of sequences from their first token, one more piece of a prompt
whose beginning is already cached, one decoded token per row, or a row packed with several
documents. What differs between these is a handful of numbers, which travel together
as a `ForwardContext`.

Router statistics travel the other way: where they are asked for, `router` is a list that every
mixture layer appends to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class RouterStats(NamedTuple):
    """What one router decided, for balancing and for looking at."""

    name: str  # the layer's path in the model, e.g. "backbone.layers.1.mixer"
    scores: Float[Tensor, "b t e"]  # sigmoid scores s, with gradient
    indices: Int[Tensor, "b t k"]  # chosen experts


@dataclass(frozen=True, slots=True)
class ForwardContext:
    """Positions of `t` new tokens in each of `b` rows.

    Attributes:
        starts: tokens each row had before; one number when all rows agree, else one per row.
        lengths: how many of the t tokens are real, row by row; None when all are. Rows are padded
            on the right.
        seq_idx: `b t`, the document of each token in a packed row; None when rows are not packed.
        router: collects `RouterStats`; None when nobody asked.
        hold: a draft: layers answer as usual but their memories stay where they are, and remember
            how to take in a part of it ("replay" or "snapshots", see state.py). None is no draft.
    """

    starts: int | Int[Tensor, "b"] = 0
    lengths: Int[Tensor, "b"] | None = None
    seq_idx: Int[Tensor, "b t"] | None = None
    router: list[RouterStats] | None = None
    hold: str | None = None

    def real(self, x: Float[Tensor, "b t d"]) -> Bool[Tensor, "b t"] | None:
        """True where a token is real and not padding; None when all are."""
        if self.lengths is None:
            return None
        return torch.arange(x.shape[1], device=x.device) < self.lengths.to(x.device)[:, None]

    def last(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b 1 d"]:
        """The last real token of each row (the first one where a row has none)."""
        if self.lengths is None:
            return x[:, -1:]
        place = (self.lengths.to(x.device) - 1).clamp(min=0)
        return x[torch.arange(len(place), device=x.device), place].unsqueeze(1)

    def of_last(self, x: Float[Tensor, "b t d"]) -> ForwardContext:
        """Where the tokens of `last` stand."""
        if self.lengths is None:
            return ForwardContext(self.starts + x.shape[1] - 1)
        return ForwardContext((self.starts + self.lengths - 1).clamp(min=0))
