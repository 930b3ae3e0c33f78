"""Root-mean-square normalization, plain and gated.

    rms_norm(x)          = w * x / sqrt(mean(x^2) + eps)
    gated_rms_norm(y, z) = rms_norm over each of g groups of ( y * silu(z) ), times w

Statistics are taken in float32 (float64 for float64 inputs) whatever the dtype of x. In the gated
form the gate comes *before* the norm, and each of the g groups of channels is divided by its own
root mean square. norm(y) * silu(z), or one norm over all channels, are different models; these are
the two most frequent porting errors.

Source: reference sheet 1.4 and 2.2 step 8. Left out: norm before gate, which Nemotron 3 never uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron_lite.backends import cpu_norm, triton
from nemotron_lite.backends.dispatch import choose
from nemotron_lite.dtypes import wide_dtype


def rms_norm(
    x: Float[Tensor, "*rows d"],
    weight: Float[Tensor, "d"],
    eps: float = 1e-5,
    *,
    impl: str = "auto",
) -> Float[Tensor, "*rows d"]:
    """Divide each row by its root mean square and scale; statistics in float32 or better.

    Args:
        x: rows of d numbers.
        weight: one factor per channel.
        eps: added to the mean square. With 0 a row of zeros becomes NaN, as the equation says.
        impl: "naive" (the equation), "torch" (`F.rms_norm`), "cpu" or "triton".

    Raises:
        ValueError: unknown `impl`, or an eps below 0.
    """
    _check_eps(eps)
    run = choose(
        "rms_norm",
        impl,
        x,
        naive=_naive,
        torch=_torch,
        cpu=cpu_norm.rms_norm,
        triton=triton.rms_norm,
    )
    return run(x, weight, eps)


def gated_rms_norm(
    y: Float[Tensor, "*rows c"],
    z: Float[Tensor, "*rows c"],
    weight: Float[Tensor, "c"],
    groups: int,
    eps: float = 1e-5,
    *,
    impl: str = "auto",
) -> Float[Tensor, "*rows c"]:
    """`y * silu(z)`, normalized within each of `groups` equal groups of adjacent channels.

    Args:
        y: output of the scan.
        z: gate.
        weight: one factor per channel.
        groups: number of groups; each is normalized separately.
        eps: added to the mean square.
        impl: "naive" (the equation), "torch" (`F.rms_norm` per group), "cpu" or "triton".

    Raises:
        ValueError: unknown `impl`, an eps below 0, or channels that do not split into
            `groups`.
    """
    _check_eps(eps)
    if y.shape[-1] % groups:
        raise ValueError(
            f"{y.shape[-1]} channels do not split into {groups} groups: choose a number of groups "
            "that divides them."
        )
    run = choose(
        "gated_rms_norm",
        impl,
        y,
        naive=_naive_gated,
        torch=_torch_gated,
        cpu=cpu_norm.gated_rms_norm,
        triton=triton.gated_rms_norm,
    )
    return run(y, z, weight, groups, eps)


def _check_eps(eps: float) -> None:
    if not eps >= 0:
        raise ValueError(f"eps={eps}: expected a number of at least 0, such as 1e-5.")


def _naive(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(wide_dtype(x))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight.to(wide.dtype) * (wide * scale)).to(x.dtype)


def _naive_gated(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    wide = y.to(wide_dtype(y)) * F.silu(z.to(wide_dtype(y)))
    split = wide.unflatten(-1, (groups, -1))
    split = split * torch.rsqrt(split.square().mean(-1, keepdim=True) + eps)
    return (weight.to(wide.dtype) * split.flatten(-2)).to(y.dtype)


def _torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.to(wide_dtype(x))
    return F.rms_norm(wide, x.shape[-1:], weight.to(wide.dtype), eps).to(x.dtype)


def _torch_gated(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    gated = (y.to(wide_dtype(y)) * F.silu(z.to(wide_dtype(y)))).unflatten(-1, (groups, -1))
    normed = F.rms_norm(gated, gated.shape[-1:], eps=eps).flatten(-2)
    return (weight.to(normed.dtype) * normed).to(y.dtype)
