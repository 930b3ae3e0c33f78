"""Routed experts with matrices packed in NVFP4: only the matrices of chosen experts are read.

    a_i = relu(W1_e z_t)^2          for each pair i = (token t, slot) with expert e
    o_t = sum_i p_i W2_e a_i        over the k pairs of token t

As in `experts`, many pairs are sorted by expert and go through two grouped products. With few pairs
(decoding), each pair reads the matrix of its own expert. In both cases a matrix is decoded in
registers and not written to memory, so 4.5 bits per weight are read instead of 16. This traffic
limits the speed of decoding. The hidden rows are kept in the dtype of z.

When many tokens share an expert, the tiles of its matrix are decoded once for each tile of rows.

Source: reference sheet 4.1 and 10.3. Left out: hidden rows packed as well, gradients
(nemotron_lite computes them in PyTorch).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_kernels._compat import check_inputs, unit_stride
from nemotron_kernels.experts import _combine, few_pairs
from nemotron_kernels.grouped import PRECISIONS, tile_rows
from nemotron_kernels.nvfp4_decode import Packed
from nemotron_kernels.nvfp4_gemm import grouped_rows
from nemotron_kernels.nvfp4_matvec import chosen_matvec
from nemotron_kernels.sorting import sort_by_expert


def nvfp4_expert_mlp(
    z: Float[Tensor, "t l"],
    up: Packed,
    down: Packed,
    weights: Float[Tensor, "t k"],
    indices: Int[Tensor, "t k"],
    *,
    input_precision: str = "ieee",
) -> Float[Tensor, "t l"]:
    """The weighted sum of each token's chosen experts.

    Args:
        z: input of the experts; float32, bfloat16 or float16.
        up, down: packed stacks W1 `e f l` and W2 `e l f`, a scale for each expert.
        weights: from the router, used as they are (float32 stays float32).
        indices: from the router, int32 or int64, each from 0 to e - 1. This is checked only under
            TRITON_DEBUG=1, on the device: a check on the host would have to wait for the device.
        input_precision: precision of float32 products: "ieee" (full), "tf32" or "tf32x3".

    Returns:
        In the dtype of `z`; every run gives the same bits.

    Raises:
        ValueError: shapes that do not fit, an unknown `input_precision`, float64.
        RuntimeError: tensors on the CPU outside the interpreter.
    """
    parts = [part for w in (up, down) for part in (w.codes, w.scales.view(torch.uint8), w.scale)]
    check_inputs("nvfp4_expert_mlp", z, *parts, weights, indices)
    _check_shapes(z, up, down, weights, indices)
    if input_precision not in PRECISIONS:
        known = ", ".join(repr(name) for name in PRECISIONS)
        raise ValueError(
            f"nvfp4_expert_mlp: input_precision={input_precision!r} is none of {known}."
        )
    if indices.numel() == 0:
        return torch.zeros_like(z)
    z, weights, indices = unit_stride(z), weights.contiguous(), indices.contiguous()
    experts, top_k = up.shape[0], indices.shape[1]
    if indices.numel() <= few_pairs(experts, top_k):
        active = chosen_matvec(z, up, indices, activate=True)
        outputs = chosen_matvec(active, down, indices, activate=False)
        return _combine(outputs, top_k, None, weights)
    order = sort_by_expert(indices, experts, tile_rows(indices.numel(), experts, z.dtype))
    shared = (order, top_k, input_precision)
    active = grouped_rows(z, up, *shared, gather=True, activate=True)
    outputs = grouped_rows(active, down, *shared, gather=False, activate=False)
    return _combine(outputs, top_k, order.places, weights)


def _check_shapes(z: Tensor, up: Packed, down: Packed, weights: Tensor, indices: Tensor) -> None:
    tokens, width = z.shape
    experts, hidden = up.shape[:2]
    expected = {
        "up": (up.shape, (experts, hidden, width)),
        "up.scale": (up.scale.shape, (experts,)),
        "down": (down.shape, (experts, width, hidden)),
        "down.scale": (down.scale.shape, (experts,)),
        "indices": (indices.shape, (tokens, indices.shape[1])),
        "weights": (weights.shape, tuple(indices.shape)),
    }
    for name, (found, shape) in expected.items():
        if tuple(found) != shape:
            raise ValueError(
                f"nvfp4_expert_mlp: {name} has shape {tuple(found)}, expected {shape} for z "
                f"{tuple(z.shape)}, up {tuple(up.shape)} and indices {tuple(indices.shape)}."
            )
