"""Layers that keep their weights packed in memory and decode them when they are used.

Packed means: stored as four-bit codes (NVFP4), or eight-bit codes (FP8), with their scales. A
routed expert in NVFP4 takes 4.5 bits a weight instead of 16. To keep that advantage in memory, a
packed layer holds the stored bytes and decodes them right before the product:

    y = x W^T,      W = code * scale

On a GPU a kernel decodes in registers. Elsewhere `nvfp4/cpu_packed_products.py` decodes a stripe of
rows at a time, and of the experts only those that some token chose.

Buffers have the names of ModelOpt's files, so a model's `state_dict` is what goes to disk:

    format   weight             weight_scale          weight_scale_2    input_scale
    nvfp4    uint8  [out in/2]  E4M3 [out in/16]      float32 []        float32 []
    fp8      E4M3   [out in]    float32 []            -                 float32 []

Rows are padded to a multiple of 16. Stacks of experts have one more dimension in front.
`input_scale` comes from a calibration: the largest magnitude of the inputs over 6 * 448 (NVFP4) or
448 (FP8).

By default inputs are not quantized (weights of 4 or 8 bits, activations of 16 bits: what hardware
without FP4 units does). With `quantize_inputs` they are rounded to the weight's format first, which
is what the tensor cores of Blackwell multiply.

A packed layer has no gradient for its weight, and `.to(dtype)` does not change its buffers.
Source: reference sheet 10.3. Left out: kernels for FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from nemotron_lite import ops
from nemotron_lite.dtypes import autocast_dtype, without_autocast
from nemotron_lite.layers.moe import Experts
from nemotron_lite.quantization import nvfp4
from nemotron_lite.quantization.fp8 import fake_quantize_fp8
from nemotron_lite.quantization.nvfp4 import E2M1_MAX, E4M3_MAX, QuantizedTensor, fake_quantize
from nemotron_lite.quantization.nvfp4.cpu_packed_products import (
    EncodedMatrix,
    multiply,
    multiply_experts,
)
from nemotron_lite.quantization.nvfp4.scaling import BLOCK

INPUT_MAX = {"nvfp4": E2M1_MAX * E4M3_MAX, "fp8": E4M3_MAX}  # amax = input_scale * this
ShapeAndDtype = tuple[tuple[int, ...], torch.dtype]


def stored_tensors(format: str, shape: tuple[int, ...]) -> dict[str, ShapeAndDtype]:
    """Shape and dtype of each stored tensor of a weight `*stack out in`.

    Raises:
        ValueError: an unknown format.
    """
    *stack, rows, cols = shape
    scalar = (tuple(stack), torch.float32)  # one for each expert of a stack
    if format == "fp8":
        return {
            "weight": (shape, torch.float8_e4m3fn),
            "weight_scale": scalar,
            "input_scale": scalar,
        }
    if format != "nvfp4":
        raise ValueError(f"format={format!r}: expected one of {', '.join(INPUT_MAX)}.")
    blocks = -(-cols // BLOCK)
    return {
        "weight": ((*stack, rows, blocks * BLOCK // 2), torch.uint8),
        "weight_scale": ((*stack, rows, blocks), torch.float8_e4m3fn),
        "weight_scale_2": scalar,
        "input_scale": scalar,
    }


def decode_weight(
    format: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Float[Tensor, "out in"]:
    """The matrix of this shape that the stored tensors of one module encode."""
    return _encoded(format, tensors, shape).decode(keep=True).to(dtype)


def _encoded(format: str, tensors: Mapping[str, Tensor], shape: tuple[int, ...]) -> EncodedMatrix:
    """A matrix, or a stack. Files store scales of shape [] or [1]; both are accepted."""
    weight, scale = tensors["weight"], "weight_scale" if format == "fp8" else "weight_scale_2"
    blocks = None if format == "fp8" else tensors["weight_scale"]
    return EncodedMatrix(weight, tensors[scale].reshape(shape[:-2]), shape[-1], blocks)


class _KeepsDtypes(nn.Module):
    """A module whose own buffers move between devices but keep their dtypes."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != value.dtype:
                self._buffers[name] = value.to(after.device)
        return self


