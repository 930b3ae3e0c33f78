"""Causal depthwise convolution: each channel looks at its own last k inputs.

    y_t = silu( bias + sum_j w_j * x_{t-k+1+j} ),   j = 0 .. k-1

The last tap, w_{k-1}, multiplies the present token; w_0 the oldest. With k = 4 the state that
decoding has to remember is the last three *inputs*, before convolution and SiLU.

Three forms, equal up to rounding: a loop over the taps (the definition), one oneDNN depthwise
convolution with the channels innermost, so that nothing is transposed (the fast form), and a
one-token step. Training keeps only the input: the backward pass computes the pre-activation anew,
which costs less than the memory traffic of storing it.

Source: Nemotron 3 Super report section 2.1; tap order and state as in the reference sheet 2.2, 2.5.
Left out: dilation and stride, which no Mamba layer uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_lite.backends.dispatch import cast, choose, kernel
from nemotron_lite.ops.scan import document_starts, number_documents

_ONEDNN = torch.backends.mkldnn.is_available()
FEW_TOKENS = 16  # a draft, not a prompt
_KERNEL = kernel("conv", "causal_conv1d")
_STEP_KERNEL = kernel("conv_step", "causal_conv1d_step")


def causal_conv1d(
    x: Float[Tensor, "b t c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None = None,
    *,
    initial_state: Float[Tensor, "b km1 c"] | None = None,
    seq_idx: Int[Tensor, "b t"] | None = None,
    lengths: Int[Tensor, "b"] | None = None,
    impl: str = "auto",
) -> tuple[Float[Tensor, "b t c"], Float[Tensor, "b km1 c"]]:
    """Convolve along time, then SiLU, carrying the last k-1 inputs in and out.

    Args:
        x: inputs, any float dtype.
        weight: taps, oldest first.
        bias: added before the SiLU.
        initial_state: the k-1 inputs before x; zeros when None.
        seq_idx: which document of a packed row each token belongs to; taps never cross from one
            document into the next. The first document of a row continues `initial_state`.
        lengths: tokens of each row that are real (right-padded rows); the state that comes back
            is that of the last real token. All of them when None.
        impl: "naive" (loop over taps), "torch" or "triton".

    Returns:
        (y, state): the outputs and the last k-1 real inputs of each row.

    Raises:
        ValueError: unknown `impl`.
    """
    run = choose("causal_conv1d", impl, x, naive=_naive, torch=_fast, triton=_KERNEL)
    return run(x, weight, bias, initial_state=initial_state, seq_idx=seq_idx, lengths=lengths)


def causal_conv1d_window(
    window: Float[Tensor, "b s c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None = None,
    *,
    impl: str = "auto",
) -> Float[Tensor, "b t c"]:
    """`causal_conv1d` of s - k + 1 tokens that have the k-1 inputs before them in front.

    For whoever has to keep that window anyway (a draft), without joining it twice. No gradients.

    Raises:
        ValueError: unknown `impl`.
    """
    run = choose(
        "causal_conv1d_window", impl, window,
        naive=_loop_over_taps, torch=_window_fast, triton=_window_triton,
    )  # fmt: skip
    return run(window, weight, bias)


def causal_conv1d_step(
    state: Float[Tensor, "b km1 c"],
    x: Float[Tensor, "b c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None = None,
    *,
    impl: str = "auto",
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b km1 c"]]:
    """One token of `causal_conv1d`: the output, and the state with `x` appended.

    Raises:
        ValueError: unknown `impl` ("torch" is the definition too: one token has one form).
    """
    run = choose("causal_conv1d_step", impl, x, torch=_step, triton=_STEP_KERNEL)
    return run(state, x, weight, bias)


def _naive(
    x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, seq_idx: Tensor | None, lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    window = _window(x, weight, initial_state)
    documents = None if seq_idx is None else number_documents(seq_idx)
    y = _loop_over_taps(window, weight, bias, documents)
    return y, _last_inputs(window, weight.shape[1] - 1, lengths)


def _fast(
    x: Tensor, weight: Tensor, bias: Tensor | None,
    initial_state: Tensor | None, seq_idx: Tensor | None, lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    weight, bias = cast(weight, x.dtype), None if bias is None else cast(bias, x.dtype)
    window = _window(x, weight, initial_state)
    state = _last_inputs(window, weight.shape[1] - 1, lengths)
    if seq_idx is not None:
        return _packed(window, weight, bias, seq_idx), state
    if not torch.is_grad_enabled():
        return F.silu(_depthwise(window, weight, bias), inplace=True), state
    return _ConvSilu.apply(window, weight, bias), state


def _window_fast(window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else cast(bias, window.dtype)
    return F.silu(_depthwise(window, cast(weight, window.dtype), bias), inplace=True)


def _window_triton(window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    before = weight.shape[1] - 1
    return _KERNEL(
        window[:, before:], weight, bias,
        initial_state=window[:, :before], seq_idx=None, lengths=None,
    )[0]  # fmt: skip


def _window(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> Float[Tensor, "b s c"]:
    """The inputs with the k-1 before them in front."""
    if initial_state is None:
        return F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    return torch.cat([initial_state, x], dim=1)


def _packed(
    window: Float[Tensor, "b s c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None,
    seq_idx: Int[Tensor, "b t"],
) -> Float[Tensor, "b t c"]:
    """All documents of all rows in one long row, with k-1 zeros between them.

    The first document of a row has the inputs before the row there instead.
    """
    before, (b, t) = weight.shape[1] - 1, seq_idx.shape
    first = document_starts(seq_idx)
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


def _step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    window = torch.cat([state, x.unsqueeze(1)], dim=1)
    y = (window * weight.t()).sum(1)
    if bias is not None:
        y = y.add_(bias) if not y.requires_grad else y + bias
    return F.silu(y), window[:, 1:]


def _last_inputs(
    window: Float[Tensor, "b s c"], count: int, lengths: Int[Tensor, "b"] | None
) -> Float[Tensor, "b km1 c"]:
    """The `count` inputs before each row's end; `window` starts `count` inputs before the row."""
    if lengths is None:
        return window[:, window.shape[1] - count :].clone()
    index = lengths.to(window.device)[:, None] + torch.arange(count, device=window.device)
    return window.gather(1, index.unsqueeze(-1).expand(-1, -1, window.shape[2]))


