"""Models of equal compute per token: a solver chooses their widths, nobody tunes them by hand.

The question of the experiment (`quality_per_flop`) is which architecture learns more from the same
arithmetic. So every model of a list costs as many FLOPs per trained token as a reference, within
1 %, counted by the ledger:

    hybrid            Mamba-2 layers, one attention layer, a standard mixture: the reference
    latent            the same with LatentMoE, the variant "acc": latent d/4, 4 times the experts
    latent_eff        LatentMoE, the variant "eff": 4 times the experts, as many per token as the
                      reference. It costs less; that is its purpose
    latent_eff_longer the same model, trained on more tokens, to the FLOPs of the reference
    moe               a transformer with a standard mixture
    dense             a transformer with a dense MLP

What the solver chooses:

    width of the MLP or of one expert    so that the FLOPs are equal (`dense`, `moe`)
    number of experts                    so that the stored parameters are nearly equal (`moe`)
    experts per token                    so that the FLOPs are equal (`latent`). Four times as many
                                         would cost more than the reference, because the projections
                                         and the larger router cost something too: Super has 22 of
                                         512 beside 6 of 128, and not 24

A dense model cannot have the parameters of a mixture at equal FLOPs. That is the reason for
mixtures, and the record says how many parameters each model has.

Width, vocabulary and heads are the same in all models. The transformers have a pair of layers more
than the hybrid has mixtures, because an attention layer is cheaper than a Mamba-2 layer; the widths
of their MLPs are then near those of the hybrid. Their queries and keys have rotary positions
(`add_rotary`). A transformer needs positions, Mamba-2 layers do not, and a transformer without them
would be a weak baseline. The rotation is not counted: the ledger leaves elementwise work out.

The factor on the routing weights is sqrt(k) in every mixture, so that the sum over k experts has
the same size. The published factors follow this rule too: 2.5 for 6 experts (Nano), 5.0 for 22
(Super).

Equal are the FLOPs of the ledger: three forward passes for each trained token. The updates of Muon
are not among them. They cost the same however many tokens a batch has, and much less for many small
matrices than for few large ones. `optimizer_flops` counts them, and the record has their share.

Source: reference sheet 4.4 (the LatentMoE paper, arXiv 2601.18089).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_lite import Nemotron, NemotronConfig, ledger
from nemotron_lite.layers.attention import Attention
from nemotron_lite.train import muon
from nemotron_lite.train.optimizer import parameter_groups

TOLERANCE = 0.01  # of the reference's FLOPs per token
STEPS = (16, 8, 4, 2, 1)  # a width is a multiple of the largest that fits
ALPHA = 4  # d / latent width, and the factor of the number of experts
ROTARY_BASE = 10_000.0


@dataclass(frozen=True)
class Model:
    """One model of the list.

    Attributes:
        name: its key in the record.
        words: its name in tables and drawings.
        config: its sizes.
        rotary: whether its attention layers have rotary positions.
        longer: how many times the updates of the others it makes.
    """

    name: str
    words: str
    config: NemotronConfig
    rotary: bool = False
    longer: float = 1.0

    def build(self, seed: int) -> Nemotron:
        """The model with random weights."""
        model = Nemotron(self.config, seed=seed)
        if self.rotary:
            add_rotary(model)
        return model


def flops_per_token(config: NemotronConfig, length: int) -> float:
    """FLOPs of one trained token in rows of `length` tokens."""
    return float(ledger.flops(config, length, "train").per_token)


@lru_cache(maxsize=8)
def model_list(reference: NemotronConfig, length: int) -> Mapping[str, Model]:
    """All models of the experiment, by name.

    Args:
        reference: the hybrid with a standard mixture.
        length: tokens per row in training; attention costs more in longer rows.

    Raises:
        ValueError: a model has no sizes of equal FLOPs.
    """
    pairs = reference.pattern.count("E") + 1
    latent = reference.replace(
        moe_latent_size=reference.hidden_size // ALPHA,
        n_routed_experts=ALPHA * reference.n_routed_experts,
    )
    saved = flops_per_token(reference, length) / flops_per_token(latent, length)
    acc = with_equal_top_k(latent, reference, length)
    mixture = with_equal_mixture(reference.replace(pattern="*E" * pairs), reference, length)
    dense = with_equal_mlp(reference.replace(pattern="*-" * pairs), reference, length)
    models = (
        Model("hybrid", "hybrid, standard MoE", reference),
        Model("latent", "hybrid, LatentMoE", acc),
        Model("moe", "transformer, standard MoE", mixture, rotary=True),
        Model("dense", "transformer, dense", dense, rotary=True),
        Model("latent_eff", "hybrid, LatentMoE eff", latent),
        Model("latent_eff_longer", "hybrid, LatentMoE eff, longer", latent, longer=saved),
    )
    return {model.name: replace(model, config=_scaled(model.config)) for model in models}


def _scaled(config: NemotronConfig) -> NemotronConfig:
    """The config with the factor on the routing weights that its experts per token need."""
    return config.replace(routed_scaling_factor=math.sqrt(config.num_experts_per_tok))


def with_equal_mlp(
    config: NemotronConfig, reference: NemotronConfig, length: int
) -> NemotronConfig:
    """The config with the MLP width that gives it the FLOPs of `reference`."""
    return _with_equal_width(
        lambda width: config.replace(intermediate_size=width), flops_per_token(reference, length),
        length,
    )  # fmt: skip


def with_equal_mixture(
    config: NemotronConfig, reference: NemotronConfig, length: int
) -> NemotronConfig:
    """The config with the FLOPs of `reference`, and as nearly as possible its parameters.

    The shared expert keeps its width in experts.
    """
    wanted = flops_per_token(reference, length)
    parameters = ledger.parameters(reference).total
    shared = config.moe_shared_expert_intermediate_size / config.moe_intermediate_size

    def of_experts(experts: int, width: int) -> NemotronConfig:
        return config.replace(
            moe_intermediate_size=width,
            moe_shared_expert_intermediate_size=max(1, round(shared * width)),
            n_routed_experts=experts,
        )

    found = []
    for experts in range(config.num_experts_per_tok, 2 * config.n_routed_experts + 1):
        try:
            one = _with_equal_width(partial(of_experts, experts), wanted, length)
        except ValueError:  # the router of so many experts costs too much
            continue
        found.append((abs(ledger.parameters(one).total - parameters), one))
    if not found:
        raise ValueError(_no_size(config, wanted))
    return min(found, key=lambda pair: pair[0])[1]


def with_equal_top_k(
    config: NemotronConfig, reference: NemotronConfig, length: int
) -> NemotronConfig:
    """The config with the number of experts per token that brings it nearest to the FLOPs."""
    wanted = flops_per_token(reference, length)
    choices = [config.replace(num_experts_per_tok=k) for k in range(1, config.n_routed_experts + 1)]
    best = min(choices, key=lambda c: abs(flops_per_token(c, length) - wanted))
    if not _is_equal(best, wanted, length):
        raise ValueError(_no_size(config, wanted))
    return best


def _with_equal_width(
    of_width: Callable[[int], NemotronConfig], wanted: float, length: int
) -> NemotronConfig:
    # FLOPs are a linear function of the width.
    first, second = (flops_per_token(of_width(width), length) for width in (1000, 2000))
    exact = 1000 + 1000 * (wanted - first) / (second - first)
    for step in STEPS:
        width = step * round(exact / step)
        if width >= 1 and _is_equal(of_width(width), wanted, length):
            return of_width(width)
    raise ValueError(_no_size(of_width(1), wanted))


def _is_equal(config: NemotronConfig, wanted: float, length: int) -> bool:
    return abs(flops_per_token(config, length) - wanted) <= TOLERANCE * wanted


def _no_size(config: NemotronConfig, wanted: float) -> str:
    return (
        f"no sizes give a model of pattern {config.pattern} and width {config.hidden_size} "
        f"{wanted:,.0f} FLOPs per trained token within {TOLERANCE:.0%}: change the pattern, or the "
        "sizes of the reference."
    )


def costs(config: NemotronConfig, length: int, contexts: tuple[int, ...]) -> dict[str, Any]:
    """What the ledger says about a model: FLOPs, parameters, bytes read for a decoded token.

    Args:
        length: tokens per row in training.
        contexts: tokens before the decoded one, for the bytes. Weights and keys and values are
            counted in bfloat16, states in float32; one row is decoded.
    """
    count = ledger.parameters(config)
    flops = ledger.flops(config, length, "train")
    # A token reads one row of the embedding.
    weights = 2 * (count.active_without_embedding + config.hidden_size)
    return {
        "flops_per_token": float(flops.per_token),
        "flops_by_part": {part: float(n) for part, n in flops.by_part.items()},
        "parameters": count.total,
        "active_parameters": count.active,
        "active_parameters_of_layers": count.active_body,
        "bytes_per_decoded_token": {
            str(context): weights + ledger.cache(config, context).total for context in contexts
        },
    }


def optimizer_flops(config: NemotronConfig) -> int:
    """FLOPs of the matrix products of Muon in one update; those of AdamW are elementwise.

    Each of its steps multiplies r x c by c x r, r x r by r x r, and r x r by r x c, with r <= c.
    """
    groups = parameter_groups(Nemotron(config, device="meta"), 0.0, orthogonal=True)
    total = 0
    for matrices in groups[-1]["params"]:
        r, c = sorted(matrices.shape[-2:])
        total += matrices.numel() // (r * c) * muon.STEPS * (4 * r * r * c + 2 * r**3)
    return total


def add_rotary(model: Nemotron) -> None:
    """Give all attention layers of a model rotary positions, for whole sequences without a cache.

    Queries and keys are turned behind their projections, so that their product depends on the
    distance of two tokens (Su et al. 2021, arXiv 2104.09864). Only differences of positions count,
    so a row of concatenated documents needs no positions of its own for each document.
    """
    for module in model.modules():
        if isinstance(module, Attention):
            turn = _Rotation(module.head_dim)
            module.q_proj.register_forward_hook(turn)
            module.k_proj.register_forward_hook(turn)


class _Rotation:
    """A forward hook that turns the two halves of every head by angles that grow with t."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self.rates = ROTARY_BASE ** (-torch.arange(0, head_dim, 2) / head_dim)

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        rates = self.rates.to(output.device)
        angles = torch.arange(output.shape[1], device=output.device)[:, None, None] * rates
        cos, sin = angles.cos().to(output.dtype), angles.sin().to(output.dtype)
        a, b = output.unflatten(-1, (-1, self.head_dim)).chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(2)
