"""LatentMoE: many small experts that read a compressed token.

    z = W_down x                                  d -> l, one matrix for all experts
    o = sum_{i in I} p_i * W2_i relu(W1_i z)^2     the chosen experts, at width l
    y = W_up o + S2 relu(S1 x)^2                  back to d, plus the shared expert

Router and shared expert read the token at full width; only the routed experts work at width l. Take
l = d / 4, four times as many experts, and choose four times as many of them per token. The weights,
the arithmetic and the traffic between devices then cost the same as a mixture at full width, and
there are far more combinations to choose from. Without `moe_latent_size` the experts read x itself
(Nano).

With `mlp_bias` the latent projections and the shared expert have biases, as in transformers. The
routed experts have none.

Source: Nemotron 3 Super report 2.1.1; reference sheet 4.1. Left out: expert parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron_lite import ops
from nemotron_lite.backends import cpu_experts
from nemotron_lite.backends.compiled_step import (
    LinearStruct,
    MoeStruct,
    NotCompiledError,
    StateStruct,
    address,
)
from nemotron_lite.backends.cpu_linear import product_for
from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers.context import ForwardContext, RouterStats
from nemotron_lite.layers.linear import linear
from nemotron_lite.layers.mixer import CompiledCall, LedgerLine, Matrix, Mixer, TokenStep
from nemotron_lite.layers.mlp import MLP
from nemotron_lite.ops.routing import choose_experts, plain_route


class Router(nn.Module):
    """One row per expert, and the selection bias that balances their load.

    The bias is not a parameter: it is moved by a fixed step after each step of the optimizer.
    Published biases are near 2^6 with differences below 2^-2, so the bias stays in float32 whatever
    the model is cast to.
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

    def init_weights(self, std: float, generator: torch.Generator | None = None) -> None:
        """A normal matrix and a bias of zero."""
        nn.init.normal_(self.weight, std=std, generator=generator)
        self.e_score_correction_bias.zero_()

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        exact = self.e_score_correction_bias
        super()._apply(fn, recurse)
        moved = self.e_score_correction_bias
        if moved.dtype != torch.float32:
            # Casting it down and up again would have rounded it: move the old values instead.
            self.e_score_correction_bias = exact.to(moved.device, torch.float32)
        return self

    def forward(self, x: Float[Tensor, "t d"]) -> ops.Routing:
        """Choose experts and their weights."""
        return ops.route(x, self.weight, self.e_score_correction_bias, **self.choice)

    def token_step(self, rows: int) -> Callable[[Float[Tensor, "b d"]], ops.Routing]:
        """`forward` for `rows` tokens, as in `Mixer.token_step`."""
        weight, bias, choice = self.weight, self.e_score_correction_bias, self.choice
        if weight.dtype != torch.float32:
            return lambda x: plain_route(x, weight, bias, **choice)
        product = product_for(weight, rows)
        return lambda x: choose_experts(torch.sigmoid(product(x)), bias, **choice)


class Experts(nn.Module):
    """The matrices of all routed experts: `up_proj` e f l and `down_proj` e l f."""

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        experts, hidden, width = (
            config.n_routed_experts, config.moe_intermediate_size, config.expert_size,
        )  # fmt: skip
        self.up_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, hidden))

    def init_weights(
        self, std: float, divisor: float, generator: torch.Generator | None = None
    ) -> None:
        """Normal matrices; `divisor` is for a `down_proj` that writes into the residual stream."""
        nn.init.normal_(self.up_proj, std=std, generator=generator)
        nn.init.normal_(self.down_proj, std=std / divisor, generator=generator)

    def forward(self, z: Float[Tensor, "t l"], routing: ops.Routing) -> Float[Tensor, "t l"]:
        """The weighted sum of each token's chosen experts."""
        return ops.expert_mlp(z, self.up_proj, self.down_proj, routing.weights, routing.indices)


