"""Weights that stay packed in memory and are decoded as they are used.

A routed expert in NVFP4 takes 4.5 bits a weight instead of 16. To keep that advantage in memory, a
packed layer holds the stored bytes and decodes them right before the product (`ops/nvfp4`: a kernel
on a GPU; a stripe of rows at a time elsewhere, and of the experts only those that a token chose):

    y = x W^T,      W = code * scale

Buffers carry the names of ModelOpt's files, so that a model's `state_dict` is what goes to disk:

    format   weight             weight_scale          weight_scale_2    input_scale
    nvfp4    uint8  [out in/2]  E4M3 [out in/16]      float32 []        float32 []
    fp8      E4M3   [out in]    float32 []            -                 float32 []

Rows are filled up to a multiple of 16. Stacks of experts have one more dimension in front.
`input_scale` is what a calibration found for the inputs: their largest magnitude over 6 * 448
(NVFP4) or 448 (FP8).

By default inputs are left as they are (weights of 4 or 8 bits, activations of 16, what hardware
without FP4 units does). With `rounds_inputs` they are rounded to the weight's format first, which
is what the tensor cores of Blackwell multiply.

A packed layer has no gradient for its weight, and `.to(dtype)` does not touch what it holds.
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
from nemotron_lite.layers.moe import Experts
from nemotron_lite.quantization import nvfp4
from nemotron_lite.quantization.fp8 import fake_quantize_fp8
from nemotron_lite.quantization.nvfp4 import E2M1_MAX, E4M3_MAX, QuantizedTensor, fake_quantize
from nemotron_lite.quantization.nvfp4.decoding import Stored, multiply, multiply_experts

BLOCK = 16
INPUT_MAX = {"nvfp4": E2M1_MAX * E4M3_MAX, "fp8": E4M3_MAX}  # amax = input_scale * this
Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]


def parts_of(form: str, shape: tuple[int, ...]) -> Parts:
    """Shape and dtype of each stored part of a weight `*stack out in`.

    Raises:
        ValueError: an unknown format.
    """
    *stack, rows, cols = shape
    one_each = (tuple(stack), torch.float32)
    if form == "fp8":
        return {
            "weight": (shape, torch.float8_e4m3fn),
            "weight_scale": one_each,
            "input_scale": one_each,
        }
    if form != "nvfp4":
        raise ValueError(f"format {form!r}; expected one of {', '.join(INPUT_MAX)}.")
    blocks = -(-cols // BLOCK)
    return {
        "weight": ((*stack, rows, blocks * BLOCK // 2), torch.uint8),
        "weight_scale": ((*stack, rows, blocks), torch.float8_e4m3fn),
        "weight_scale_2": one_each,
        "input_scale": one_each,
    }


def decode(
    form: str, parts: Mapping[str, Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> Float[Tensor, "out in"]:
    """The matrix of this shape that the stored parts of one module mean."""
    return _stored(form, parts, shape).decode(keep=True).to(dtype)


def _stored(form: str, parts: Mapping[str, Tensor], shape: tuple[int, ...]) -> Stored:
    """A matrix, or a stack; scales may come as files spell them, [] or [1]."""
    weight, scale = parts["weight"], "weight_scale" if form == "fp8" else "weight_scale_2"
    blocks = None if form == "fp8" else parts["weight_scale"]
    return Stored(weight, parts[scale].reshape(shape[:-2]), shape[-1], blocks)


class _KeepsDtypes(nn.Module):
    """A module whose own buffers move between devices and keep their number formats."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, value in before.items():
            after = self._buffers[name]
            if after is not None and after.dtype != value.dtype:
                self._buffers[name] = value.to(after.device)
        return self


class Packed(_KeepsDtypes):
    """One weight, or a stack of them, as stored.

    Args:
        form: "nvfp4" or "fp8".
        shape: of the numbers, `*stack out in`.
        calibrated: whether there is an `input_scale`.
    """

    weight: Tensor
    weight_scale: Tensor
    weight_scale_2: Tensor
    input_scale: Tensor | None

    def __init__(self, form: str, shape: tuple[int, ...], *, calibrated: bool = True) -> None:
        super().__init__()
        self.form, self.shape = form, tuple(shape)
        for name, (size, dtype) in parts_of(form, self.shape).items():
            absent = name == "input_scale" and not calibrated
            self.register_buffer(name, None if absent else torch.empty(size, dtype=dtype))
        self.rounds_inputs = False

    def parts(self, expert: int | None = None) -> dict[str, Tensor]:
        """The stored tensors, of one expert of a stack where it is one."""
        named = {name: value for name, value in self._buffers.items() if value is not None}
        return named if expert is None else {name: part[expert] for name, part in named.items()}

    def decode(self, dtype: torch.dtype, expert: int | None = None) -> Float[Tensor, "out in"]:
        """The matrix itself."""
        return decode(self.form, self.parts(expert), self.shape[-2:], dtype)

    def stored(self) -> Stored:
        """What decoding reads."""
        return _stored(self.form, self.parts(), self.shape)

    def quantized(self) -> QuantizedTensor:
        """The weight of a layer in NVFP4."""
        scale = self.weight_scale_2
        return QuantizedTensor(self.weight, self.weight_scale, scale, self.shape)

    def inputs(self, x: Float[Tensor, "*rows n"], expert: int | None = None) -> Tensor:
        """What the product reads for x: x, or x rounded to this format.

        Raises:
            ValueError: inputs are to be rounded and there is no `input_scale`.
        """
        if not self.rounds_inputs:
            return x
        if self.input_scale is None:
            raise ValueError("rounds_inputs is on, but this checkpoint has no input_scale.")
        scale = self.input_scale if expert is None else self.input_scale[expert]
        scale = scale.reshape(())
        if self.form == "fp8":
            return fake_quantize_fp8(x, scale=scale, name="the input")
        return fake_quantize(x, amax=scale * INPUT_MAX["nvfp4"], name="the input")

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(part.nbytes for part in self.parts().values())

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.form}, {list(self.shape)}"


