"""LatentMoE: many small experts that read a compressed token.

    z = W_down x                                  d -> l, one matrix for all experts
    o = sum_{i in I} p_i * W2_i relu(W1_i z)^2     the chosen experts, at width l
    y = W_up o + S2 relu(S1 x)^2                  back to d, plus the shared expert

Router and shared expert read the token at full width; only the routed path is latent. With
l = d / 4, four times as many experts of which four times as many are chosen cost the same weights,
the same arithmetic and the same traffic between devices as a mixture at full width, and there are
far more combinations to choose from. Without `moe_latent_size` the experts read x itself (Nano).

Source: Nemotron 3 Super report 2.1.1; reference sheet 4.1. Left out: expert parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron_lite import ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers.context import ForwardContext, RouterStats
from nemotron_lite.layers.linear import Linear
from nemotron_lite.layers.mlp import MLP


class Router(nn.Module):
    """One row per expert, and the selection bias that balances their load.

    The bias is no parameter: it is moved by a fixed step after each optimiser step. Published
    biases are near 2^6 with differences below 2^-2, so it stays in float32 whatever the model is
    cast to.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(experts, dtype=torch.float32))
        self.choice: dict[str, Any] = dict(
            top_k=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            # There and back again would have rounded it: move the old values instead.
            self.e_score_correction_bias = exact.to(moved.device, torch.float32)
        return self

    def forward(self, x: Float[Tensor, "t d"]) -> ops.Routing:
        """Choose experts and their weights."""
        return ops.route(x, self.weight, self.e_score_correction_bias, **self.choice)


class Experts(nn.Module):
    """The matrices of all routed experts: `up_proj` e f l and `down_proj` e l f."""

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        experts, hidden, width = (
            config.n_routed_experts, config.moe_intermediate_size, config.expert_size,
        )  # fmt: skip
        self.up_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, z: Float[Tensor, "t l"], routing: ops.Routing) -> Float[Tensor, "t l"]:
        """The weighted sum of each token's chosen experts."""
        return ops.expert_mlp(z, self.up_proj, self.down_proj, routing.weights, routing.indices)


class MoE(nn.Module):
    """Router, routed experts (in the latent space where there is one) and the shared expert."""

    def __init__(self, config: NemotronConfig, name: str = "") -> None:
        super().__init__()
        self.name = name
        d, latent = config.hidden_size, config.moe_latent_size
        self.gate = Router(config)
        self.experts = Experts(config)
        self.latent = latent is not None
        if latent is not None:
            self.fc1_latent_proj = Linear(d, latent)
            self.fc2_latent_proj = Linear(latent, d)
        self.shared_experts = (
            MLP(d, config.moe_shared_expert_intermediate_size) if config.n_shared_experts else None
        )

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        cache: None = None,
        context: ForwardContext = ForwardContext(),
    ) -> Float[Tensor, "b t d"]:
        """Route each token by itself; `cache` is what other mixers need."""
        flat = x.view(-1, x.shape[-1])
        routing = self.gate(flat)
        if context.router is not None:
            rows = x.shape[:2]
            scores, indices = routing.scores.unflatten(0, rows), routing.indices.unflatten(0, rows)
            context.router.append(RouterStats(self.name, scores, indices))
        if self.latent:
            y = self.fc2_latent_proj(self.experts(self.fc1_latent_proj(flat), routing))
        else:
            y = self.experts(flat, routing)
        if self.shared_experts is not None:
            y = y + self.shared_experts(flat)
        return y.view(x.shape)
