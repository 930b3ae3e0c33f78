"""The scan of a draft: read its tokens without changing the state, then accept a part of them.

In speculative decoding a draft of t tokens is read before it is known how many of them will be
accepted. With s the running sum of dt A inside the draft,

    read      y_l  = exp(s_l) S C_l + sum_{r <= l} (C_l . B_r) exp(s_l - s_r) dt_r x_r + D x_l
    accept    S'   = exp(s_c) S + sum_{r <= c} exp(s_c - s_r) dt_r x_r (outer) B_r

`ssd_read_draft` is one chunk of the dual form (ssd.py) and writes no state. `ssd_accept_draft`
updates the state with the first c tokens, where each row has its own c. It needs x, dt and B of
these tokens: some hundred numbers per head instead of the p x n of a state. Together they read the
state twice and write it once, as much as a single step of decoding does, whatever t is.

The exponents are sums of dt A over intervals of tokens. As differences of running sums they would
lose digits. Here each interval is summed by itself, all of them in one product with a table of
zeros and ones, so the arithmetic can stay in the state's dtype.

Source: the replay of TensorRT-LLM's MTP (reference sheet 5.5, solution b). Left out: gradients,
concatenated documents, drafts long enough to need several chunks.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.backends.dispatch import choose
from nemotron_lite.dtypes import cast
from nemotron_lite.ops.scan import check_shapes, selective_scan

Decays = tuple[Float[Tensor, "b h t"], Float[Tensor, "b h t t1"]]


def ssd_read_draft(
    state: Float[Tensor, "b h p n"],
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b t g n"],
    C: Float[Tensor, "b t g n"],
    *,
    D: Float[Tensor, "h"] | None = None,
    decays: Decays | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b t h p"]:
    """What `ssd` would return for t tokens after `state`; the state stays as it is.

    Args:
        state: float32, or float64 with it; the arithmetic is in its dtype.
        x, dt, A, B, C, D: as in `ssd`. Memory and work grow with t squared: for short t.
        decays: from `draft_decays`, if the caller has them; "naive" does not use them.
        impl: "naive" (`selective_scan`) or "torch".

    Returns:
        y in the dtype of x.

    Raises:
        ValueError: unknown `impl`, or shapes that do not fit each other.
    """
    if (
        not _fits(state, x, dt, A, B)
        or C.shape != B.shape
        or (D is not None and D.shape != A.shape)
    ):
        check_shapes(x, dt, A, B, C, D, state, None)
    run = choose("ssd_read_draft", impl, x, naive=_naive_read, torch=_torch_read)
    return run(state, x, dt, A, B, C, D, decays)


def ssd_accept_draft(
    state: Float[Tensor, "b h p n"],
    x: Float[Tensor, "b t h p"],
    dt: Float[Tensor, "b t h"],
    A: Float[Tensor, "h"],
    B: Float[Tensor, "b t g n"],
    counts: int | Int[Tensor, "b"],
    *,
    decays: Decays | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h p n"]:
    """The state after the first `counts` of t tokens, for all rows or row by row.

    Args:
        state: before the first token. "torch" overwrites it and returns it; "naive" returns a
            new one.
        x, dt, A, B: as given to `ssd_read_draft`.
        counts: 0 to t; 0 leaves a row's state as it was.
        decays: as for `ssd_read_draft`, of all t tokens.
        impl: "naive" (`selective_scan`, row by row) or "torch".

    Raises:
        ValueError: unknown `impl`, counts outside 0 to t, or shapes that do not fit each other.
    """
    if not _fits(state, x, dt, A, B):
        check_shapes(x, dt, A, B, B, None, state, None)
    low, high = (counts, counts) if isinstance(counts, int) else _range(counts)
    if low < 0 or high > x.shape[1]:
        raise ValueError(
            f"ssd_accept_draft: counts from {low} to {high}: expected 0 to {x.shape[1]}, the "
            "number of tokens of the draft."
        )
    return choose("ssd_accept_draft", impl, x, naive=_naive_accept, torch=_torch_accept)(
        state, x, dt, A, B, counts, decays
    )


def _fits(state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor) -> bool:
    """Whether the shapes fit; where they do not, `check_shapes` says what is wrong."""
    if x.ndim != 4 or B.ndim != 4:
        return False
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    shapes = (state.shape, dt.shape, A.shape, B.shape[:2], h % g)
    return shapes == ((b, h, p, n), (b, t, h), (h,), (b, t), 0)


def _range(counts: Tensor) -> tuple[int, int]:
    values = counts.tolist()
    return min(values), max(values)


def _naive_read(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    decays: Decays | None,
) -> Tensor:  # fmt: skip
    return selective_scan(x, dt, A, B, C, D=D, initial_state=state)[0]


def _naive_accept(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, counts: int | Tensor,
    decays: Decays | None,
) -> Tensor:  # fmt: skip
    each = [counts] * len(x) if isinstance(counts, int) else counts.tolist()
    rows = []
    for row, count in enumerate(each):
        one = slice(row, row + 1)
        kept = [part[one, :count] for part in (x, dt, B)]
        if count:
            _, new = selective_scan(kept[0], kept[1], A, kept[2], kept[2], initial_state=state[one])
        else:
            new = state[one].clone()
        rows.append(new.to(state.dtype))
    return torch.cat(rows)


def _torch_read(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    decays: Decays | None,
) -> Tensor:  # fmt: skip
    b, t, h, p = x.shape
    g, n = B.shape[2:]
    wide = state.dtype
    B, C = (cast(v, wide).transpose(1, 2).reshape(b * g, t, n) for v in (B, C))
    heads = cast(x, wide).permute(0, 2, 3, 1)  # b h p t
    dt, decay = decays or draft_decays(dt, A, wide)
    mix = decay[..., 1:] * dt.unsqueeze(2)
    mix.view(b * g, h // g, t, t).mul_(torch.bmm(C, B.mT).unsqueeze(1))
    # From the state: its rows are h*p/g vectors of n, read by the group's C.
    y = torch.bmm(state.reshape(b * g, -1, n), C.mT).view(b, h, p, t)
    y.mul_(decay[..., 0].unsqueeze(2))
    y.view(b * h, p, t).baddbmm_(heads.reshape(b * h, p, t), mix.view(b * h, t, t).mT)
    if D is not None:
        y.addcmul_(heads, cast(D, wide)[:, None, None])
    return cast(y, x.dtype).permute(0, 3, 1, 2)


def _torch_accept(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, counts: int | Tensor,
    decays: Decays | None,
) -> Tensor:  # fmt: skip
    b, h, g, n = x.shape[0], x.shape[2], B.shape[2], B.shape[3]
    wide = state.dtype
    longest = counts if isinstance(counts, int) else int(counts.max())
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
    rows = state.view(b * g, -1, n)
    directions = cast(B, wide).transpose(1, 2).reshape(b * g, -1, n)
    rows.baddbmm_(heads.reshape(b * g, -1, longest), directions)
    return state


def draft_decays(dt: Float[Tensor, "b t h"], A: Float[Tensor, "h"], wide: torch.dtype) -> Decays:
    """How much a draft's tokens see of each other, for `ssd_read_draft` and `ssd_accept_draft`.

    Returns:
        dt as `b h t`, and the decays as `b h t 1+t`: what is left at token l of the state before
        the draft (first column) and of each token r; zero where r comes after l. Both are in dtype
        `wide`, which is that of the state.
    """
    dt = cast(dt, wide).transpose(1, 2)
    b, h, t = dt.shape
    table, mask = _intervals(t, wide, dt.device)
    exponents = torch.addmm(mask, (dt * cast(A, wide)[:, None]).reshape(-1, t), table)
    return dt, exponents.exp_().view(b, h, t, t + 1)


@lru_cache(maxsize=64)
def _intervals(t: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which dt A add up to the exponent of (l, 1+r), and minus infinity where r comes after l."""
    with torch.inference_mode(False):
        place = torch.arange(t, device=device)
        after = place[:, None, None] >= torch.arange(t + 1, device=device)  # i, 1, 1+r: i > r
        table = after & (place[:, None, None] <= place[:, None])  # i, l, 1+r
        later = torch.arange(-1, t, device=device) > place[:, None]
        mask = torch.zeros(t, t + 1, dtype=dtype, device=device).masked_fill_(later, -math.inf)
        return table.to(dtype).reshape(t, -1), mask.reshape(-1)
