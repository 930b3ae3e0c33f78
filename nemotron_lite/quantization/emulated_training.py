"""Train a model under a precision recipe: swap the quantized layers in, train, swap them out again.

`EmulatedPrecision` is a context manager. Inside it, the modules that the recipe runs in NVFP4 or
MXFP8 are replaced by their quantized counterparts. These share the original weights, so the
optimizer, the names in a checkpoint and the model's `state_dict` do not change. Outside it, the
model is as before.

    with EmulatedPrecision(model, RECIPES["nvfp4"], seed=0) as precision:
        precision.start_micro_batch(i)       # selects the random bits of micro-batch i
        with precision.autocast():           # BF16 for the products that are not quantized
            out = model.forward_hidden(tokens)
        ...backward()

The random bits of stochastic rounding depend only on the seed, the number of the micro-batch and
the position in the model. A run that is resumed at micro-batch i continues with the same losses.

Left out: switching formats during a run (reference sheet 6.4: BF16 in the forward pass for the last
part of training halves the gap). To do this, continue the training with another recipe.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from nemotron_lite.layers.moe import Experts
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.emulated_layers import (
    MXFP8Linear,
    NVFP4Experts,
    NVFP4Linear,
    StochasticSeeds,
)
from nemotron_lite.quantization.recipe import ModuleFormat, Recipe, get_recipe, module_formats


class EmulatedPrecision(AbstractContextManager["EmulatedPrecision"]):
    """Runs the matrix products of `model` as a recipe says, while the context is open.

    Args:
        model: with FP32 weights.
        recipe: a recipe or its name.
        seed: of stochastic rounding.

    Raises:
        ValueError: an unknown recipe.
        RuntimeError: (on entering) the context is open already.
    """

    def __init__(self, model: Nemotron, recipe: str | Recipe, seed: int = 0) -> None:
        self.model, self.recipe = model, get_recipe(recipe)
        self._formats = module_formats(model.config, self.recipe)
        self._seeds = StochasticSeeds(seed)
        self._originals: list[tuple[str, nn.Module]] = []

    def __enter__(self) -> EmulatedPrecision:
        if any(isinstance(module, _EMULATED) for module in self.model.modules()):
            raise RuntimeError(
                "this model is inside an `EmulatedPrecision` already. Leave that context first."
            )
        for i, entry in enumerate(self._formats):
            if entry.format in ("nvfp4", "mxfp8"):
                original = self.model.get_submodule(entry.path)
                self.model.set_submodule(entry.path, self._counterpart(original, entry, 2 * i))
                self._originals.append((entry.path, original))
        return self

    def __exit__(self, *_: object) -> None:
        for path, original in self._originals:
            self.model.set_submodule(path, original)
        self._originals.clear()

    def start_micro_batch(self, micro_batch: int) -> None:
        """Use the random bits of this micro-batch from now on; counted over the whole run."""
        self._seeds.start_micro_batch(micro_batch)

    def autocast(self) -> torch.autocast:
        """The autocast of the forward pass: BF16, or disabled for a recipe in FP32."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.recipe.mixed)

    def _counterpart(self, original: nn.Module, entry: ModuleFormat, number: int) -> nn.Module:
        """The quantized layer that shares the weights of `original`."""
        options: dict[str, Any] = dict(
            recipe=self.recipe.gemm, seeds=self._seeds, number=number, name=entry.path
        )
        if isinstance(original, Experts):
            return NVFP4Experts(original, **options)
        assert isinstance(original, nn.Linear)
        if entry.format == "mxfp8":
            return MXFP8Linear.from_linear(original)
        return NVFP4Linear.from_linear(original, **options)


_EMULATED = (NVFP4Linear, NVFP4Experts, MXFP8Linear)