class PackedWeight(_KeepsDtypes):
    """The stored tensors of one weight, or of a stack of them.

    Args:
        format: "nvfp4" or "fp8".
        shape: of the decoded weight, `*stack out in`.
        calibrated: whether there is an `input_scale`.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor
    input_scale: Tensor | None

    def __init__(self, format: str, shape: tuple[int, ...], *, calibrated: bool = True) -> None:
        super().__init__()
        self.format, self.shape = format, tuple(shape)
        for name, (size, dtype) in stored_tensors(format, self.shape).items():
            absent = name == "input_scale" and not calibrated
            self.register_buffer(name, None if absent else torch.empty(size, dtype=dtype))
        self.quantize_inputs = False

    def tensors(self, expert: int | None = None) -> dict[str, Tensor]:
        """The stored tensors by name; with `expert`, those of one expert of a stack."""
        named = {name: value for name, value in self._buffers.items() if value is not None}
        return named if expert is None else {name: value[expert] for name, value in named.items()}

    def decode(self, dtype: torch.dtype, expert: int | None = None) -> Float[Tensor, "out in"]:
        """The matrix itself."""
        return decode_weight(self.format, self.tensors(expert), self.shape[-2:], dtype)

    def encoded(self) -> EncodedMatrix:
        """The weight as `nvfp4.cpu_packed_products` reads it."""
        return _encoded(self.format, self.tensors(), self.shape)

    def quantized(self) -> QuantizedTensor:
        """The weight as a `QuantizedTensor`; for NVFP4 only."""
        scale = self.weight_scale_2
        return QuantizedTensor(self.weight, self.weight_scale, scale, self.shape)

    def prepare_inputs(self, x: Float[Tensor, "*rows n"], expert: int | None = None) -> Tensor:
        """x, or x rounded to this format if `quantize_inputs` is on.

        Raises:
            ValueError: `quantize_inputs` is on and there is no `input_scale`.
        """
        if not self.quantize_inputs:
            return x
        if self.input_scale is None:
            raise ValueError(
                "quantize_inputs is on, but there is no input_scale. Quantize the model with a "
                "calibration, or set quantize_inputs=False."
            )
        scale = self.input_scale if expert is None else self.input_scale[expert]
        scale = scale.reshape(())
        if self.format == "fp8":
            return fake_quantize_fp8(x, scale=scale, name="the input")
        return fake_quantize(x, amax=scale * INPUT_MAX["nvfp4"], name="the input")

    def __getstate__(self) -> dict[str, Any]:
        """FP8 numbers as bytes: pickle cannot restore a tensor in FP8 (torch 2.13)."""
        buffers = {
            name: (tensor.dtype, tensor.view(torch.uint8))
            if tensor is not None and _is_fp8(tensor)
            else tensor
            for name, tensor in self._buffers.items()
        }
        return {**self.__dict__, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        buffers = {
            name: value[1].view(value[0]) if isinstance(value, tuple) else value
            for name, value in state["_buffers"].items()
        }
        super().__setstate__({**state, "_buffers": buffers})

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.format}, {list(self.shape)}"


def _is_fp8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize == 1


class PackedLinear(PackedWeight):
    """y = x W^T with a packed W."""

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows f"]:
        """Decode and multiply, in the dtype of x."""
        x = self.prepare_inputs(x)
        if self.format == "fp8":
            return multiply(x, self.encoded())
        return nvfp4.matmul(x, self.quantized())


class BiasedPackedLinear(PackedLinear):
    """y = x W^T + b with a packed W; b is a plain parameter, that of the layer it replaces."""

    bias: nn.Parameter

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows f"]:
        """Decode, multiply and add, in the dtype of x."""
        y = super().forward(x)
        return y + self.bias.to(y.dtype)


class PackedExperts(nn.Module):
    """Routed experts with packed matrices; replaces `Experts`.

    `up_proj` and `down_proj` may each be a stack of packed weights or a plain parameter.
    """

    def __init__(self, up: PackedWeight | nn.Parameter, down: PackedWeight | nn.Parameter) -> None:
        super().__init__()
        self.up_proj, self.down_proj = up, down

    def forward(self, z: Float[Tensor, "t l"], routing: ops.Routing) -> Float[Tensor, "t l"]:
        """The weighted sum of each token's chosen experts; under autocast in its dtype."""
        narrow = autocast_dtype(z)
        if narrow is None or z.dtype == torch.float64:
            return self._sum(z, routing)
        return without_autocast(self._sum, z)(z.to(narrow), routing)

    def _sum(self, z: Tensor, routing: ops.Routing) -> Tensor:
        up, down = self.up_proj, self.down_proj
        if not (isinstance(up, PackedWeight) and isinstance(down, PackedWeight)):
            return self._one_by_one(z, routing)
        if up.quantize_inputs or down.quantize_inputs:
            return self._one_by_one(z, routing)
        if up.format == down.format == "nvfp4":
            matrices = up.quantized(), down.quantized()
            return nvfp4.expert_mlp(z, *matrices, routing.weights, routing.indices)
        encoded = up.encoded(), down.encoded()
        return multiply_experts(z, *encoded, routing.weights, routing.indices)

    def _one_by_one(self, z: Tensor, routing: ops.Routing) -> Tensor:
        """One expert at a time: for a plain matrix, or inputs quantized per expert."""
        out = torch.zeros_like(z)
        for e in routing.indices.unique().tolist():
            rows, slots = (routing.indices == e).nonzero(as_tuple=True)
            hidden = ops.squared_relu(_multiply(z[rows], self.up_proj, e))
            answers = _multiply(hidden, self.down_proj, e)
            weights = routing.weights[rows, slots].to(z.dtype)
            out = out.index_add(0, rows, answers * weights.unsqueeze(1))
        return out


