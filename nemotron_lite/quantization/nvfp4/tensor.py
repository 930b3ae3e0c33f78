"""A tensor in NVFP4, and how one is made: the definition, step by step.

`quantize` is the order of operations of scaling.py, applied to blocks of one of two shapes:

    "1x16"     sixteen neighbours along the last dimension, the one a matrix product sums over
    "16x16"    a square tile, for weights: the forward pass sums along rows and the backward pass
               along columns, and with square tiles a weight and its transpose have the same values.
               Stored as 1x16, each scale repeated for the sixteen rows of its tile.

Rows that are no multiple of 16 are filled up with zeros, which change neither scale nor value;
`shape` remembers where the numbers end, and a rotated tensor keeps the filled-up columns, because
the rotation has spread the numbers over them.

Layout: two codes in a byte, the even column in the low nibble; scales row-major, as in a checkpoint
(not in the 128 x 4 order that tensor cores read). 4.5 bits a number, and 4 bytes for the tensor.

**Stochastic rounding** is unbiased only where nothing is clipped. c is rounded to nearest, so in
about half of the blocks it is too small by up to 1/16, and the largest value of such a block is
clipped at 6 whichever way the dice fall. The mean error there is toward zero: of a million normal
numbers 3.5 % are clipped, in 51 % of the blocks, by 7 % of a step on average. Measured in
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
from nemotron_lite.quantization.nvfp4 import elements, scaling
from nemotron_lite.quantization.nvfp4.hadamard import hadamard as rotate
from nemotron_lite.quantization.nvfp4.scaling import BLOCK

BLOCKS = ("1x16", "16x16")


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """Numbers in NVFP4; `dequantize` gives them back.

    `cols` is the last length rounded up to a multiple of 16.

    Raises:
        ValueError: parts whose dtypes or shapes do not belong together.
    """

    codes: UInt8[Tensor, "*rows half"]  # cols / 2 bytes a row
    scales: Float8e4m3fn[Tensor, "*rows blocks"]  # cols / 16 of them a row
    scale: Float32[Tensor, "*batch"]  # s_dec: one number, or one for each tensor of a batch
    shape: tuple[int, ...]  # of the numbers
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
            ValueError: an `impl` other than "auto", "torch" and "triton".
            RuntimeError: "triton" for tensors on the CPU outside its interpreter.
        """
        # What is asked for decides: the kernel writes no float64.
        wanted = self.scale.new_empty(0, dtype=dtype)
        run = choose(
            "dequantize", impl, wanted,
            torch=QuantizedTensor._dequantize, triton=triton.nvfp4_dequantize,
        )  # fmt: skip
        return run(self, dtype)

    def _dequantize(self, dtype: torch.dtype) -> Tensor:
        decode = self.scale.reshape(*self.scale.shape, *[1] * (len(self.shape) - self.scale.ndim))
        factor = self.scales.float() * decode
        values = elements.decode_packed(self.codes).unflatten(-1, (-1, BLOCK))
        return (values * factor.unsqueeze(-1)).flatten(-2)[..., : self.shape[-1]].to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes + self.scale.nbytes


@dataclass(frozen=True)
class Options:
    """How to quantize; `quantize` in __init__.py says what each means."""

    block: str
    stochastic: bool
    seed: int | None
    bits: Tensor | None
    hadamard: bool
    batch_dims: int
    amax: Tensor | None
    name: str

    def turned(self) -> Options:
        """The same for the transposed tensor."""
        return self if self.bits is None else replace(self, bits=self.bits.mT)


def naive_quantize(x: Tensor, options: Options) -> QuantizedTensor:
    """The definition of `quantize`."""
    check(x, options)
    x, name, batch_dims = x.detach(), options.name, options.batch_dims
    if options.hadamard:
        x = rotate(F.pad(x, (0, -x.shape[-1] % BLOCK)))
    amax = scaling.tensor_amax(x, batch_dims=batch_dims, name=name)
    if options.amax is not None:
        amax = scaling.check_finite(options.amax, f"amax of {name}")
    encode, decode = scaling.tensor_scales(amax)
    blocks = F.pad(x.float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1)
    if options.block == "16x16":
        largest = _over_sixteen_rows(largest)
    one_each = [1] * (largest.ndim - batch_dims)
    scales = scaling.block_scales(largest, encode.reshape(*encode.shape, *one_each))
    times, _ = scaling.block_factors(scales, decode.reshape(*decode.shape, *one_each))
    v = (blocks * times.unsqueeze(-1)).clamp(-elements.E2M1_MAX, elements.E2M1_MAX).flatten(-2)
    if options.stochastic:
        codes = elements.encode_e2m1_stochastic(v, _bits(v, options))
    else:
        codes = elements.encode_e2m1(v)
    return QuantizedTensor(elements.pack(codes), scales, decode, tuple(x.shape), options.block)


def naive_fake(x: Tensor, dim: int, options: Options) -> Tensor:
    """The definition of `fake_quantize`; `dim` is -1 or -2."""
    if dim == -2:
        return naive_fake(x.mT, -1, options.turned()).mT
    return naive_quantize(x, options).dequantize(x.dtype)


def check(x: Tensor, options: Options) -> None:
    """Refuse what cannot be quantized this way.

    Raises:
        ValueError: naming the tensor.
    """
    name, block, batch_dims = options.name, options.block, options.batch_dims
    if block not in BLOCKS:
        raise ValueError(f"block={block!r}; expected one of {BLOCKS}.")
    scaling.check_dtype(x, name)
    if not 0 <= batch_dims < x.ndim:
        raise ValueError(
            f"{name} has shape {list(x.shape)} and batch_dims={batch_dims}; at least one dimension "
            "must be left for the numbers."
        )
    if block == "16x16" and x.ndim != batch_dims + 2:
        raise ValueError(
            f"{name} has shape {list(x.shape)} and batch_dims={batch_dims}; square tiles need "
            "matrices, two dimensions after those of the batch."
        )
    if options.amax is not None and options.amax.shape != x.shape[:batch_dims]:
        raise ValueError(
            f"{name}: amax of shape {list(options.amax.shape)}; expected one number for each "
            f"tensor of the batch, {list(x.shape[:batch_dims])}."
        )
    seed, bits, stochastic = options.seed, options.bits, options.stochastic
    if (seed is not None) + (bits is not None) != int(stochastic):
        wants = "exactly one of seed and bits" if stochastic else "neither seed nor bits"
        raise ValueError(
            f"{name}: stochastic={stochastic} takes {wants}; got seed={seed}, "
            f"bits={'None' if bits is None else list(bits.shape)}."
        )


def _over_sixteen_rows(largest: Tensor) -> Tensor:
    """The maximum over each run of 16 rows, for every one of them; dimension -2."""
    rows = largest.shape[-2]
    tiles = F.pad(largest, (0, 0, 0, -rows % BLOCK)).unflatten(-2, (-1, BLOCK))
    return tiles.amax(-2, keepdim=True).expand_as(tiles).flatten(-3, -2)[..., :rows, :]


def _bits(v: Tensor, options: Options) -> Tensor:
    """Random bits for each number, filled-up columns included; zeros stay zero whatever these are.

    Raises:
        ValueError: bits of another shape.
    """
    if options.bits is None:
        assert options.seed is not None
        rows = v.shape[:-1].numel()
        return random_halves(options.seed, rows, v.shape[-1], device=v.device).view(v.shape)
    return F.pad(options.bits, (0, v.shape[-1] - options.bits.shape[-1]))