class MoE(Mixer):
    """Router, routed experts (in the latent space where there is one) and the shared expert."""

    LETTERS: ClassVar[Mapping[str, str]] = {
        "e": "n_routed_experts",
        "k": "num_experts_per_tok",
        "f": "moe_intermediate_size",
        "l": "expert_size",
        "s": "moe_shared_expert_intermediate_size",
    }

    def __init__(self, config: NemotronConfig, name: str = "") -> None:
        super().__init__()
        self.name = name
        d, latent = config.hidden_size, config.moe_latent_size
        self.gate = Router(config)
        self.experts = Experts(config)
        self.latent = latent is not None
        if latent is not None:
            self.fc1_latent_proj = linear(d, latent, config.mlp_bias)
            self.fc2_latent_proj = linear(latent, d, config.mlp_bias)
        self.shared_experts = (
            MLP(d, config.moe_shared_expert_intermediate_size, config.mlp_bias)
            if config.n_shared_experts
            else None
        )

    @classmethod
    def build(cls, config: NemotronConfig, name: str) -> MoE:
        """The mixer of an `E` layer, whose router statistics carry its name."""
        return cls(config, name)

    def init_weights(
        self, std: float, residual_divisor: float, generator: torch.Generator | None = None
    ) -> None:
        """Normal matrices. The last matrix of each path writes into the residual stream."""
        self.gate.init_weights(std, generator)
        self.experts.init_weights(std, 1.0 if self.latent else residual_divisor, generator)
        if self.latent:
            self.fc1_latent_proj.init_weights(std, generator=generator)
            self.fc2_latent_proj.init_weights(std, residual_divisor, generator)
        if self.shared_experts is not None:
            self.shared_experts.init_weights(std, residual_divisor, generator)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        cache: None = None,
        context: ForwardContext = ForwardContext(),
    ) -> Float[Tensor, "b _ d"]:
        """Route each token by itself; `cache` is what other mixers need."""
        x = context.kept(x)
        flat = x.reshape(-1, x.shape[-1])
        routing = self.gate(flat)
        if context.router_stats is not None:
            rows = x.shape[:2]
            scores, indices = routing.scores.unflatten(0, rows), routing.indices.unflatten(0, rows)
            context.router_stats.append(RouterStats(self.name, scores, indices))
        latent = (self.fc1_latent_proj, self.fc2_latent_proj) if self.latent else None
        return _mix(flat, routing, self.experts, latent, self.shared_experts).view(x.shape)

    def token_step(self, rows: int) -> TokenStep:
        """The step of `forward` for one token per row, without statistics."""
        route, up, down = self.gate.token_step(rows), self.experts.up_proj, self.experts.down_proj
        latent, shared = None, None
        if self.latent:
            projections = self.fc1_latent_proj, self.fc2_latent_proj
            latent = projections[0].product_for(rows), projections[1].product_for(rows)
        if self.shared_experts is not None:
            shared = self.shared_experts.token_step(rows)

        def experts(z: Tensor, routing: ops.Routing) -> Tensor:
            return cpu_experts.expert_mlp(z, up, down, routing.weights, routing.indices)

        return lambda x, cache, starts: _mix(x, route(x), experts, latent, shared)

    def compiled_part(self) -> MoeStruct:
        """Router, experts, and the latent projections and the shared expert if there are any."""
        up = self.experts.up_proj
        none = LinearStruct()
        latent = (none, none)
        if self.latent:
            latent = LinearStruct.of(self.fc1_latent_proj), LinearStruct.of(self.fc2_latent_proj)
        shared = (none, none)
        if self.shared_experts is not None:
            mlp = self.shared_experts
            shared = LinearStruct.of(mlp.up_proj), LinearStruct.of(mlp.down_proj)
        part = MoeStruct(
            LinearStruct.of(self.gate), *latent, *shared,
            address(self.gate.e_score_correction_bias), address(up),
            address(self.experts.down_proj), experts=up.shape[0], hidden=up.shape[1],
            latent=up.shape[2],
        )  # fmt: skip
        self._set_choice(part)
        return part

    def compiled_state(
        self, part: MoeStruct, state: StateStruct, cache: None, call: CompiledCall
    ) -> None:
        """No cache; but the rule of the choice is a dict whose values may be changed."""
        self._set_choice(part)

    def _set_choice(self, part: MoeStruct) -> None:
        choice = self.gate.choice
        if choice["n_group"] > 1:
            raise NotCompiledError(f"the router has n_group={choice['n_group']}")
        part.chosen, part.scale = choice["top_k"], choice["scale"]
        part.normalize = choice["normalize"]

    @classmethod
    def parameter_lines(cls, config: NemotronConfig) -> list[LedgerLine]:
        """Its parameters. A token reads k of the e experts."""
        lines = [
            LedgerLine("router", "e * d"),
            LedgerLine("router selection bias", "e"),
            LedgerLine("experts", "2 * e * f * l", active="2 * k * f * l"),
        ]
        if config.moe_latent_size is not None:
            lines.append(LedgerLine("latent projections", "2 * d * l"))
            if config.mlp_bias:
                lines.append(LedgerLine("biases of the latent projections", "l + d"))
        if config.n_shared_experts:
            lines.append(LedgerLine("shared expert", "2 * d * s"))
            if config.mlp_bias:
                lines.append(LedgerLine("biases of the shared expert", "s + d"))
        return lines

    @classmethod
    def flop_lines(cls, config: NemotronConfig, mode: str) -> list[LedgerLine]:
        """Its FLOPs per token, the same in every mode."""
        lines = [LedgerLine("router", "2*d * e"), LedgerLine("experts", "k * 2 * 2*f*l")]
        if config.moe_latent_size is not None:
            lines.append(LedgerLine("latent projections", "2 * 2*d * l"))
        if config.n_shared_experts:
            lines.append(LedgerLine("shared expert", "2 * 2*d * s"))
        return lines

    @classmethod
    def matrices(cls, config: NemotronConfig) -> list[Matrix]:
        """The router, the experts as one module, and the projections and shared expert if any."""
        d, width = config.hidden_size, config.expert_size
        found = [Matrix("gate", "router", config.n_routed_experts * d)]
        if config.moe_latent_size is not None:
            found.append(Matrix("fc1_latent_proj", "latent", d * width))
        experts = 2 * config.n_routed_experts * config.moe_intermediate_size * width
        found.append(Matrix("experts", "experts", experts))
        if config.moe_latent_size is not None:
            found.append(Matrix("fc2_latent_proj", "latent", width * d))
        if config.n_shared_experts:
            size = d * config.moe_shared_expert_intermediate_size
            found += [
                Matrix("shared_experts.up_proj", "shared", size),
                Matrix("shared_experts.down_proj", "shared", size),
            ]
        return found


def _mix(
    flat: Float[Tensor, "t d"],
    routing: ops.Routing,
    experts: Callable[..., Tensor],
    latent: tuple[Callable[..., Tensor], Callable[..., Tensor]] | None,
    shared: Callable[..., Tensor] | None,
) -> Float[Tensor, "t d"]:
    """The sum of all experts, which are modules or functions; `latent` leads into z and back."""
    if latent is None:
        y = experts(flat, routing)
    else:
        y = latent[1](experts(latent[0](flat), routing))
    return y if shared is None else y + shared(flat)
