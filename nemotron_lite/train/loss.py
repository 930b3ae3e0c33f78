"""The training loss: next token, the token after it, and the one after that.

    loss = CE_0 + (w / D) sum_{k=1..D} CE_k + balance                       w = 0.3, D = 2

CE_0 is the usual next-token cross-entropy. CE_k is that of MTP depth k, which has read token i+k at
position i and predicts token i+k+1. Each is a mean over its own valid targets: a target must be in
the same document as position i (concatenated documents) and must not be masked (padding, prompts).

The purpose of this file is to save memory. With a vocabulary of 4,096 and three losses, the logits
of a batch of 2,048 tokens take 100 MB in float32. Their softmax takes as much again, and autograd
keeps them for the backward pass. With 131,072 entries it is gigabytes. But the gradient of a
cross-entropy is known as soon as the logits are:

    d nll_i / d logits_i = softmax(logits_i) - onehot(label_i)

So `weighted_cross_entropy` computes loss and gradient for a slice of rows, reduces them at once to
gradients of the hidden states and of the head, and frees the logits. The backward pass only
multiplies these gradients by a number. (The idea is from Liger Kernel and cut-cross-entropy;
Wijmans et al. 2024, arXiv 2411.09009.)

The formula holds for a head that is a matrix and nothing else. A head with an adapter, a
parametrization or a hook is called for each slice, as a module, and autograd finds the gradients of
the slice. The memory is the same; the speed is that of autograd.

Source of the recipe: Nemotron 3 Super report 2.4; reference sheet 5.2. Left out: logit soft-capping
and label smoothing, which these models do not use, and second derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Past `ops.linear`: the gradients here are written by hand, so these products need none.
from nemotron_lite.backends.cpu_linear import prefers_onednn, product
from nemotron_lite.data.batches import Batch
from nemotron_lite.layers import plain_weight
from nemotron_lite.masks import number_documents

SLICE_ROWS = 512  # rows of logits in memory at one time


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, labels: Tensor, weights: Tensor, slice_rows: int
    ) -> tuple[Tensor, Tensor]:
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            compute = torch.get_autocast_dtype(device)
        else:
            compute = hidden.dtype
        accumulate = torch.promote_types(compute, torch.float32)
        with torch.autocast(device, enabled=False):
            return _loss_and_gradients(
                ctx, hidden, head, labels, weights.to(accumulate), slice_rows, compute, accumulate
            )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grads = (None if g is None else g * grad_total.to(g.dtype) for g in ctx.grads)
        return (*grads, None, None, None)


def _loss_and_gradients(
    ctx: Any,
    hidden: Tensor,
    head: Tensor,
    labels: Tensor,
    weights: Tensor,
    slice_rows: int,
    compute: torch.dtype,
    accumulate: torch.dtype,
) -> tuple[Tensor, Tensor]:
    need_hidden, need_head = ctx.needs_input_grad[:2]
    n, v = hidden.shape[0], head.shape[0]
    grad_hidden = torch.empty_like(hidden) if need_hidden else None
    grad_head = torch.zeros_like(head, dtype=accumulate) if need_head else None
    nll = torch.empty(n, dtype=accumulate, device=hidden.device)
    table = head.to(compute)
    # Two buffers for all slices: new memory for each slice would cause page faults each time.
    buffers = [hidden.new_empty(min(n, slice_rows), v, dtype=accumulate) for _ in range(2)]
    for start in range(0, n, slice_rows):
        rows = slice(start, start + slice_rows)
        x, y, w = hidden[rows].to(compute), labels[rows, None], weights[rows, None]
        logits, log_p = (buffer[: len(x)] for buffer in buffers)
        _product(x, table.T, logits)
        torch.log_softmax(logits, 1, out=log_p)
        nll[rows] = -log_p.gather(1, y).squeeze(1)
        if grad_hidden is None and grad_head is None:
            continue
        grad_logits = log_p.exp_().scatter_add_(1, y, torch.full_like(w, -1)).mul_(w).to(compute)
        if grad_hidden is not None:
            _product(grad_logits, table, grad_hidden[rows])
        if grad_head is not None and prefers_onednn(grad_logits.T, x):
            grad_head += product(grad_logits.T, x.T)
        elif grad_head is not None and compute == accumulate:
            grad_head.addmm_(grad_logits.T, x)
        elif grad_head is not None:
            grad_head += grad_logits.T @ x
    ctx.grads = (grad_hidden, None if grad_head is None else grad_head.to(head.dtype))
    ctx.mark_non_differentiable(nll)
    return (nll * weights).sum(), nll


class _CalledCrossEntropy(torch.autograd.Function):
    """The same for a head that is called. `parameters` are those of the head that are trained."""

    @staticmethod
    def forward(
        ctx: Any,
        head: nn.Module,
        hidden: Tensor,
        labels: Tensor,
        weights: Tensor,
        slice_rows: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        nll = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        needs = [ctx.needs_input_grad[1], *ctx.needs_input_grad[5:]]
        grad_hidden = torch.zeros_like(hidden) if needs[0] else None
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, wide)) for p in parameters]
        for start in range(0, len(hidden), slice_rows):
            rows = slice(start, start + slice_rows)
            with torch.set_grad_enabled(any(needs)):
                x = hidden[rows].detach().requires_grad_(needs[0])
                log_p = head(x).to(wide).log_softmax(-1)
                part = -log_p.gather(1, labels[rows, None]).squeeze(1)
                total = (part * weights[rows]).sum()
            nll[rows] = part.detach()
            wanted = [v for v, need in zip((x, *parameters), needs, strict=True) if need]
            if not wanted or not total.requires_grad:
                continue
            grads = list(torch.autograd.grad(total, wanted, allow_unused=True))
            if grad_hidden is not None and (of_x := grads.pop(0)) is not None:
                grad_hidden[rows] = of_x
            for i, grad in enumerate(grads):
                if grad is not None:  # a parameter that this slice did not use
                    sums[i] += grad
        ctx.grads = (grad_hidden, *(s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)))
        ctx.mark_non_differentiable(nll)
        return (nll * weights).sum(), nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_hidden, *others = (None if g is None else g * grad_total.to(g.dtype) for g in ctx.grads)
        return (None, of_hidden, None, None, None, *others)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, for any dtype of `out`; b may be a transposed view."""
    if prefers_onednn(a, b):
        out.copy_(product(a, b.t()))
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def weighted_cross_entropy(
    hidden: Float[Tensor, "n d"],
    head: nn.Module | Float[Tensor, "v d"],
    labels: Int[Tensor, "n"],
    weights: Float[Tensor, "n"],
    *,
    slice_rows: int = SLICE_ROWS,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
    """sum_i weights_i * -log softmax(head(hidden_i))[labels_i], without keeping any logits.

    Matrix products run in the dtype of `hidden`, or in that of an enclosing autocast. The softmax
    and the sums run in float32 (float64 for float64 inputs). `hidden` and the head's parameters get
    gradients.

    Args:
        hidden: input of the head.
        head: the layer that makes logits of `hidden`, or the matrix of one that is nothing else.
        labels: token id per row; a row of weight 0 needs a valid one too.
        weights: weight of each row in the sum; gets no gradient.
        slice_rows: rows of logits in memory at one time.

    Returns:
        The weighted sum, and each row's negative log-likelihood in nats, without weights and
        detached.
    """
    matrix = head if isinstance(head, Tensor) else plain_weight(head)
    if matrix is not None:
        return _WeightedCrossEntropy.apply(hidden, matrix, labels, weights, slice_rows)
    assert isinstance(head, nn.Module)
    trained = [p for p in head.parameters() if p.requires_grad]
    return _CalledCrossEntropy.apply(head, hidden, labels, weights, slice_rows, *trained)


def targets(batch: Batch, depth: int) -> tuple[Int[Tensor, "b s"], Bool[Tensor, "b s"]]:
    """The target of each position at a depth, and which of these targets count.

    Position i of depth k predicts token i+k+1 (depth 0 is the backbone), for s = t-k-1 positions.
    A target counts if it is not masked and is in the same document as position i.

    Raises:
        ValueError: the rows are too short for this depth.
    """
    ahead = depth + 1
    tokens, seq_idx, mask = batch
    if tokens.shape[1] <= ahead:
        raise ValueError(
            f"rows of {tokens.shape[1]} tokens have no target at depth {depth}: expected at least "
            f"{ahead + 1} tokens per row."
        )
    labels = tokens[:, ahead:]
    valid = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask[:, ahead:]
    if seq_idx is not None:
        document = number_documents(seq_idx)
        valid = valid & (document[:, ahead:] == document[:, :-ahead])
    return labels, valid


def count_targets(batches: Sequence[Batch], depths: int) -> list[int]:
    """Number of valid targets at depths 0 to `depths`, over all micro-batches of an update."""
    return [sum(int(targets(b, k)[1].sum()) for b in batches) for k in range(depths + 1)]


class TokenLoss(NamedTuple):
    """The part of the loss that comes from predicting tokens."""

    total: Float[Tensor, ""]  # differentiable
    by_depth: list[float]  # CE_0, CE_1, ...: this batch's part of the mean nats per target


def token_loss(
    hidden: Float[Tensor, "b t d"],
    mtp_hidden: Sequence[Float[Tensor, "b _ d"]],
    head: nn.Module | Float[Tensor, "v d"],
    batch: Batch,
    *,
    mtp_weight: float,
    counts: Sequence[int] | None = None,
) -> TokenLoss:
    """CE_0 + mtp_weight / D * sum_k CE_k of one batch, all depths in one pass over the head.

    Args:
        hidden: the backbone's output; entry k-1 of `mtp_hidden` (`b t-k d`) is that of depth k.
        head: the model's `lm_head`, with all that is around it: an adapter gets its gradients.
        counts: number of targets by depth that the means divide by; those of this batch by default.
            With gradient accumulation, give those of all micro-batches. The losses of the
            micro-batches then sum to the mean over the whole update, even if the micro-batches have
            different numbers of targets.
    """
    depths = len(mtp_hidden)
    if counts is None:
        counts = count_targets([batch], depths)
    rows, labels, weights = [], [], []
    for depth, states in enumerate((hidden, *mtp_hidden)):
        label, valid = targets(batch, depth)
        factor = mtp_weight / depths if depth else 1.0
        rows.append(states[:, : label.shape[1]].flatten(0, 1))
        labels.append(label.flatten())
        weights.append(valid.flatten() * (factor / max(1, counts[depth])))
    sizes = [len(label) for label in labels]
    total, nll = weighted_cross_entropy(
        torch.cat(rows), head, torch.cat(labels), torch.cat(weights)
    )
    parts = (nll * torch.cat([w != 0 for w in weights])).split(sizes)
    means = [float(part.sum()) / max(1, n) for part, n in zip(parts, counts, strict=True)]
    return TokenLoss(total, means)
