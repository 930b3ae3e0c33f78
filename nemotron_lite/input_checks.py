"""Checks of the arguments of a call of the model, before any layer sees them.

The arguments of `model(tokens, cache, lengths=..., seq_idx=...)` may not fit together: more rows
than the cache has, lengths beyond the row, a cache of another model. Without these checks such a
mistake would show later, as an error about a tensor deep inside a layer, or not at all and as wrong
numbers. Each error names the value, what was expected, and what to do where that is not obvious.

The checks run at every decoded token. So they look at shapes and counts, not at numbers on a
device, and a cache is compared with the model only once, at its first call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_lite.cache import Cache
from nemotron_lite.config import NemotronConfig


def check_call(
    config: NemotronConfig,
    dtype: torch.dtype,
    tokens: Tensor,
    cache: Cache | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    mtp_depths: int,
) -> None:
    """Refuse arguments of `Nemotron.forward` that do not fit each other or the model.

    Args:
        config, dtype: of the model.

    Raises:
        ValueError: the first thing that is wrong.
    """
    shape = list(tokens.shape)
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"tokens must be rows x time, not empty; got {shape}.")
    if tokens.is_floating_point() or tokens.is_complex():
        raise ValueError(f"tokens must be ids, whole numbers; got {tokens.dtype}.")
    if lengths is not None and list(lengths.shape) != shape[:1]:
        raise ValueError(
            f"lengths has shape {list(lengths.shape)}; expected {shape[:1]}, one length per row."
        )
    if lengths is not None and not bool(((lengths >= 0) & (lengths <= shape[1])).all()):
        raise ValueError(f"lengths {lengths.tolist()} must be 0 to {shape[1]}.")
    if seq_idx is not None and list(seq_idx.shape) != shape:
        raise ValueError(
            f"seq_idx has shape {list(seq_idx.shape)}; expected that of tokens, {shape}."
        )
    _check_depths(config, shape[1], mtp_depths)
    if cache is not None:
        _check_cache(config, dtype, shape[0], cache)
        if seq_idx is not None:
            raise ValueError(
                "concatenated documents (seq_idx) cannot continue a cache: leave out one of the "
                "two."
            )
        if mtp_depths:
            raise ValueError("mtp_depths needs the whole text at once; call without a cache.")


def check_draft(cache: Cache | None, lengths: Tensor | None) -> None:
    """Refuse `draft=True` without a cache, or with lengths.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    if cache is None or lengths is not None:
        raise ValueError(
            "draft=True reads a draft behind a cache: give a cache, and leave out lengths (the "
            "counts of cache.accept say how many tokens of each row are real)."
        )


def check_logits_to_keep(logits_to_keep: int, tokens: Tensor) -> None:
    """Refuse a number of logits that is negative or larger than the number of tokens.

    Raises:
        ValueError: the number, and what was expected.
    """
    if not logits_to_keep or tokens.ndim != 2 or not tokens.shape[1]:
        return  # `check_call` refuses tokens of another shape
    if not 0 < logits_to_keep <= tokens.shape[1]:
        raise ValueError(
            f"logits_to_keep={logits_to_keep}: expected 0 (all tokens) to {tokens.shape[1]}, the "
            "tokens of a row."
        )


def _check_depths(config: NemotronConfig, tokens: int, depths: int) -> None:
    if not depths:
        return
    if depths < 0:
        raise ValueError(f"mtp_depths={depths} must be 0 or more.")
    if not config.mtp_pattern:
        raise ValueError(f"mtp_depths={depths}, but this model has no MTP module: use 0.")
    if depths >= tokens:
        raise ValueError(
            f"mtp_depths={depths} needs more than {tokens} tokens: give longer rows, or use fewer "
            "depths."
        )


def _check_cache(config: NemotronConfig, dtype: torch.dtype, rows: int, cache: Cache) -> None:
    if cache.batch != rows:
        raise ValueError(
            f"{rows} rows of tokens, but a cache of {cache.batch}: make one with "
            f"model.empty_cache({rows})."
        )
    if cache.draft_length:
        raise ValueError(
            f"a draft of {cache.draft_length} tokens is waiting in the cache: call "
            "cache.accept(counts) first (accept(0) drops it)."
        )
    known = cache.checked_for
    if known is None or known[0] is not config or known[1] != dtype:
        _check_layers(config, dtype, cache)
        cache.checked_for = (config, dtype)


def _check_layers(config: NemotronConfig, dtype: torch.dtype, cache: Cache) -> None:
    """Refuse a cache with other layers, sizes or dtypes than the model's."""
    what_to_do = "Make one with model.empty_cache(rows), or load the cache that this model saved."
    if len(cache.layers) != config.num_layers:
        raise ValueError(
            f"a cache of {len(cache.layers)} layers, but a model of {config.num_layers}. "
            f"{what_to_do}"
        )
    fitting = Cache.empty(config, 1, device="meta", dtype=dtype, capacity=1)
    for i, (found, expected) in enumerate(zip(cache.layers, fitting.layers, strict=True)):
        sizes = None if found is None else found.sizes
        wanted = None if expected is None else expected.sizes
        if sizes != wanted:
            raise ValueError(
                f"layer {i} ({config.pattern[i]!r}) remembers sizes {wanted}, but the cache has "
                f"{sizes} there: it is of another model. {what_to_do}"
            )
        if found is not None and found.dtype != dtype:
            raise ValueError(
                f"layer {i} computes in {dtype}, but the cache holds {found.dtype}: was the model "
                f"cast after the cache was made? {what_to_do}"
            )
