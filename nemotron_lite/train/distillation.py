"""Self-distillation of the MTP module: its targets are the backbone's distributions, not the text.

    KL_k = mean_i  KL( p_{i+k} || q^k_i )         loss = CE_0 + (w / D) sum_{k=1..D} KL_k

q^k_i is the distribution that MTP depth k predicts for token i+k+1 at position i. p_{i+k} is the
distribution that the backbone predicts for the same token at position i+k. The backbone gets no
gradient from the comparison. A draft token is likely to be accepted where the two distributions
agree. The text is only one sample of p, while this loss teaches the whole distribution at each
position. Its gradient is that of a cross-entropy with the soft label p:

    d KL_i / d logits_i = softmax(logits_i) - p

As in loss.py, it is computed for one slice of rows at a time, so that no logits are kept. A head
with an adapter or a hook is called instead of read. Only the output of the MTP module gets
gradients, because the head belongs to the backbone.

Source: "boosting" in Nemotron 3 Ultra, a forward KL divergence to the backbone's logits without
cross-entropy (reference sheet 5.2). Left out: its temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nemotron_lite.data.batches import Batch
from nemotron_lite.layers import plain_weight
from nemotron_lite.ops import linear
from nemotron_lite.train.loss import SLICE_ROWS, TokenLoss, count_targets, targets, token_loss


class _WeightedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        teacher: Tensor,
        head: nn.Module | Tensor,
        weights: Tensor,
        slice_rows: int,
    ) -> tuple[Tensor, Tensor]:
        if not isinstance(head, Tensor):
            return _called(ctx, hidden, teacher, head, weights, slice_rows)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        weights = weights.to(exact)
        grad_hidden = torch.empty_like(hidden)
        divergence = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            table = head.to(hidden.dtype)
            for start in range(0, len(hidden), slice_rows):
                rows = slice(start, start + slice_rows)
                log_p = linear(teacher[rows].to(hidden.dtype), table).to(exact).log_softmax(-1)
                log_q = linear(hidden[rows], table).to(exact).log_softmax(-1)
                p = log_p.exp()
                divergence[rows] = (log_p - log_q).mul_(p).sum(-1)
                difference = log_q.exp_().sub_(p).mul_(weights[rows, None])
                grad_hidden[rows] = linear(difference.to(hidden.dtype), table.t())
        ctx.grad_hidden = grad_hidden
        ctx.mark_non_differentiable(divergence)
        return (divergence * weights).sum(), divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.grad_hidden * grad.to(ctx.grad_hidden.dtype), None, None, None, None


def _called(
    ctx: Any, hidden: Tensor, teacher: Tensor, head: nn.Module, weights: Tensor, slice_rows: int
) -> tuple[Tensor, Tensor]:
    """The same with a head that is called; autograd finds the gradient of each slice."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    grad_hidden = torch.zeros_like(hidden)
    divergence = torch.empty(len(hidden), dtype=exact, device=hidden.device)
    for start in range(0, len(hidden), slice_rows):
        rows = slice(start, start + slice_rows)
        with torch.no_grad():
            log_p = head(teacher[rows].to(hidden.dtype)).to(exact).log_softmax(-1)
        with torch.enable_grad():
            x = hidden[rows].detach().requires_grad_()
            log_q = head(x).to(exact).log_softmax(-1)
            part = ((log_p - log_q) * log_p.exp()).sum(-1)
            total = (part * weights[rows]).sum()
        (grad_hidden[rows],) = torch.autograd.grad(total, x)
        divergence[rows] = part.detach()
    ctx.grad_hidden = grad_hidden
    ctx.mark_non_differentiable(divergence)
    return (divergence * weights).sum(), divergence


def weighted_divergence(
    hidden: Float[Tensor, "n d"],
    teacher: Float[Tensor, "n d"],
    head: nn.Module | Float[Tensor, "v d"],
    weights: Float[Tensor, "n"],
    *,
    slice_rows: int = SLICE_ROWS,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
    """sum_i weights_i KL(softmax(head(teacher_i)) || softmax(head(hidden_i))).

    Only `hidden` gets gradients. `head` is a layer, or the matrix of one that is nothing else.

    Returns:
        The weighted sum, and each row's divergence in nats, without weights and detached.
    """
    matrix = head if isinstance(head, Tensor) else plain_weight(head)
    given = head if matrix is None else matrix.detach()
    return _WeightedDivergence.apply(hidden, teacher.detach(), given, weights, slice_rows)


def distillation_loss(
    hidden: Float[Tensor, "b t d"],
    mtp_hidden: Sequence[Float[Tensor, "b _ d"]],
    head: nn.Module | Float[Tensor, "v d"],
    batch: Batch,
    *,
    mtp_weight: float,
    counts: Sequence[int] | None = None,
) -> TokenLoss:
    """`token_loss`, but from depth 1 on the targets are the backbone's distributions.

    The same positions count as in `token_loss`. `by_depth` holds CE_0, KL_1, KL_2, ...
    """
    depths = len(mtp_hidden)
    if counts is None:
        counts = count_targets([batch], depths)
    first = token_loss(hidden, [], head, batch, mtp_weight=0.0, counts=counts[:1])
    rows, teachers, weights = [], [], []
    for depth, states in enumerate(mtp_hidden, start=1):
        label, valid = targets(batch, depth)
        length = label.shape[1]
        rows.append(states[:, :length].flatten(0, 1))
        teachers.append(hidden[:, depth : depth + length].flatten(0, 1))
        weights.append(valid.flatten() * (mtp_weight / depths / max(1, counts[depth])))
    if not depths:
        return first
    sizes = [len(part) for part in weights]
    total, divergence = weighted_divergence(
        torch.cat(rows), torch.cat(teachers), head, torch.cat(weights)
    )
    parts = (divergence * torch.cat([w != 0 for w in weights])).split(sizes)
    means = [float(part.sum()) / max(1, n) for part, n in zip(parts, counts[1:], strict=True)]
    return TokenLoss(first.total + total, [*first.by_depth, *means])
