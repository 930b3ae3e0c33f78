"""AdamW, with weight decay on matrices only, and gradient clipping.

    m <- b1 m + (1 - b1) g        v <- b2 v + (1 - b2) g^2
    w <- w - lr (m^ / (sqrt(v^) + eps) + wd w)            m^, v^: bias-corrected

Weight decay pulls a weight towards zero in every step, independent of its gradient. That is a good
prior for a matrix. It is a wrong one for the scale of a norm, for a bias, and for Mamba's A_log, D
and dt_bias, which set time scales: A_log = 0 is no more natural than A_log = 2. So tensors with
fewer than two dimensions have no decay. This is Megatron's rule, and it covers all of these.
Embeddings, the head, the convolution taps and the stacked experts have decay.

Super: beta 0.9 / 0.95, weight decay 0.1, eps 1e-8 (reference sheet 7). Clipping at norm 1.0 is the
default of NVIDIA's recipes; the report does not state it.
AdamW: Loshchilov and Hutter 2017 (arXiv 1711.05101).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from nemotron_lite.layers.moe import Experts
from nemotron_lite.train.muon import Muon


def parameter_groups(
    model: nn.Module, weight_decay: float, *, orthogonal: bool = False
) -> list[dict[str, Any]]:
    """Groups of trainable parameters: matrices with decay, everything else without.

    The order inside a group is that of `model.named_parameters()`, so that a saved optimizer state
    fits the same model again.

    Args:
        orthogonal: put the matrices that Muon moves into a third group, the last.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    moved = _orthogonal(model) if orthogonal else set()
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in trainable if p.ndim >= 2 and id(p) not in moved],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    if orthogonal:
        chosen = [p for p in trainable if id(p) in moved]
        groups.append({"params": chosen, "weight_decay": weight_decay, "orthogonal": True})
    return groups


def _orthogonal(model: nn.Module) -> set[int]:
    """Identities of the parameters that Muon moves: projections and experts, but not the head."""
    head = getattr(model, "lm_head", None)
    found = set()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            found.add(id(module.weight))
        elif isinstance(module, Experts):
            found |= {id(module.up_proj), id(module.down_proj)}
    return found


def make_optimizer(
    model: nn.Module,
    *,
    name: str = "adamw",
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> torch.optim.AdamW:
    """Fused AdamW over `parameter_groups` (one pass over the weights instead of ten), or Muon.

    Args:
        name: "adamw" or "muon".
    """
    options: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, fused=True)
    if name == "muon":
        return Muon(parameter_groups(model, weight_decay, orthogonal=True), **options)
    return torch.optim.AdamW(parameter_groups(model, weight_decay), **options)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale all gradients by one factor so that their joint norm is at most `max_norm`.

    Returns:
        The norm before clipping.

    Raises:
        FloatingPointError: the norm is not finite; the gradients are left as they are.
    """
    norm = nn.utils.clip_grad_norm_(parameters, max_norm, error_if_nonfinite=False)
    value = float(norm)
    if not torch.isfinite(norm):
        raise FloatingPointError(
            f"the gradient norm is {value}, expected a finite number: lower the learning rate, "
            "lengthen the warm-up, or look for NaN or infinity in the weights."
        )
    return value
