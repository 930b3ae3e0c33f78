"""Routed experts: each token is read by its k experts and their answers are added, weighted.

    o = sum_{i in I} p_i * W2_i relu(W1_i z)^2

`relu(x)^2` (squared ReLU) needs two matrices per expert, not the three of a gated MLP. z is the
latent of width l in a LatentMoE, or the token itself in a plain mixture.

The definition visits tokens one by one. The fast form sorts the (token, slot) pairs by expert, so
that each expert multiplies one contiguous block of rows, and puts the answers back in token order.
For a handful of tokens (decoding) the calls are the larger cost: then the matrices of every pair
are copied side by side and multiply as one batch, on all cores. That is two to three times faster
than a product per pair, up to where the copies fall out of the caches.

BF16 products on a CPU are compiled by oneDNN for each new number of rows, and one product of a
small expert takes less time than its call. So there each expert's rows are filled up to a multiple
of 16, and small experts of like load multiply together, as one batch.

Training stores the sorted inputs' positions and the hidden rows before the activation; inputs are
gathered again in the backward pass.

Source: reference sheet 4.1. Left out: capacity limits and expert parallelism (a later chapter).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_lite.backends.dispatch import cast, choose, kernel

_KERNEL = kernel("experts", "expert_mlp")
COPIED = 3_000_000  # numbers in the matrices of all pairs up to which copying them beats sorting
RUN_ROWS = 128  # rows of hidden units to activate in one call
FILL = 16  # BF16: rows of an expert are filled up to a multiple
TOGETHER = 8  # BF16: experts that multiply together at most; more would be filled up too much
TOGETHER_WEIGHTS = 2**19  # and the weights in their matrices, which are copied side by side


def squared_relu(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """relu(x)^2, the activation of every feed-forward layer in the family."""
    positive = torch.relu(x)
    return positive.square() if positive.requires_grad else positive.mul_(positive)


def expert_mlp(
    z: Float[Tensor, "t l"],
    up: Float[Tensor, "e f l"],
    down: Float[Tensor, "e l f"],
    weights: Float[Tensor, "t k"],
    indices: Int[Tensor, "t k"],
    *,
    impl: str = "auto",
) -> Float[Tensor, "t l"]:
    """The weighted sum of each token's chosen experts.

    Args:
        z: what the experts read.
        up, down: the experts' matrices W1 and W2.
        weights, indices: from `route`.
        impl: "naive" (token by token), "torch" (sorted by expert) or "triton".

    Raises:
        ValueError: unknown `impl`.
    """
    run = choose("expert_mlp", impl, z, naive=_naive, torch=_fast, triton=_KERNEL)
    return run(z, up, down, weights, indices)


def _naive(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    rows = []
    for token, token_weights, chosen in zip(z, weights, indices, strict=True):
        answers = [
            weight.to(z.dtype) * (down[e] @ squared_relu(up[e] @ token))
            for weight, e in zip(token_weights, chosen.tolist(), strict=True)
        ]
        rows.append(torch.stack(answers).sum(0))
    return torch.stack(rows)


def _fast(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    up, down, weights = (cast(part, z.dtype) for part in (up, down, weights))
    if torch.is_grad_enabled():
        return _SortedExperts.apply(z, up, down, weights, indices)
    pairs = indices.numel()
    crowded = pairs >= FILL * up.shape[0]  # rows enough for products of each expert's own
    if not crowded and pairs * up[0].numel() <= COPIED:
        return _pair_by_pair(z, up, down, weights, indices)
    if crowded and z.is_cpu and z.dtype == torch.bfloat16:
        return _in_batches(z, up, down, weights, indices)
    return _sorted_forward(z, up, down, weights, indices)[0]


def _pair_by_pair(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    (tokens, k), chosen = indices.shape, indices.flatten()
    rows = z.unsqueeze(1).expand(-1, k, -1).reshape(tokens * k, 1, -1)
    # A row times a matrix, not a matrix times a column: MKL's batches are twice as fast so.
    hidden = torch.bmm(rows, up.index_select(0, chosen).mT).relu_()
    hidden.mul_(hidden).mul_(weights.reshape(-1, 1, 1))
    return torch.bmm(hidden, down.index_select(0, chosen).mT).view(tokens, k, -1).sum(1)


class _Order:
    """(token, slot) pairs sorted by expert: who is where, and which rows belong to whom."""

    def __init__(self, indices: Int[Tensor, "t k"], experts: int) -> None:
        flat = indices.flatten()
        self.pairs = flat.argsort(stable=True)  # sorted position -> pair
        self.tokens = self.pairs // indices.shape[1]
        self.places = torch.empty_like(self.pairs)  # pair -> sorted position
        self.places[self.pairs] = torch.arange(flat.numel(), device=flat.device)
        counts = torch.bincount(flat, minlength=experts).tolist()
        self.blocks = []
        start = 0
        for expert, count in enumerate(counts):
            if count:
                self.blocks.append((expert, start, start + count))
                start += count

    def runs(self) -> Iterator[list[tuple[int, int, int]]]:
        """Neighbouring blocks that are activated together: few calls, and rows still in cache."""
        run: list[tuple[int, int, int]] = []
        for block in self.blocks:
            run.append(block)
            if block[2] - run[0][1] >= RUN_ROWS:
                yield run
                run = []
        if run:
            yield run


def _combine(answers: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Sum each token's k answers, read from their sorted places, with the router's weights."""
    return torch.nn.functional.embedding_bag(
        places.view_as(weights), answers, mode="sum", per_sample_weights=weights
    )


