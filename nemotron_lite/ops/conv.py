"""Causal depthwise convolution: each channel looks at its own last k inputs.

    y_t = silu( bias + sum_j w_j * x_{t-k+1+j} ),   j = 0 .. k-1

The last tap, w_{k-1}, multiplies the present token; w_0 the oldest. With k = 4, decoding has to
cache the last three *inputs*, before convolution and SiLU.

The definition is a loop over the taps; the plain form multiplies all windows of k inputs with the
taps at once; decoding has a one-token step.

Source: Nemotron 3 Super report section 2.1; tap order and state as in the reference sheet 2.2, 2.5.
Left out: dilation and stride, which no Mamba layer uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.backends import cpu_conv, triton
from nemotron_lite.backends.dispatch import choose
from nemotron_lite.dtypes import cast, without_autocast
from nemotron_lite.masks import document_starts, number_documents


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
        initial_state: the k-1 inputs before x; zeros when None. It may have another dtype than x
            (a float32 cache under autocast); then the wider one of both is computed with.
        seq_idx: which document each token belongs to, where a row holds several; taps never cross
            from one document into the next. The first document of a row continues `initial_state`.
        lengths: how many tokens of each row are real (right-padded rows); the inputs that come back
            are the last real ones. All tokens are real when None.
        impl: "naive" (loop over taps), "torch", "cpu", "traced" (the loop, which a compiler makes
            one pass of) or "triton".

    Returns:
        (y, state): the outputs in the dtype of x, and the last k-1 real inputs of each row in the
        dtype of `initial_state`, or of x without one.

    Raises:
        ValueError: unknown `impl`.
    """
    if initial_state is not None and initial_state.dtype != x.dtype:
        wide = torch.promote_types(initial_state.dtype, x.dtype)
        y, state = causal_conv1d(
            x.to(wide),
            weight,
            bias,
            initial_state=initial_state.to(wide),
            seq_idx=seq_idx,
            lengths=lengths,
            impl=impl,
        )
        return y.to(x.dtype), state.to(initial_state.dtype)
    run = choose(
        "causal_conv1d",
        impl,
        x,
        naive=_naive,
        torch=_torch,
        cpu=_cpu,
        traced=_naive,
        triton=triton.causal_conv1d,
    )
    return without_autocast(run, x)(x, weight, bias, initial_state, seq_idx, lengths)


def causal_conv1d_window(
    window: Float[Tensor, "b s c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None = None,
    *,
    impl: str = "auto",
) -> Float[Tensor, "b t c"]:
    """`causal_conv1d` of s - k + 1 tokens that have the k-1 inputs before them in front.

    For a caller that has to keep that window anyway (a draft), without joining it twice. No
    gradients.

    Raises:
        ValueError: unknown `impl` ("naive", "torch", "cpu", "traced", "triton").
    """
    run = choose(
        "causal_conv1d_window",
        impl,
        window,
        naive=_loop_over_taps,
        torch=_all_taps,
        cpu=cpu_conv.causal_conv1d_window,
        traced=_loop_over_taps,
        triton=triton.causal_conv1d_window,
    )
    return without_autocast(run, window)(window, weight, bias)


def causal_conv1d_step(
    state: Float[Tensor, "b km1 c"],
    x: Float[Tensor, "b c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None = None,
    *,
    impl: str = "auto",
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b km1 c"]]:
    """One token of `causal_conv1d`: the output, and the state with `x` appended.

    The output has the dtype of x; a state of another dtype keeps its own.

    Raises:
        ValueError: unknown `impl` ("torch", which is the definition too, or "triton").
    """
    run = choose("causal_conv1d_step", impl, x, torch=plain_step, triton=triton.causal_conv1d_step)
    if state.dtype != x.dtype:
        wide = torch.promote_types(state.dtype, x.dtype)
        y, new = run(state.to(wide), x.to(wide), weight, bias)
        return y.to(x.dtype), new.to(state.dtype)
    return run(state, x, weight, bias)


def _naive(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    window = _window(x, weight, initial_state)
    documents = None if seq_idx is None else number_documents(seq_idx)
    y = _loop_over_taps(window, weight, bias, documents)
    return y, _last_inputs(window, weight.shape[1] - 1, lengths)


def _torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    window = _window(x, weight, initial_state)
    documents = None if seq_idx is None else number_documents(seq_idx)
    y = _all_taps(window, weight, bias, documents)
    return y, _last_inputs(window, weight.shape[1] - 1, lengths)


def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    window = _window(x, weight, initial_state)
    starts = None if seq_idx is None else document_starts(seq_idx)
    y = cpu_conv.causal_conv1d(window, weight, bias, starts)
    return y, _last_inputs(window, weight.shape[1] - 1, lengths)


def _window(x: Tensor, weight: Tensor, initial_state: Tensor | None) -> Float[Tensor, "b s c"]:
    """The inputs with the k-1 before them in front."""
    if initial_state is None:
        return F.pad(x, (0, 0, weight.shape[1] - 1, 0))
    return torch.cat([initial_state, x], dim=1)


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
    documents: Int[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t c"]:
    """The definition: tap by tap."""
    taps = weight.shape[1]
    length = window.shape[1] - taps + 1
    weight = cast(weight, window.dtype)
    y = torch.zeros_like(window[:, :length])
    if bias is not None:
        y = y + cast(bias, window.dtype)
    for j in range(taps):
        shifted = window[:, j : j + length]
        if documents is not None:
            back = taps - 1 - j
            # Tokens before the row belong to its first document.
            padded = torch.cat([documents[:, :1].expand(-1, back), documents], dim=1)
            same = padded[:, :length] == documents
            shifted = shifted * same.unsqueeze(-1)
        y = y + weight[:, j] * shifted
    return F.silu(y)


def _all_taps(
    window: Float[Tensor, "b s c"],
    weight: Float[Tensor, "c k"],
    bias: Float[Tensor, "c"] | None,
    documents: Int[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t c"]:
    """The plain form: every window of k inputs at once, and one product with the taps."""
    taps = weight.shape[1]
    inputs = window.unfold(1, taps, 1)  # b t c k, a view
    if documents is not None:
        # Tokens before the row belong to its first document.
        before = documents[:, :1].expand(-1, taps - 1)
        document = torch.cat([before, documents], dim=1).unfold(1, taps, 1)  # b t k
        same = document == documents.unsqueeze(-1)
        inputs = inputs.masked_fill(~same.unsqueeze(2), 0.0)
    y = torch.einsum("btck,ck->btc", inputs, weight.to(window.dtype))
    return F.silu(y if bias is None else y + bias.to(window.dtype))


def plain_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d_step` of a state in the dtype of x."""
    window = torch.cat([state, x.unsqueeze(1)], dim=1)
    y = (window * cast(weight, window.dtype).t()).sum(1)
    if bias is not None:
        bias = cast(bias, window.dtype)
        y = y.add_(bias) if not y.requires_grad else y + bias
    return F.silu(y), window[:, 1:]
