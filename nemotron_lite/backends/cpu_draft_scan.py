"""The scan of a draft in few passes over the state; accepting tokens updates the state in place.

A state is large (p x n numbers per head), and a draft is short. So everything about a draft is
computed in small matrices first; then the state is read once by a batched product, or multiplied
once and added to once where it lies.

The exponents are sums of dt A over intervals of tokens. As differences of running sums they would
lose digits. Here each interval is summed by itself, all of them in one product with a table of
zeros and ones, so the arithmetic can stay in the state's dtype.

Source: the equations of `ops/draft_scan.py`. Left out: gradients, which cannot flow through a state
that is overwritten.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron_lite.backends.constants import kept_constant
from nemotron_lite.dtypes import cast

Decays = tuple[Float[Tensor, "b h t"], Float[Tensor, "b h t t1"]]


def ssd_read_draft(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    decays: Decays | None,
) -> Tensor:
    """`ops.ssd_read_draft` of inputs whose shapes were checked."""
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    wide = state.dtype
    B, C = (cast(v, wide).transpose(1, 2).reshape(b * g, t, n) for v in (B, C))
    heads = cast(x, wide).permute(0, 2, 3, 1)  # b h p t
    dt, decay = decays or draft_decays(dt, A, wide)
    mix = decay[..., 1:] * dt.unsqueeze(2)
    mix.view(b * g, h // g, t, t).mul_(torch.bmm(C, B.mT).unsqueeze(1))
    # From the state: its rows are h*p/g vectors of n, read by the group's C.
    y = torch.bmm(state.reshape(b * g, h // g * p, n), C.mT).view(b, h, p, t)
    y.mul_(decay[..., 0].unsqueeze(2))
    y.view(b * h, p, t).baddbmm_(heads.reshape(b * h, p, t), mix.view(b * h, t, t).mT)
    if D is not None:
        y.addcmul_(heads, cast(D, wide)[:, None, None])
    return cast(y, x.dtype).permute(0, 3, 1, 2)


def ssd_accept_draft(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    counts: int | Tensor,
    decays: Decays | None,
) -> Tensor:
    """`ops.ssd_accept_draft` of checked inputs; `state` is overwritten and returned."""
    (b, _, h, p), (g, n) = x.shape, B.shape[2:]
    wide = state.dtype
    longest = counts if isinstance(counts, int) else max(counts.tolist(), default=0)
    if longest == 0:
        return state
    x, B = x[:, :longest], B[:, :longest]
    dt, decay = decays or draft_decays(dt, A, wide)
    dt, decay = dt[..., :longest], decay[:, :, :longest, : longest + 1]
    if isinstance(counts, int):
        end = decay[:, :, -1]  # b h 1+t: what is left at the last accepted token
    else:
        ends = counts.to(x.device)
        end = decay[torch.arange(b, device=x.device), :, (ends - 1).clamp(min=0)]
        untouched = torch.zeros_like(end[0])
        untouched[:, 0] = 1
        end = torch.where((ends > 0)[:, None, None], end, untouched)
    write = (end[..., 1:] * dt).unsqueeze(2)
    heads = cast(x, wide).permute(0, 2, 3, 1) * write  # b h p t
    state.mul_(end[..., 0].reshape(b, h, 1, 1))
    rows = state.view(b * g, h // g * p, n)
    directions = cast(B, wide).transpose(1, 2).reshape(b * g, longest, n)
    rows.baddbmm_(heads.reshape(b * g, h // g * p, longest), directions)
    return state


def draft_decays(dt: Float[Tensor, "b t h"], A: Float[Tensor, "h"], wide: torch.dtype) -> Decays:
    """`ops.draft_decays`."""
    dt = cast(dt, wide).transpose(1, 2)
    b, h, t = dt.shape
    table, mask = _intervals(t, wide, dt.device)
    exponents = torch.addmm(mask, (dt * cast(A, wide)[:, None]).reshape(-1, t), table)
    return dt, exponents.exp_().view(b, h, t, t + 1)


@kept_constant
def _intervals(t: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which dt A add up to the exponent of (l, 1+r), and minus infinity where r comes after l."""
    place = torch.arange(t, device=device)
    after = place[:, None, None] >= torch.arange(t + 1, device=device)  # i, 1, 1+r: i > r
    table = after & (place[:, None, None] <= place[:, None])  # i, l, 1+r
    later = torch.arange(-1, t, device=device) > place[:, None]
    mask = torch.zeros(t, t + 1, dtype=dtype, device=device).masked_fill_(later, -math.inf)
    return table.to(dtype).reshape(t, -1), mask.reshape(-1)
