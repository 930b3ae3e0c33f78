"""Root-mean-square normalization, plain and gated, in groups: forward and backward.

    a = y * silu(z)   (a = x in the plain form)
    s = 1 / sqrt(mean over the group of a^2 + eps)          n = a s          out = w n

and backward, with m = d(out) * w:

    da = s (m - n mean(m n))     dy = da silu(z)     dz = da y silu'(z)     dw = sum of d(out) n

The gate is applied before the norm, and each group of channels has its own s. A program holds whole
groups in registers, so each input is read once. Only the inputs are kept for the backward pass,
which computes s again. The kernels are bound by memory traffic: 6 bytes per token and channel
forward (y, z, out in 16 bit; 4 in the plain form) and 10 backward (y, z, d(out), dy, dz).

A tile is several rows of one group, so that a program has enough work with narrow groups too. The
gradient of the weight is summed over a program's rows in registers, and over programs by torch, in
a fixed order.

Arithmetic is in float32. Source: the definition in nemotron_lite/ops/norm.py. Left out: norm before
gate, biases, groups of more than 32,768 channels.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_kernels._compat import (
    Config,
    by_arch,
    cdiv,
    check_inputs,
    next_power_of_2,
    on_device,
    unit_stride,
)

# TILE: elements that a program handles at a time. ROWS: rows whose dw a program sums before it
# writes its part. PER_WARP: elements that a warp can hold in its registers; wide groups get more
# warps by it.
FORWARD = {
    0: Config({"TILE": 2**16, "PER_WARP": 2**16}),
    80: Config({"TILE": 2048, "PER_WARP": 512}),
}
BACKWARD = {
    0: Config({"TILE": 2**14, "PER_WARP": 2**16, "ROWS": 2**7}),
    80: Config({"TILE": 1024, "PER_WARP": 512, "ROWS": 32}),
}
WIDEST = 2**15


@triton.jit
def _inverse_rms(a, inside, size, eps):
    """1 / root mean square of each row; 1 for rows outside the tensor, to avoid 1 / 0."""
    mean = tl.sum(a * a, axis=1) / size
    return tl.rsqrt(tl.where(inside, mean + eps, 1.0))


@triton.jit
def _norm_forward(
    y_ptr,
    z_ptr,
    w_ptr,
    out_ptr,
    rows,
    channels,
    size,
    eps,
    y_stride,
    z_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    place = tl.arange(0, BLOCK_N)
    channel = tl.program_id(1) * size + place
    mask = (row < rows)[:, None] & (place < size)[None, :]
    a = tl.load(y_ptr + row[:, None] * y_stride + channel[None, :], mask=mask, other=0.0)
    a = a.to(tl.float32)
    if z_ptr is not None:
        z = tl.load(z_ptr + row[:, None] * z_stride + channel[None, :], mask=mask, other=0.0)
        z = z.to(tl.float32)
        a *= z / (1.0 + tl.exp(-z))
    scale = _inverse_rms(a, row < rows, size, eps)
    w = tl.load(w_ptr + channel, mask=place < size, other=0.0).to(tl.float32)
    out = w[None, :] * (a * scale[:, None])
    tl.store(
        out_ptr + row[:, None] * channels + channel[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _norm_backward(
    y_ptr,
    z_ptr,
    w_ptr,
    dout_ptr,
    dy_ptr,
    dz_ptr,
    partial_ptr,
    rows,
    channels,
    size,
    eps,
    y_stride,
    z_stride,
    dout_stride,
    ROWS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    stretch = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK_N)
    channel = tl.program_id(1) * size + place
    w = tl.load(w_ptr + channel, mask=place < size, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, ROWS, BLOCK_R):
        row = stretch * ROWS + first + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (place < size)[None, :]
        y = tl.load(y_ptr + row[:, None] * y_stride + channel[None, :], mask=mask, other=0.0)
        dout = tl.load(
            dout_ptr + row[:, None] * dout_stride + channel[None, :], mask=mask, other=0.0
        )
        y, dout = y.to(tl.float32), dout.to(tl.float32)
        a = y
        if z_ptr is not None:
            z = tl.load(z_ptr + row[:, None] * z_stride + channel[None, :], mask=mask, other=0.0)
            z = z.to(tl.float32)
            sigmoid = 1.0 / (1.0 + tl.exp(-z))
            gate = z * sigmoid
            a = y * gate
        scale = _inverse_rms(a, row < rows, size, eps)
        normed = a * scale[:, None]
        dw += tl.sum(dout * normed, axis=0)
        m = dout * w[None, :]
        inner = tl.sum(m * normed, axis=1) / size
        da = scale[:, None] * (m - normed * inner[:, None])
        out = row[:, None] * channels + channel[None, :]
        if z_ptr is not None:
            # d silu(z) / dz = sigmoid + z sigmoid (1 - sigmoid)
            dz = da * y * (sigmoid + gate * (1.0 - sigmoid))
            tl.store(dz_ptr + out, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            da *= gate
        tl.store(dy_ptr + out, da.to(dy_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + stretch * channels + channel, dw, mask=place < size)


class _RmsNorm(torch.autograd.Function):
    """Both forms, on rows: y and z are `r c`, and z is None in the plain one."""

    @staticmethod
    def forward(ctx, y, z, weight, groups, eps):  # type: ignore[no-untyped-def]
        rows, channels = y.shape
        size = channels // groups
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        options = _options(by_arch(FORWARD), size)
        with on_device(y):
            _norm_forward[cdiv(rows, options["BLOCK_R"]), groups](
                y, z, weight, out, rows, channels, size, eps, y.stride(0), _row_stride(z), **options
            )
        ctx.save_for_backward(y, z, weight)
        ctx.groups, ctx.eps = groups, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        y, z, weight = ctx.saved_tensors
        rows, channels = y.shape
        size = channels // ctx.groups
        dout = unit_stride(dout)
        dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        dz = None if z is None else torch.empty(z.shape, dtype=z.dtype, device=z.device)
        config = by_arch(BACKWARD)
        options = _options(config, size)
        stretches = cdiv(rows, config["ROWS"])
        partial = torch.empty(stretches, channels, dtype=torch.float32, device=y.device)
        with on_device(y):
            _norm_backward[stretches, ctx.groups](
                y,
                z,
                weight,
                dout,
                dy,
                dz,
                partial,
                rows,
                channels,
                size,
                ctx.eps,
                y.stride(0),
                _row_stride(z),
                dout.stride(0),
                ROWS=config["ROWS"],
                **options,
            )
        return dy, dz, partial.sum(0).to(weight.dtype), None, None


def rms_norm(
    x: Float[Tensor, "*rows d"], weight: Float[Tensor, "d"], eps: float = 1e-5
) -> Float[Tensor, "*rows d"]:
    """`nemotron_lite.ops.rms_norm` as one kernel: x / rms(x) * weight for each row.

    Args:
        x: float32, bfloat16 or float16; the result has its dtype, the arithmetic is in float32.
        weight: one factor per channel, any of these dtypes.
        eps: added to the mean square.

    Raises:
        RuntimeError: CPU tensors outside the interpreter.
        ValueError: shapes that do not fit, float64, rows of more than 32,768 channels.
    """
    check_inputs("rms_norm", x, weight)
    _check("rms_norm", x, None, weight, 1)
    out = _run(x, None, weight, 1, eps)
    return out.view(x.shape)


def gated_rms_norm(
    y: Float[Tensor, "*rows c"],
    z: Float[Tensor, "*rows c"],
    weight: Float[Tensor, "c"],
    groups: int,
    eps: float = 1e-5,
) -> Float[Tensor, "*rows c"]:
    """`nemotron_lite.ops.gated_rms_norm` as one kernel: `y * silu(z)`, normalized in groups.

    Args:
        y, z: float32, bfloat16 or float16; their dtypes may differ. A slice of a wider tensor is
            read without a copy if all its rows are one stride apart.
        weight: one factor per channel.
        groups: number of groups of channels; each is normalized by its own root mean square.
        eps: added to the mean square.

    Returns:
        The result in the dtype of y; differentiable in y, z and weight.

    Raises:
        RuntimeError: CPU tensors outside the interpreter.
        ValueError: shapes that do not fit, float64, groups of more than 32,768 channels.
    """
    check_inputs("gated_rms_norm", y, z, weight)
    _check("gated_rms_norm", y, z, weight, groups)
    return _run(y, z, weight, groups, eps).view(y.shape)


def rmsnorm_fn(
    x: Float[Tensor, "*rows c"],
    weight: Float[Tensor, "c"],
    bias: Float[Tensor, "c"] | None,
    z: Float[Tensor, "*rows c"] | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Float[Tensor, "*rows c"]:
    """`gated_rms_norm` with the argument names, order and defaults of mamba_ssm's function.

    Raises:
        ValueError: a gate after the norm or a bias, which Nemotron 3 does not have; a `group_size`
            that does not divide the channels; and as `gated_rms_norm`.
        RuntimeError: CPU tensors outside the interpreter.
    """
    if bias is not None:
        raise ValueError(
            "rmsnorm_fn: the kernel has no bias; pass bias=None and add the bias to the result."
        )
    if z is not None and norm_before_gate:
        raise ValueError(
            "rmsnorm_fn: the kernel gates before the norm. Pass norm_before_gate=False, or "
            "multiply the norm of x by silu(z) yourself."
        )
    channels = x.shape[-1]
    size = group_size or channels
    if channels % size:
        raise ValueError(f"rmsnorm_fn: {channels} channels do not split into groups of {size}.")
    check_inputs("rmsnorm_fn", x, z, weight)
    _check("rmsnorm_fn", x, z, weight, channels // size)
    return _run(x, z, weight, channels // size, eps).view(x.shape)


def _run(y: Tensor, z: Tensor | None, weight: Tensor, groups: int, eps: float) -> Tensor:
    if y.numel() == 0:
        return y + 0 * weight if z is None else y * z + 0 * weight
    flat = unit_stride(y).reshape(-1, y.shape[-1])
    gate = None if z is None else unit_stride(z).reshape(-1, z.shape[-1])
    return _RmsNorm.apply(flat, gate, weight.contiguous(), groups, eps)


def _options(config: Config, size: int) -> dict[str, Any]:
    """Tile and warps for groups of `size` channels: a wide group gets more warps, not more rows."""
    block = next_power_of_2(size)
    rows = max(1, config["TILE"] // block)
    if "ROWS" in config.blocks:
        rows = min(rows, config["ROWS"])
    warps = min(32, max(config.num_warps, block // config["PER_WARP"]))
    launch = {k: v for k, v in config.kwargs.items() if k not in config.blocks}
    return {**launch, "BLOCK_R": rows, "BLOCK_N": block, "num_warps": warps}


def _row_stride(z: Tensor | None) -> int:
    return 0 if z is None else z.stride(0)


def _check(op: str, y: Tensor, z: Tensor | None, weight: Tensor, groups: int) -> None:
    channels = y.shape[-1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{op}: {channels} channels do not split into {groups} groups.")
    if channels // groups > WIDEST:
        raise ValueError(
            f"{op}: {channels // groups} channels in a group; the kernel holds at most {WIDEST} in "
            "registers. Use nemotron_lite.ops with impl='torch'."
        )
    if z is not None and z.shape != y.shape:
        raise ValueError(
            f"{op}: z has shape {tuple(z.shape)}, y {tuple(y.shape)}; they must agree."
        )
    if weight.shape != (channels,):
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}; expected ({channels},).")
