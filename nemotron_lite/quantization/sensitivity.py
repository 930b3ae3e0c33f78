"""Sensitivity: how much loss each format adds to each module, without trying every mix.

Quantizing module m to format f changes its output y by D_f. At a trained model the gradient is zero
on average, so the second order counts. With the Hessian replaced by the diagonal of the Fisher
information,

    loss(m in f) - loss  ~  1/2  sum over outputs of  (dL/dy)^2 D_f^2

This needs one forward and one backward pass for all modules and formats together. Both factors are
taken at the same token and channel: an error costs nothing where the loss does not depend on it.
The costs of several modules are added, as if the modules were independent; bit allocation relies on
that.

`inputs=True` counts the rounding of activations as well (in the format of the weight, as Blackwell
multiplies); False counts the weights alone.

The loss is that of the next token. The MTP module does not change it, so its formats cost nothing
here, and a budget gives it the smallest. What that costs is the acceptance of drafts.

The estimate ranks modules and formats; it is not the loss. Measure the chosen mix on held-out text.

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
from nemotron_lite.quantization.pack_model import packed_copy
from nemotron_lite.quantization.packed_layers import PackedWeight
from nemotron_lite.quantization.quantizable import QuantizableModule, quantizable_modules


@dataclass(frozen=True)
class Sensitivity:
    """What each format of each module would cost.

    Attributes:
        modules: in the model's order.
        nats: for each module, format -> estimated increase of the loss in nats per token; 0 for
            "bf16".
    """

    modules: list[QuantizableModule]
    nats: list[dict[str, float]]


def measure_sensitivity(
    model: Nemotron,
    batches: Iterable[Int[Tensor, "_ _"]],
    calibration: Calibration,
    *,
    choices: str = "any",
    inputs: bool = False,
) -> Sensitivity:
    """Estimate the cost of every quantizable module in every format it may have.

    Args:
        model: with plain weights.
        batches: of tokens; each row is a piece of one document.
        calibration: of the same model.
        choices: as for `quantizable_modules`.
        inputs: whether to round the inputs too.

    Raises:
        ValueError: no batches, rows of fewer than two tokens, or a model that is quantized already.
    """
    modules = quantizable_modules(model, choices)
    copies = [
        {f: packed_copy(model, module.path, f, calibration) for f in module.formats if f != "bf16"}
        for module in modules
    ]
    for layer in (m for by_format in copies for copy in by_format.values() for m in copy.modules()):
        if isinstance(layer, PackedWeight):
            layer.quantize_inputs = inputs
    sums = [dict.fromkeys(module.formats, 0.0) for module in modules]
    outputs: dict[int, tuple[Tensor, dict[str, Tensor]]] = {}  # y, and D_f^2 of each format

    def record_output(number: int) -> Any:
        def hook(module: Any, args: tuple[Any, ...], y: Tensor) -> None:
            with torch.no_grad():
                change = {f: (copy(*args) - y).square() for f, copy in copies[number].items()}
            outputs[number] = (y, change)

        return hook

    handles = [
        model.get_submodule(module.path).register_forward_hook(record_output(number))
        for number, module in enumerate(modules)
    ]
    tokens = 0
    try:
        for batch in batches:
            if batch.shape[1] < 2:
                raise ValueError(
                    f"rows of {batch.shape[1]} tokens; expected at least 2, because the loss "
                    "predicts each token from those before it."
                )
            batch = batch.to(model.device)
            with torch.enable_grad():
                logits = model(batch).logits[:, :-1].flatten(0, 1)
                loss = F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="sum")
                numbers = list(outputs)
                grads = torch.autograd.grad(loss, [outputs[i][0] for i in numbers])
            for number, grad in zip(numbers, grads, strict=True):
                fisher = grad.double().square()
                for format, change in outputs[number][1].items():
                    sums[number][format] += 0.5 * float((fisher * change).sum())
            outputs.clear()
            tokens += batch[:, 1:].numel()
    finally:
        for handle in handles:
            handle.remove()
    if not tokens:
        raise ValueError("no text to measure on: expected at least one batch of tokens.")
    return Sensitivity(modules, [{f: value / tokens for f, value in each.items()} for each in sums])
