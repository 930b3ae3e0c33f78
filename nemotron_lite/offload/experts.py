"""Routed experts and an embedding that fetch only what the tokens of a call need.

Of a stack of experts, each chosen expert is fetched once per call and matrix, whatever the number
of tokens that chose it, and one at a time. (Small packed experts are multiplied in groups of a few
pairs of token and expert. One that two groups need is fetched for each.) The products are those of
the layers in memory:

    plain matrices       sorted by expert, one product per expert (backends/cpu_experts.py)
    NVFP4 and FP8        expert by expert, decoded in stripes (quantization/nvfp4)
    mixed, or with       expert by expert
    quantized inputs

A layer in memory takes other forms for a few small experts. Its results then differ by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite import ops

# Past `ops.expert_mlp`: it takes whole stacks.
from nemotron_lite.backends.cpu_experts import one_by_one
from nemotron_lite.offload.store import Tensors, WeightStore
from nemotron_lite.quantization.nvfp4.cpu_packed_products import (
    EncodedMatrix,
    multiply,
    multiply_experts,
)
from nemotron_lite.quantization.packed_layers import PackedExperts, PackedWeight


class OffloadedExperts(PackedExperts):
    """Routed experts whose matrices are fetched; `up_proj` and `down_proj` are on meta.

    Args:
        up, down: what the layer in memory has.
        path: of the module in the model.
    """

    store: WeightStore

    def __init__(
        self, up: PackedWeight | nn.Parameter, down: PackedWeight | nn.Parameter, path: str
    ) -> None:
        super().__init__(up, down)
        self.path = path

    def forward(self, z: Float[Tensor, "t l"], routing: ops.Routing) -> Float[Tensor, "t l"]:
        """The weighted sum of each token's chosen experts."""
        with self.store.choosing(self.path, routing.indices.unique().tolist()):
            return super().forward(z, routing)

    def _sum(self, z: Tensor, routing: ops.Routing) -> Tensor:
        up, down = self.up_proj, self.down_proj
        weights, indices = routing.weights, routing.indices
        if isinstance(up, PackedWeight) and isinstance(down, PackedWeight):
            if up.quantize_inputs or down.quantize_inputs:
                return self._one_by_one(z, routing)
            stacks = self._stack("up_proj", up), self._stack("down_proj", down)
            return multiply_experts(z, *stacks, weights, indices)
        if isinstance(up, PackedWeight) or isinstance(down, PackedWeight):
            return self._one_by_one(z, routing)
        experts, hidden = up.shape[:2]
        first, second = self._transposed("up_proj"), self._transposed("down_proj")
        return one_by_one(z, experts, hidden, first, second, weights.to(z.dtype), indices)

    def _one_by_one(self, z: Tensor, routing: ops.Routing) -> Tensor:
        out = torch.zeros_like(z)
        for e in routing.indices.unique().tolist():
            rows, slots = (routing.indices == e).nonzero(as_tuple=True)
            hidden = ops.squared_relu(self._multiply("up_proj", z[rows], e))
            answers = self._multiply("down_proj", hidden, e)
            weights = routing.weights[rows, slots].to(z.dtype)
            out = out.index_add(0, rows, answers * weights.unsqueeze(1))
        return out

    def _multiply(self, leaf: str, x: Tensor, expert: int) -> Tensor:
        tensors = self._fetch(leaf, expert)
        module = getattr(self, leaf)
        if not isinstance(module, PackedWeight):
            return F.linear(x, tensors[""].to(x.dtype))
        with torch.device("meta"):
            calibrated = "input_scale" in tensors
            one = PackedWeight(module.format, module.shape[-2:], calibrated=calibrated)
        one.quantize_inputs = module.quantize_inputs
        for name, tensor in tensors.items():
            one.register_buffer(name, tensor)
        return multiply(one.prepare_inputs(x), one.encoded(), F.linear)

    def _fetch(self, leaf: str, expert: int) -> Tensors:
        return self.store.expert(f"{self.path}.{leaf}", expert)

    def _transposed(self, leaf: str) -> Callable[[int], Tensor]:
        return lambda expert: self._fetch(leaf, expert)[""].mT

    def _stack(self, leaf: str, packed: PackedWeight) -> EncodedMatrix:
        stack = packed.encoded()

        def fetch(expert: int) -> EncodedMatrix:
            tensors = self._fetch(leaf, expert)
            if stack.scales is None:
                return EncodedMatrix(tensors["weight"], tensors["weight_scale"], stack.cols)
            scale, scales = tensors["weight_scale_2"], tensors["weight_scale"]
            return EncodedMatrix(tensors["weight"], scale, stack.cols, scales)

        return _FetchedStack(stack.codes, stack.scale, stack.cols, stack.scales, fetch)


@dataclass(frozen=True, eq=False)
class _FetchedStack(EncodedMatrix):
    """A stack on meta, of which single matrices are fetched."""

    fetch: Callable[[int], EncodedMatrix] | None = None

    def select(self, experts: int | Int[Tensor, "c"]) -> EncodedMatrix:
        assert self.fetch is not None
        if isinstance(experts, int):
            return self.fetch(experts)
        # A fetched matrix is valid until the next one is fetched, so each is copied.
        ids = experts.tolist()
        found: dict[int, EncodedMatrix] = {}
        for expert in ids:
            if expert not in found:
                found[expert] = _copied(self.fetch(expert))
        each = [found[expert] for expert in ids]
        return EncodedMatrix(
            _stacked([one.codes for one in each]),
            torch.stack([one.scale for one in each]),
            self.cols,
            None if self.scales is None else _stacked([cast(Tensor, one.scales) for one in each]),
        )


def _copied(one: EncodedMatrix) -> EncodedMatrix:
    scales = None if one.scales is None else one.scales.clone()
    return EncodedMatrix(one.codes.clone(), one.scale.clone(), one.cols, scales)


def _stacked(tensors: list[Tensor]) -> Tensor:
    """`torch.stack`, which does not take FP8."""
    return torch.stack([tensor.view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)


class OffloadedEmbedding(nn.Embedding):
    """An embedding of which the rows of the tokens are read; its weight is on meta."""

    store: WeightStore

    def forward(self, input: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Look tokens up.

        Raises:
            IndexError: a token outside the vocabulary.
            ValueError: tokens that are not on the CPU.
        """
        if not input.is_cpu:
            raise ValueError(
                f"tokens are on {input.device}, but an offloaded model computes on the CPU: give "
                "tokens.cpu()."
            )
        ids = input.flatten()
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.num_embeddings:
            raise IndexError("index out of range")
        rows = self.store.rows("backbone.embeddings.weight", ids)
        return rows.view(*input.shape, -1)
