"""RMS norms in few passes over memory, with gradients written by hand.

The forward pass calls few operators and writes into its own temporaries. Training keeps only the
inputs and one number per row (or group); the backward pass computes the rest again, which costs
less than the memory traffic of storing it. With s = 1 / sqrt(mean(x^2) + eps) and g the gradient of
x s:

    d x = s (g - x s^2 mean(g x))

One decoded token on a CPU has a path of its own with a third of the calls.

Source: differentiated here from `ops/norm.py`. Left out: second derivatives.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_lite.dtypes import cast, exact_backward, wide_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps), times w; statistics in float32 or better."""
    if torch.is_grad_enabled():
        return _RmsNorm.apply(x, weight, eps)
    if x.is_cpu and x.numel() == x.shape[-1] and type(x) is Tensor:
        # One decoded token: with the scale as a Python number two calls are enough.
        wide = cast(x, wide_dtype(x))
        norm = torch.linalg.vector_norm(wide).item()
        mean = norm * norm / x.shape[-1] + eps
        scale = mean**-0.5 if mean else math.inf
        return cast(torch.addcmul(_constant(0.0, wide.dtype), wide, weight, value=scale), x.dtype)
    return _rms_norm(x, weight, eps)[0]


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """`rms_norm` of each group of y * silu(z), times w."""
    if torch.is_grad_enabled():
        return _GatedRmsNorm.apply(y, z, weight, groups, eps)
    return _gated(y, z, weight, groups, eps)[0]


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept; one pass over x."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if x.is_cpu and type(norm) is Tensor:
        start = _constant(eps, x.dtype)
        return torch.addcmul(start, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


@lru_cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor, made once: making it at every call would cost more than using it.

    It is made and used only with ordinary tensors. Those of `FakeTensorMode` have no numbers, and
    one that is kept would break later calls.
    """
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")  # not the default device


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = cast(x, wide_dtype(x))
    scale = _inverse_rms(wide, eps)
    return cast((wide * scale).mul_(weight), x.dtype), scale


def _gated(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    wide = F.silu(cast(z, wide_dtype(y))).mul_(y)
    grouped = wide.view(*wide.shape[:-1], groups, wide.shape[-1] // groups)
    scale = _inverse_rms(grouped, eps)
    grouped.mul_(scale)
    return cast(wide.mul_(weight), y.dtype), scale


def _norm_backward(grad_normed: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """Gradient of x * scale(x) given that of the result: s (g - x s^2 mean(g x))."""
    inner = torch.linalg.vecdot(grad_normed, x).unsqueeze(-1).mul_(scale.square()).div_(x.shape[-1])
    return grad_normed.sub_(x * inner).mul_(scale)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):  # type: ignore[no-untyped-def]
        out, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    @exact_backward
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        x, weight, scale = ctx.saved_tensors
        wide, grad = x.to(scale.dtype), grad.to(scale.dtype)
        normed = wide * scale
        grad_weight = normed.mul_(grad).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        return _norm_backward(grad * weight, wide, scale).to(x.dtype), grad_weight, None


class _GatedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight, groups, eps):  # type: ignore[no-untyped-def]
        out, scale = _gated(y, z, weight, groups, eps)
        ctx.save_for_backward(y, z, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    @exact_backward
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        y, z, weight, scale = ctx.saved_tensors
        groups = scale.shape[-2]
        wide_y, wide_z = y.to(scale.dtype), z.to(scale.dtype)
        sigmoid = torch.sigmoid(wide_z)
        gate = wide_z * sigmoid
        gated = (wide_y * gate).unflatten(-1, (groups, -1))
        grad = grad.to(scale.dtype)
        normed = (gated * scale).flatten(-2)
        grad_weight = normed.mul_(grad).reshape(-1, y.shape[-1]).sum(0).to(weight.dtype)
        grad_gated = _norm_backward((grad * weight).unflatten(-1, (groups, -1)), gated, scale)
        grad_gated = grad_gated.flatten(-2)
        # d silu(z)/dz = s + z s (1 - s) = s + gate (1 - s)
        slope = torch.addcmul(sigmoid, gate, 1 - sigmoid).mul_(wide_y)
        grad_z = slope.mul_(grad_gated).to(z.dtype)
        return gate.mul_(grad_gated).to(y.dtype), grad_z, grad_weight, None, None
