"""What a call of the model must look like, checked before any layer sees it.

`model(tokens, state, lengths=..., seq_idx=...)` has arguments that fit together or do not: rows
that a state has no memory for, lengths beyond the row, a state of another model. Found late, such a
mistake is a message about a tensor deep inside a layer, or silence and a wrong number. Each check
here names the value, what would fit, and where it is not obvious the way out.

All of this happens at every decoded token, so it looks at shapes and counts, not at numbers on a
device; a state is compared with the model once, at its first call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers import KVCache, MambaMemory
from nemotron_lite.state import HOLDS, State


def check_call(
    config: NemotronConfig,
    dtype: torch.dtype,
    tokens: Tensor,
    state: State | None,
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
    if state is not None:
        _check_state(config, dtype, shape[0], state)
        if seq_idx is not None:
            raise ValueError("packed rows (seq_idx) cannot continue a state; drop one of the two.")
        if mtp_depths:
            raise ValueError("mtp_depths needs the whole text at once; call without a state.")


def check_hold(hold: str | None, state: State | None, lengths: Tensor | None) -> None:
    """Refuse a `hold` that names no way of holding a draft, or that has no state to hold it.

    Raises:
        ValueError: what is wrong, and what to do.
    """
    if hold is None:
        return
    if hold not in HOLDS:
        raise ValueError(f"hold={hold!r}: expected one of {HOLDS}, or None.")
    if state is None or lengths is not None:
        raise ValueError(
            "hold reads a draft behind a state: give a state, and leave lengths away (the counts "
            "of state.keep say how many tokens of each row are real)."
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


def _check_state(config: NemotronConfig, dtype: torch.dtype, rows: int, state: State) -> None:
    if state.batch != rows:
        raise ValueError(f"{rows} rows of tokens, but a state of {state.batch}.")
    if state.held:
        raise ValueError(
            f"the state holds a draft of {state.held} tokens: call state.keep(counts) first."
        )
    known = state.fits
    if known is None or known[0] is not config or known[1] != dtype:
        _check_memories(config, dtype, state)
        state.fits = (config, dtype)


def _check_memories(config: NemotronConfig, dtype: torch.dtype, state: State) -> None:
    """A state of other layers, sizes or numbers than the model's."""
    way_out = "Make one with model.empty_state(rows), or load the state that this model saved."
    if len(state.layers) != config.num_layers:
        raise ValueError(
            f"a state of {len(state.layers)} layers, but a model of {config.num_layers}. {way_out}"
        )
    ssm = (config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
    sizes = {
        "M": (config.conv_kernel - 1, config.conv_dim, *ssm),
        "*": (config.num_key_value_heads, config.head_dim),
    }
    for i, (kind, memory) in enumerate(zip(config.pattern, state.layers, strict=True)):
        found: tuple[int, ...] | None = None
        held = dtype
        if isinstance(memory, MambaMemory):
            found, held = (*memory.conv.shape[1:], *memory.ssm.shape[1:]), memory.conv.dtype
        elif isinstance(memory, KVCache):
            found, held = (memory.k.shape[1], memory.k.shape[3]), memory.k.dtype
        if found != sizes.get(kind):
            raise ValueError(
                f"layer {i} ({kind!r}) remembers sizes {sizes.get(kind)}, but the state has {found}"
                f" there: it is of another model. {way_out}"
            )
        if held != dtype:
            raise ValueError(
                f"layer {i} computes in {dtype}, but the state holds {held}: was the model cast "
                f"after it? {way_out}"
            )
