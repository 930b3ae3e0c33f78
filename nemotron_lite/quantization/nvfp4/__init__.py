"""NVFP4: four bits a number, an eight-bit scale for sixteen numbers, a float32 for the tensor.

NVIDIA trains and serves Nemotron 3 in this format. A number is one of 0, 0.5, 1, 1.5, 2, 3, 4, 6
with a sign (E2M1), times the E4M3 scale of its block of 16, times the scale of its tensor. That is
4.5 bits a number. Blackwell's tensor cores multiply this format directly; any other machine can
compute the same values, as this package does.

    e2m1.py                 the sixteen four-bit codes: rounding to them, two of them in a byte
    scaling.py              the two scales; Transformer Engine's order of operations is normative
    hadamard.py             the 16-point Hadamard transform
    tensor.py               `QuantizedTensor`, and the definition of `quantize`
    cpu_quantize.py         the same bits in few passes over memory (`impl="cpu"`)
    triton_quantize.py      the same bits from kernels on a GPU (`impl="triton"`)
    products.py             products with packed weights: `matmul`, and `expert_mlp` over a stack
    cpu_packed_products.py  these products, a stripe of decoded rows at a time (`impl="cpu"`)

There is no `impl="torch"` for quantizing and for products: "naive" is the definition and plain.

Source: reference sheet 6 and 10.3; Abecassis et al. 2025 (arXiv 2509.25149); Transformer Engine.
Left out: "four over six" and power-of-two scales, which pre-training does not use.
"""

from __future__ import annotations

from jaxtyping import Float, Float32, Int
from torch import Tensor

from nemotron_lite.backends.dispatch import choose
from nemotron_lite.quantization.nvfp4.cpu_quantize import cpu_fake_quantize, cpu_quantize
from nemotron_lite.quantization.nvfp4.e2m1 import (
    E2M1_MAX,
    E2M1_VALUES,
    decode_e2m1,
    encode_e2m1,
    encode_e2m1_stochastic,
    pack_codes,
    unpack_codes,
)
from nemotron_lite.quantization.nvfp4.hadamard import (
    SIGNS,
    hadamard_transform,
    inverse_hadamard_transform,
)
from nemotron_lite.quantization.nvfp4.products import expert_mlp, matmul
from nemotron_lite.quantization.nvfp4.scaling import (
    E4M3_MAX,
    block_scales,
    round_e4m3,
    tensor_amax,
    tensor_scales,
)
from nemotron_lite.quantization.nvfp4.tensor import (
    QuantizedTensor,
    QuantizeOptions,
    naive_fake_quantize,
    naive_quantize,
)
from nemotron_lite.quantization.nvfp4.triton_quantize import triton_fake_quantize, triton_quantize

__all__ = [
    "E2M1_MAX",
    "E2M1_VALUES",
    "E4M3_MAX",
    "SIGNS",
    "QuantizedTensor",
    "block_scales",
    "decode_e2m1",
    "encode_e2m1",
    "encode_e2m1_stochastic",
    "expert_mlp",
    "fake_quantize",
    "hadamard_transform",
    "inverse_hadamard_transform",
    "matmul",
    "pack_codes",
    "quantize",
    "round_e4m3",
    "tensor_amax",
    "tensor_scales",
    "unpack_codes",
]


def quantize(
    x: Float[Tensor, "*rows n"],
    *,
    block: str = "1x16",
    stochastic: bool = False,
    seed: int | None = None,
    bits: Int[Tensor, "*bits_rows m"] | None = None,
    hadamard: bool = False,
    batch_dims: int = 0,
    amax: Float32[Tensor, "*batch"] | None = None,
    name: str = "tensor",
    impl: str = "auto",
) -> QuantizedTensor:
    """x in NVFP4, blocks along the last dimension (quantize `x.mT` for blocks along columns).

    Args:
        x: float32, bfloat16 or float16; no gradient flows.
        block: "1x16", or "16x16" for a weight.
        stochastic: stochastic rounding instead of rounding to nearest; needs `seed` or `bits`.
        seed: 0 to 2^63 - 1. Number (row, column) gets the random bits of `philox.random_halves`;
            rows are counted over all leading dimensions, columns are padded to a multiple of 16.
        bits: random bits, 0 .. 65535 for each number, instead of a seed; m is n, or n padded.
        hadamard: apply the Hadamard transform to each 16 numbers first. The result is the
            transformed tensor, its last dimension padded with zeros to a multiple of 16.
        batch_dims: this many leading dimensions count separate tensors, each with its own scale:
            1 for a stack of expert weights.
        amax: the largest magnitude to scale for, instead of x's own: from a calibration, or from
            other processes that hold other parts of the tensor. Larger numbers saturate.
        name: of the tensor, for errors.
        impl: "naive" (the definition), "cpu" or "triton"; they give the same bits.

    Raises:
        ValueError: NaN or infinity in x or amax, another dtype, a block shape that x cannot have,
            random bits that are missing or not needed, an unknown `impl`.
        RuntimeError: "triton" for tensors on the CPU outside its interpreter.
    """
    run = choose(
        "quantize", impl, x, naive=naive_quantize, cpu=cpu_quantize, triton=triton_quantize
    )
    options = QuantizeOptions(block, stochastic, seed, bits, hadamard, batch_dims, amax, name)
    return run(x, options)


def fake_quantize(
    x: Float[Tensor, "*rows n"],
    *,
    dim: int = -1,
    block: str = "1x16",
    stochastic: bool = False,
    seed: int | None = None,
    bits: Int[Tensor, "*bits_rows m"] | None = None,
    hadamard: bool = False,
    batch_dims: int = 0,
    amax: Float32[Tensor, "*batch"] | None = None,
    name: str = "tensor",
    impl: str = "auto",
) -> Float[Tensor, "*out_rows k"]:
    """The values that tensor cores would read: `quantize(x).dequantize(x.dtype)`, in few passes.

    Args:
        dim: -1, or -2 for blocks along the columns: the same as `fake_quantize(x.mT, ...).mT`, but
            without transposing x in memory. Weight gradients sum over tokens, which are rows.
        impl: "naive", which makes the codes; "triton", with the same bits; or "cpu", with the
            same bits except for the sign of zeros.
        The rest: as for `quantize`; `bits` have the layout of x.

    Returns:
        The shape and dtype of x; with `hadamard`, transformed and padded to a multiple of 16.

    Raises:
        ValueError, RuntimeError: as `quantize`.
    """
    if dim not in (-1, -2):
        raise ValueError(f"{name}: dim={dim}; expected -1 or -2.")
    run = choose(
        "fake_quantize",
        impl,
        x,
        naive=naive_fake_quantize,
        cpu=cpu_fake_quantize,
        triton=triton_fake_quantize,
    )
    options = QuantizeOptions(block, stochastic, seed, bits, hadamard, batch_dims, amax, name)
    return run(x, dim, options)
