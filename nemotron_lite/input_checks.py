"""What a call of the model must look like, checked before any layer sees it.

`model(tokens, cache, lengths=..., seq_idx=...)` has arguments that fit together or do not: rows
that a cache has no memory for, lengths beyond the row, a cache of another model. Found late, such a
mistake is a message about a tensor deep inside a layer, or silence and a wrong number. Each check
here names the value, what would fit, and where it is not obvious the way out.

All of this happens at every decoded token, so it looks at shapes and counts, not at numbers on a
device; a cache is compared with the model once, at its first call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_lite.cache import HOLDS, Cache
from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers import KVCache, MambaCache


def check_call(
    config: NemotronConfig,
    dtype: torch.dtype,
    tokens: Tensor,
    cache: Cache | None,
    lengths: Tensor | None,
    seq_idx: Tensor | None,
    mtp_depths: int,
) -> None:
    """Refuse arguments of `Nemotron.forward` that do not fit together, or not the model.

    Args:
        config, dtype: of the model.

    Raises:
        ValueError: the first thing that is wrong.
    """
    shape = list(tokens.shape)
    if len(shape) != 2 or shape[1] == 0:
        raise ValueError(f"tokens must be rows x time, not empty; got {shape}.")
    if tokens.is_floating_point() or tokens.is_complex():
        raise ValueError(f"tokens are ids, whole numbers; got {tokens.dtype}.")
    if lengths is not None and list(lengths.shape) != shape[:1]:
        raise ValueError(f"lengths has shape {list(lengths.shape)}; {shape[0]} rows need as many.")
    if lengths is not None and not bool(((lengths >= 0) & (lengths <= shape[1])).all()):
        raise ValueError(f"lengths {lengths.tolist()} must be 0 to {shape[1]}.")
    if seq_idx is not None and list(seq_idx.shape) != shape:
        raise ValueError(f"seq_idx has shape {list(seq_idx.shape)}, but tokens {shape}.")
    _check_depths(config, shape[1], mtp_depths)
    if cache is not None:
        _check_state(config, dtype, shape[0], cache)
        if seq_idx is not None:
            raise ValueError("packed rows (seq_idx) cannot continue a cache; drop one of the two.")
        if mtp_depths:
            raise ValueError("mtp_depths needs the whole text at once; call without a cache.")


def check_hold(hold: str | None, cache: Cache | None, lengths: Tensor | None) -> None:
    """Refuse a `hold` that names no way of holding a draft, or that has no cache to hold it.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    if hold is None:
        return
    if hold not in HOLDS:
        raise ValueError(f"hold={hold!r}: expected one of {HOLDS}, or None.")
    if cache is None or lengths is not None:
        raise ValueError(
            "hold reads a draft behind a cache: give a cache, and leave lengths away (the counts "
            "of cache.keep say how many tokens of each row are real)."
        )


def _check_depths(config: NemotronConfig, tokens: int, depths: int) -> None:
    if not depths:
        return
    if depths < 0:
        raise ValueError(f"mtp_depths={depths} must be 0 or more.")
    if not config.mtp_pattern:
        raise ValueError(f"mtp_depths={depths}, but this model has no MTP module.")
    if depths >= tokens:
        raise ValueError(f"mtp_depths={depths} needs more than {tokens} tokens.")


def _check_state(config: NemotronConfig, dtype: torch.dtype, rows: int, cache: Cache) -> None:
    if cache.batch != rows:
        raise ValueError(f"{rows} rows of tokens, but a cache of {cache.batch}.")
    if cache.held:
        raise ValueError(
            f"the cache holds a draft of {cache.held} tokens: call cache.keep(counts) first."
        )
    known = cache.fits
    if known is None or known[0] is not config or known[1] != dtype:
        _check_memories(config, dtype, cache)
        cache.fits = (config, dtype)


def _check_memories(config: NemotronConfig, dtype: torch.dtype, cache: Cache) -> None:
    """A cache of other layers, sizes or numbers than the model's."""
    way_out = "Make one with model.empty_cache(rows), or load the cache that this model saved."
    if len(cache.layers) != config.num_layers:
        raise ValueError(
            f"a cache of {len(cache.layers)} layers, but a model of {config.num_layers}. {way_out}"
        )
    ssm = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
    sizes = {
        "M": (config.conv_kernel - 1, config.conv_dim, *ssm),
        "*": (config.num_key_value_heads, config.head_dim),
    }
    for i, (kind, memory) in enumerate(zip(config.pattern, cache.layers, strict=True)):
        found: tuple[int, ...] | None = None
        held = dtype
        if isinstance(memory, MambaCache):
            found, held = (*memory.conv.shape[1:], *memory.ssm.shape[1:]), memory.conv.dtype
        elif isinstance(memory, KVCache):
            found, held = (memory.k.shape[1], memory.k.shape[3]), memory.k.dtype
        if found != sizes.get(kind):
            raise ValueError(
                f"layer {i} ({kind!r}) remembers sizes {sizes.get(kind)}, but the cache has {found}"
                f" there: it is of another model. {way_out}"
            )
        if held != dtype:
            raise ValueError(
                f"layer {i} computes in {dtype}, but the cache holds {held}: was the model cast "
                f"after it? {way_out}"
            )
