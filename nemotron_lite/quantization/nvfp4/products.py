"""Products with weights that stay packed in NVFP4: a linear layer, and routed experts.

    y = x W^T             W = e2m1(code) * (c * s_dec),  4.5 bits a weight
    o = sum_i p_i W2_i relu(W1_i z)^2           over the k experts of each token

x is floating point (weights of 4 bits, activations of 16: this suits hardware without FP4 units,
because decoding tokens is limited by reading W), or packed as well, which is what Blackwell's
tensor cores multiply. There is no bias; the layer adds it.

    "naive"    decode everything in float32, then multiply in float32
    "cpu"      decode a stripe of rows at a time, and of the experts only the chosen ones
               (cpu_packed_products.py)
    "triton"   decode in registers right before the product, so the decoded matrix is never in
               memory; for hundreds of rows it is decoded once

The three differ in one rounding. A code times its block's scale has six significant bits, so the
kernel multiplies exact 16-bit numbers, and applies s_dec to the float32 sum. "cpu" does the same
as "naive" for a few rows of x. For many rows it first rounds code * (c * s_dec) to the dtype of x;
with 16 bits this changes each weight by up to 2^-9.

Packed weights have no gradient. x, z and the router's weights have; after a kernel's forward pass,
the backward pass computes them with decoded weights.

Source: reference sheet 4.1 and 10.3. Left out: experts whose inputs are packed too.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_lite.backends import triton
from nemotron_lite.backends.dispatch import choose
from nemotron_lite.ops import experts
from nemotron_lite.quantization.nvfp4.cpu_packed_products import (
    EncodedMatrix,
    multiply,
    multiply_experts,
)
from nemotron_lite.quantization.nvfp4.tensor import QuantizedTensor


def matmul(
    x: Float[Tensor, "*rows k"] | QuantizedTensor,
    w: QuantizedTensor,
    *,
    dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Float[Tensor, "*rows n"]:
    """x W^T with a packed W, summed in float32 or better.

    Args:
        x: floating point, or packed.
        w: `n k`, with one scale for the tensor.
        dtype: of the result; by default that of x, or float32 if x is packed.
        impl: "naive" (the definition), "cpu" or "triton".

    Raises:
        ValueError: shapes that do not fit, a stack of matrices instead of one, an unknown `impl`.
        RuntimeError: "triton" for tensors on the CPU outside its interpreter.
    """
    if len(w.shape) != 2 or w.scale.ndim or x.shape[-1:] != w.shape[-1:]:
        raise ValueError(
            f"matmul: x has shape {list(x.shape)} and w {list(w.shape)} with {w.scale.numel()} "
            "scale(s); expected x [.., k] and one matrix [n, k] with one scale."
        )
    if isinstance(x, Tensor):
        example, default = x, x.dtype
    elif x.scale.ndim:
        raise ValueError(
            f"matmul: the packed x of shape {list(x.shape)} has {x.scale.numel()} scales, one for "
            "each tensor of a batch; expected one. Quantize it with batch_dims=0."
        )
    else:
        example, default = x.scale, torch.float32
    # `choose` looks at a device and a dtype; codes do not have a floating-point dtype.
    run = choose(
        "matmul", impl, example, naive=_naive_matmul, cpu=_cpu_matmul, triton=_triton_matmul
    )
    return run(x, w, dtype or default)


def _naive_matmul(x: Tensor | QuantizedTensor, w: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    if isinstance(x, QuantizedTensor):
        x = x.dequantize(torch.float32)
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) @ w.dequantize(wide).mT).to(dtype)


def _cpu_matmul(x: Tensor | QuantizedTensor, w: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    if isinstance(x, QuantizedTensor):
        x = x.dequantize(torch.float32)
    return multiply(x.to(torch.promote_types(x.dtype, dtype)), _encoded(w)).to(dtype)


def _triton_matmul(x: Tensor | QuantizedTensor, w: QuantizedTensor, dtype: torch.dtype) -> Tensor:
    if isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        return _TritonMatmul.apply(x, w, dtype)
    return triton.nvfp4_matmul(x, w, dtype)


class _TritonMatmul(torch.autograd.Function):
    """Forward by the kernel; backward dx = dy W with a decoded W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        ctx.w, ctx.dtype = w, x.dtype
        return triton.nvfp4_matmul(x, w, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return (grad @ ctx.w.dequantize(grad.dtype)).to(ctx.dtype), None, None


def expert_mlp(
    z: Float[Tensor, "t l"],
    up: QuantizedTensor,
    down: QuantizedTensor,
    weights: Float[Tensor, "t k"],
    indices: Int[Tensor, "t k"],
    *,
    impl: str = "auto",
) -> Float[Tensor, "t l"]:
    """The weighted sum of each token's chosen experts, whose matrices are packed.

    Args:
        z: what the experts read.
        up, down: the experts' matrices W1 `e f l` and W2 `e l f`, a scale for each of them.
        weights, indices: from `route`.
        impl: "naive" (token by token), "cpu" (expert by expert) or "triton".

    Raises:
        ValueError: matrices that do not fit z or each other, an unknown `impl`.
        RuntimeError: "triton" for tensors on the CPU outside its interpreter.
    """
    hidden, width = up.shape[-2], z.shape[-1]
    stacks = len(up.shape) == 3 and up.scale.ndim == down.scale.ndim == 1
    if not stacks or up.shape[2] != width or down.shape != (up.shape[0], width, hidden):
        raise ValueError(
            f"expert_mlp: up is {list(up.shape)} and down {list(down.shape)} with "
            f"{up.scale.numel()} and {down.scale.numel()} scales; for z {list(z.shape)} expected "
            "[e, f, l] and [e, l, f] with a scale for each expert (quantize with batch_dims=1)."
        )
    run = choose(
        "expert_mlp", impl, z, naive=_naive_experts, cpu=_cpu_experts, triton=_triton_experts
    )
    return run(z, up, down, weights, indices)


def _naive_experts(
    z: Tensor, up: QuantizedTensor, down: QuantizedTensor, weights: Tensor, indices: Tensor
) -> Tensor:
    wide = torch.promote_types(z.dtype, torch.float32)
    matrices = up.dequantize(wide), down.dequantize(wide)
    return experts.expert_mlp(z.to(wide), *matrices, weights, indices, impl="naive").to(z.dtype)


def _cpu_experts(
    z: Tensor, up: QuantizedTensor, down: QuantizedTensor, weights: Tensor, indices: Tensor
) -> Tensor:
    return multiply_experts(z, _encoded(up), _encoded(down), weights, indices)


def _encoded(w: QuantizedTensor) -> EncodedMatrix:
    return EncodedMatrix(w.codes, w.scale, w.shape[-1], w.scales)


def _triton_experts(
    z: Tensor, up: QuantizedTensor, down: QuantizedTensor, weights: Tensor, indices: Tensor
) -> Tensor:
    if torch.is_grad_enabled() and (z.requires_grad or weights.requires_grad):
        return _TritonExperts.apply(z, up, down, weights, indices)
    return triton.nvfp4_expert_mlp(z, up, down, weights, indices)


class _TritonExperts(torch.autograd.Function):
    """Forward by the kernels; backward through "cpu", recomputed expert by expert."""

    @staticmethod
    def forward(ctx: Any, z, up, down, weights, indices):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(z, weights, indices)
        ctx.matrices = up, down
        return triton.nvfp4_expert_mlp(z, up, down, weights, indices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (z, weights, indices), (up, down) = ctx.saved_tensors, ctx.matrices
        with torch.enable_grad():
            leaves = z.detach().requires_grad_(), weights.detach().requires_grad_()
            out = _cpu_experts(leaves[0], up, down, leaves[1], indices)
        grad_z, grad_weights = torch.autograd.grad(out, leaves, grad)
        return grad_z, None, None, grad_weights, None
