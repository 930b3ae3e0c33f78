"""Calibration: how large the inputs of every module get, and the keys and values.

A checkpoint in ModelOpt's layout carries one number per module, `input_scale`. From it serving
derives the tensor scale of the module's activations; their block scales follow from the data. That
number is the largest magnitude found on a sample of text, divided by the format's largest value.

    a linear layer      max |x| over all tokens
    routed experts      per expert, over the tokens that chose it: of z, and of relu(W1 z)^2
    keys and values     max |k|, max |v|: no position embedding and no norm changes them afterwards

An expert that no token chose gets the largest number of its layer. A scale that is too large only
makes the steps coarser; one that is too small clips.

Source: reference sheet 6.6 (NVIDIA: 512 samples of 4096 tokens) and 10.3.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nemotron_lite import ops
from nemotron_lite.layers.moe import Experts
from nemotron_lite.model import Nemotron


@dataclass(frozen=True)
class Calibration:
    """Largest magnitudes, float32.

    Attributes:
        input_amax: name of a weight -> of the inputs it multiplies; one number, or one per expert.
        kv_amax: path of a `k_proj` or `v_proj` -> of its outputs.
        tokens: how many were read.
    """

    input_amax: dict[str, Tensor]
    kv_amax: dict[str, Tensor]
    tokens: int


@torch.no_grad()
def calibrate(
    model: Nemotron, batches: Iterable[Int[Tensor, "_ _"]], *, choices: str = "any"
) -> Calibration:
    """Run a model over some text and record the largest magnitudes.

    Args:
        model: with plain weights.
        batches: of tokens.
        choices: as for `quantizable_modules`. With "everything", the head and all depths of the
            MTP module are run too.

    Raises:
        ValueError: no batches, or activations that are NaN or infinite.
    """
    everything = choices == "everything"
    depths = model.config.mtp_depths if everything and model.mtp is not None else 0
    input_amax: dict[str, Tensor] = {}
    kv_amax: dict[str, Tensor] = {}

    def record(found: dict[str, Tensor], name: str, amax: Tensor) -> None:
        amax = amax.float()
        if not bool(amax.isfinite().all()):
            raise ValueError(
                f"the activations at {name} are not finite; expected finite numbers. Check the "
                "model's weights for NaN or infinity."
            )
        found[name] = torch.maximum(found[name], amax) if name in found else amax

    def linear_hook(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            record(input_amax, f"{name}.weight", args[0].abs().amax())
            if name.startswith("backbone.") and name.endswith(("k_proj", "v_proj")):
                record(kv_amax, name, y.abs().amax())

        return hook

    def experts_hook(name: str) -> Any:
        def hook(module: Experts, args: tuple[Any, ...], y: Tensor) -> None:
            up, down = _amax_per_expert(module, *args)
            record(input_amax, f"{name}.up_proj", up)
            record(input_amax, f"{name}.down_proj", down)

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            handles.append(module.register_forward_hook(experts_hook(name)))
        elif isinstance(module, nn.Linear) and (everything or name.startswith("backbone.")):
            handles.append(module.register_forward_hook(linear_hook(name)))
    tokens = 0
    try:
        for batch in batches:
            if everything:
                model(batch.to(model.device), mtp_depths=depths)
            else:
                model.forward_hidden(batch.to(model.device))
            tokens += batch.numel()
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise ValueError("no text to calibrate on: expected at least one batch of tokens.")
    without_gaps = {  # experts without a token have 0 here
        name: torch.where(amax == 0, amax.max(), amax) if amax.ndim else amax
        for name, amax in input_amax.items()
    }
    return Calibration(without_gaps, kv_amax, tokens)


def _amax_per_expert(module: Experts, z: Tensor, routing: ops.Routing) -> tuple[Tensor, Tensor]:
    """Largest input magnitude of each expert's two matrices; 0 for experts without a token."""
    up = torch.zeros(module.up_proj.shape[0], device=z.device)
    down = torch.zeros_like(up)
    for e in routing.indices.unique().tolist():
        rows = z[(routing.indices == e).any(1)]
        up[e] = rows.abs().amax()
        down[e] = ops.squared_relu(rows @ module.up_proj[e].to(z.dtype).mT).amax()
    return up, down
