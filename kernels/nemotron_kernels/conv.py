"""Causal depthwise convolution with SiLU, and its cache of inputs: forward, backward, one token.

    u_t = bias + sum_j w_j * x_{t-3+j}      j = 0 .. 3, without taps in another document
    y_t = u_t * sigmoid(u_t)

Four taps, as in every Mamba-2 model; shorter filters are padded with zeros in front. Both
directions are bound by memory traffic: at least 4 bytes per token and channel forward (read x,
write y, 16 bit) and 6 backward (read x and dy, write dx).

Forward: a program takes a tile of tokens and channels and loads it four times, shifted by one token
each time; three of the four come from the GPU's cache. The program of the first tokens also writes
the final state, so this needs no launch of its own.

Backward: a program loops over a range of tokens with its channels in registers. Each x and dy is
loaded once, and u is computed again. dx_t is written three tokens later, after the last of the four
outputs that depend on x_t. Shifted tiles, as in the forward pass, would need four sigmoids per
element and would be bound by arithmetic. The gradients of the filter are summed in registers,
written once per program, and summed by torch in a fixed order, so that two runs give the same bits.

Inputs may be strided (xBC is a slice of the input projection). Channels must be contiguous;
otherwise the input is copied. Source: the definition in nemotron_lite/ops/conv.py. Left out: more
than four taps, outputs without SiLU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_kernels._compat import (
    Config,
    by_arch,
    cdiv,
    check_inputs,
    check_rows,
    on_device,
    unit_stride,
)

FORWARD = {
    0: Config({"BLOCK_T": 64, "BLOCK_C": 512}),
    80: Config({"BLOCK_T": 16, "BLOCK_C": 256}, num_warps=4),
}
BACKWARD = {
    0: Config({"STRETCH": 64, "BLOCK_C": 512}),
    80: Config({"STRETCH": 128, "BLOCK_C": 256}, num_warps=1),  # 8 channels per thread, 16 bytes
}


@triton.jit
def tap(w_ptr, channel, inside, w_stride, J: tl.constexpr, TAPS: tl.constexpr):
    """Tap J of four; a filter with fewer taps has zeros in the first places."""
    shift: tl.constexpr = J - 4 + TAPS
    if shift < 0:
        return tl.zeros_like(channel).to(tl.float32)
    return tl.load(w_ptr + channel * w_stride + shift, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["length"])
def _conv_forward(
    x_ptr,
    w_ptr,
    bias_ptr,
    initial_ptr,
    seq_ptr,
    lengths_ptr,
    y_ptr,
    final_ptr,
    length,
    channels,
    x_stride_b,
    x_stride_t,
    w_stride,
    initial_stride_b,
    initial_stride_k,
    seq_stride_b,
    TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(2).to(tl.int64)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = channel < channels
    x_ptr += row * x_stride_b
    if initial_ptr is not None:
        initial_ptr += row * initial_stride_b
    if seq_ptr is not None:
        seq_ptr += row * seq_stride_b

    u = tl.zeros((BLOCK_T, BLOCK_C), dtype=tl.float32)
    if bias_ptr is not None:
        u += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    if seq_ptr is not None:
        document = tl.load(seq_ptr + token, mask=token < length, other=0)
    for back in tl.static_range(TAPS):
        w = tl.load(w_ptr + channel * w_stride + (TAPS - 1 - back), mask=inside, other=0.0)
        source = token - back
        known = (source >= 0) & (source < length)
        if seq_ptr is not None:
            # Tokens before the start of the row belong to its first document.
            reached = tl.load(seq_ptr + tl.maximum(source, 0), mask=source < length, other=0)
            same = reached == document
            known = known & same
        x = tl.load(
            x_ptr + source[:, None] * x_stride_t + channel[None, :],
            mask=known[:, None] & inside[None, :],
            other=0.0,
        ).to(tl.float32)
        if initial_ptr is not None and back > 0:
            if block == 0:
                before = (source < 0) & (token < length)
                if seq_ptr is not None:
                    before = before & same
                cached = source + TAPS - 1
                x += tl.load(
                    initial_ptr + cached[:, None] * initial_stride_k + channel[None, :],
                    mask=before[:, None] & inside[None, :],
                    other=0.0,
                ).to(tl.float32)
        u += w.to(tl.float32)[None, :] * x
    y = u / (1.0 + tl.exp(-u))
    tl.store(
        y_ptr + (row * length + token[:, None]) * channels + channel[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=(token < length)[:, None] & inside[None, :],
    )

    if block == 0:
        # The final state: the last TAPS - 1 real inputs of this row.
        end = length.to(tl.int64)
        if lengths_ptr is not None:
            end = tl.load(lengths_ptr + row).to(tl.int64)
        for i in tl.static_range(TAPS - 1):
            at = end - (TAPS - 1) + i
            last = tl.load(
                x_ptr + at * x_stride_t + channel,
                mask=channel < tl.where(at >= 0, channels, 0),
                other=0.0,
            ).to(tl.float32)
            if initial_ptr is not None:
                last += tl.load(
                    initial_ptr + (at + TAPS - 1) * initial_stride_k + channel,
                    mask=channel < tl.where(at < 0, channels, 0),
                    other=0.0,
                ).to(tl.float32)
            tl.store(
                final_ptr + (row * (TAPS - 1) + i) * channels + channel,
                last.to(final_ptr.dtype.element_ty),
                mask=inside,
            )


@triton.jit
def _window_row(
    x_ptr,
    initial_ptr,
    t,
    length,
    channel,
    channels,
    x_stride_t,
    initial_stride_k,
    TAPS: tl.constexpr,
):
    """x_t; from the initial state where t < 0; zero outside both."""
    x = tl.load(
        x_ptr + t * x_stride_t + channel,
        mask=channel < tl.where((t >= 0) & (t < length), channels, 0),
        other=0.0,
    ).to(tl.float32)
    if initial_ptr is not None:
        x += tl.load(
            initial_ptr + (t + TAPS - 1) * initial_stride_k + channel,
            mask=channel < tl.where((t < 0) & (t > -TAPS), channels, 0),
            other=0.0,
        ).to(tl.float32)
    return x


@triton.jit
def _same_document(seq_ptr, t, document, latest):
    """1.0 where token t is in `document`; tokens before the row count to its first one."""
    there = tl.load(seq_ptr + tl.minimum(tl.maximum(t, 0), latest))
    return tl.where(there == document, 1.0, 0.0)


@triton.jit(do_not_specialize=["length"])
def _conv_backward(
    x_ptr,
    w_ptr,
    bias_ptr,
    initial_ptr,
    seq_ptr,
    lengths_ptr,
    dy_ptr,
    dfinal_ptr,
    dx_ptr,
    dinitial_ptr,
    partial_ptr,
    length,
    channels,
    stretches,
    x_stride_b,
    x_stride_t,
    w_stride,
    initial_stride_b,
    initial_stride_k,
    seq_stride_b,
    dy_stride_b,
    dy_stride_t,
    dfinal_stride_b,
    dfinal_stride_k,
    TAPS: tl.constexpr,
    STRETCH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    stretch = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(2).to(tl.int64)
    inside = channel < channels
    x_ptr += row * x_stride_b
    dy_ptr += row * dy_stride_b
    if initial_ptr is not None:
        initial_ptr += row * initial_stride_b
        dinitial_ptr += row * (TAPS - 1) * channels
    if dfinal_ptr is not None:
        dfinal_ptr += row * dfinal_stride_b
    if seq_ptr is not None:
        seq_ptr += row * seq_stride_b
    length = length.to(tl.int64)
    start = stretch * STRETCH
    stop = tl.minimum(start + STRETCH, length)
    end = length
    if lengths_ptr is not None:
        end = tl.load(lengths_ptr + row).to(tl.int64)

    w0 = tap(w_ptr, channel, inside, w_stride, 0, TAPS)
    w1 = tap(w_ptr, channel, inside, w_stride, 1, TAPS)
    w2 = tap(w_ptr, channel, inside, w_stride, 2, TAPS)
    w3 = tap(w_ptr, channel, inside, w_stride, 3, TAPS)
    bias = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)

    # x3, x2, x1: the inputs 3, 2 and 1 tokens back. dx3, dx2, dx1: the gradients of those inputs,
    # summed over the tokens so far.
    x3 = _window_row(
        x_ptr, initial_ptr, start - 3, length, channel, channels, x_stride_t, initial_stride_k, TAPS
    )
    x2 = _window_row(
        x_ptr, initial_ptr, start - 2, length, channel, channels, x_stride_t, initial_stride_k, TAPS
    )
    x1 = _window_row(
        x_ptr, initial_ptr, start - 1, length, channel, channels, x_stride_t, initial_stride_k, TAPS
    )
    dx3 = tl.zeros((BLOCK_C,), dtype=tl.float32)
    dx2, dx1 = dx3, dx3
    dw0, dw1, dw2, dw3, dbias = dx3, dx3, dx3, dx3, dx3
    reach1, reach2, reach3 = 1.0, 1.0, 1.0

    for step in range(0, stop - start + 3):
        t = start + step  # 64 bits
        readable = tl.where(t < length, channels, 0)
        dy = tl.load(dy_ptr + t * dy_stride_t + channel, mask=channel < readable, other=0.0)
        x0 = tl.load(x_ptr + t * x_stride_t + channel, mask=channel < readable, other=0.0)
        x0 = x0.to(tl.float32)
        if seq_ptr is not None:
            latest = tl.maximum(length - 1, 0)
            here = tl.load(seq_ptr + tl.minimum(t, latest))
            reach1 = _same_document(seq_ptr, t - 1, here, latest)
            reach2 = _same_document(seq_ptr, t - 2, here, latest)
            reach3 = _same_document(seq_ptr, t - 3, here, latest)
        v1, v2, v3 = w2 * reach1, w1 * reach2, w0 * reach3
        u = bias + w3 * x0 + v1 * x1 + v2 * x2 + v3 * x3
        gate = 1.0 / (1.0 + tl.exp(-u))
        du = dy.to(tl.float32) * gate * (1.0 + u * (1.0 - gate))

        # Tokens beyond this stretch belong to the next program, which adds their part of dw.
        mine = du * tl.where(t < stop, 1.0, 0.0)
        dbias += mine
        dw3 += mine * x0
        dw2 += mine * (x1 * reach1)
        dw1 += mine * (x2 * reach2)
        dw0 += mine * (x3 * reach3)

        out = dx3 + v3 * du
        done = t - 3
        if dfinal_ptr is not None:
            place = done - end + TAPS - 1
            out += tl.load(
                dfinal_ptr + place * dfinal_stride_k + channel,
                mask=channel < tl.where((place >= 0) & (place < TAPS - 1), channels, 0),
                other=0.0,
            ).to(tl.float32)
        tl.store(
            dx_ptr + (row * length + done) * channels + channel,
            out.to(dx_ptr.dtype.element_ty),
            mask=channel < tl.where(done >= start, channels, 0),
        )
        if initial_ptr is not None:
            tl.store(
                dinitial_ptr + (done + TAPS - 1) * channels + channel,
                out.to(dinitial_ptr.dtype.element_ty),
                mask=channel < tl.where((t < 3) & (done > -TAPS), channels, 0),
            )
        dx3 = dx2 + v2 * du
        dx2 = dx1 + v1 * du
        dx1 = w3 * du
        x3, x2, x1 = x2, x1, x0

    partial_ptr += (row * stretches + stretch) * 5 * channels + channel
    tl.store(partial_ptr, dw0, mask=inside)
    tl.store(partial_ptr + channels, dw1, mask=inside)
    tl.store(partial_ptr + 2 * channels, dw2, mask=inside)
    tl.store(partial_ptr + 3 * channels, dw3, mask=inside)
    tl.store(partial_ptr + 4 * channels, dbias, mask=inside)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, seq_idx, lengths):  # type: ignore[no-untyped-def]
        b, t, c = x.shape
        taps = weight.shape[1]
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        kept = x.dtype if initial_state is None else initial_state.dtype
        state = torch.empty(b, taps - 1, c, dtype=kept, device=x.device)
        config = by_arch(FORWARD)
        grid = (max(1, cdiv(t, config["BLOCK_T"])), cdiv(c, config["BLOCK_C"]), b)
        with on_device(x):
            _conv_forward[grid](
                x,
                weight,
                bias,
                initial_state,
                seq_idx,
                lengths,
                y,
                state,
                t,
                c,
                *x.stride()[:2],
                *_strides(weight, initial_state, seq_idx),
                TAPS=taps,
                **config.kwargs,
            )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, initial_state, seq_idx, lengths)
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):  # type: ignore[no-untyped-def]
        x, weight, bias, initial_state, seq_idx, lengths = ctx.saved_tensors
        b, t, c = x.shape
        dy = unit_stride(torch.zeros_like(x) if dy is None else dy)
        dfinal = None if dfinal is None else unit_stride(dfinal)
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        dinitial = (
            None
            if initial_state is None
            else torch.empty_like(initial_state, memory_format=torch.contiguous_format)
        )
        config = by_arch(BACKWARD)
        stretches = max(1, cdiv(t, config["STRETCH"]))
        partial = torch.empty(b, stretches, 5, c, dtype=torch.float32, device=x.device)
        with on_device(x):
            _conv_backward[stretches, cdiv(c, config["BLOCK_C"]), b](
                x,
                weight,
                bias,
                initial_state,
                seq_idx,
                lengths,
                dy,
                dfinal,
                dx,
                dinitial,
                partial,
                t,
                c,
                stretches,
                *x.stride()[:2],
                *_strides(weight, initial_state, seq_idx),
                *dy.stride()[:2],
                *((0, 0) if dfinal is None else dfinal.stride()[:2]),
                TAPS=weight.shape[1],
                **config.kwargs,
            )
        sums = partial.sum((0, 1))
        dweight = sums[4 - weight.shape[1] : 4].t().to(weight.dtype)
        dbias = None if bias is None else sums[4].to(bias.dtype)
        return dx, dweight, dbias, dinitial, None, None


def causal_conv1d(
    x: Float[Tensor, "b t c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None = None,
    *,
    initial_state: Float[Tensor, "b km1 c"] | None = None,
    seq_idx: Int[Tensor, "b t"] | None = None,
    lengths: Int[Tensor, "b"] | None = None,
) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b km1 c"]]:
    """`nemotron_lite.ops.causal_conv1d` as one kernel; differentiable in all float inputs.

    Args:
        x: inputs in float32, bfloat16 or float16; may be strided if channels are contiguous.
        weight: taps, oldest first, 2 to 4 of them.
        bias: added before the SiLU.
        initial_state: the k-1 inputs before x; zeros when None.
        seq_idx: number of the document of each token. Where it changes, a new document begins, and
            no tap reads across that point, even if the same number appears again later in the row.
        lengths: real tokens of each row; the returned state is that of the last real one.

    Returns:
        (y, state): y in the dtype of x; the last k-1 real inputs of each row in the dtype of
        `initial_state`, or of x without one.

    Raises:
        RuntimeError: CPU tensors outside the interpreter.
        ValueError: shapes that do not fit, a filter of another length, float64, more than 65,535
            rows.
    """
    check_inputs("causal_conv1d", x, weight, bias, initial_state, seq_idx, lengths)
    b, t, c = x.shape
    check_rows("causal_conv1d", b)
    check_shapes(
        "causal_conv1d",
        c,
        weight,
        bias=(bias, (c,)),
        seq_idx=(seq_idx, (b, t)),
        initial_state=(initial_state, (b, weight.shape[1] - 1, c)),
        lengths=(lengths, (b,)),
    )
    x, weight = unit_stride(x), weight.contiguous()
    bias, lengths = (None if v is None else v.contiguous() for v in (bias, lengths))
    initial_state = None if initial_state is None else unit_stride(initial_state)
    if seq_idx is not None:  # count the documents, because a number may appear again later
        changes = seq_idx[:, 1:] != seq_idx[:, :-1]
        seq_idx = torch.nn.functional.pad(changes, (1, 0)).cumsum(1)
    return _CausalConv1d.apply(x, weight, bias, initial_state, seq_idx, lengths)


def _strides(weight: Tensor, initial: Tensor | None, seq_idx: Tensor | None) -> tuple[int, ...]:
    """Strides of the filter, of initial state along b and k, and of seq_idx; 0 for None."""
    along = (0, 0) if initial is None else initial.stride()[:2]
    return (weight.stride(0), *along, 0 if seq_idx is None else seq_idx.stride(0))


def check_shapes(op: str, channels: int, weight: Tensor, **given: Any) -> None:
    """Compare the filter with the channels, and each (value, shape) of `given` with its shape.

    Raises:
        ValueError: names the argument, its shape and the expected one.
    """
    if weight.ndim != 2 or weight.shape[0] != channels or not 2 <= weight.shape[1] <= 4:
        raise ValueError(
            f"{op}: weight has shape {tuple(weight.shape)}; {channels} channels need "
            f"({channels}, 2 to 4 taps). Longer filters: nemotron_lite.ops with impl='torch'."
        )
    for name, (value, shape) in given.items():
        if value is not None and tuple(value.shape) != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(value.shape)}; expected {shape}.")