def _loop_over_taps(
    window: Float[Tensor, "b s c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None,
    seq_idx: Int[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t c"]:
    taps = weight.shape[1]
    length = window.shape[1] - taps + 1
    y = torch.zeros_like(window[:, :length])
    if bias is not None:
        y = y + bias
    for j in range(taps):
        shifted = window[:, j : j + length]
        if seq_idx is not None:
            back = taps - 1 - j
            # Tokens before the row belong to its first document.
            padded = torch.cat([seq_idx[:, :1].expand(-1, back), seq_idx], dim=1)
            same = padded[:, :length] == seq_idx
            shifted = shifted * same.unsqueeze(-1)
        y = y + weight[:, j] * shifted
    return F.silu(y)


def _depthwise(
    window: Float[Tensor, "b s c"], weight: Float[Tensor, "c k"], bias: Float[Tensor, "c"] | None
) -> Float[Tensor, "b t c"]:
    """oneDNN's 2-D depthwise convolution on an image one pixel high, channels innermost.

    Where oneDNN does not answer (float64, other devices), and for a few tokens, which end before it
    has begun, one multiply-add per tap.
    """
    length = window.shape[1] - weight.shape[1] + 1
    narrow = window.dtype in (torch.float32, torch.bfloat16)
    if window.is_cpu and narrow and _ONEDNN and length > FEW_TOKENS:
        image = window.transpose(1, 2).unsqueeze(2)
        kernel = weight[:, None, None, :].contiguous(memory_format=torch.channels_last)
        y = F.conv2d(image, kernel, bias, groups=weight.shape[0])
        return y.squeeze(2).transpose(1, 2)
    taps = weight.t().contiguous()  # each tap in one piece: four times faster for a few tokens
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
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
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
