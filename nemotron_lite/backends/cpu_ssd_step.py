"""One token of the selective scan, for decoding: three passes over the state, written in place.

    S <- exp(dt A) S                 one pass
    S <- S + dt x (outer) B          one pass
    y  = S C + D x                   one pass

A state is large (p x n numbers per head) and is read and written at every token, so the passes over
it are what costs time.

Source: the equations of `ops/scan.py`. Left out: gradients, which cannot flow through a state that
is overwritten.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nemotron_lite.dtypes import cast


def ssd_step(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ops.ssd_step` of inputs whose shapes were checked; `state` is overwritten and returned."""
    batch, heads, width = x.shape
    groups, n = B.shape[1:]
    shared = heads // groups
    narrow, wide = x.dtype, state.dtype
    x, dt, B, C = cast(x, wide), cast(dt, wide), cast(B, wide), cast(C, wide)
    # Splitting an axis is always a view, so this writes through to the caller's state.
    grouped = state.view(batch, groups, shared, width, n)
    fade = torch.exp(dt * A).view(batch, groups, shared, 1, 1)
    write = (x * dt.unsqueeze(-1)).reshape(batch, groups, shared, width, 1)
    grouped.mul_(fade).addcmul_(write, B.reshape(batch, groups, 1, 1, n))
    # The heads of a group share C: one row times one matrix, with the state as the columns.
    rows = state.reshape(batch * groups, shared * width, n)
    y = torch.bmm(C.reshape(batch * groups, 1, n), rows.mT).view(batch, heads, width)
    if D is not None:
        y.addcmul_(x, cast(D, wide).unsqueeze(-1))
    return cast(y, narrow), state