def _sorted_forward(
    z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor, keep: bool = False
) -> tuple[Tensor, _Order, Tensor | None]:
    order = _Order(indices, up.shape[0])
    rows = z[order.tokens]
    answers = torch.empty_like(rows)
    hidden = rows.new_empty(rows.shape[0], up.shape[1])
    up, down = up.mT, down.mT
    for run in order.runs():
        first, last = run[0][1], run[-1][2]
        for e, start, stop in run:
            torch.mm(rows[start:stop], up[e], out=hidden[start:stop])
        positive = hidden[first:last]
        positive = torch.relu(positive) if keep else positive.relu_()
        positive.mul_(positive)
        for e, start, stop in run:
            torch.mm(positive[start - first : stop - first], down[e], out=answers[start:stop])
    return _combine(answers, order.places, weights), order, hidden if keep else None


def _in_batches(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Experts sorted by load, a few at a time, each with as many rows as the busiest of them.

    Rows that fill up repeat the first token, and nobody reads their answers.
    """
    flat = indices.flatten()
    counts = torch.bincount(flat, minlength=up.shape[0])
    loads, by_load = counts.sort(descending=True)
    busy = [load for load in loads.tolist() if load]
    together = max(1, min(TOGETHER, TOGETHER_WEIGHTS // up[0].numel()))
    batches, starts, total = [], [], 0
    for first in range(0, len(busy), together):
        chosen = by_load[first : first + min(together, len(busy) - first)]
        rows = -(-busy[first] // FILL) * FILL
        batches.append((chosen, total, rows))
        starts += [total + i * rows for i in range(len(chosen))]
        total += len(chosen) * rows

    offset = counts - counts.cumsum(0)  # minus the pairs of the experts before, by number
    offset[by_load[: len(starts)]] += torch.tensor(starts)
    pairs = flat.argsort(stable=True)
    places = torch.empty_like(flat)  # pair -> row
    places[pairs] = offset[flat[pairs]] + torch.arange(flat.numel())
    tokens = flat.new_zeros(total)
    tokens[places] = torch.arange(flat.numel()) // indices.shape[1]

    rows_in = z[tokens]
    answers = torch.empty_like(rows_in)
    for chosen, start, rows in batches:
        # A single expert is a view; the matrices of several are copied side by side.
        which = chosen if len(chosen) > 1 else slice(e := int(chosen), e + 1)
        part = slice(start, start + len(chosen) * rows)
        hidden = torch.bmm(rows_in[part].view(len(chosen), rows, -1), up[which].mT).relu_()
        torch.bmm(
            hidden.mul_(hidden), down[which].mT, out=answers[part].view(len(chosen), rows, -1)
        )
    return _combine(answers, places, weights)


class _SortedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, up, down, weights, indices):  # type: ignore[no-untyped-def]
        out, ctx.order, hidden = _sorted_forward(z, up, down, weights, indices, keep=True)
        ctx.save_for_backward(z, up, down, weights, hidden)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        z, up, down, weights, hidden = ctx.saved_tensors
        order: _Order = ctx.order
        pair_weights = weights.flatten()[order.pairs].unsqueeze(-1)
        rows, grad_rows = z[order.tokens], grad[order.tokens]
        grad_up, grad_down = torch.zeros_like(up), torch.zeros_like(down)
        grad_inputs = torch.empty_like(rows)
        grad_pairs = rows.new_empty(rows.shape[0])
        for e, start, stop in order.blocks:
            positive = hidden[start:stop].clamp(min=0)
            active = positive.square()
            grad_answer = grad_rows[start:stop]
            # <grad, W2 a> = <W2^T grad, a>: one product serves the weights' and the rows' gradient
            grad_active = torch.mm(grad_answer, down[e])
            torch.linalg.vecdot(grad_active, active, out=grad_pairs[start:stop])
            scale = pair_weights[start:stop]
            torch.mm(grad_answer.t(), active.mul_(scale), out=grad_down[e])
            grad_hidden = grad_active.mul_(positive).mul_(scale * 2)
            torch.mm(grad_hidden.t(), rows[start:stop], out=grad_up[e])
            torch.mm(grad_hidden, up[e], out=grad_inputs[start:stop])
        grad_z = _combine(grad_inputs, order.places, torch.ones_like(weights))
        return grad_z, grad_up, grad_down, grad_pairs[order.places].view_as(weights), None
