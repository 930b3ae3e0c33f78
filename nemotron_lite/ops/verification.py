"""The acceptance rule of speculative decoding: fewer steps, and the same distribution of tokens.

A draft d_1 .. d_k was drawn from q_1 .. q_k; the model itself would have drawn from p_1 .. p_{k+1}.
With u_j uniform in [0, 1):

    accept d_j               while  u_j q_j(d_j) < p_j(d_j)              that is, with min(1, p / q)
    after a rejection        draw from  max(p_j - q_j, 0), normalized
    if all are accepted      draw from  p_{k+1}, the bonus token

Each token that comes out is distributed as p, whatever q is: a token x is accepted with probability
q(x) min(1, p(x)/q(x)) = min(p, q), and drawing from the residual adds the rest, p - min(p, q). q
decides only how often a draft is accepted: with probability sum_x min(p, q). Greedy decoding is the
limit where p and q are one-hot: a draft token is accepted if it is the model's own choice.

The rule is exact only if q is the distribution that the draft was drawn from, and p the one that
plain decoding would draw from: both *after* temperature, top-k and top-p.

Uniforms are arguments. So implementations can be compared token by token, and each row of a batch
can have its own random stream. A draw from weights w is the first token whose cumulative weight
exceeds u * sum(w); the weights need not add up to one.

Source: Leviathan, Kalman and Matias 2023 (arXiv 2211.17192); Chen et al. 2023 (arXiv 2302.01318).
Left out: trees of drafts, and rules that trade exactness for acceptance.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.backends import triton
from nemotron_lite.backends.dispatch import choose


class Verdict(NamedTuple):
    """How much of each row's draft is accepted, and the token after it."""

    accepted: Int[Tensor, "b"]  # how many draft tokens are accepted
    token: Int[Tensor, "b"]  # the one after them, from the residual or from the bonus distribution


def verify(
    p: Float[Tensor, "b k1 v"],
    q: Float[Tensor, "b k v"],
    drafts: Int[Tensor, "b k"],
    uniforms: Float[Tensor, "b k1"],
    lengths: Int[Tensor, "b"] | None = None,
    *,
    impl: str = "auto",
) -> Verdict:
    """Accept or reject drafted tokens, and draw the token that follows.

    Args:
        p: the model's probabilities at the k drafted places and the one after, k1 = k + 1.
        q: the probabilities the drafts were drawn from.
        drafts: tokens.
        uniforms: in [0, 1): one for each drafted token, the last for the token that follows.
        lengths: drafted tokens of each row, 0 to k; all k when None. Drafts beyond it are not
            read, and the bonus token of a row is drawn from p at its own length.
        impl: "naive" (row by row, in float64), "torch" or "triton".

    Raises:
        ValueError: unknown `impl`, or shapes that do not fit each other.
    """
    b, places, v = p.shape
    if q.shape != (b, places - 1, v) or drafts.shape != (b, places - 1):
        raise ValueError(
            f"verify: q has shape {list(q.shape)} and drafts {list(drafts.shape)}; with p "
            f"{list(p.shape)} expected {[b, places - 1, v]} and {[b, places - 1]}: one place of p "
            "for each drafted token and one more."
        )
    if uniforms.shape != (b, places):
        raise ValueError(
            f"verify: uniforms has shape {list(uniforms.shape)}; expected {[b, places]}: one for "
            "each drafted token and one more."
        )
    run = choose("verify", impl, p, naive=_naive, torch=_torch, triton=_triton)
    return run(p, q, drafts, uniforms, lengths)


def draw(weights: Float[Tensor, "b v"], uniforms: Float[Tensor, "b"]) -> Int[Tensor, "b"]:
    """One token per row, by the inverse of the cumulative sum; weights are >= 0, any scale.

    A token of weight zero is never drawn, not even where rounding puts the target at the very end.
    """
    sums = weights.double().cumsum(-1)
    targets = uniforms.to(sums)[:, None] * sums[:, -1:]
    last = torch.searchsorted(sums, sums[:, -1:].contiguous())
    return torch.searchsorted(sums, targets, right=True).minimum(last)[:, 0]


def _naive(
    p: Tensor, q: Tensor, drafts: Tensor, uniforms: Tensor, lengths: Tensor | None
) -> Verdict:
    accepted, tokens = [], []
    for row, draft in enumerate(drafts.tolist()):
        count = len(draft) if lengths is None else int(lengths[row])
        kept = 0
        while kept < count:
            token = draft[kept]
            u, ours, theirs = (
                float(v) for v in (uniforms[row, kept], p[row, kept, token], q[row, kept, token])
            )
            if u * theirs >= ours:
                break
            kept += 1
        weights = p[row, kept].double()
        if kept < count:
            rest = (weights - q[row, kept].double()).clamp(min=0)
            weights = rest if rest.sum() > 0 else weights
        accepted.append(kept)
        tokens.append(int(draw(weights[None], uniforms[row, -1:])))
    return Verdict(*torch.tensor([accepted, tokens], dtype=torch.int64, device=p.device))


def _torch(
    p: Tensor, q: Tensor, drafts: Tensor, uniforms: Tensor, lengths: Tensor | None
) -> Verdict:
    k = drafts.shape[1]
    if k == 0:
        return Verdict(drafts.new_zeros(len(p)), draw(p[:, 0], uniforms[:, -1]))
    rows = torch.arange(len(p), device=p.device)
    places = drafts.unsqueeze(-1)
    ours, theirs = p[:, :k].gather(2, places)[..., 0], q.gather(2, places)[..., 0]
    accept = uniforms[:, :k] * theirs.double() < ours.double()
    counts = torch.full_like(rows, k) if lengths is None else lengths.to(p.device)
    accept &= torch.arange(k, device=p.device) < counts[:, None]
    accepted = accept.cumprod(1).sum(1)
    weights = p[rows, accepted]
    rest = (weights - q[rows, accepted.clamp(max=k - 1)]).clamp_(min=0)
    # Rounding can make all of p - q zero; then p itself is the closest distribution.
    rejected = (accepted < counts) & (rest.sum(-1) > 0)
    weights = torch.where(rejected[:, None], rest, weights)
    return Verdict(accepted, draw(weights, uniforms[:, -1]))


def _triton(*arguments: Any) -> Verdict:
    return Verdict(*triton.verify(*arguments))
