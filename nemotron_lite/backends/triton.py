"""Calls of the Triton kernels: one ordinary function for each, imported when it is first called.

`nemotron_kernels` needs triton, which exists for few platforms and takes a second to import. So
each import is inside its function: a program that never uses a kernel never imports triton.
If triton is missing, the import raises an `ImportError` that says what to do.

The signatures are those with which `ops` calls every implementation, so that `dispatch.choose` can
exchange one for another. If a kernel cannot take its inputs (float64, CPU tensors outside the
interpreter), it raises an error itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`ops.rms_norm`."""
    from nemotron_kernels.norm import rms_norm

    return rms_norm(x, weight, eps)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """`ops.gated_rms_norm`."""
    from nemotron_kernels.norm import gated_rms_norm

    return gated_rms_norm(y, z, weight, groups, eps)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`ops.causal_conv1d`."""
    from nemotron_kernels.conv import causal_conv1d

    return causal_conv1d(
        x, weight, bias, initial_state=initial_state, seq_idx=seq_idx, lengths=lengths
    )


def causal_conv1d_window(window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`ops.causal_conv1d_window`."""
    before = weight.shape[1] - 1
    return causal_conv1d(window[:, before:], weight, bias, window[:, :before], None, None)[0]


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ops.causal_conv1d_step`."""
    from nemotron_kernels.conv_step import causal_conv1d_step

    return causal_conv1d_step(state, x, weight, bias)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    chunk: int | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """`ops.ssd`; the bias and the softplus of dt are computed inside the kernel."""
    from nemotron_kernels.ssd import ssd

    return ssd(
        x,
        dt,
        A,
        B,
        C,
        D,
        initial_state,
        seq_idx,
        chunk,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
    )


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    seed: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.ssd_step`: updates `state` in place, and rounds it where it is in float16."""
    from nemotron_kernels.state_update import selective_state_update

    y = selective_state_update(
        state, x, dt, A, B, C, D, dt_bias=dt_bias, dt_softplus=dt_softplus, seed=seed
    )
    return y, state


def route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(weights, indices, scores) of `ops.route`."""
    from nemotron_kernels.routing import route

    weights, indices, scores, *_ = route(
        x, weight, bias, top_k, n_group, topk_group, normalize, scale
    )
    return weights, indices, scores


def expert_mlp(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """`ops.expert_mlp`."""
    from nemotron_kernels.experts import expert_mlp

    return expert_mlp(z, up, down, weights, indices)


def verify(
    p: Tensor, q: Tensor, drafts: Tensor, uniforms: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(accepted, token) of `ops.verify`."""
    from nemotron_kernels.verification import verify

    accepted, token = verify(p, q, drafts, uniforms, lengths)
    return accepted, token


def nvfp4_amax(x: Tensor, *, hadamard: bool, batch_dims: int) -> Tensor:
    """The largest magnitude of each tensor, before quantization."""
    from nemotron_kernels.nvfp4_quantizer import nvfp4_amax

    return nvfp4_amax(x, hadamard=hadamard, batch_dims=batch_dims)


def nvfp4_quantize(x: Tensor, amax: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(codes, block scales, tensor scale) of `nvfp4.quantize`."""
    from nemotron_kernels.nvfp4_quantizer import nvfp4_quantize

    return nvfp4_quantize(x, amax, **options)


def nvfp4_fake_quantize(x: Tensor, amax: Tensor, **options: Any) -> Tensor:
    """`nvfp4.fake_quantize`."""
    from nemotron_kernels.nvfp4_quantizer import nvfp4_fake_quantize

    return nvfp4_fake_quantize(x, amax, **options)


def nvfp4_dequantize(w: Any, dtype: torch.dtype) -> Tensor:
    """`QuantizedTensor.dequantize`."""
    from nemotron_kernels.nvfp4_dequantizer import nvfp4_dequantize

    return nvfp4_dequantize(w, dtype)


def nvfp4_matmul(x: Any, w: Any, dtype: torch.dtype) -> Tensor:
    """`nvfp4.matmul`, without gradients."""
    from nemotron_kernels.nvfp4_gemm import nvfp4_matmul

    return nvfp4_matmul(x, w, dtype)


def nvfp4_expert_mlp(z: Tensor, up: Any, down: Any, weights: Tensor, indices: Tensor) -> Tensor:
    """`nvfp4.expert_mlp`, without gradients."""
    from nemotron_kernels.nvfp4_experts import nvfp4_expert_mlp

    return nvfp4_expert_mlp(z, up, down, weights, indices)
