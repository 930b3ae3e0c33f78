"""The scan of a draft: read its tokens without changing the state, then accept a part of them.

In speculative decoding a draft of t tokens is read before it is known how many of them will be
accepted. With s the running sum of dt A inside the draft,

    read      y_l  = exp(s_l) S C_l + sum_{r <= l} (C_l . B_r) exp(s_l - s_r) dt_r x_r + D x_l
    accept    S'   = exp(s_c) S + sum_{r <= c} exp(s_c - s_r) dt_r x_r (outer) B_r

`ssd_read_draft` is one chunk of the dual form (ssd.py) and writes no state. `ssd_accept_draft`
updates the state with the first c tokens, where each row has its own c. It needs x, dt and B of
these tokens: some hundred numbers per head instead of the p x n of a state. Together they read the
state twice and write it once, as much as a single step of decoding does, whatever t is.

The definition runs the recurrence. The plain form writes the two equations as `einsum`, with the
exponents in float64: as differences of running sums they would lose digits in float32. The form
that decoding uses, with few passes over the state, is `backends/cpu_draft_scan.py`.

Source: the replay of TensorRT-LLM's MTP (reference sheet 5.5, solution b). Left out: gradients,
concatenated documents, drafts long enough to need several chunks.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.backends import cpu_draft_scan
from nemotron_lite.backends.cpu_draft_scan import Decays
from nemotron_lite.backends.dispatch import choose
from nemotron_lite.dtypes import without_autocast
from nemotron_lite.ops.scan import check_shapes, selective_scan


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
        decays: from `draft_decays`, if the caller has them; only "cpu" uses them.
        impl: "naive" (`selective_scan`), "torch" (the equation written out) or "cpu".

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
    run = choose(
        "ssd_read_draft",
        impl,
        x,
        naive=_naive_read,
        torch=_torch_read,
        cpu=cpu_draft_scan.ssd_read_draft,
    )
    return without_autocast(run, x)(state, x, dt, A, B, C, D, decays)


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
        state: before the first token. "cpu" overwrites it and returns it; "naive" and "torch"
            leave it alone and return a new one.
        x, dt, A, B: as given to `ssd_read_draft`.
        counts: 0 to t; 0 leaves a row's state as it was.
        decays: as for `ssd_read_draft`, of all t tokens.
        impl: "naive" (`selective_scan`, row by row), "torch" (the equation written out) or "cpu".

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
    run = choose(
        "ssd_accept_draft",
        impl,
        x,
        naive=_naive_accept,
        torch=_torch_accept,
        cpu=cpu_draft_scan.ssd_accept_draft,
    )
    return without_autocast(run, x)(state, x, dt, A, B, counts, decays)


def draft_decays(dt: Float[Tensor, "b t h"], A: Float[Tensor, "h"], wide: torch.dtype) -> Decays:
    """How much a draft's tokens see of each other, for `ssd_read_draft` and `ssd_accept_draft`.

    Returns:
        dt as `b h t`, and the decays as `b h t 1+t`: what is left at token l of the state before
        the draft (first column) and of each token r; zero where r comes after l. Both are in dtype
        `wide`, which is that of the state.
    """
    return without_autocast(cpu_draft_scan.draft_decays, dt)(dt, A, wide)


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
    return min(values, default=0), max(values, default=0)


def _naive_read(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    decays: Decays | None,
) -> Tensor:
    return selective_scan(x, dt, A, B, C, D=D, initial_state=state)[0]


def _naive_accept(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    counts: int | Tensor,
    decays: Decays | None,
) -> Tensor:
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
    return torch.cat(rows) if rows else state.clone()


def _torch_read(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    decays: Decays | None,
) -> Tensor:
    wide, shared = state.dtype, x.shape[2] // B.shape[2]
    inputs, keys, queries = x.to(wide), *(v.repeat_interleave(shared, 2).to(wide) for v in (B, C))
    s = (dt.double() * A.double()).cumsum(1)  # b t h
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    exponents = s.unsqueeze(2) - s.unsqueeze(1)  # b l r h
    L = exponents.masked_fill(later.unsqueeze(-1), -math.inf).exp().to(wide)
    scores = torch.einsum("blhn,brhn->blrh", queries, keys)
    y = torch.einsum("blrh,brh,brhp->blhp", scores * L, dt.to(wide), inputs)
    y = y + torch.einsum("blh,bhpn,blhn->blhp", s.exp().to(wide), state, queries)
    return (y if D is None else y + D.to(wide).unsqueeze(-1) * inputs).to(x.dtype)


def _torch_accept(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    counts: int | Tensor,
    decays: Decays | None,
) -> Tensor:
    wide, shared = state.dtype, x.shape[2] // B.shape[2]
    inputs, keys = x.to(wide), B.repeat_interleave(shared, 2).to(wide)
    ends = torch.as_tensor(counts, device=x.device).reshape(-1, 1, 1)
    place = torch.arange(x.shape[1], device=x.device).unsqueeze(-1)
    dt = dt * (place < ends)  # a step of 0 leaves the state as it is
    s = (dt.double() * A.double()).cumsum(1)  # b t h
    total = (dt.double() * A.double()).sum(1, keepdim=True)
    writes = (total - s).exp().to(wide) * dt.to(wide)
    kept = torch.einsum("bh,bhpn->bhpn", total[:, 0].exp().to(wide), state)
    return kept + torch.einsum("bth,bthp,bthn->bhpn", writes, inputs, keys)
