"""Writing text: prefill the prompt, then one token at a time.

    p = softmax(logits / temperature), cut to the top_k most likely, then to the smallest set that
    holds top_p of the probability, and renormalised

Temperature 0 is greedy: the most likely token, whatever the filters. Rows of a batch may have
prompts of different lengths, each gives the tokens it would give alone. Each row draws from its own
random stream, row r with `seed + r`, so this holds for sampling too.

Source: reference sheet 8.6 for the recommended settings (temperature 1.0, top_p 0.95). Left out:
drafting with the MTP module, beams, repetition penalties.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.model import Nemotron
from nemotron_lite.state import State

Prompts = Int[Tensor, "b t"] | Sequence[Sequence[int]]


def generate(
    model: Nemotron,
    tokens: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    seed: int | None = None,
    prefill_chunk: int | None = None,
) -> list[list[int]]:
    """Continue each prompt.

    Args:
        tokens: `b t` ids, or one list of ids per row, of any lengths.
        max_new_tokens: most tokens to write per row.
        temperature: 0 is greedy.
        top_k, top_p: filters on the distribution; None is off.
        stop: tokens that end a row, for instance `model.config.eos_token_ids`.
        seed: makes sampling repeatable; None draws a fresh one.
        prefill_chunk: tokens of prompt per pass; None lets the model choose. Any value gives the
            same logits up to rounding.

    Returns:
        The new tokens of each row, without the prompt; a stop token is the last of its row.

    Raises:
        ValueError: an argument out of range, or an empty prompt.
    """
    rows: list[list[int]] | None = None
    for step in stream(
        model, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        stop=stop, seed=seed, prefill_chunk=prefill_chunk,
    ):  # fmt: skip
        rows = rows or [[] for _ in step]
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows or [[] for _ in range(len(tokens))]


def stream(
    model: Nemotron,
    tokens: Prompts,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Collection[int] = (),
    seed: int | None = None,
    prefill_chunk: int | None = None,
) -> Iterator[list[int | None]]:
    """`generate`, one step at a time: a token per row, None for rows that have ended.

    Arguments are checked at once; the prompt is read when the first step is asked for.
    """
    _check(max_new_tokens, temperature, top_k, top_p, prefill_chunk)
    prompt, lengths = pad_right(tokens)
    chooser = _Chooser(len(prompt), temperature, top_k, top_p, seed)
    return _steps(model, prompt, lengths, max_new_tokens, chooser, frozenset(stop), prefill_chunk)


def _steps(
    model: Nemotron,
    prompt: Int[Tensor, "b t"],
    lengths: list[int],
    max_new_tokens: int,
    chooser: _Chooser,
    stop: frozenset[int],
    prefill_chunk: int | None,
) -> Iterator[list[int | None]]:
    if max_new_tokens == 0:
        return
    # Inference mode must not stay on while the caller holds the iterator: it covers single calls.
    with torch.inference_mode():
        state = model.empty_state(len(prompt), capacity=prompt.shape[1] + max_new_tokens)
        logits = prefill(model, prompt, lengths, state, prefill_chunk)
        chosen = chooser(logits)
    ended = [False] * len(prompt)
    for step in range(max_new_tokens):
        if step:
            with torch.inference_mode():
                logits = model(chosen.unsqueeze(1), state, last_only=True).logits[:, 0]
                chosen = chooser(logits)
        found = chosen.tolist()
        yield [None if over else token for token, over in zip(found, ended, strict=True)]
        ended = [over or token in stop for token, over in zip(found, ended, strict=True)]
        if all(ended):
            return


def prefill(
    model: Nemotron,
    prompt: Int[Tensor, "b t"],
    lengths: list[int],
    state: State,
    chunk: int | None = None,
) -> Float[Tensor, "b v"]:
    """Take prompts into `state`; the logits after each row's last token.

    Args:
        prompt: padded on the right.
        lengths: real tokens per row.
        chunk: tokens per pass; None is all at once.
    """
    prompt = prompt.to(model.device)
    total = prompt.shape[1]
    if min(lengths) == total:
        for start in range(0, total, chunk or total):
            out = model(prompt[:, start : start + (chunk or total)], state, last_only=True)
        return out.logits[:, 0]
    ends = torch.tensor(lengths, device=model.device)
    logits: Tensor | None = None
    for start in range(0, total, chunk or total):
        part = prompt[:, start : start + (chunk or total)]
        real = (ends - start).clamp(0, part.shape[1])
        new = model(part, state, lengths=real, last_only=True).logits[:, 0]
        keep = (real > 0)[:, None]
        logits = new if logits is None else torch.where(keep, new, logits)
    assert logits is not None
    return logits


def pad_right(tokens: Prompts) -> tuple[Int[Tensor, "b t"], list[int]]:
    """Rows of any lengths as one tensor, padded with 0, and their lengths.

    Raises:
        ValueError: no rows, or an empty one.
    """
    rows = tokens.tolist() if isinstance(tokens, Tensor) else [list(row) for row in tokens]
    lengths = [len(row) for row in rows] if rows and isinstance(rows[0], list) else []
    if not lengths or not min(lengths):
        raise ValueError("prompts must be rows of at least one token; start with bos_token_id.")
    longest = max(lengths)
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows]), lengths


def distribution(
    logits: Float[Tensor, "b v"],
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Float[Tensor, "b v"]:
    """The distribution that tokens are drawn from, after temperature and filters, in float32.

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
    ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill(before >= top_p, 0.0)
    kept = kept / kept.sum(-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, places, kept)


class _Chooser:
    """Picks one token per row, with one random stream per row."""

    def __init__(
        self, rows: int, temperature: float, top_k: int | None, top_p: float | None,
        seed: int | None,
    ) -> None:  # fmt: skip
        self.filters = (temperature, top_k, top_p)
        first = torch.seed() if seed is None and temperature else seed or 0
        self.streams = [torch.Generator().manual_seed(first + row) for row in range(rows)]

    def __call__(self, logits: Float[Tensor, "b v"]) -> Int[Tensor, "b"]:
        if self.filters[0] == 0:
            return logits.argmax(-1)
        sums = distribution(logits, *self.filters).double().cumsum(-1)
        draws = [torch.rand(1, generator=s, dtype=torch.float64) for s in self.streams]
        # Inverse of the cumulative sum; scaled by its end, which is 1 only up to rounding.
        targets = torch.stack(draws).to(logits.device) * sums[:, -1:]
        return torch.searchsorted(sums, targets, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


def _check(
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    prefill_chunk: int | None,
) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more.")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be 0 (greedy) or a number above.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be at least 1, or None for no limit.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1, or None for no limit.")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1, or None.")
