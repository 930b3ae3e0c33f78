"""Where the tokens of one call stand, told once to every layer.

A forward pass may be a whole batch of sequences from their first token, one more piece of a prompt
whose beginning is already cached, one decoded token per row, or a row packed with several
documents. What differs between these is a handful of numbers, which travel together as a `Span`.

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
class Span:
    """Positions of `t` new tokens in each of `b` rows.

    Attributes:
        starts: tokens each row had before; one number when all rows agree, else one per row.
        lengths: how many of the t tokens are real, row by row; None when all are. Rows are padded
            on the right.
        seq_idx: `b t`, the document of each token in a packed row; None when rows are not packed.
        router: collects `RouterStats`; None when nobody asked.
    """

    starts: int | Int[Tensor, "b"] = 0
    lengths: Int[Tensor, "b"] | None = None
    seq_idx: Int[Tensor, "b t"] | None = None
    router: list[RouterStats] | None = None

    def real(self, x: Float[Tensor, "b t d"]) -> Bool[Tensor, "b t"] | None:
        """True where a token is real and not padding; None when all are."""
        if self.lengths is None:
            return None
        return torch.arange(x.shape[1], device=x.device) < self.lengths.to(x.device)[:, None]
