"""Routed experts in the order that is fastest for the number of tokens.

    training                  (token, slot) pairs sorted by expert; gradient written by hand
    few pairs (decoding)      the matrices of every pair copied side by side, one batched product
    many rows in BF16, CPU    experts of similar load padded to the same length, in batches
    everything else           sorted by expert, one product per expert

Sorted by expert, each expert multiplies one contiguous block of rows, and the answers are read back
in token order. For a handful of tokens the calls cost more than the arithmetic: one batched product
is two to three times faster than a product per pair, as long as the copied matrices fit into the
CPU's caches.

BF16 products on a CPU are compiled by oneDNN for each new number of rows, and the product of a
small expert takes less time than its call. So each expert's rows are padded to a multiple of 16,
and small experts of similar load multiply together, as one batch.

Training stores the positions of the sorted inputs and the hidden rows before the activation. The
inputs are gathered again in the backward pass.

Source: measured. Left out: second derivatives.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_lite.dtypes import cast, exact_backward

COPIED = 3_000_000  # numbers in the matrices of all pairs up to which copying them beats sorting
GROUP_ROWS = 128  # rows of hidden units to activate in one call
PADDED_ROWS = 16  # BF16: rows of an expert are padded to a multiple of this
TOGETHER = 8  # BF16: most experts in one batch; more would be padded too much
TOGETHER_WEIGHTS = 2**19  # BF16: most weights in the matrices of a batch, which are copied


def expert_mlp(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """`ops.expert_mlp`."""
    weights = cast(weights, z.dtype)
    if torch.is_grad_enabled():
        return _SortedExperts.apply(z, cast(up, z.dtype), cast(down, z.dtype), weights, indices)
    # Without gradients, matrices of another dtype are cast when they are used: few of them are.
    if multiplies_pair_by_pair(up, indices):
        return pair_by_pair(z, up, down, weights, indices)
    if _is_crowded(up, indices) and z.is_cpu and z.dtype == torch.bfloat16:
        return _in_batches(z, up, down, weights, indices)
    return _sorted_forward(z, up, down, weights, indices)[0]


def _is_crowded(up: Tensor, indices: Tensor) -> bool:
    """Whether there are enough rows for a product per expert."""
    return indices.numel() >= PADDED_ROWS * up.shape[0]


def multiplies_pair_by_pair(up: Tensor, indices: Tensor) -> bool:
    """Whether, without gradients, the matrices of every pair are copied side by side."""
    pairs = indices.numel()
    return not _is_crowded(up, indices) and pairs * up[0].numel() <= COPIED


def pair_by_pair(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The form for few pairs, without gradients: one batched product."""
    (tokens, k), chosen = indices.shape, indices.flatten()
    rows = z.unsqueeze(1).expand(-1, k, -1).reshape(tokens * k, 1, z.shape[1])
    # A row times a matrix, not a matrix times a column: MKL's batches are twice as fast this way.
    # One copy at a time: two would exceed what the C library keeps, and every call would have to
    # fetch its memory from the system again.
    hidden = torch.bmm(rows, cast(up.index_select(0, chosen), z.dtype).mT).relu_()
    hidden.mul_(hidden).mul_(weights.reshape(-1, 1, 1))
    chosen_down = cast(down.index_select(0, chosen), z.dtype).mT
    return torch.bmm(hidden, chosen_down).view(tokens, k, z.shape[1]).sum(1)


class _Order:
    """(token, slot) pairs sorted by expert: where each pair is, and which rows an expert has."""

    def __init__(self, indices: Int[Tensor, "t k"], experts: int) -> None:
        flat = indices.flatten()
        self.pairs = flat.argsort(stable=True)  # sorted position -> pair
        self.tokens = self.pairs // indices.shape[1]
        self.places = torch.empty_like(self.pairs)  # pair -> sorted position
        self.places[self.pairs] = torch.arange(flat.numel(), device=flat.device)
        counts = torch.bincount(flat, minlength=experts).tolist()
        self.blocks = []  # (expert, first row, end)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                self.blocks.append((expert, start, start + count))
                start += count

    def groups(self) -> Iterator[list[tuple[int, int, int]]]:
        """Adjacent blocks that are activated together: few calls, and rows still in CPU caches."""
        group: list[tuple[int, int, int]] = []
        for block in self.blocks:
            group.append(block)
            if block[2] - group[0][1] >= GROUP_ROWS:
                yield group
                group = []
        if group:
            yield group


