"""Checks of the arguments of a call of the model, before any layer sees them.

The arguments of `model(tokens, cache, lengths=..., seq_idx=...)` may not fit together: more rows
than the cache has, lengths beyond the row, a cache of another model. Without these checks such a
mistake would show later, as an error about a tensor deep inside a layer, or not at all and as wrong
numbers. Each error names the value, what was expected, and what to do where that is not obvious.

The checks run at every decoded token. So they look at shapes and counts, not at numbers on a
device, and a cache is compared with the model only once, at its first call.

Token ids, lengths and document numbers may have any integer dtype; they are used as int64. Smaller
dtypes overflow in comparisons and sums with the number of tokens: in uint8, 300 is 44.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemotron_lite.arguments import integer
from nemotron_lite.backends.private_torch import inside_transform
from nemotron_lite.cache import Cache
from nemotron_lite.config import NemotronConfig
from nemotron_lite.dtypes import autocast_dtype

_HALVES = (torch.bfloat16, torch.float16)


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
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"tokens must be rows x time, not empty; got {shape}.")
    if inside_transform():
        raise ValueError(
            "torch.func transforms (vmap, grad, jvp) cannot look into this model. Instead of vmap, "
            "give the rows as one batch; for gradients, use torch.autograd.grad or backward()."
        )
    if lengths is not None and list(lengths.shape) != shape[:1]:
        raise ValueError(
            f"lengths has shape {list(lengths.shape)}; expected {shape[:1]}, one length per row."
        )
    if lengths is not None and lengths.is_meta and type(lengths) is Tensor:
        raise ValueError(
            "lengths are on meta: there are no numbers to compute with. Make them on the device of "
            "the model; a model on meta cannot be called."
        )
    if lengths is not None:
        right = ((lengths >= 0) & (lengths <= shape[1])).all()
        if torch.compiler.is_compiling():  # the numbers are known when the program runs
            torch._assert_async(right, f"lengths must be 0 to {shape[1]}.")
        elif not bool(right):
            raise ValueError(f"lengths {lengths.tolist()} must be 0 to {shape[1]}.")
    if seq_idx is not None and list(seq_idx.shape) != shape:
        raise ValueError(
            f"seq_idx has shape {list(seq_idx.shape)}; expected that of tokens, {shape}."
        )
    if seq_idx is not None and seq_idx.device != tokens.device:
        raise ValueError(
            f"seq_idx is on {seq_idx.device}, but tokens are on {tokens.device}: move one of them "
            "with .to(device)."
        )
    if dtype in _HALVES:
        narrow = autocast_dtype(tokens)
        if narrow is not None and narrow != dtype:
            raise ValueError(
                f"a model in {dtype} under autocast to {narrow}: one of them has digits that the "
                f"other lacks. Use autocast to {dtype}, or a model in float32."
            )
    _check_depths(config, shape[1], mtp_depths)
    if cache is not None:
        check_cache(config, dtype, tokens.shape[0], tokens.device, cache)
        if seq_idx is not None:
            raise ValueError(
                "concatenated documents (seq_idx) cannot continue a cache: leave out one of the "
                "two."
            )
        if mtp_depths:
            raise ValueError("mtp_depths needs the whole text at once; call without a cache.")


def to_int64(name: str, values: Any) -> Tensor:
    """A tensor of any integer dtype as int64.

    Args:
        name: of the argument, for the message.

    Raises:
        TypeError: not a tensor.
        ValueError: not integers.
    """
    if type(values) is Tensor and values.dtype is torch.int64:
        return values
    if not isinstance(values, Tensor):
        raise TypeError(
            f"{name} is a {type(values).__name__}; expected a tensor of integers: "
            "torch.tensor(...) makes one."
        )
    dtype = values.dtype
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool or values.is_quantized:
        raise ValueError(f"{name} has dtype {dtype}; expected integers, such as torch.int64.")
    return values.to(torch.int64)


def check_vocabulary(config: NemotronConfig, tokens: Tensor) -> None:
    """Refuse token ids outside the vocabulary. It reads all of them.

    A prompt is looked at once, before its first segment changes the cache. A single token is left
    to the embedding, which finds it on a CPU.

    Raises:
        ValueError: the smallest and the largest id, and the size of the vocabulary.
    """
    if type(tokens) is not Tensor or tokens.is_meta:
        return
    low, high = (int(end) for end in tokens.aminmax())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"tokens range from {low} to {high}, but the vocabulary has {config.vocab_size} "
            "entries. Is this the model's tokenizer?"
        )


def check_draft(cache: Cache | None, lengths: Tensor | None) -> None:
    """Refuse `draft=True` without a cache, or with lengths.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    if cache is None or lengths is not None:
        raise ValueError(
            "draft=True reads a draft after a cache: give a cache, and leave out lengths (the "
            "counts of cache.accept say how many tokens of each row are real)."
        )


