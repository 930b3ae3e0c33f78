"""The MTP module learns from the backbone instead of from the text: a divergence for a loss.

    KL_k = mean_i  KL( p_{i+k} || q^k_i )         loss = CE_0 + (w / D) sum_{k=1..D} KL_k

q^k_i is what depth k says about token i+k+1 at position i; p_{i+k} is what the backbone says about
the same token, one pass later, with nothing learnt from the comparison. A draft is accepted where
the two agree, and the text is only one sample of p: each position teaches a whole distribution, and
no draw is needed for it. The gradient is that of a cross-entropy whose label is p:

    d KL_i / d logits_i = softmax(logits_i) - p

and as in loss.py it is made slice by slice, so that no logits are kept. Only the module's own
output takes gradients; the head belongs to the backbone.

Source: Ultra's boosting, a forward KL to the backbone's logits with the cross-entropy off
(reference sheet 5.2). Left out: its temperature.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_lite.data.batches import Batch
from nemotron_lite.ops import linear
from nemotron_lite.train.loss import SLICE_ROWS, TokenLoss, count_targets, targets, token_loss


class _WeightedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, teacher: Tensor, head: Tensor, weights: Tensor, slice_rows: int
    ) -> tuple[Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        weights = weights.to(exact)
        slope = torch.empty_like(hidden)
        found = torch.empty(len(hidden), dtype=exact, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            table = head.to(hidden.dtype)
            for start in range(0, len(hidden), slice_rows):
                rows = slice(start, start + slice_rows)
                log_p = linear(teacher[rows].to(hidden.dtype), table).to(exact).log_softmax(-1)
                log_q = linear(hidden[rows], table).to(exact).log_softmax(-1)
                p = log_p.exp()
                found[rows] = (log_p - log_q).mul_(p).sum(-1)
                difference = log_q.exp_().sub_(p).mul_(weights[rows, None])
                slope[rows] = linear(difference.to(hidden.dtype), table.t())
        ctx.slope = slope
        ctx.mark_non_differentiable(found)
        return (found * weights).sum(), found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.slope * grad.to(ctx.slope.dtype), None, None, None, None


def weighted_divergence(
    hidden: Float[Tensor, "n d"],
    teacher: Float[Tensor, "n d"],
    head: Float[Tensor, "v d"],
    weights: Float[Tensor, "n"],
    *,
    slice_rows: int = SLICE_ROWS,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n"]]:
    """sum_i weights_i KL(softmax(head @ teacher_i) || softmax(head @ hidden_i)).

    Gradients reach `hidden` and nothing else.

    Returns:
        The weighted sum, and every row's divergence in nats, unweighted and detached.
    """
    return _WeightedDivergence.apply(hidden, teacher.detach(), head.detach(), weights, slice_rows)


def distillation_loss(
    hidden: Float[Tensor, "b t d"],
    mtp_hidden: Sequence[Float[Tensor, "b _ d"]],
    head: Float[Tensor, "v d"],
    batch: Batch,
    *,
    mtp_weight: float,
    counts: Sequence[int] | None = None,
) -> TokenLoss:
    """`token_loss` with the backbone's distributions in place of the text, from depth 1 on.

    A position counts where `token_loss` counts it. `by_depth` holds CE_0, KL_1, KL_2, ...
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
    total, found = weighted_divergence(
        torch.cat(rows), torch.cat(teachers), head, torch.cat(weights)
    )
    parts = (found * torch.cat([w != 0 for w in weights])).split(sizes)
    means = [float(part.sum()) / max(1, n) for part, n in zip(parts, counts[1:], strict=True)]
    return TokenLoss(first.total + total, [*first.by_depth, *means])
