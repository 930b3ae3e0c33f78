"""Root-mean-square normalisation, plain and gated.

    rms_norm(x)          = w * x / sqrt(mean(x^2) + eps)
    gated_rms_norm(y, z) = rms_norm over each of g groups of ( y * silu(z) ), times w

Statistics are taken in float32 (float64 for float64 inputs) whatever the dtype of x. In the gated
form the gate comes *before* the norm, and each of the g groups of channels is divided by its own
root mean square: norm(y) * silu(z), or one norm over all channels, are different models and the two
most frequent porting errors.

Both keep only their inputs and one number per row (or group) for the backward pass.

Source: reference sheet 1.4 and 2.2 step 8. Left out: norm before gate, which Nemotron 3 never uses.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_lite.backends.dispatch import cast, choose, kernel

_KERNEL = kernel("norm", "rms_norm")
_GATED_KERNEL = kernel("norm", "gated_rms_norm")


def rms_norm(
    x: Float[Tensor, "*rows d"],
    weight: Float[Tensor, "d"],
    eps: float = 1e-5,
    *,
    impl: str = "auto",
) -> Float[Tensor, "*rows d"]:
    """Divide each row by its root mean square and scale; statistics in float32 or better.

    Raises:
        ValueError: unknown `impl` ("naive", "torch", "triton").
    """
    return choose("rms_norm", impl, x, naive=_naive, torch=_fast, triton=_KERNEL)(x, weight, eps)


def gated_rms_norm(
    y: Float[Tensor, "*rows c"],
    z: Float[Tensor, "*rows c"],
    weight: Float[Tensor, "c"],
    groups: int,
    eps: float = 1e-5,
    *,
    impl: str = "auto",
) -> Float[Tensor, "*rows c"]:
    """`y * silu(z)`, normalised within each of `groups` equal runs of channels.

    Raises:
        ValueError: unknown `impl`, or channels that do not split into `groups`.
    """
    if y.shape[-1] % groups:
        raise ValueError(f"{y.shape[-1]} channels do not split into {groups} groups.")
    run = choose(
        "gated_rms_norm", impl, y, naive=_naive_gated, torch=_fast_gated, triton=_GATED_KERNEL
    )
    return run(y, z, weight, groups, eps)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _naive(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(_wide(x))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight.to(wide.dtype) * (wide * scale)).to(x.dtype)


def _naive_gated(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    wide = y.to(_wide(y)) * F.silu(z.to(_wide(y)))
    split = wide.unflatten(-1, (groups, -1))
    split = split * torch.rsqrt(split.square().mean(-1, keepdim=True) + eps)
    return (weight.to(wide.dtype) * split.flatten(-2)).to(y.dtype)


def _fast(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if torch.is_grad_enabled():
        return _RmsNorm.apply(x, weight, eps)
    if x.is_cpu and x.numel() == x.shape[-1]:
        # One decoded token: with the scale as a Python number two calls are enough.
        wide = cast(x, _wide(x))
        norm = torch.linalg.vector_norm(wide).item()
        scale = (norm * norm / x.shape[-1] + eps) ** -0.5
        return cast(torch.addcmul(_constant(0.0, wide.dtype), wide, weight, value=scale), x.dtype)
    return _rms_norm(x, weight, eps)[0]


def _fast_gated(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    if torch.is_grad_enabled():
        return _GatedRmsNorm.apply(y, z, weight, groups, eps)
    return _gated(y, z, weight, groups, eps)[0]


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept; one pass over x."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if x.is_cpu:
        start = _constant(eps, x.dtype)
        return torch.addcmul(start, norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()


@lru_cache
def _constant(value: float, dtype: torch.dtype) -> Tensor:
    """A number as a tensor made once: small calls spend their time on making it anew."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device="cpu")  # whatever the default device is


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = cast(x, _wide(x))
    scale = _inverse_rms(wide, eps)
    return cast((wide * scale).mul_(weight), x.dtype), scale


def _gated(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    wide = F.silu(cast(z, _wide(y))).mul_(y)
    grouped = wide.view(*wide.shape[:-1], groups, -1)
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
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        wide, grad = x.to(scale.dtype), grad.to(scale.dtype)
        normed = wide * scale
        grad_weight = normed.mul_(grad).view(-1, x.shape[-1]).sum(0).to(weight.dtype)
        return _norm_backward(grad * weight, wide, scale).to(x.dtype), grad_weight, None


class _GatedRmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, z, weight, groups, eps):  # type: ignore[no-untyped-def]
        out, scale = _gated(y, z, weight, groups, eps)
        ctx.save_for_backward(y, z, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        y, z, weight, scale = ctx.saved_tensors
        groups = scale.shape[-2]
        wide_y, wide_z = y.to(scale.dtype), z.to(scale.dtype)
        sigmoid = torch.sigmoid(wide_z)
        gate = wide_z * sigmoid
        gated = (wide_y * gate).unflatten(-1, (groups, -1))
        grad = grad.to(scale.dtype)
        normed = (gated * scale).flatten(-2)
        grad_weight = normed.mul_(grad).view(-1, y.shape[-1]).sum(0).to(weight.dtype)
        grad_gated = _norm_backward((grad * weight).unflatten(-1, (groups, -1)), gated, scale)
        grad_gated = grad_gated.flatten(-2)
        # d silu(z)/dz = s + z s (1 - s) = s + gate (1 - s)
        slope = torch.addcmul(sigmoid, gate, 1 - sigmoid).mul_(wide_y)
        grad_z = slope.mul_(grad_gated).to(z.dtype)
        return gate.mul_(grad_gated).to(y.dtype), grad_z, grad_weight, None, None