def _combine(answers: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """The sum of each token's k answers, read from their sorted positions and weighted."""
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
    for group in order.groups():
        first, last = group[0][1], group[-1][2]
        for e, start, stop in group:
            torch.mm(rows[start:stop], cast(up[e], z.dtype), out=hidden[start:stop])
        positive = hidden[first:last]
        positive = torch.relu(positive) if keep else positive.relu_()
        positive.mul_(positive)
        for e, start, stop in group:
            ours = positive[start - first : stop - first]
            torch.mm(ours, cast(down[e], z.dtype), out=answers[start:stop])
    return _combine(answers, order.places, weights), order, hidden if keep else None


def _in_batches(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """Experts sorted by load, a few at a time, each with as many rows as the busiest of them.

    Rows of padding repeat the first token, and their answers are not read.
    """
    flat = indices.flatten()
    counts = torch.bincount(flat, minlength=up.shape[0])
    loads, by_load = counts.sort(descending=True)
    busy = [load for load in loads.tolist() if load]
    together = max(1, min(TOGETHER, TOGETHER_WEIGHTS // up[0].numel()))
    batches, starts, total = [], [], 0
    for first in range(0, len(busy), together):
        chosen = by_load[first : first + min(together, len(busy) - first)]
        rows = -(-busy[first] // PADDED_ROWS) * PADDED_ROWS
        batches.append((chosen, total, rows))
        starts += [total + i * rows for i in range(len(chosen))]
        total += len(chosen) * rows

    offset = counts - counts.cumsum(0)  # minus the pairs of the experts before, by number
    offset[by_load[: len(starts)]] += torch.tensor(starts, device=flat.device)
    pairs = flat.argsort(stable=True)
    places = torch.empty_like(flat)  # pair -> row
    order = torch.arange(flat.numel(), device=flat.device)
    places[pairs] = offset[flat[pairs]] + order
    tokens = flat.new_zeros(total)
    tokens[places] = order // indices.shape[1]

    rows_in = z[tokens]
    answers = torch.empty_like(rows_in)
    for chosen, start, rows in batches:
        # A single expert is a view; the matrices of several are copied side by side.
        which = chosen if len(chosen) > 1 else slice(e := int(chosen), e + 1)
        part = slice(start, start + len(chosen) * rows)
        first_matrix, second = (cast(matrix[which], z.dtype).mT for matrix in (up, down))
        hidden = torch.bmm(rows_in[part].view(len(chosen), rows, -1), first_matrix).relu_()
        torch.bmm(hidden.mul_(hidden), second, out=answers[part].view(len(chosen), rows, -1))
    return _combine(answers, places, weights)


class _SortedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, up, down, weights, indices):  # type: ignore[no-untyped-def]
        out, ctx.order, hidden = _sorted_forward(z, up, down, weights, indices, keep=True)
        ctx.save_for_backward(z, up, down, weights, hidden)
        return out

    @staticmethod
    @once_differentiable
    @exact_backward
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        z, up, down, weights, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        return (*_backward(grad, z, up, down, weights, hidden, ctx.order, needs), None)


def gradients(
    grad: Tensor,
    z: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    indices: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Those of z, up, down and weights, for a caller that kept nothing of the forward pass.

    Args:
        needs: whether `up` and `down` need one; None comes back for a frozen matrix.
    """
    _, order, hidden = _sorted_forward(z, up, down, weights, indices, keep=True)
    assert hidden is not None
    return _backward(grad, z, up, down, weights, hidden, order, needs)


def _backward(
    grad: Tensor,
    z: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    hidden: Tensor,
    order: _Order,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    pair_weights = weights.flatten()[order.pairs].unsqueeze(-1)
    rows, grad_rows = z[order.tokens], grad[order.tokens]
    grad_up = torch.zeros_like(up) if needs[0] else None
    grad_down = torch.zeros_like(down) if needs[1] else None
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
        if grad_down is not None:
            torch.mm(grad_answer.t(), active.mul_(scale), out=grad_down[e])
        grad_hidden = grad_active.mul_(positive).mul_(scale * 2)
        if grad_up is not None:
            torch.mm(grad_hidden.t(), rows[start:stop], out=grad_up[e])
        torch.mm(grad_hidden, up[e], out=grad_inputs[start:stop])
    grad_z = _combine(grad_inputs, order.places, torch.ones_like(weights))
    return grad_z, grad_up, grad_down, grad_pairs[order.places].view_as(weights)
