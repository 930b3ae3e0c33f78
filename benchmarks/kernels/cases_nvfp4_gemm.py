"""Products with packed weights at the shapes of Super, beside cuBLAS in bfloat16.

Mamba's in_proj is 4,096 to 18,560 (two gates of 8,192, B and C of 8 groups of 128, 128 steps), the
shared expert 4,096 to 5,376 and back, the routed experts 512 of 1,024 to 2,688 and back. Reference
sheet section 1.1.

The definition is the product with the decoded matrix in float64. Peers get that matrix in bfloat16,
so they read 3.6 times as many bytes. W4A16 should therefore be faster with few rows. With many rows
it can be equally fast at best, since both use the same tensor cores. The lower bound of the time
counts packed bytes, and FLOPs at the speed of bfloat16; a Blackwell GPU exceeds that speed when x
is packed too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.kernels.registry import Case, Draw, Inputs
from nemotron_kernels.experts import expert_mlp, few_pairs
from nemotron_kernels.grouped import tile_rows
from nemotron_kernels.nvfp4_experts import nvfp4_expert_mlp
from nemotron_kernels.nvfp4_gemm import MANY, nvfp4_matmul
from nemotron_lite.quantization import nvfp4

IN_PROJ, SHARED_UP, SHARED_DOWN = (18_560, 4096), (5376, 4096), (4096, 5376)
EXPERTS, TOP_K, HIDDEN, LATENT = 512, 22, 2688, 1024
BITS = 4.5


class Both(NamedTuple):
    """One matrix, or a stack of them: packed, and the same decoded values in bfloat16 for peers."""

    packed: nvfp4.QuantizedTensor
    dense: Tensor


def _both(draw: Draw, *shape: int, batch_dims: int = 0) -> Both:
    if draw.dry:
        codes = torch.empty(*shape[:-1], shape[-1] // 2, dtype=torch.uint8)
        scales = torch.empty(*shape[:-1], shape[-1] // 16, dtype=torch.float8_e4m3fn)
        packed = nvfp4.QuantizedTensor(codes, scales, torch.empty(shape[:batch_dims]), shape)
        return Both(packed, codes)
    numbers = draw.normal(*shape, scale=shape[-1] ** -0.5)
    packed = nvfp4.quantize(numbers, batch_dims=batch_dims)
    return Both(packed, packed.dequantize(torch.bfloat16))


def _inputs(tokens: int, matrix: tuple[int, int], packed: bool) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        shape = (draw.tokens(tokens), matrix[1])
        return {
            "x": _both(draw, *shape) if packed else draw.normal(*shape),
            "w": _both(draw, *matrix),
        }

    return make


def _run(x: Tensor | Both, w: Both) -> Tensor:
    return nvfp4_matmul(x.packed if isinstance(x, Both) else x, w.packed, torch.bfloat16)


def _exact(x: Tensor | Both, w: Both) -> Tensor:
    x = x.packed.dequantize(torch.float64) if isinstance(x, Both) else x
    return x @ w.packed.dequantize(torch.float64).mT


def _cublas(x: Tensor | Both, w: Both) -> Tensor:
    return (x.dense if isinstance(x, Both) else x) @ w.dense.mT


def _case(tokens: int, what: str, matrix: tuple[int, int], packed: bool = False) -> Case:
    numbers = matrix[0] * matrix[1]
    if packed:
        kernel = "few tokens" if tokens <= 16 else "many tokens"
    elif tokens == 1:
        kernel = "one token"
    elif tokens >= MANY:
        kernel = "decoded once"
    else:
        kernel = f"tiles of {next((t for t in (16, 32, 64) if t >= tokens), 128)}"
    form = "W4A4" if packed else "W4A16"
    x_bytes = tokens * matrix[1] * (BITS / 8 if packed else 2)
    return Case(
        op="nvfp4_matmul",
        name=form,
        shape=f"{what} of Super, {tokens} tokens",
        inputs=_inputs(tokens, matrix, packed),
        run=_run,
        exact=_exact,
        tolerance=4e-3,  # of a result in bfloat16; tests require 1e-6 of float32
        bytes=round(numbers * BITS / 8 + x_bytes + 2 * tokens * matrix[0]),
        flops=2 * tokens * numbers,
        peers={"cuBLAS bfloat16": _cublas},
        key=f"nvfp4_matmul {form}, {kernel}",
    )


def _expert_inputs(tokens: int) -> Callable[[Draw], Inputs]:
    return lambda draw: {
        "z": draw.normal(tokens, LATENT),
        "up": _both(draw, EXPERTS, HIDDEN, LATENT, batch_dims=1),
        "down": _both(draw, EXPERTS, LATENT, HIDDEN, batch_dims=1),
        "weights": draw.uniform(tokens, TOP_K),
        "indices": draw.integers(0, EXPERTS, tokens, TOP_K),
    }


def _run_experts(z: Tensor, up: Both, down: Both, weights: Tensor, indices: Tensor) -> Tensor:
    return nvfp4_expert_mlp(z, up.packed, down.packed, weights, indices)


def _exact_experts(z: Tensor, up: Both, down: Both, weights: Tensor, indices: Tensor) -> Tensor:
    return nvfp4.expert_mlp(z, up.packed, down.packed, weights, indices, impl="cpu")


def _bfloat16(z: Tensor, up: Both, down: Both, weights: Tensor, indices: Tensor) -> Tensor:
    return expert_mlp(z, up.dense, down.dense, weights, indices)


def _expert_case(tokens: int) -> Case:
    pairs = tokens * TOP_K
    busy = round(EXPERTS * (1 - (1 - 1 / EXPERTS) ** pairs))  # if choices are uniform
    few = pairs <= few_pairs(EXPERTS, TOP_K)
    tiles = "few tokens" if few else f"tiles of {tile_rows(pairs, EXPERTS, torch.bfloat16)}"
    return Case(
        op="nvfp4_expert_mlp",
        name="W4A16",
        shape=f"Super, {tokens} tokens",
        inputs=_expert_inputs(tokens),
        run=_run_experts,
        exact=_exact_experts,
        tolerance=8e-3,
        bytes=round(busy * 2 * HIDDEN * LATENT * BITS / 8) + 4 * tokens * LATENT,
        flops=4 * pairs * HIDDEN * LATENT,
        peers={"bfloat16 kernel": _bfloat16},
        key=f"nvfp4_expert_mlp W4A16, {tiles}",
    )


CASES = [
    *[_case(tokens, "in_proj", IN_PROJ) for tokens in (1, 2, 16, 32, 64, 256, 512, 8192)],
    *[_case(tokens, "shared up", SHARED_UP) for tokens in (1, 8192)],
    *[_case(tokens, "shared down", SHARED_DOWN) for tokens in (1, 8192)],
    *[_case(tokens, "in_proj", IN_PROJ, packed=True) for tokens in (16, 8192)],
    *[_expert_case(tokens) for tokens in (1, 4, 64, 512, 1024, 8192)],
]
