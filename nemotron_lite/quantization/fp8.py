"""FP8: eight bits a number, with one scale for the tensor, a tile, or a power of two for every 32.

E4M3 has four bits of exponent and three of mantissa, no infinity, largest 448, smallest 2^-9.

**Per tensor** (`quantize_fp8`), as ModelOpt writes it in checkpoints and serving reads it:

    scale = amax / 448         code = e4m3( x / scale )         value = code * scale

**Per row or tile** (`decode_fp8_blocks`): some releases store one scale for each row, or for each
128 x 128 numbers. Such weights are decoded when they are loaded, and are not written.

**MXFP8** (`quantize_mxfp8`): each 32 neighbors have a scale with eight bits of exponent only
(E8M0), so multiplying by it does not round. Nemotron 3's recipe runs the output projection of Mamba
layers in MXFP8, because NVFP4 flushed too much of it to zero (reference sheet 6.5):

    s     = 2^ceil( log2( fl(amax_block / 448) ) ), at least 2^-127
    code  = e4m3( x / s )                                       value = code * s

The exponent is rounded up, so no value is clipped; this is Transformer Engine's rule. The OCP paper
takes 2^(floor(log2 amax) - 8), which clips values above 448 s; it is not offered. Division by a
power of two is exact, so the order of operations does not matter here.

Rows whose length is no multiple of 32 are padded with zeros. Source: reference sheet 6.5, 6.6 and
10.3; OCP Microscaling formats 1.0; Transformer Engine, ptx.cuh. Left out: E5M2, which no part of
the recipe uses, and E8M0's NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float8e4m3fn, Float32, UInt8
from torch import Tensor

from nemotron_lite.backends.dispatch import choose
from nemotron_lite.quantization.nvfp4.cpu_packed_products import decode_e4m3
from nemotron_lite.quantization.nvfp4.scaling import E4M3_MAX, check_dtype, check_finite, round_e4m3

MX_BLOCK = 32
_BIAS = 127  # E8M0: byte b is 2^(b - 127)


@dataclass(frozen=True, eq=False)
class FP8Tensor:
    """Numbers in E4M3 with one float32 scale for the tensor."""

    codes: Float8e4m3fn[Tensor, "*shape"]
    scale: Float32[Tensor, ""]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
        """code * scale, computed in float32."""
        return (self.codes.float() * self.scale).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scale."""
        return self.codes.nbytes + self.scale.nbytes


@dataclass(frozen=True, eq=False)
class MXFP8Tensor:
    """Numbers in E4M3 with a power of two for each 32 along the last dimension."""

    codes: Float8e4m3fn[Tensor, "*rows padded"]
    scales: UInt8[Tensor, "*rows blocks"]  # E8M0: exponent + 127
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*shape"]:
        """code * 2^(scale - 127), computed in float32."""
        blocks = self.codes.float().unflatten(-1, (-1, MX_BLOCK))
        values = torch.ldexp(blocks, self.scales.int().unsqueeze(-1) - _BIAS)
        return values.flatten(-2)[..., : self.shape[-1]].to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes


def quantize_fp8(
    x: Float[Tensor, "*shape"],
    *,
    scale: Float32[Tensor, ""] | None = None,
    name: str = "tensor",
) -> FP8Tensor:
    """x in E4M3 with one scale: the given one, or amax / 448 (1 for a tensor of zeros).

    Raises:
        ValueError: NaN or infinity in x, a dtype other than float32, bfloat16 and float16, a given
            scale that is not positive and finite.
    """
    wide = _checked_float32(x, name)
    if scale is None:
        largest = wide.abs().amax() if x.numel() else wide.new_zeros(())
        # Divide by a tensor: on a GPU torch multiplies by 1 / number instead, which rounds twice.
        scale = largest / torch.full_like(largest, E4M3_MAX)
        # If amax is below 448 times float32's smallest number, the quotient and all values are 0.
        scale = torch.where(scale == 0, 1.0, scale)
    elif not (bool(scale.isfinite()) and float(scale) > 0):
        raise ValueError(f"{name}: scale={float(scale)}; expected a positive finite number.")
    return FP8Tensor(round_e4m3(wide / scale), scale)


