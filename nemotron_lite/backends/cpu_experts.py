"""Routed experts in the order that is fastest for the number of tokens.

    training, and BF16 on a CPU   experts of similar load padded to the same length, in batches;
                                  gradient written by hand
    one token in float32          a matrix times a vector for each chosen expert, in place
    few pairs (decoding)          the matrices of every pair copied side by side, one batched
                                  product
    everything else               sorted by expert, one product per expert

Sorted by expert, each expert multiplies one contiguous block of rows, and the answers are read back
in token order. For a handful of tokens the calls cost more than the arithmetic: one batched product
is two to three times faster than a product per pair, as long as the copied matrices fit into the
CPU's caches.

A single token needs no batch, and its matrices are read once: copying them would take as long as
multiplying. In float32 it is multiplied where they are: 0.6 of the time with experts of 384 x 256,
0.9 with 128 x 64. (BF16 keeps the batch: there a product of one vector costs more than the copy.)

The product of a small expert takes less time than its call, and training makes six products per
expert. So experts are sorted by load, and a few of them with nearly the same number of rows
multiply together, as one batch; their rows are padded to those of the busiest. Their matrices are
copied side by side. Forward and backward of 64 experts (192 x 64) take 0.8 of the time of a product
per expert in float32, with 512 tokens.

BF16 products on a CPU are compiled by oneDNN for each new number of rows. There, the number of rows
is rounded up to a multiple of 16, so that few shapes are compiled: 0.4 of the time.

Training stores the positions of the sorted inputs and the hidden rows before the activation. The
inputs are gathered again in the backward pass.

Source: measured. Left out: second derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_lite.dtypes import cast, exact_backward

COPIED = 3_000_000  # numbers in the matrices of all pairs up to which copying them beats sorting
GROUP_ROWS = 128  # rows of hidden units to activate in one call
PADDED_ROWS = 16  # BF16: rows of an expert are padded to a multiple of this
TOGETHER = {torch.bfloat16: 8}  # most experts in one batch; more would be padded too much
TOGETHER_ELSE = 4  # the same in other dtypes, whose products cost more per row of padding
TOGETHER_WEIGHTS = 2**19  # most weights in the matrices of a batch, which are copied


def expert_mlp(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """`ops.expert_mlp`."""
    weights = cast(weights, z.dtype)
    if torch.is_grad_enabled():
        return _TrainedExperts.apply(z, cast(up, z.dtype), cast(down, z.dtype), weights, indices)
    # Without gradients, matrices of another dtype are cast when they are used: few of them are.
    if len(indices) == 1 and z.is_cpu and z.dtype == up.dtype == down.dtype == torch.float32:
        return one_token(z, up, down, weights, indices)
    if multiplies_pair_by_pair(up, indices):
        return pair_by_pair(z, up, down, weights, indices)
    if _is_crowded(up, indices) and z.is_cpu and z.dtype == torch.bfloat16:
        return _forward_in_batches(z, up, down, weights, indices)[0]
    return _sorted_forward(z, up, down, weights, indices)


def _is_crowded(up: Tensor, indices: Tensor) -> bool:
    """Whether there are enough rows for a product per expert."""
    return indices.numel() >= PADDED_ROWS * up.shape[0]


def multiplies_pair_by_pair(up: Tensor, indices: Tensor) -> bool:
    """Whether, without gradients, the matrices of every pair are copied side by side."""
    pairs = indices.numel()
    return not _is_crowded(up, indices) and pairs * up.shape[1] * up.shape[2] <= COPIED


def one_token(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The form for one token, without gradients: no matrix is copied."""
    x, chosen = z[0], indices[0].tolist()
    hidden = z.new_empty(len(chosen), up.shape[1])
    rows = hidden.unbind()
    for row, expert in zip(rows, chosen, strict=True):
        torch.mv(up.select(0, expert), x, out=row)
    hidden.relu_().square_().mul_(weights.view(-1, 1))
    y = z.new_zeros(z.shape[1])
    for row, expert in zip(rows, chosen, strict=True):
        y.addmv_(down.select(0, expert), row)
    return y.unsqueeze(0)


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
        pairs = flat.argsort(stable=True)  # sorted position -> pair
        self.tokens = pairs // indices.shape[1]
        self.places = torch.empty_like(pairs)  # pair -> sorted position
        self.places[pairs] = torch.arange(flat.numel(), device=flat.device)
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
    z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor
) -> Tensor:
    experts, hidden = up.shape[:2]
    return one_by_one(z, experts, hidden, up.mT.__getitem__, down.mT.__getitem__, weights, indices)


