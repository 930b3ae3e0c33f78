"""Routed experts: k experts read each token, and their outputs are summed with weights.

    o = sum_{i in I} p_i * W2_i relu(W1_i z)^2

`relu(x)^2` (squared ReLU) needs two matrices per expert, not the three of a gated MLP. z is the
latent of width l in a LatentMoE, or the token itself in a plain mixture.

The definition goes token by token; the plain form goes expert by expert, so that each expert
multiplies all of its tokens at once. `backends/cpu_experts.py` holds faster forms.

Source: reference sheet 4.1. Left out: capacity limits and expert parallelism (a later chapter).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.backends import cpu_experts, traceable, triton
from nemotron_lite.backends.dispatch import choose
from nemotron_lite.dtypes import autocast_dtype, without_autocast


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

    Under autocast the products are those of its dtype, as in `linear`.

    Args:
        z: what the experts read.
        up, down: the experts' matrices W1 and W2, used in the dtype of z.
        weights, indices: from `route`.
        impl: "naive" (token by token), "torch" (expert by expert), "cpu", "traced" (one operator
            that compilers do not look into) or "triton".

    Raises:
        ValueError: unknown `impl`.
    """
    run = choose(
        "expert_mlp",
        impl,
        z,
        naive=_naive,
        torch=_torch,
        cpu=cpu_experts.expert_mlp,
        traced=traceable.expert_mlp,
        triton=triton.expert_mlp,
    )
    narrow = autocast_dtype(z)
    if narrow is None or z.dtype == torch.float64:
        return run(z, up, down, weights, indices)
    return without_autocast(run, z)(z.to(narrow), up, down, weights, indices)


def _naive(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    up, down = up.to(z.dtype), down.to(z.dtype)
    rows = []
    for token, token_weights, chosen in zip(z, weights, indices, strict=True):
        answers = [
            weight.to(z.dtype) * (down[e] @ squared_relu(up[e] @ token))
            for weight, e in zip(token_weights, chosen.tolist(), strict=True)
        ]
        rows.append(torch.stack(answers).sum(0))
    return torch.stack(rows) if rows else torch.zeros_like(z)


def _torch(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    up, down, weights = (v.to(z.dtype) for v in (up, down, weights))
    out = torch.zeros_like(z)
    for e in indices.unique().tolist():
        tokens, slots = torch.where(indices == e)
        answers = squared_relu(z[tokens] @ up[e].mT) @ down[e].mT
        out = out.index_add(0, tokens, answers * weights[tokens, slots].unsqueeze(-1))
    return out