def decode_fp8_blocks(
    codes: Float8e4m3fn[Tensor, "r c"], scales: Float32[Tensor, "br bc"], block: tuple[int, int]
) -> Float32[Tensor, "r c"]:
    """code * scale, with one scale for each `block` of rows and columns.

    Blocks at the lower and right edge may be cut: the scales are ceil(r / rows of a block) by
    ceil(c / columns of a block).

    Raises:
        ValueError: scales that are not as many.
    """
    (rows, cols), (high, wide) = codes.shape, block
    expected = [-(-rows // high), -(-cols // wide)]
    if list(scales.shape) != expected:
        raise ValueError(
            f"scales have shape {list(scales.shape)}; expected {expected} for a matrix of "
            f"{rows} x {cols} in blocks of {high} x {wide}."
        )
    values = decode_e4m3(codes)
    by_row = scales.repeat_interleave(high, dim=0)[:rows]
    full = cols // wide * wide  # columns in blocks that are not cut
    values[:, :full].unflatten(1, (-1, wide)).mul_(by_row[:, : cols // wide].unsqueeze(-1))
    values[:, full:].mul_(by_row[:, cols // wide :])
    return values


def quantize_mxfp8(x: Float[Tensor, "*rows n"], *, name: str = "tensor") -> MXFP8Tensor:
    """x in MXFP8, blocks of 32 along the last dimension.

    Raises:
        ValueError: NaN or infinity in x, a dtype other than float32, bfloat16 and float16.
    """
    blocks = F.pad(_checked_float32(x, name), (0, -x.shape[-1] % MX_BLOCK)).unflatten(
        -1, (-1, MX_BLOCK)
    )
    exponent = _scale_exponent(blocks.abs().amax(-1))
    codes = round_e4m3(torch.ldexp(blocks, -exponent.unsqueeze(-1)))
    return MXFP8Tensor(codes.flatten(-2), (exponent + _BIAS).to(torch.uint8), tuple(x.shape))


def fake_quantize_fp8(
    x: Float[Tensor, "*shape"],
    *,
    scale: Float32[Tensor, ""] | None = None,
    name: str = "tensor",
) -> Float[Tensor, "*shape"]:
    """`quantize_fp8(x).dequantize(x.dtype)`."""
    return quantize_fp8(x, scale=scale, name=name).dequantize(x.dtype)


def fake_quantize_mxfp8(
    x: Float[Tensor, "*rows n"], *, dim: int = -1, name: str = "tensor", impl: str = "auto"
) -> Float[Tensor, "*rows n"]:
    """`quantize_mxfp8(x).dequantize(x.dtype)`; `dim` -2 for blocks along the columns.

    Raises:
        ValueError: as `quantize_mxfp8`; another `dim`; an unknown `impl`: "naive" and "torch" are
            the same form, and there is no tuned one.
    """
    if dim not in (-1, -2):
        raise ValueError(f"{name}: dim={dim}; expected -1 or -2.")
    run = choose("fake_quantize_mxfp8", impl, x, naive=_naive_fake_mxfp8, torch=_naive_fake_mxfp8)
    return run(x, dim, name)


def _naive_fake_mxfp8(x: Tensor, dim: int, name: str) -> Tensor:
    if dim == -2:
        return _naive_fake_mxfp8(x.mT, -1, name).mT
    return quantize_mxfp8(x, name=name).dequantize(x.dtype)


def _checked_float32(x: Tensor, name: str) -> Tensor:
    check_dtype(x, name)
    wide = x.detach().float()
    if x.numel():
        check_finite(wide.abs().amax(), name, "FP8")
    return wide


def _scale_exponent(amax: Tensor) -> Tensor:
    """The exponent of a block's scale: ceil(log2(amax / 448)), -127 to 120."""
    # frexp writes the quotient as m 2^e with 0.5 <= m < 1: it is a power of two where m = 0.5.
    mantissa, exponent = torch.frexp(amax * torch.tensor(1 / E4M3_MAX, device=amax.device))
    exponent = exponent - (mantissa == 0.5).int()
    return torch.where(mantissa == 0, -_BIAS, exponent.clamp(min=-_BIAS))
