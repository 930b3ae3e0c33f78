"""Writing text: prefill the prompt, then one token at a time, or several where a draft is right.

    t_{i+1} ~ p( . | t_1 .. t_i),      p = softmax(logits / temperature) after the filters

Rows of a batch may have prompts of different lengths; each gives the tokens it would give alone.
Each row draws from its own random stream, row r with `seed + r`, so this holds for sampling too.

With `draft="mtp"` the MTP module proposes the next few tokens and the backbone checks them in one
pass (speculative/). Greedy, the tokens are the same as without; sampled, their law is the same, and
the tokens are others, since the random numbers are used differently.

Source: reference sheet 8.6 for the recommended settings (temperature 1.0, top_p 0.95). The filters
are in sampling.py, the prompt in prompts.py. Left out: beams, repetition penalties.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from jaxtyping import Int
from torch import Tensor

from nemotron_lite.cache import Cache
from nemotron_lite.generation.prefill import Prompts, pad_right, prefill
from nemotron_lite.generation.sampling import Chooser, Filters
from nemotron_lite.generation.speculative import Costs, Speculation, Statistics
from nemotron_lite.model import Nemotron

DRAFTS = ("mtp",)


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
    draft: str | None = None,
    draft_length: int = 4,
    adaptive: bool | Costs = True,
    shortlist: Int[Tensor, "s"] | None = None,
    statistics: Statistics | None = None,
    ssm_dtype: torch.dtype | None = None,
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
        draft: "mtp" lets the MTP module draft and the backbone verify; None writes token by token.
        draft_length: most tokens of a draft.
        adaptive: draft only as far as it pays, by the ledger's prices or by the `Costs` given
            (`speculative.calibrate` measures them); False drafts `draft_length` tokens always.
        shortlist: the only tokens to draft, for a cheaper head (`speculative.shortlist` counts
            them); all of them when None.
        statistics: filled in with what drafting did.
        ssm_dtype: float16 halves the memory of SSM states, which are then rounded by chance, with
            bits that follow from `seed` (0 where there is none). None is float32.

    Returns:
        The new tokens of each row, without the prompt; a stop token is the last of its row.

    Raises:
        ValueError: an argument out of range, an empty prompt, a draft asked of a model without
            an MTP module, or an `ssm_dtype` that caches do not have.
    """
    rows: list[list[int]] | None = None
    for step in stream(
        model, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
        stop=stop, seed=seed, prefill_chunk=prefill_chunk, draft=draft, draft_length=draft_length,
        adaptive=adaptive, shortlist=shortlist, statistics=statistics, ssm_dtype=ssm_dtype,
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
    draft: str | None = None,
    draft_length: int = 4,
    adaptive: bool | Costs = True,
    shortlist: Int[Tensor, "s"] | None = None,
    statistics: Statistics | None = None,
    ssm_dtype: torch.dtype | None = None,
) -> Iterator[list[int | None]]:
    """`generate`, one step at a time: a token per row, None for rows that have ended.

    Arguments are checked at once; the prompt is read when the first step is asked for.
    """
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be 0 or more.")
    if prefill_chunk is not None and prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk} must be at least 1, or None.")
    if draft is not None and draft not in DRAFTS:
        raise ValueError(f"draft={draft!r}: expected one of {DRAFTS}, or None to write plainly.")
    if isinstance(stop, int | str) or not all(isinstance(token, int) for token in stop):
        raise ValueError(f"stop={stop!r}: expected token ids, as in model.config.eos_token_ids.")
    filters = Filters(temperature, top_k, top_p)
    prompt, lengths = pad_right(tokens)
    if draft is not None:
        return Speculation(
            model, prompt, lengths, max_new_tokens, filters, seed=seed, stop=frozenset(stop),
            chunk=prefill_chunk, draft_length=draft_length, adaptive=adaptive,
            shortlist=shortlist, statistics=statistics, ssm_dtype=ssm_dtype,
        ).steps()  # fmt: skip
    chooser = Chooser(len(prompt), filters, seed)
    cache = model.empty_cache(
        len(prompt),
        prompt.shape[1] + max_new_tokens,
        ssm_dtype=ssm_dtype,
        ssm_seed=(seed or 0) % 2**63,
    )
    return _steps(
        model, prompt, lengths, max_new_tokens, chooser, frozenset(stop), prefill_chunk, cache
    )


def _steps(
    model: Nemotron,
    prompt: Int[Tensor, "b t"],
    lengths: list[int],
    max_new_tokens: int,
    chooser: Chooser,
    stop: frozenset[int],
    prefill_chunk: int | None,
    cache: Cache,
) -> Iterator[list[int | None]]:
    if max_new_tokens == 0:
        return
    # Inference mode must not stay on while the caller holds the iterator: it covers single calls.
    with torch.inference_mode():
        logits = prefill(model, prompt, lengths, cache, prefill_chunk)
        chosen = chooser(logits)
    ended = [False] * len(prompt)
    for step in range(max_new_tokens):
        if step:
            with torch.inference_mode():
                logits = model(chosen.unsqueeze(1), cache, logits_to_keep=1).logits[:, 0]
                chosen = chooser(logits)
        found = chosen.tolist()
        yield [None if over else token for token, over in zip(found, ended, strict=True)]
        ended = [over or token in stop for token, over in zip(found, ended, strict=True)]
        if all(ended):
            return
