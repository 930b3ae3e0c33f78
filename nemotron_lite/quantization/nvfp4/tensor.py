"""A tensor in NVFP4, and how it is made: the definition, step by step.

`quantize` is the order of operations of scaling.py, applied to blocks of one of two shapes:

    "1x16"     sixteen neighbors along the last dimension, which a matrix product sums over
    "16x16"    a square tile, for weights: the forward pass sums along rows and the backward pass
               along columns, and with square tiles a weight and its transpose have the same values.
               Stored like 1x16, with each scale repeated for the sixteen rows of its tile.

Rows whose length is no multiple of 16 are padded with zeros, which change neither scales nor
values. `shape` is the shape before padding. A tensor after the Hadamard transform keeps the padded
columns, because the transform has spread its numbers over them.

Layout: two codes in a byte, the even column in the low four bits; scales row-major, as in a
checkpoint (not in the 128 x 4 order that tensor cores read). 4.5 bits a number, and 4 bytes for the
tensor.

**Stochastic rounding** is unbiased only where nothing is clipped. c is rounded to nearest, so in
about half of the blocks it is too small, by up to 1/16. The largest value of such a block is then
clipped at 6, whatever the random bits are, and the mean error there is toward zero. Of a million
normal numbers 3.5 % are clipped, in 51 % of the blocks, by 7 % of a step on average. Measured in
tests/quantization/nvfp4/test_stochastic.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float8e4m3fn, Float32, UInt8
from torch import Tensor

from nemotron_lite.backends import triton
from nemotron_lite.backends.dispatch import choose
from nemotron_lite.ops.philox import random_halves
from nemotron_lite.quantization.nvfp4 import e2m1, scaling
from nemotron_lite.quantization.nvfp4.hadamard import hadamard_transform
from nemotron_lite.quantization.nvfp4.scaling import BLOCK

BLOCKS = ("1x16", "16x16")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Numbers in NVFP4; `dequantize` decodes them.

    Attributes:
        codes: packed, two in a byte; rows are padded to a multiple of 16 codes.
        scales: c of each block.
        scale: s_dec of the tensor: one number, or one for each tensor of a batch.
        shape: of the numbers, without padding.
        block: "1x16" or "16x16".

    Raises:
        ValueError: dtypes or shapes that do not fit together.
    """

    codes: UInt8[Tensor, "*rows half"]
    scales: Float8e4m3fn[Tensor, "*rows blocks"]
    scale: Float32[Tensor, "*batch"]
    shape: tuple[int, ...]
    block: str = "1x16"

    def __post_init__(self) -> None:
        if self.block not in BLOCKS:
            raise ValueError(f"block={self.block!r}; expected one of {BLOCKS}.")
        if not self.shape:
            raise ValueError("an NVFP4 tensor needs at least one dimension; shape is ().")
        *rows, last = self.shape
        blocks = -(-last // BLOCK)
        parts = {
            "codes": (self.codes, (*rows, blocks * BLOCK // 2), torch.uint8),
            "scales": (self.scales, (*rows, blocks), torch.float8_e4m3fn),
            "scale": (self.scale, self.shape[: self.scale.ndim], torch.float32),
        }
        for name, (part, shape, dtype) in parts.items():
            if tuple(part.shape) != shape or part.dtype != dtype:
                raise ValueError(
                    f"{name} is {part.dtype} of shape {list(part.shape)}; numbers of shape "
                    f"{list(self.shape)} need {dtype} of shape {list(shape)}."
                )

    def dequantize(
        self, dtype: torch.dtype = torch.float32, *, impl: str = "auto"
    ) -> Float[Tensor, "*shape"]:
        """The values, code * (c * s_dec), computed in float32 and rounded once to `dtype`.

        Raises:
            ValueError: an `impl` other than "auto", "torch" (the definition) and "triton".
            RuntimeError: "triton" for tensors on the CPU outside its interpreter.
        """
        # `choose` looks at the dtype of the result, because the kernel cannot write float64.
        result = self.scale.new_empty(0, dtype=dtype)
        run = choose(
            "dequantize",
            impl,
            result,
            torch=QuantizedTensor._dequantize,
            triton=triton.nvfp4_dequantize,
        )
        return run(self, dtype)

    def _dequantize(self, dtype: torch.dtype) -> Tensor:
        decode = self.scale.reshape(*self.scale.shape, *[1] * (len(self.shape) - self.scale.ndim))
        factor = self.scales.float() * decode
        values = e2m1.decode_packed_codes(self.codes).unflatten(-1, (-1, BLOCK))
        return (values * factor.unsqueeze(-1)).flatten(-2)[..., : self.shape[-1]].to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes + self.scale.nbytes


@dataclass(frozen=True)
class QuantizeOptions:
    """The arguments of `quantize`, which explains them."""

    block: str
    stochastic: bool
    seed: int | None
    bits: Tensor | None
    hadamard: bool
    batch_dims: int
    amax: Tensor | None
    name: str

    def transposed(self) -> QuantizeOptions:
        """The same options for the transposed tensor."""
        return self if self.bits is None else replace(self, bits=self.bits.mT)


def naive_quantize(x: Tensor, options: QuantizeOptions) -> QuantizedTensor:
    """The definition of `quantize`."""
    check(x, options)
    x, name, batch_dims = x.detach(), options.name, options.batch_dims
    if options.hadamard:
        x = hadamard_transform(F.pad(x, (0, -x.shape[-1] % BLOCK)))
    amax = scaling.tensor_amax(x, batch_dims=batch_dims, name=name)
    if options.amax is not None:
        amax = scaling.check_finite(options.amax, f"amax of {name}")
    encode, decode = scaling.tensor_scales(amax)
    blocks = F.pad(x.float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1)
    if options.block == "16x16":
        largest = _max_of_sixteen_rows(largest)
    ones = [1] * (largest.ndim - batch_dims)
    scales = scaling.block_scales(largest, encode.reshape(*encode.shape, *ones))
    times, _ = scaling.block_factors(scales, decode.reshape(*decode.shape, *ones))
    v = (blocks * times.unsqueeze(-1)).clamp(-e2m1.E2M1_MAX, e2m1.E2M1_MAX).flatten(-2)
    if options.stochastic:
        codes = e2m1.encode_e2m1_stochastic(v, _random_bits(v, options))
    else:
        codes = e2m1.encode_e2m1(v)
    return QuantizedTensor(e2m1.pack_codes(codes), scales, decode, tuple(x.shape), options.block)


def naive_fake_quantize(x: Tensor, dim: int, options: QuantizeOptions) -> Tensor:
    """The definition of `fake_quantize`; `dim` is -1 or -2."""
    if dim == -2:
        return naive_fake_quantize(x.mT, -1, options.transposed()).mT
    return naive_quantize(x, options).dequantize(x.dtype)


def check(x: Tensor, options: QuantizeOptions) -> None:
    """Refuse a tensor that cannot be quantized with these options.

    Raises:
        ValueError: naming the tensor.
    """
    name, block, batch_dims = options.name, options.block, options.batch_dims
    if block not in BLOCKS:
        raise ValueError(f"block={block!r}; expected one of {BLOCKS}.")
    scaling.check_dtype(x, name)
    if not 0 <= batch_dims < x.ndim:
        raise ValueError(
            f"{name} has shape {list(x.shape)} and batch_dims={batch_dims}; expected at least "
            "one dimension after those of the batch. Use fewer batch_dims."
        )
    if block == "16x16" and x.ndim != batch_dims + 2:
        raise ValueError(
            f"{name} has shape {list(x.shape)} and batch_dims={batch_dims}; square tiles need "
            "matrices: exactly two dimensions after those of the batch."
        )
    if options.amax is not None and options.amax.shape != x.shape[:batch_dims]:
        raise ValueError(
            f"{name}: amax of shape {list(options.amax.shape)}; expected one number for each "
            f"tensor of the batch, {list(x.shape[:batch_dims])}."
        )
    seed, bits, stochastic = options.seed, options.bits, options.stochastic
    if (seed is not None) + (bits is not None) != int(stochastic):
        expected = "exactly one of seed and bits" if stochastic else "neither seed nor bits"
        raise ValueError(
            f"{name}: stochastic={stochastic} takes {expected}; got seed={seed}, "
            f"bits={'None' if bits is None else list(bits.shape)}."
        )


def _max_of_sixteen_rows(largest: Tensor) -> Tensor:
    """The maximum over each 16 rows (dimension -2), repeated for each of them."""
    rows = largest.shape[-2]
    tiles = F.pad(largest, (0, 0, 0, -rows % BLOCK)).unflatten(-2, (-1, BLOCK))
    return tiles.amax(-2, keepdim=True).expand_as(tiles).flatten(-3, -2)[..., :rows, :]


def _random_bits(v: Tensor, options: QuantizeOptions) -> Tensor:
    """Random bits for each number, padding included (a zero stays zero with any bits)."""
    if options.bits is None:
        assert options.seed is not None
        rows = v.shape[:-1].numel()
        return random_halves(options.seed, rows, v.shape[-1], device=v.device).view(v.shape)
    return F.pad(options.bits, (0, v.shape[-1] - options.bits.shape[-1]))
