"""Sensitivity: how much loss each format adds to each module, without trying every mix.

Quantizing module m changes its output y by D_f. To second order, with the gradient's mean zero at a
trained model and the Hessian replaced by the Fisher information's diagonal,

    loss(m in f) - loss  ~  1/2  sum over outputs of  (dL/dy)^2 D_f^2

which needs one forward and one backward pass for all modules and formats together. Both factors are
taken at the same token and channel, so an error where nothing depends on it costs nothing. Costs of
several modules are added as if they did not know of each other; the knapsack relies on that.

`inputs=True` counts rounded activations as well (the weights' format on both sides, as Blackwell
multiplies); False counts weights alone.

The estimate ranks; it is not the loss. Measure what was chosen on held-out text.

Source: Nemotron 3 Super report 4.2 (AutoQuantize: second-order Taylor scores with Fisher).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.calibration import Calibration
from nemotron_lite.quantization.pack_model import stand_in
from nemotron_lite.quantization.packed_layers import Packed
from nemotron_lite.quantization.quantizable import QuantizableModule, quantizable_modules


@dataclass(frozen=True)
class Costs:
    """What each unit would cost.

    Attributes:
        units: in the order of the model.
        nats: for each unit, format -> estimated nats per token; 0 for "bf16".
    """

    units: list[QuantizableModule]
    nats: list[dict[str, float]]


def sensitivity(
    model: Nemotron,
    batches: Iterable[Int[Tensor, "_ _"]],
    calibration: Calibration,
    *,
    choices: str = "any",
    inputs: bool = False,
) -> Costs:
    """Estimate the cost of every unit in every format it may have.

    Args:
        model: with plain weights.
        batches: text; each row is one document's piece.
        calibration: of the same model.
        choices: see `units`.
        inputs: whether inputs are rounded too.

    Raises:
        ValueError: no batches, rows of fewer than two tokens, a model that is packed already.
    """
    parts = quantizable_modules(model, choices)
    tried = [
        {f: stand_in(model, u.path, f, calibration) for f in u.formats if f != "bf16"}
        for u in parts
    ]
    for layer in (m for each in tried for one in each.values() for m in one.modules()):
        if isinstance(layer, Packed):
            layer.rounds_inputs = inputs
    sums = [dict.fromkeys(unit.formats, 0.0) for unit in parts]
    outputs: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}

    def watch(number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], y: Tensor) -> None:
            with torch.no_grad():
                change = {f: (one(*args) - y).square() for f, one in tried[number].items()}
            outputs[number] = (y, change)

        return hook

    handles = [
        model.get_submodule(unit.path).register_forward_hook(watch(number))
        for number, unit in enumerate(parts)
    ]
    tokens = 0
    try:
        for batch in batches:
            if batch.shape[1] < 2:
                raise ValueError(f"rows of {batch.shape[1]} tokens: nothing to predict in them.")
            batch = batch.to(model.device)
            with torch.enable_grad():
                logits = model(batch).logits[:, :-1].flatten(0, 1)
                loss = F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
                numbers = list(outputs)
                grads = torch.autograd.grad(loss, [outputs[i][0] for i in numbers])
            for number, grad in zip(numbers, grads, strict=True):
                weight = grad.double().square()
                for form, change in outputs[number][1].items():
                    sums[number][form] += 0.5 * float((weight * change).sum())
            outputs.clear()
            tokens += batch[:, 1:].numel()
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise ValueError("no text to measure on: expected at least one batch of tokens.")
    return Costs(parts, [{f: value / tokens for f, value in each.items()} for each in sums])