def one_by_one(
    z: Tensor,
    experts: int,
    hidden_width: int,
    up: Callable[[int], Tensor],
    down: Callable[[int], Tensor],
    weights: Tensor,
    indices: Tensor,
) -> Tensor:
    """The form with a product per expert, without gradients, where the matrices may be anywhere.

    Args:
        z: `t l`.
        experts, hidden_width: e and f.
        up, down: the transposed matrix of one expert, `l f` and `f l`. Each is called once for
            every chosen expert, and its result is used before the next call.
        weights, indices: from `route`.
    """
    order = _Order(indices, experts)
    rows = z[order.tokens]
    answers = torch.empty_like(rows)
    hidden = rows.new_empty(rows.shape[0], hidden_width)
    for group in order.groups():
        first, last = group[0][1], group[-1][2]
        for e, start, stop in group:
            torch.mm(rows[start:stop], cast(up(e), z.dtype), out=hidden[start:stop])
        positive = hidden[first:last].relu_()
        positive.mul_(positive)
        for e, start, stop in group:
            torch.mm(hidden[start:stop], cast(down(e), z.dtype), out=answers[start:stop])
    return _combine(answers, order.places, weights)


class _Batch(NamedTuple):
    """A few experts of similar load, each with as many rows as the busiest of them."""

    experts: Int[Tensor, "c"]
    rows: slice  # of all experts of the batch, one after the other

    def split(self, v: Tensor) -> Tensor:
        """The rows of the batch by expert, `rows ...` -> `c rows/c ...`: a view."""
        return v[self.rows].unflatten(0, (len(self.experts), -1))

    def matrices(self, stack: Tensor, dtype: torch.dtype) -> Tensor:
        """Their matrices: a view of a single one, several copied side by side."""
        if len(self.experts) > 1:
            return cast(stack.index_select(0, self.experts), dtype)
        return cast(stack.narrow(0, int(self.experts), 1), dtype)


