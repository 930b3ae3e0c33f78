"""One token of the causal convolution, for decoding.

    u = bias + sum_{j<3} w_j * state_j + w_3 * x        y = u * sigmoid(u)
    state <- state_1, state_2, x

A program takes the channels of one sequence. It is bound by memory traffic: per channel it reads
the three cached inputs and x, and writes three inputs and y, which is 16 bytes in 16 bit. Compared
with the state of the scan (p * n numbers for each p channels) that is little, so the time is that
of one launch.

The new state may be written to the memory of the old one: all inputs are read before any is
overwritten.

Source: the definition in nemotron_lite/ops/conv.py. Left out: gradients (a decoding step has none),
a circular buffer.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nemotron_kernels._compat import (
    Config,
    by_arch,
    cdiv,
    check_inputs,
    check_rows,
    on_device,
    unit_stride,
)
from nemotron_kernels.conv import check_shapes, tap

# One warp for 256 channels: 8 channels per thread, a load of 16 bytes in 16 bit.
STEP = {0: Config({"BLOCK_C": 1024}), 80: Config({"BLOCK_C": 256}, num_warps=1)}


@triton.jit
def _conv_step(
    state_ptr,
    x_ptr,
    w_ptr,
    bias_ptr,
    y_ptr,
    out_ptr,
    channels,
    state_stride_b,
    state_stride_k,
    out_stride_b,
    out_stride_k,
    x_stride_b,
    w_stride,
    TAPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channel = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(1).to(tl.int64)
    inside = channel < channels
    x = tl.load(x_ptr + row * x_stride_b + channel, mask=inside, other=0.0).to(tl.float32)
    u = tap(w_ptr, channel, inside, w_stride, 3, TAPS) * x
    if bias_ptr is not None:
        u += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    # Each cached input is read before its place is written, so state and out may be one tensor.
    for i in tl.static_range(TAPS - 1):
        cached = tl.load(
            state_ptr + row * state_stride_b + i * state_stride_k + channel, mask=inside, other=0.0
        )
        u += tap(w_ptr, channel, inside, w_stride, 4 - TAPS + i, TAPS) * cached.to(tl.float32)
        if i > 0:
            place = out_ptr + row * out_stride_b + (i - 1) * out_stride_k + channel
            tl.store(place, cached.to(out_ptr.dtype.element_ty), mask=inside)
    place = out_ptr + row * out_stride_b + (TAPS - 2) * out_stride_k + channel
    tl.store(place, x.to(out_ptr.dtype.element_ty), mask=inside)
    y = u / (1.0 + tl.exp(-u))
    tl.store(y_ptr + row * channels + channel, y.to(y_ptr.dtype.element_ty), mask=inside)


def causal_conv1d_step(
    state: Float[Tensor, "b km1 c"],
    x: Float[Tensor, "b c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None = None,
    *,
    out_state: Float[Tensor, "b km1 c"] | None = None,
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b km1 c"]]:
    """One token of `causal_conv1d`, for decoding: the output, and the state with `x` appended.

    Args:
        state, x, weight, bias: as in `causal_conv1d`, without the time axis.
        out_state: receives the new state. Pass `state` itself to update it in place, which a
            captured CUDA graph needs. A new tensor is returned when None.

    Raises:
        RuntimeError: CPU tensors outside the interpreter.
        ValueError: as `causal_conv1d`.
    """
    check_inputs("causal_conv1d_step", x, state, weight, bias, out_state)
    (b, c), kept = x.shape, (x.shape[0], weight.shape[1] - 1, x.shape[1])
    check_rows("causal_conv1d_step", b)
    check_shapes(
        "causal_conv1d_step",
        c,
        weight,
        bias=(bias, (c,)),
        state=(state, kept),
        out_state=(out_state, kept),
    )
    if out_state is None:
        out_state = torch.empty(kept, dtype=state.dtype, device=x.device)
    if out_state.stride(-1) != 1 and c > 1:
        raise ValueError(f"out_state has strides {out_state.stride()}; its last axis must have 1.")
    x, state, weight = unit_stride(x), unit_stride(state), weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((b, c), dtype=x.dtype, device=x.device)
    config = by_arch(STEP)
    with on_device(x):
        _conv_step[cdiv(c, config["BLOCK_C"]), b](
            state,
            x,
            weight,
            bias,
            y,
            out_state,
            c,
            *state.stride()[:2],
            *out_state.stride()[:2],
            x.stride(0),
            weight.stride(0),
            TAPS=weight.shape[1],
            **config.kwargs,
        )
    return y, out_state
