"""Load balancing of the experts: a bias updated outside the optimizer, and a small loss.

Without balancing, a router soon sends most tokens to the few experts that were good first. Two
methods act against that (reference sheet 4.3; the router itself is in `ops/routing.py`):

1. Each expert has a selection bias b. It is added to the score for the choice of experts, but not
   to the routing weights. After every optimizer step it moves by a fixed amount towards the mean
   load:

       b_i <- b_i + u sign(mean load - load_i)                                      u = 1e-3

   It needs no gradient (Wang et al. 2024, arXiv 2408.15664).

2. A balance loss with a tiny coefficient (1e-4), per sequence and router:

       e * sum_i f_i P_i     f_i = count_i / (k t)      P_i = mean over t of s_i / sum_j s_j

   Here count_i comes from the top k of the scores *without* the bias. So the loss measures what
   the router itself prefers, not the balance that the bias has already restored. Perfect balance
   gives 1.

The bias balances the whole batch, and the loss balances each sequence. Scores are in (0, 1), so
with u = 1e-3 a shift by 0.1 takes a hundred steps: a short run sees only the beginning of this.

`router_balance` says how well it works, router by router, after every update. The log of a run has
these numbers, and `balance_history.py` reads them back.

Left out: summing loads over devices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from nemotron_lite.layers import RouterStats


def sequence_balance_loss(
    scores: Float[Tensor, "b t e"], top_k: int, mask: Bool[Tensor, "b t"] | None = None
) -> Float[Tensor, ""]:
    """e * sum_i f_i P_i for every sequence, averaged over the batch; 1 is perfect balance.

    Args:
        scores: the router's sigmoid scores, with their gradient.
        top_k: experts chosen per token.
        mask: True on tokens that count; all of them by default. A row without any adds 0.
    """
    experts = scores.shape[-1]
    keep = scores.new_ones(scores.shape[:2]) if mask is None else mask.to(scores.dtype)
    tokens = keep.sum(1).clamp_min(1)
    chosen = scores.detach().topk(top_k, dim=-1, sorted=False).indices
    votes = keep.unsqueeze(-1).expand(chosen.shape).flatten(1)
    counts = scores.new_zeros(scores.shape[0], experts).scatter_add_(1, chosen.flatten(1), votes)
    share = counts / (top_k * tokens).unsqueeze(-1)
    normalized = scores / scores.sum(-1, keepdim=True)
    preference = (normalized * keep.unsqueeze(-1)).sum(1) / tokens.unsqueeze(-1)
    return experts * (share * preference).sum(-1).mean()


def expert_loads(
    routed: Iterable[RouterStats], mask: Bool[Tensor, "b t"] | None = None
) -> dict[str, Int[Tensor, "e"]]:
    """Number of tokens sent to each expert, by router name.

    If a router is used several times in a pass (the MTP router, once per depth), its loads are
    summed. The pass at depth d has t - d positions, and `mask` is shortened to match.
    """
    loads: dict[str, Tensor] = {}
    for stats in routed:
        indices = stats.indices
        if mask is not None:
            indices = indices[mask[:, : indices.shape[1]]]
        load = torch.bincount(indices.flatten(), minlength=stats.scores.shape[-1])
        loads[stats.name] = loads[stats.name] + load if stats.name in loads else load
    return loads


@torch.no_grad()
def update_biases(model: nn.Module, loads: Mapping[str, Int[Tensor, "e"]], rate: float) -> None:
    """Move every router's selection bias by `rate` towards the mean load, in place.

    Raises:
        AttributeError: the model has no router of that name.
    """
    for name, load in loads.items():
        bias = model.get_submodule(f"{name}.gate").get_buffer("e_score_correction_bias")
        load = load.to(bias.dtype)
        bias += rate * torch.sign(load.mean() - load)


class RouterBalance(NamedTuple):
    """How evenly one router spread the tokens of an update over its experts.

    Attributes:
        load: tokens sent to each expert.
        max_vio: max load / mean load - 1; 0 is perfect balance. Its upper bound is e / k - 1,
            reached if every token chooses the same experts.
        entropy: of the shares of the load, divided by log e; 1 is perfect balance.
        unused: experts without a token.
    """

    load: list[int]
    max_vio: float
    entropy: float
    unused: int


def router_balance(loads: Mapping[str, Int[Tensor, "e"]]) -> dict[str, RouterBalance]:
    """The balance of every router, by name, from the loads of one update.

    The loads of all routers leave the device in one transfer, and the rest is arithmetic on a few
    hundred integers. A router that got no token counts as balanced, with all experts unused.
    """
    if not loads:
        return {}
    numbers = torch.cat([*loads.values()]).tolist()
    found, start = {}, 0
    for name, load in loads.items():
        found[name] = _balance(numbers[start : start + len(load)])
        start += len(load)
    return found


def _balance(load: list[int]) -> RouterBalance:
    total, experts = sum(load), len(load)
    used = [n for n in load if n]
    if not total or experts == 1:
        return RouterBalance(load, 0.0, 1.0, experts - len(used))
    # -sum p log p with p = n / total
    entropy = math.log(total) - sum(n * math.log(n) for n in used) / total
    return RouterBalance(
        load,
        round(max(load) * experts / total - 1, 6),
        round(entropy / math.log(experts), 6),
        experts - len(used),
    )


def max_violation(routers: Mapping[str, RouterBalance]) -> float:
    """MaxVio of the worst router; 0 for a model without one."""
    return max((router.max_vio for router in routers.values()), default=0.0)