def check_logits_to_keep(logits_to_keep: Any, tokens: Tensor) -> int:
    """The number of logits as an int.

    Raises:
        TypeError: not an integer.
        ValueError: negative, or larger than the number of tokens.
    """
    if type(logits_to_keep) is not int:
        logits_to_keep = integer("logits_to_keep", logits_to_keep)
    if not logits_to_keep or tokens.ndim != 2 or not tokens.shape[1]:
        return int(logits_to_keep)  # `check_call` refuses tokens of another shape
    if not 0 < logits_to_keep <= tokens.shape[1]:
        raise ValueError(
            f"logits_to_keep={logits_to_keep}: expected 0 (all tokens) to {tokens.shape[1]}, the "
            "tokens of a row."
        )
    return int(logits_to_keep)


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


def check_cache(
    config: NemotronConfig, dtype: torch.dtype, rows: int, device: torch.device, cache: Cache
) -> None:
    """Refuse a cache that cannot take `rows` rows of tokens on `device`.

    Args:
        config, dtype: of the model.

    Raises:
        ValueError: the first thing that is wrong, and what to do.
    """
    if cache.batch != rows:
        raise ValueError(
            f"{rows} rows of tokens, but a cache of {cache.batch}: make one with "
            f"model.empty_cache({rows})."
        )
    cache.refuse_draft()
    known = cache.checked_for
    if known is None or known[0] is not config or known[1] != dtype:
        check_fits(config, dtype, cache)
        if cache.device != device:
            raise ValueError(
                f"the cache is on {cache.device}, but tokens are on {device}: make the "
                "cache with model.empty_cache, or load it with device=."
            )
        cache.checked_for = (config, dtype)


def check_fits(config: NemotronConfig, dtype: torch.dtype, cache: Cache) -> None:
    """Refuse a cache with other layers, sizes or dtypes than those of a model.

    Raises:
        ValueError: the first difference, and what to do.
    """
    what_to_do = "Make one with model.empty_cache(rows), or load the cache that this model saved."
    if len(cache.layers) != config.num_layers:
        raise ValueError(
            f"a cache of {len(cache.layers)} layers, but a model of {config.num_layers}. "
            f"{what_to_do}"
        )
    fitting = Cache.empty(config, 1, device="meta", dtype=dtype, capacity=1, mtp=bool(cache.mtp))
    if (cache.pattern, cache.mtp_pattern) != (fitting.pattern, fitting.mtp_pattern):
        raise ValueError(
            f"a cache for the layers {cache.pattern!r} and {cache.mtp_pattern!r} (MTP), but a "
            f"model of {fitting.pattern!r} and {fitting.mtp_pattern!r}: it belongs to another "
            f"model. {what_to_do}"
        )
    pairs = zip([*cache.layers, *cache.mtp], [*fitting.layers, *fitting.mtp], strict=True)
    for i, (found, expected) in enumerate(pairs):
        name = f"layer {i} ({(cache.pattern + cache.mtp_pattern)[i]!r})"
        sizes = None if found is None else found.sizes
        wanted = None if expected is None else expected.sizes
        if sizes != wanted:
            raise ValueError(
                f"{name} caches sizes {wanted}, but the cache has {sizes} there: it belongs to "
                f"another model. {what_to_do}"
            )
        if found is not None and found.dtype != dtype:
            raise ValueError(
                f"{name} computes in {dtype}, but the cache holds {found.dtype}: was the model "
                f"cast after the cache was made? {what_to_do}"
            )


def check_transcript(config: NemotronConfig, cache: Cache) -> None:
    """Refuse a cache whose transcript a model with this config cannot have left.

    Raises:
        ValueError: vectors or token ids of another model, and what to do.
    """
    left = cache.transcript
    if left is None:
        return
    if left.hidden.shape[1] != config.hidden_size:
        raise ValueError(
            f"the cache's transcript has vectors of {left.hidden.shape[1]} numbers, but the model "
            f"has {config.hidden_size}: it belongs to another model. Load the cache that this "
            "model saved."
        )
    for i, row in enumerate(left.tokens):
        low, high = min(row or [0]), max(row or [0])
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"the cache has read token ids from {low} to {high} in row {i}, but the vocabulary "
                f"has {config.vocab_size} entries: it belongs to another model. Load the cache "
                "that this model saved."
            )