class _Batches:
    """All pairs of token and expert in batches of experts.

    Attributes:
        batches: in the order of their rows.
        places: pair -> row.
        tokens: row -> token. Rows of padding repeat the first token, and nobody reads their
            answers.
        idle: experts without a row.
    """

    def __init__(self, indices: Int[Tensor, "t k"], stack: Tensor, dtype: torch.dtype) -> None:
        flat = indices.flatten()
        counts = torch.bincount(flat, minlength=stack.shape[0])
        loads, by_load = counts.sort(descending=True)
        busy = [load for load in loads.tolist() if load]
        multiple = PADDED_ROWS if dtype == torch.bfloat16 else 1
        most = TOGETHER.get(dtype, TOGETHER_ELSE)
        together = max(1, min(most, TOGETHER_WEIGHTS // max(1, stack[0].numel())))
        self.batches, starts, total = list[_Batch](), [], 0
        for first in range(0, len(busy), together):
            experts = by_load[first : min(first + together, len(busy))]
            rows = -(-busy[first] // multiple) * multiple
            self.batches.append(_Batch(experts, slice(total, total + len(experts) * rows)))
            starts += [total + i * rows for i in range(len(experts))]
            total += len(experts) * rows

        offset = counts - counts.cumsum(0)  # minus the pairs of the experts before, by number
        offset[by_load[: len(starts)]] += torch.tensor(starts, dtype=flat.dtype, device=flat.device)
        pairs = flat.argsort(stable=True)
        order = torch.arange(flat.numel(), device=flat.device)
        self.places = torch.empty_like(flat)
        self.places[pairs] = offset[flat[pairs]] + order
        self.tokens = flat.new_zeros(total)
        self.tokens[self.places] = order // indices.shape[1]
        self.idle = by_load[len(busy) :]


def _forward_in_batches(
    z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor, keep: bool = False
) -> tuple[Tensor, _Batches, Tensor | None]:
    """The answers, and what the backward pass needs; hidden rows only with `keep`."""
    plan = _Batches(indices, up, z.dtype)
    rows = z[plan.tokens]
    answers = torch.empty_like(rows)
    hidden = rows.new_empty(rows.shape[0], up.shape[1]) if keep else None
    for batch in plan.batches:
        first = batch.matrices(up, z.dtype).mT
        if hidden is None:
            active = torch.bmm(batch.split(rows), first).relu_()
        else:
            active = torch.bmm(batch.split(rows), first, out=batch.split(hidden)).relu()
        second = batch.matrices(down, z.dtype).mT
        torch.bmm(active.mul_(active), second, out=batch.split(answers))
    return _combine(answers, plan.places, weights), plan, hidden


class _TrainedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, up, down, weights, indices):  # type: ignore[no-untyped-def]
        out, ctx.plan, hidden = _forward_in_batches(z, up, down, weights, indices, keep=True)
        ctx.save_for_backward(z, up, down, weights, hidden)
        return out

    @staticmethod
    @once_differentiable
    @exact_backward
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        z, up, down, weights, hidden = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        return (*_backward(grad, z, up, down, weights, hidden, ctx.plan, needs), None)


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
    _, plan, hidden = _forward_in_batches(z, up, down, weights, indices, keep=True)
    assert hidden is not None
    return _backward(grad, z, up, down, weights, hidden, plan, needs)


def _backward(
    grad: Tensor,
    z: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    hidden: Tensor,
    plan: _Batches,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    rows, grad_rows = z[plan.tokens], grad[plan.tokens]
    # A weight of 0 keeps the rows of padding out of the matrices' gradients.
    row_weights = weights.new_zeros(rows.shape[0])
    row_weights[plan.places] = weights.flatten()
    grad_up, grad_down = (
        torch.empty_like(m).index_fill_(0, plan.idle, 0) if need else None
        for m, need in zip((up, down), needs, strict=True)
    )
    grad_inputs = torch.empty_like(rows)
    grad_pairs = torch.empty_like(row_weights)
    for batch in plan.batches:
        positive = batch.split(hidden).clamp(min=0)
        active = positive.square()
        grad_answer = batch.split(grad_rows)
        # <grad, W2 a> = <W2^T grad, a>: one product serves the weights' and the rows' gradient
        grad_active = torch.bmm(grad_answer, batch.matrices(down, z.dtype))
        torch.linalg.vecdot(grad_active, active, out=batch.split(grad_pairs))
        scale = batch.split(row_weights).unsqueeze(-1)
        if grad_down is not None:
            of_down = torch.bmm(grad_answer.mT, active.mul_(scale))
            grad_down.index_copy_(0, batch.experts, of_down)
        grad_hidden = grad_active.mul_(positive).mul_(scale * 2)
        if grad_up is not None:
            of_up = torch.bmm(grad_hidden.mT, batch.split(rows))
            grad_up.index_copy_(0, batch.experts, of_up)
        torch.bmm(grad_hidden, batch.matrices(up, z.dtype), out=batch.split(grad_inputs))
    grad_z = _combine(grad_inputs, plan.places, torch.ones_like(weights))
    return grad_z, grad_up, grad_down, grad_pairs[plan.places].view_as(weights)
