"""From logits to a token: temperature, filters, and a random stream for each row.

    p = softmax(logits / temperature), cut to the top_k most likely tokens, then to the smallest set
    that has probability top_p, then to the tokens with at least min_p times the probability of the
    best, and normalized again

Temperature 0 is greedy: the most likely token, whatever the filters. Each row draws from its own
random stream, row r with `seed + r`, so a row's text does not depend on its neighbors.

top_p looks at the most likely tokens first: if the best `CANDIDATES` have enough probability, the
others are neither sorted nor read again. Sorting a whole vocabulary takes longer than a small
model's forward pass.

Source: reference sheet 8.6 for the recommended settings (temperature 1.0, top_p 0.95); the order of
the filters is that of transformers; min_p: Nguyen et al. 2024 (arXiv 2407.01082). Left out: beam
search, locally typical sampling. What changes logits before the temperature is in adjustments.py.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.generation.options import SamplingOptions
from nemotron_lite.ops.verification import draw

CANDIDATES = 256
TINY_TEMPERATURE = 1e-6  # below it, logits / temperature may be infinite in float32
TINY_TOP_P = 1e-30  # smaller values are zero in float32, and no token has less in the best place


def probabilities(
    logits: Float[Tensor, "*rows v"], options: SamplingOptions
) -> Float[Tensor, "*rows v"]:
    """`distribution` with these options, for any leading axes."""
    flat = logits.reshape(-1, logits.shape[-1])
    found = distribution(flat, options.temperature, options.top_k, options.top_p, options.min_p)
    return found.view(logits.shape)


def distribution(
    logits: Float[Tensor, "b v"],
    temperature: float | int,
    top_k: int | None = None,
    top_p: float | int | None = None,
    min_p: float | int | None = None,
) -> Float[Tensor, "b v"]:
    """The distribution that tokens are drawn from, after temperature and filters.

    Tokens that tie for the top_k-th place are all kept. With temperature 0 the most likely token
    has probability 1. Finite logits give probabilities that are finite and add up to 1.
    """
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits).scatter_(-1, best, 1.0)
    if temperature < TINY_TEMPERATURE:
        scaled = _divide_by_tiny(logits, temperature)
    else:
        scaled = logits / temperature
        if temperature < 1:  # huge logits may overflow; the best must stay finite
            scaled = scaled.clamp_(max=torch.finfo(scaled.dtype).max)
    if top_k is not None and top_k < logits.shape[-1]:
        smallest = scaled.topk(top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(scaled < smallest, float("-inf"))
    found = scaled.softmax(-1)
    if top_p is not None and top_p < 1:
        top_p = max(top_p, TINY_TOP_P)
        ordered, places = _most_likely(found, top_p)
        before = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(before >= top_p, 0.0)
        kept = kept / kept.sum(-1, keepdim=True)
        found = torch.zeros_like(found).scatter_(-1, places, kept)
    if min_p:
        found = found.masked_fill(found < min_p * found.amax(-1, keepdim=True), 0.0)
        found = found / found.sum(-1, keepdim=True)
    return found


def _divide_by_tiny(logits: Float[Tensor, "b v"], temperature: float) -> Float[Tensor, "b v"]:
    """`logits / temperature`, minus the maximum of each row, which changes no probability.

    The most likely tokens get 0; where the others overflow, they get -inf, which is correct. Values
    without the maximum subtracted would overflow to +inf, and their softmax would be NaN.

    The smallest positive float is 5e-324, but its inverse is infinite, and on a GPU PyTorch divides
    by multiplying with the inverse: 1e-300 takes its place. Both give the same probabilities.
    """
    below = (logits - logits.amax(-1, keepdim=True)).double()
    return (below / max(temperature, 1e-300)).to(logits.dtype)


def _most_likely(probabilities: Tensor, top_p: float | int) -> tuple[Tensor, Tensor]:
    """Enough of each row, in falling order, to have top_p: the candidates, or all tokens."""
    if probabilities.shape[-1] > CANDIDATES:
        # One more than the candidates: a tie across their end must be cut by token number, as a
        # stable sort of the whole row would.
        values, places = probabilities.topk(CANDIDATES + 1, dim=-1)
        enough = values[:, :CANDIDATES].sum(-1) >= top_p + 1e-4
        if bool((enough & (values[:, CANDIDATES - 1] > values[:, CANDIDATES])).all()):
            values, places = values[:, :CANDIDATES], places[:, :CANDIDATES]
            places, order = places.sort(-1)
            ordered, again = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
            return ordered, places.gather(1, again)
    values, places = probabilities.sort(dim=-1, descending=True, stable=True)
    return values, places


class RandomStreams:
    """One source of uniform random numbers for each row."""

    def __init__(self, rows: int, seed: int | None) -> None:
        first = torch.Generator().seed() if seed is None else seed
        seeds = [first + row for row in range(rows)]
        self.generators = [
            torch.Generator().manual_seed(seed if seed < 2**64 else seed - 2**64) for seed in seeds
        ]

    def uniforms(self, count: int, device: torch.device) -> Float[Tensor, "b count"]:
        """`count` numbers in [0, 1) for each row, in float64."""
        drawn = [
            torch.rand(count, generator=g, dtype=torch.float64, device="cpu")
            for g in self.generators
        ]
        return torch.stack(drawn).to(device)


class Sampler:
    """Chooses tokens from logits.

    Args:
        rows: of the batch.
        options: temperature and filters.
        seed: row r draws from a stream with seed `seed + r`; None takes a fresh seed.
    """

    def __init__(self, rows: int, options: SamplingOptions, seed: int | None) -> None:
        self.options = options
        self._streams = None if options.greedy else RandomStreams(rows, seed)

    def uniforms(self, count: int, device: torch.device) -> Float[Tensor, "b count"] | None:
        """`count` random numbers for each row; None for greedy decoding, which needs none."""
        return None if self._streams is None else self._streams.uniforms(count, device)

    def choose(
        self, logits: Float[Tensor, "b v"], uniforms: Float[Tensor, "b"] | None
    ) -> Int[Tensor, "b"]:
        """One token per row: the most likely one without random numbers, else by `uniforms`."""
        if uniforms is None:
            return logits.argmax(-1)
        return draw(probabilities(logits, self.options), uniforms)