class PackedLinear(Packed):
    """y = x W^T with a packed W; no bias."""

    def forward(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows f"]:
        """Decode and multiply, in the dtype of x."""
        x = self.inputs(x)
        return (
            multiply(x, self.stored()) if self.form == "fp8" else nvfp4.matmul(x, self.quantized())
        )


class PackedExperts(nn.Module):
    """Routed experts with packed matrices; takes the place of `Experts`.

    `up_proj` and `down_proj` may each be a `Packed` stack or the plain parameter.
    """

    def __init__(self, up: Packed | nn.Parameter, down: Packed | nn.Parameter) -> None:
        super().__init__()
        self.up_proj, self.down_proj = up, down

    def forward(self, z: Float[Tensor, "t l"], routing: ops.Routing) -> Float[Tensor, "t l"]:
        """The weighted sum of each token's chosen experts."""
        up, down = self.up_proj, self.down_proj
        if isinstance(up, Packed) and isinstance(down, Packed):
            forms = {up.form, down.form, up.rounds_inputs, down.rounds_inputs}
            if forms == {"nvfp4", False}:
                packed = up.quantized(), down.quantized()
                return nvfp4.expert_mlp(z, *packed, routing.weights, routing.indices)
            if True not in forms:
                stored = up.stored(), down.stored()
                return multiply_experts(z, *stored, routing.weights, routing.indices)
        return self._one_by_one(z, routing)

    def _one_by_one(self, z: Tensor, routing: ops.Routing) -> Tensor:
        """With one matrix plain, or inputs rounded expert by expert."""
        out = torch.zeros_like(z)
        for e in routing.indices.unique().tolist():
            rows, slots = (routing.indices == e).nonzero(as_tuple=True)
            hidden = ops.squared_relu(_multiply(z[rows], self.up_proj, e))
            answers = _multiply(hidden, self.down_proj, e)
            weights = routing.weights[rows, slots].to(z.dtype)
            out = out.index_add(0, rows, answers * weights.unsqueeze(1))
        return out


def _multiply(x: Tensor, matrices: Packed | Tensor, expert: int) -> Tensor:
    if isinstance(matrices, Packed):
        return multiply(matrices.inputs(x, expert), matrices.stored().of(expert), F.linear)
    return F.linear(x, matrices[expert].to(x.dtype))


class ScaledLinear(_KeepsDtypes, nn.Linear):
    """A plain projection that remembers the FP8 scale of the keys or values it makes.

    Nothing here computes with the scale: caches are BF16 or FP32. It is kept for those who serve.
    """

    @classmethod
    def over(cls, linear: nn.Linear, name: str) -> ScaledLinear:
        """Stand on the weight of `linear`, with a buffer `name` ("k_scale" or "v_scale")."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=False)
        made.weight = linear.weight
        made.register_buffer(name, torch.ones((), dtype=torch.float32, device=linear.weight.device))
        return made


def install(model: nn.Module, name: str, form: str, *, calibrated: bool = True) -> Packed:
    """Put an empty packed layer where the model's tensor `name` is, on the same device.

    Args:
        model: changed in place.
        name: key of its state_dict: `….weight` of a linear layer, or a stack of experts.
        form: "nvfp4" or "fp8".
        calibrated: whether there will be an `input_scale`.

    Raises:
        ValueError: no linear layer and no stack of experts, or an unknown format.
    """
    path = name.removesuffix(".weight")
    parent_path, _, leaf = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    current = getattr(parent, leaf, None)
    if isinstance(parent, Experts | PackedExperts) and isinstance(current, nn.Parameter):
        with current.device:
            made = Packed(form, tuple(current.shape), calibrated=calibrated)
        both = {"up_proj": parent.up_proj, "down_proj": parent.down_proj, leaf: made}
        layer = PackedExperts(both["up_proj"], both["down_proj"])
        above, _, place = parent_path.rpartition(".")
        setattr(model.get_submodule(above), place, layer.train(parent.training))
        return made
    if not isinstance(current, nn.Linear):
        raise ValueError(f"{name} is neither a linear layer nor a stack of experts.")
    with current.weight.device:
        linear = PackedLinear(form, tuple(current.weight.shape), calibrated=calibrated)
    setattr(parent, leaf, linear.train(current.training))
    return linear
