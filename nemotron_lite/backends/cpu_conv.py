"""The causal convolution by oneDNN, with a gradient written by hand.

One depthwise convolution with the channels innermost, so that nothing is transposed. Training keeps
only the input: the backward pass computes the pre-activation again, which costs less than the
memory traffic of storing it.

Concatenated documents are spread out into one long row with zeros between them, so that one
convolution serves them all.

Source: the equations of `ops/conv.py`. Left out: second derivatives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_lite.backends import private_torch
from nemotron_lite.dtypes import cast, exact_backward

FEW_TOKENS = 16  # the length of a draft, not of a prompt


def causal_conv1d(
    window: Float[Tensor, "b s c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None,
    starts: Bool[Tensor, "b t"] | None,
) -> Float[Tensor, "b t c"]:
    """Convolution and SiLU of a row with the k-1 inputs before it in front.

    Args:
        window: inputs, s = t + k - 1.
        weight, bias: in any dtype; used in that of the window.
        starts: True at the first token of a document, where there are several.
    """
    weight, bias = cast(weight, window.dtype), None if bias is None else cast(bias, window.dtype)
    if starts is not None:
        return _concatenated(window, weight, bias, starts)
    if not torch.is_grad_enabled():
        return F.silu(_depthwise(window, weight, bias), inplace=True)
    return _ConvSilu.apply(window, weight, bias)


def causal_conv1d_window(
    window: Float[Tensor, "b s c"], weight: Float[Tensor, "c k"], bias: Float[Tensor, "c"] | None
) -> Float[Tensor, "b t c"]:
    """The same for one document, without gradients."""
    bias = None if bias is None else cast(bias, window.dtype)
    return F.silu(_depthwise(window, cast(weight, window.dtype), bias), inplace=True)


def _concatenated(
    window: Float[Tensor, "b s c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None,
    starts: Bool[Tensor, "b t"],
) -> Float[Tensor, "b t c"]:
    """All documents of all rows in one long row, each with k-1 zeros before it.

    The first document of a row has the inputs before the row there instead of zeros.
    """
    before, (b, t) = weight.shape[1] - 1, starts.shape
    if not starts.numel():
        return F.silu(window[:, before:])
    first = starts.clone()
    first[:, 0] = True
    document = first.flatten().cumsum(0)
    places = torch.arange(b * t, device=window.device) + before * document
    row_starts = places.view(b, t)[:, :1] + torch.arange(-before, 0, device=window.device)
    size = b * t + before * int(document[-1])
    long = window.new_zeros(size, window.shape[2])
    long = long.index_copy(0, places, window[:, before:].flatten(0, 1))
    long = long.index_copy(0, row_starts.flatten(), window[:, :before].flatten(0, 1))
    y = _ConvSilu.apply(long.unsqueeze(0), weight, bias)[0]
    return y.index_select(0, places - before).view(b, t, -1)


def _depthwise(
    window: Float[Tensor, "b s c"], weight: Float[Tensor, "c k"], bias: Float[Tensor, "c"] | None
) -> Float[Tensor, "b t c"]:
    """oneDNN's 2-D depthwise convolution on an image one pixel high, channels innermost.

    For what oneDNN does not take (float64, other devices), and for a few tokens, where its call
    costs more than the work, one multiply-add per tap.
    """
    length = window.shape[1] - weight.shape[1] + 1
    narrow = window.dtype in (torch.float32, torch.bfloat16)
    if window.is_cpu and narrow and private_torch.HAS_ONEDNN and length > FEW_TOKENS:
        image = window.transpose(1, 2).unsqueeze(2)
        kernel = weight[:, None, None, :].contiguous(memory_format=torch.channels_last)
        y = F.conv2d(image, kernel, bias, groups=weight.shape[0])
        return y.squeeze(2).transpose(1, 2)
    taps = weight.t().contiguous()  # each tap contiguous: four times faster for a few tokens
    y = window[:, :length] * taps[0]
    for j in range(1, len(taps)):
        y.addcmul_(window[:, j : j + length], taps[j])
    return y if bias is None else y.add_(bias)


class _ConvSilu(torch.autograd.Function):
    """The convolution and its SiLU as one node that stores nothing but its input."""

    @staticmethod
    def forward(ctx, window, weight, bias):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(window, weight, bias)
        return F.silu(_depthwise(window, weight, bias), inplace=True)

    @staticmethod
    @once_differentiable
    @exact_backward
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        window, weight, bias = ctx.saved_tensors
        taps = weight.shape[1]
        pre = _depthwise(window, weight, bias)
        gate = torch.sigmoid(pre)
        # d silu(u)/du = s + u s (1 - s), with s = sigmoid(u)
        grad_pre = pre.mul_(1 - gate).add_(1).mul_(gate).mul_(grad)
        grad_bias = grad_pre.sum((0, 1)) if bias is not None else None
        padded = F.pad(grad_pre, (0, 0, taps - 1, taps - 1))
        grad_window = _depthwise(padded, weight.flip(1), None)
        length = grad.shape[1]
        grad_weight = torch.stack(
            [(window[:, j : j + length] * grad_pre).sum((0, 1)) for j in range(taps)], dim=1
        )
        return grad_window, grad_weight, grad_bias
