"""From logits to a token: temperature, filters, and a random stream for each row.

    p = softmax(logits / temperature), cut to the top_k most likely, then to the smallest set that
    holds top_p of the probability, and renormalised

Temperature 0 is greedy: the most likely token, whatever the filters. Each row draws from its own
random stream, row r with `seed + r`, so a row's text does not depend on its neighbours.

top_p looks at the most likely tokens first: if the best `SHORTLIST` hold enough probability, the
others are neither sorted nor read again. Sorting a whole vocabulary takes longer than a small
model's forward pass.

Source: reference sheet 8.6 for the recommended settings (temperature 1.0, top_p 0.95). Left out:
beams, repetition penalties, min-p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.ops.verification import draw

SHORTLIST = 256


@dataclass(frozen=True)
class Filters:
    """How logits become a distribution.

    Raises:
        ValueError: a setting out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature} must be 0 (greedy) or a number above."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1, or None for no limit.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} must be above 0 and at most 1, or None for no limit."
            )

    @property
    def greedy(self) -> bool:
        """Whether there is nothing to draw."""
        return self.temperature == 0

    def __call__(self, logits: Float[Tensor, "*rows v"]) -> Float[Tensor, "*rows v"]:
        """`distribution` with these settings, for any leading axes."""
        flat = logits.reshape(-1, logits.shape[-1])
        return distribution(flat, self.temperature, self.top_k, self.top_p).view(logits.shape)


def distribution(
    logits: Float[Tensor, "b v"],
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "b v"]:
    """The distribution that tokens are drawn from, after temperature and filters.

    Ties at the top_k-th place all stay. With temperature 0 the most likely token has all of it.
    """
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    scaled = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = scaled.topk(top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, float("-inf"))
    probabilities = scaled.softmax(-1)
    if top_p is None or top_p >= 1:
        return probabilities
    ordered, places = _most_likely(probabilities, top_p)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(-1, places, kept)


def _most_likely(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Enough of each row, in falling order, to hold top_p: the shortlist, or everything."""
    if probabilities.shape[-1] > SHORTLIST:
        # One more than the list: a tie across its end must be cut by token number, as a stable
        # sort of the whole row would.
        values, places = probabilities.topk(SHORTLIST + 1, dim=-1)
        enough = values[:, :SHORTLIST].sum(-1) >= top_p + 1e-4
        if bool((enough & (values[:, SHORTLIST - 1] > values[:, SHORTLIST])).all()):
            values, places = values[:, :SHORTLIST], places[:, :SHORTLIST]
            places, order = places.sort(-1)
            ordered, again = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
            return ordered, places.gather(1, again)
    values, places = probabilities.sort(dim=-1, descending=True, stable=True)
    return values, places


class Streams:
    """One source of uniform numbers for each row."""

    def __init__(self, rows: int, seed: int | None) -> None:
        first = torch.seed() if seed is None else seed
        self.generators = [torch.Generator().manual_seed(first + row) for row in range(rows)]

    def uniforms(self, count: int, device: torch.device) -> Float[Tensor, "b count"]:
        """`count` numbers in [0, 1) for each row, in float64."""
        drawn = [torch.rand(count, generator=g, dtype=torch.float64) for g in self.generators]
        return torch.stack(drawn).to(device)


class Chooser:
    """Picks one token per row from logits."""

    def __init__(self, rows: int, filters: Filters, seed: int | None) -> None:
        self.filters = filters
        self.streams = Streams(rows, 0 if filters.greedy else seed)

    def __call__(self, logits: Float[Tensor, "b v"]) -> Int[Tensor, "b"]:
        """One step of every row."""
        if self.filters.greedy:
            return logits.argmax(-1)
        return draw(self.filters(logits), self.streams.uniforms(1, logits.device)[:, 0])