def _multiply(x: Tensor, matrices: PackedWeight | Tensor, expert: int) -> Tensor:
    if isinstance(matrices, PackedWeight):
        x = matrices.prepare_inputs(x, expert)
        return multiply(x, matrices.encoded().select(expert), F.linear)
    return F.linear(x, matrices[expert].to(x.dtype))


class LinearWithKVScale(_KeepsDtypes, nn.Linear):
    """A plain k or v projection with a buffer for the FP8 scale of its keys or values.

    Nothing here computes with the scale, because our caches are BF16 or FP32. It is kept for
    serving engines that store the cache in FP8.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear, name: str) -> LinearWithKVScale:
        """Share weight and bias of `linear`, and add a buffer `name` ("k_scale" or "v_scale")."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=False)
        made.weight, made.bias = linear.weight, linear.bias
        made.register_buffer(name, torch.ones((), dtype=torch.float32, device=linear.weight.device))
        return made


def empty_packed_layer(
    model: nn.Module, name: str, format: str, *, calibrated: bool = True
) -> PackedWeight:
    """A packed layer for the model's weight `name`, on the same device, with undefined content.

    Args:
        model: is not changed.
        name: key of its state_dict: `….weight` of a linear layer, or a stack of experts.
        format: "nvfp4" or "fp8".
        calibrated: whether there will be an `input_scale`.

    Raises:
        ValueError: `name` is neither of these, or an unknown format.
    """
    parent, current = _parent_and_module(model, name)
    if isinstance(parent, Experts | PackedExperts) and isinstance(current, nn.Parameter):
        with current.device:
            layer = PackedWeight(format, tuple(current.shape), calibrated=calibrated)
    elif isinstance(current, nn.Linear):
        kind = PackedLinear if current.bias is None else BiasedPackedLinear
        with current.weight.device:
            layer = kind(format, tuple(current.weight.shape), calibrated=calibrated)
        if current.bias is not None:
            layer.register_parameter("bias", current.bias)
        layer.train(current.training)
    else:
        raise ValueError(f"{name} is neither a linear layer nor a stack of experts.")
    return layer


def install_packed_layer(model: nn.Module, name: str, layer: PackedWeight) -> None:
    """Put a layer made by `empty_packed_layer` in the place of the model's weight `name`."""
    parent, _ = _parent_and_module(model, name)
    path, _, leaf = name.removesuffix(".weight").rpartition(".")
    if isinstance(parent, Experts | PackedExperts):
        both = {"up_proj": parent.up_proj, "down_proj": parent.down_proj, leaf: layer}
        experts = PackedExperts(both["up_proj"], both["down_proj"])
        model.set_submodule(path, experts.train(parent.training))
    else:
        setattr(parent, leaf, layer)


def _parent_and_module(model: nn.Module, name: str) -> tuple[nn.Module, Any]:
    """The module that holds the layer (or stack) called `name`, and the layer itself."""
    path, _, leaf = name.removesuffix(".weight").rpartition(".")
    parent = model.get_submodule(path)
    return parent, getattr(parent, leaf, None)
