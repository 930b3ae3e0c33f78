"""What a call of the model returns: hidden states, logits, and statistics of the routers.

`Nemotron.forward` gives an `Output`; without the head it gives a `Hidden`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.layers import RouterStats


@dataclass
class Hidden:
    """The model's output before the head.

    Attributes:
        hidden: after the final norm, `b t d`.
        mtp_hidden: entry k-1 is depth k, `b t-k d`; its row i predicts token i+k+1.
        router: statistics of every mixture of experts, backbone first; empty unless `router_stats`.
    """

    hidden: Float[Tensor, "b t d"]
    mtp_hidden: list[Tensor] = field(default_factory=list)
    router: list[RouterStats] = field(default_factory=list)


@dataclass
class Output(Hidden):
    """`Hidden` with the head applied.

    Attributes:
        logits: float32 (float64 for a float64 model), `b t v`, or `b n v` with `logits_to_keep=n`.
        mtp_logits: entry k-1 is depth k, `b t-k v`; its row i predicts token i+k+1.
    """

    logits: Tensor = field(kw_only=True)
    mtp_logits: list[Tensor] = field(default_factory=list)


for _result in (Hidden, Output):  # so that torch.export can return them
    torch.export.register_dataclass(_result)


def last_tokens(
    hidden: Float[Tensor, "b t d"], lengths: Int[Tensor, "b"] | None, count: int
) -> Float[Tensor, "b n d"]:
    """The last `count` real tokens of each row (see `logits_to_keep`); all t tokens for 0."""
    if not count:
        return hidden
    if lengths is None:
        return hidden[:, -count:]
    ends = lengths.to(hidden.device)[:, None]
    places = (ends - count + torch.arange(count, device=hidden.device)).clamp(min=0)
    return hidden[torch.arange(len(places), device=hidden.device)[:, None], places]


def refuse_backward(logits: Tensor) -> Tensor:
    """The same logits, computed after a cache: `backward()` from them raises a RuntimeError."""
    guarded: Tensor = _NoGradient.apply(logits)
    return guarded


class _NoGradient(torch.autograd.Function):
    """Logits after a cache. Through the head alone a gradient would come out incomplete."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise RuntimeError(
            "these logits were computed after a cache, and no gradients are recorded through a "
            "cache: call the model on the whole text without a cache, model(tokens)."
        )
