"""A precision recipe at work in a model: swap the layers in, train, swap them out again.

`Arithmetic` is a context. Inside, the modules that the recipe's map places in NVFP4 or MXFP8 are
replaced by their quantized counterparts, which stand on the very same weights: the optimiser, the
names in a checkpoint and the model's `state_dict` notice nothing. Outside, the model is as before.

    with Arithmetic(model, RECIPES["nvfp4"], seed=0) as arithmetic:
        arithmetic.at(i)                     # the dice of micro-batch i
        with arithmetic.products():          # BF16 for whatever is not quantized
            out = model.forward_hidden(tokens)
        ...backward()

The bits of stochastic rounding depend on the seed, the number of the micro-batch and the place in
the model, on nothing before. A run that is resumed at micro-batch i goes on with the same losses.

Left out: switching formats during a run (reference sheet 6.4: BF16 in the forward pass for
the last stretch halves the gap). Train on with another recipe for that.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from nemotron_lite.layers.moe import Experts
from nemotron_lite.model import Nemotron
from nemotron_lite.quantization.emulated_layers import Dice, MXFP8Linear, NVFP4Experts, NVFP4Linear
from nemotron_lite.quantization.recipe import Placement, Recipe, placements
from nemotron_lite.quantization.recipe import recipe as recipe_of


class Arithmetic(AbstractContextManager["Arithmetic"]):
    """The products of `model` as a recipe wants them, while the context is open.

    Args:
        model: with FP32 weights.
        which: a recipe or its name.
        seed: of stochastic rounding.

    Raises:
        ValueError: an unknown recipe. RuntimeError (on entering): the context is open already.
    """

    def __init__(self, model: Nemotron, which: str | Recipe, seed: int = 0) -> None:
        self.model, self.recipe = model, recipe_of(which)
        self.map = placements(model.config, self.recipe)
        self._dice = Dice(seed)
        self._before: list[tuple[str, nn.Module]] = []

    def __enter__(self) -> Arithmetic:
        if self._before or any(isinstance(m, _QUANTIZED) for m in self.model.modules()):
            raise RuntimeError(
                "this model is inside an `Arithmetic` already: leave that one first."
            )
        for i, place in enumerate(self.map):
            if place.format in ("nvfp4", "mxfp8"):
                original = self.model.get_submodule(place.path)
                self.model.set_submodule(place.path, self._counterpart(original, place, 2 * i))
                self._before.append((place.path, original))
        return self

    def __exit__(self, *_: object) -> None:
        for path, original in self._before:
            self.model.set_submodule(path, original)
        self._before.clear()

    def at(self, micro_batch: int) -> None:
        """Throw the dice of this micro-batch, counted over the whole run, from here on."""
        self._dice.at(micro_batch)

    def products(self) -> torch.autocast:
        """The autocast for the forward pass: BF16, or none for a recipe in FP32."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.recipe.mixed)

    def _counterpart(self, original: nn.Module, place: Placement, number: int) -> nn.Module:
        """The quantized layer over the weights of `original`."""
        how: dict[str, Any] = dict(
            recipe=self.recipe.gemm, dice=self._dice, number=number, name=place.path
        )
        if isinstance(original, Experts):
            return NVFP4Experts(original, **how)
        assert isinstance(original, nn.Linear)
        if place.format == "mxfp8":
            return MXFP8Linear.over(original)
        return NVFP4Linear.over(original, **how)


_QUANTIZED = (NVFP4Linear, NVFP4Experts, MXFP8Linear)
