"""Calibration: how large the inputs of every module get, and keys and values with them.

A checkpoint in ModelOpt's layout carries one number per module, `input_scale`, from which serving
derives the first of the two scales of its activations; the scales of blocks follow the data. That
number is the largest magnitude seen on a sample of text, divided by the format's largest value.

    a linear layer      max |x| over all tokens
    routed experts      per expert, over the tokens that chose it: of z, and of relu(W1 z)^2
    keys and values     max |k|, max |v|: attention has neither positions nor norms behind them

An expert that no token chose takes the largest number of its layer: too large a scale only makes
steps coarser, one too small clips.

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
        inputs: by the name of the weight that reads them; one number, or one for each expert.
        caches: by the path of a `k_proj` or `v_proj`: of what it makes.
        tokens: read.
    """

    inputs: dict[str, Tensor]
    caches: dict[str, Tensor]
    tokens: int


@torch.no_grad()
def calibrate(model: Nemotron, batches: Iterable[Int[Tensor, "_ _"]]) -> Calibration:
    """Run a model over some text and note how large what it multiplies gets.

    Raises:
        ValueError: no batches, or activations that are NaN or infinite.
    """
    inputs: dict[str, Tensor] = {}
    caches: dict[str, Tensor] = {}

    def note(found: dict[str, Tensor], name: str, value: Tensor) -> None:
        value = value.float()
        if not bool(value.isfinite().all()):
            raise ValueError(f"the activations at {name} are not finite: the model is broken.")
        found[name] = torch.maximum(found[name], value) if name in found else value

    def linear(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            note(inputs, f"{name}.weight", args[0].abs().amax())
            if name.endswith(("k_proj", "v_proj")):
                note(caches, name, y.abs().amax())

        return hook

    def experts(name: str) -> Any:
        def hook(module: Experts, args: tuple[Any, ...], y: Tensor) -> None:
            up, down = _of_experts(module, *args)
            note(inputs, f"{name}.up_proj", up)
            note(inputs, f"{name}.down_proj", down)

        return hook

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            handles.append(module.register_forward_hook(experts(name)))
        elif isinstance(module, nn.Linear) and name.startswith("backbone."):
            handles.append(module.register_forward_hook(linear(name)))
    tokens = 0
    try:
        for batch in batches:
            model.forward_hidden(batch.to(model.device))
            tokens += batch.numel()
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise ValueError("no text to calibrate on: expected at least one batch of tokens.")
    filled = {
        name: torch.where(value == 0, value.max(), value) if value.ndim else value
        for name, value in inputs.items()
    }
    return Calibration(filled, caches, tokens)


def _of_experts(module: Experts, z: Tensor, routing: ops.Routing) -> tuple[Tensor, Tensor]:
    """Largest magnitude that each expert's two matrices read; 0 for those without a token."""
    up = torch.zeros(module.up_proj.shape[0], device=z.device)
    down = torch.zeros_like(up)
    for e in routing.indices.unique().tolist():
        rows = z[(routing.indices == e).any(1)]
        up[e] = rows.abs().amax()
        down[e] = ops.squared_relu(rows @ module.up_proj[e].to(z.dtype).mT).amax()
    return up, down
