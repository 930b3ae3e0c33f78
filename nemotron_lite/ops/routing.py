"""The router: which experts read a token, and with which weight.

    s   = sigmoid(W x)                       one score per expert, in float32
    I   = the k experts with the largest s + b
    p_i = scale * s_i / sum_{j in I} s_j     for i in I

The bias b balances the load of the experts: it decides *which* experts are chosen and does not
enter the weights p, which come from s alone. A model that mixes the two up trains without any
error, and is a different model.

With `n_group > 1` only experts of the `topk_group` best groups can be chosen. A group's score is
the sum of its two largest s + b. Nemotron 3 uses one group, where this does nothing.

Source: reference sheet 4.1 and 4.2 (Nemotron 3 Super report 2.1.1). Left out: token dropping and
capacity limits, which the family does not use.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.backends import triton
from nemotron_lite.backends.dispatch import choose
from nemotron_lite.dtypes import cast, wide_dtype, without_autocast
from nemotron_lite.ops.linear import linear


class Routing(NamedTuple):
    """What the router decided for t tokens."""

    weights: Float[Tensor, "t k"]  # p, in float32
    indices: Int[Tensor, "t k"]  # I; order within a row has no meaning
    scores: Float[Tensor, "t e"]  # s, in float32


def route(
    x: Float[Tensor, "t d"],
    weight: Float[Tensor, "e d"],
    bias: Float[Tensor, "e"],
    *,
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    impl: str = "auto",
) -> Routing:
    """Choose `top_k` experts per token.

    Args:
        x: token features at full width.
        weight: one row per expert.
        bias: selection bias; changes the choice, never the weights.
        n_group, topk_group: group-limited routing.
        normalize: divide the chosen scores by their sum.
        scale: factor on the weights (5.0 for Super).
        impl: "naive" (token by token), "torch" or "triton".

    Raises:
        ValueError: unknown `impl`.
    """
    run = choose("route", impl, x, naive=_naive, torch=plain_route, triton=_triton)
    return run(x, weight, bias, top_k, n_group, topk_group, normalize, scale)


def _scores(x: Tensor, weight: Tensor) -> Tensor:
    wide = wide_dtype(x)
    product = without_autocast(linear, x)  # mixed precision must not reach the router
    return torch.sigmoid(product(cast(x, wide), cast(weight, wide)))


def _naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scale: float,
) -> Routing:
    scores = _scores(x, weight)
    if not len(x):
        return Routing(scores[:, :top_k], scores[:, :top_k].long(), scores)
    per_group = weight.shape[0] // n_group
    weights, indices = [], []
    for token_scores in scores:
        biased = (token_scores + bias).tolist()
        groups = [biased[i * per_group : (i + 1) * per_group] for i in range(n_group)]
        best = sorted(range(n_group), key=lambda i: -sum(sorted(groups[i])[-2:]))[:topk_group]
        allowed = [e for e in range(len(biased)) if n_group == 1 or e // per_group in best]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:top_k]
        picked = token_scores[chosen]
        if normalize:
            picked = picked / (picked.sum() + 1e-20)
        weights.append(picked * scale)
        indices.append(torch.tensor(chosen, device=x.device))
    return Routing(torch.stack(weights), torch.stack(indices), scores)


def plain_route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scale: float,
) -> Routing:
    """`route` by plain PyTorch."""
    scores = _scores(x, weight)
    return choose_experts(scores, bias, top_k, n_group, topk_group, normalize, scale)


def choose_experts(
    scores: Float[Tensor, "t e"],
    bias: Float[Tensor, "e"],
    top_k: int,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scale: float,
) -> Routing:
    """The choice of `route` from scores that are known."""
    biased = (scores.detach() if scores.requires_grad else scores) + bias
    if n_group > 1:
        biased = _keep_best_groups(biased, n_group, topk_group)
    indices = torch.topk(biased, top_k, dim=-1, sorted=False).indices
    weights = scores.gather(1, indices)
    if normalize:
        return Routing(weights * (scale / (weights.sum(-1, keepdim=True) + 1e-20)), indices, scores)
    return Routing(weights * scale, indices, scores)


def _triton(*arguments: Any) -> Routing:
    return Routing(*triton.route(*arguments))


def _keep_best_groups(
    biased: Float[Tensor, "t e"], n_group: int, topk_group: int
) -> Float[Tensor, "t e"]:
    grouped = biased.unflatten(-1, (n_group, -1))
    group_scores = grouped.topk(2, dim=-1).values.sum(-1)
    best = group_scores.topk(topk_group, dim=-1, sorted=False).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), -math.inf).flatten(1)
