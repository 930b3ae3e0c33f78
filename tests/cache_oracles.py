"""Two other ways of going back, slower and simpler than `Cache.accept`, to compare it with.

`copies_after_every_token` makes Mamba layers read a draft token by token and copy the state after
each one; `accept` then picks a copy. `snapshot` and `rollback` copy what a Mamba layer overwrites
and put it back, and drop keys and values by their lengths.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nemotron_lite import ops
from nemotron_lite.cache import Cache
from nemotron_lite.layers import ForwardContext, Mamba2, MambaCache
from nemotron_lite.layers.mamba2 import MambaDraft


class CopiedStates(MambaDraft):
    """A draft with the state before it and after each of its tokens: `slots` t+1 b h p n."""

    def __init__(self, window: Tensor, slots: Tensor) -> None:
        self.window, self.slots = window, slots

    @property
    def nbytes(self) -> int:
        return self.window.nbytes + self.slots.nbytes

    def state_after(self, state: Tensor, counts: int | Tensor) -> Tensor:
        if isinstance(counts, int):
            return self.slots[counts].clone()
        return self.slots[counts, torch.arange(len(counts), device=counts.device)]


def _read_token_by_token(
    self: Mamba2, u: Tensor, cache: MambaCache, context: ForwardContext
) -> Tensor:
    z, raw, dt = self.in_proj(u).split_with_sizes(self.splits, dim=-1)
    window = torch.cat([cache.conv, raw], dim=1)
    taps = self.conv1d.weight.squeeze(1)
    x, B, C = self._split_heads(ops.causal_conv1d_window(window, taps, self.conv1d.bias))
    dt, A = self._step_sizes(dt), self._rates()
    slots = cache.ssm.new_empty(u.shape[1] + 1, *cache.ssm.shape)
    slots[0] = cache.ssm
    steps = []
    for i in range(u.shape[1]):
        slots[i + 1].copy_(slots[i])
        y, _ = ops.ssd_step(
            slots[i + 1], x[:, i], dt[:, i], A, B[:, i], C[:, i], D=self.D, seed=cache.next_seed()
        )
        steps.append(y)
    cache.draft = CopiedStates(window, slots)
    return self.out_proj(self.norm(torch.stack(steps, dim=1).flatten(2), z))


@contextmanager
def copies_after_every_token() -> Iterator[None]:
    """Drafts are read token by token, with a copy of every state."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Mamba2, "_read_draft", _read_token_by_token)
        yield


# How a draft is read: as the package does it, and by the oracle.
WAYS = {"replay": nullcontext, "snapshots": copies_after_every_token}


class Snapshot(NamedTuple):
    """A point that `rollback` returns to."""

    lengths: list[int]
    mtp_lengths: list[int]
    mamba: list[MambaCache | None]

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.mamba if layer)


def snapshot(cache: Cache) -> Snapshot:
    """Copy conv and SSM, note the lengths."""
    copies = [m.clone() if isinstance(m, MambaCache) else None for m in cache.layers]
    return Snapshot(cache.lengths.tolist(), cache.mtp_lengths.tolist(), copies)


def rollback(cache: Cache, taken: Snapshot) -> None:
    """Return to a snapshot; keys and values behind it are overwritten later."""
    for place, copy in enumerate(taken.mamba):
        if copy is not None:
            cache.layers[place] = copy.clone()
    cache.draft_length = 0
    cache._lengths = list(taken.lengths)
    cache._mtp_lengths = list(taken.mtp_lengths)
