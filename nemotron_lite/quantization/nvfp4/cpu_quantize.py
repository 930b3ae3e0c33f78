"""NVFP4 in few passes over memory: what `impl="cpu"` runs, with the same bits as the definition.

Emulated training quantizes every operand of every matrix product, so the time of these passes adds
to that of the product. Three ideas make them fast, and none of them changes a value:

**No table and no comparison.** Let e be the power of two at or below |v|, at least 1. There E2M1
has the step e / 2, and float32 has the same step at 3 * 2^21 e. Adding that number rounds v to the
grid, ties to even; subtracting it leaves the rounded value:

    e = bits of v without sign and mantissa             q = (v + 3 * 2^21 e) - 3 * 2^21 e

Stochastic rounding is e / 2 * floor(2 v / e + u). The codes come from float16: q * 2^-14 has the
code in the upper bits of its exponent and mantissa.

**Numbers that stay in the processor's cache.** The tensor is processed in pieces, each from its
first pass to its last. The scales of all blocks are computed in between, from the block maxima: one
sixteenth of the numbers. The maxima of blocks along columns (dim = -2) are taken over sixteen long
rows, several times faster than over sixteen neighbors. A transposed view is recognized and
processed in its own memory order.

**Clipping only where it is needed.** In rounding to nearest, |v| < 7 becomes at most 6 by itself,
and v stays below 7 unless a block's scale is subnormal. One test of all block scales decides.

`fake_quantize` does not keep the sign of a zero (-0.1 becomes 0.0, where the codes say -0.0). Two
rare cases use the definition instead: stochastic rounding with square tiles that do not fill the
matrix, and with a tensor scale so small that half of it could not be represented.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite.ops.philox import words
from nemotron_lite.quantization.nvfp4 import e2m1, scaling
from nemotron_lite.quantization.nvfp4.hadamard import hadamard_transform
from nemotron_lite.quantization.nvfp4.scaling import BLOCK
from nemotron_lite.quantization.nvfp4.tensor import (
    QuantizedTensor,
    QuantizeOptions,
    check,
    naive_fake_quantize,
    naive_quantize,
)

PIECE = 2**17  # numbers: half a megabyte in float32, of which two copies exist at a time
SMALLEST_SCALE = 2.0**-110
_EXPONENT = 0x7F800000
_SHIFT = 3.0 * 2**21


@dataclass(frozen=True)
class _ScaledBlocks:
    """A padded tensor in groups of blocks, with the scales of its blocks, ready to be rounded.

    The blocks lie along the last dimension of `groups` [G, blocks, 16], or along the middle one of
    [G, 16, columns]. `encode` and `factor` broadcast over it.
    """

    groups: Tensor  # padded, after the Hadamard transform if there is one, in the dtype of x
    encode: Tensor
    factor: Tensor
    scales: Tensor  # E4M3, one for each block
    decode: Tensor  # one number, or one for each tensor of the batch
    clips: bool
    dither: _Dither | None  # of stochastic rounding


@dataclass(frozen=True)
class _Dither:
    """The random numbers of stochastic rounding, computed piece by piece."""

    seed: int | None
    bits: Tensor | None  # in the layout of the groups
    along_columns: bool  # whether rows of the quantized tensor are columns here
    groups_per_matrix: int
    counters_per_row: int  # each counter of the generator gives eight numbers

    def of_piece(self, piece: slice, like: Tensor) -> Tensor:
        """The dither u of e2m1.py for the groups of `piece`: (2 r + 1) / 2^17."""
        if self.bits is not None:
            return self.bits[piece].float().mul_(2.0**-16).add_(2.0**-17)
        assert self.seed is not None
        draw = self._along_columns if self.along_columns else self._along_rows
        return draw(self.seed, piece, like)

    def _along_rows(self, seed: int, piece: slice, like: Tensor) -> Tensor:
        each = like[0].numel() // 8
        counter = torch.arange(piece.start * each, piece.stop * each, device=like.device)
        w0, w1, w2, w3 = words(seed, counter)
        # Two words make 64 bits: four 16-bit numbers in memory order. Flipping the top bit of each
        # makes them signed numbers r - 2^15, which convert to float32 in one pass.
        pairs = torch.empty(len(counter), 2, dtype=torch.int64, device=like.device)
        pairs[:, 0] = w0 | (w1 << 32)
        pairs[:, 1] = w2 | (w3 << 32)
        halves = pairs.bitwise_xor_(-0x7FFF7FFF7FFF8000).view(torch.int16).float()
        return halves.mul_(2.0**-16).add_(0.5 + 2.0**-17).view(like.shape)

    def _along_columns(self, seed: int, piece: slice, like: Tensor) -> Tensor:
        count, _, columns = like.shape
        group = torch.arange(piece.start, piece.stop, device=like.device)
        matrix, in_matrix = group // self.groups_per_matrix, group % self.groups_per_matrix
        first = matrix * columns * self.counters_per_row + 2 * in_matrix
        start = first[:, None] + torch.arange(2, device=like.device)
        column = torch.arange(columns, device=like.device) * self.counters_per_row
        counter = start[:, :, None] + column
        u = torch.empty(count, 2, 8, columns, device=like.device)
        for i, word in enumerate(words(seed, counter)):
            u[:, :, 2 * i] = word & 0xFFFF
            u[:, :, 2 * i + 1] = word >> 16
        return u.mul_(2.0**-16).add_(2.0**-17).view(like.shape)


def cpu_fake_quantize(x: Tensor, dim: int, options: QuantizeOptions) -> Tensor:
    """`fake_quantize(impl="cpu")`; `dim` is -1 or -2."""
    if _is_transposed_view(x, options):
        return cpu_fake_quantize(x.mT, -3 - dim, options.transposed()).mT
    blocks = _scale_blocks(x, dim, options)
    if blocks is None:
        return naive_fake_quantize(x, dim, options)
    out = torch.empty_like(blocks.groups)
    scale = 0.5 if options.stochastic else 1.0  # stochastic values come doubled
    factor = blocks.factor * scale
    for piece, q in _rounded(blocks):
        torch.mul(q, factor[piece], out=out[piece])
    rows, columns = x.shape[-2:] if x.ndim > 1 else (1, x.shape[-1])
    out = out.view(*x.shape[:-2], *_padded_shape(x, dim, options))
    if options.hadamard:
        rows, columns = (rows, out.shape[-1]) if dim == -1 else (out.shape[-2], columns)
    out = out[..., :rows, :columns]
    return out[0] if x.ndim == 1 else out


def cpu_quantize(x: Tensor, options: QuantizeOptions) -> QuantizedTensor:
    """`quantize(impl="cpu")`."""
    blocks = _scale_blocks(x, -1, options)
    if blocks is None:
        return naive_quantize(x, options)
    rows, columns = _padded_shape(x, -1, options)
    packed = torch.empty(blocks.groups.numel() // 2, dtype=torch.uint8, device=x.device)
    packed = packed.view(len(blocks.groups), -1)
    to_float16 = 2.0**-15 if options.stochastic else 2.0**-14  # stochastic values come doubled
    for piece, q in _rounded(blocks):
        # The upper byte: sign, four of the exponent's five bits, and two of the mantissa.
        half = q.mul_(to_float16).to(torch.float16).flatten(1)
        codes = (_upper_bytes(half) >> 1) & 7
        codes |= (_upper_bytes(blocks.groups[piece].flatten(1)) >> 4) & 8
        packed[piece] = e2m1.pack_codes(codes)
    scales = blocks.scales
    if options.block == "16x16":
        scales = scales.unsqueeze(1).expand(-1, BLOCK, -1)
    lead, last = x.shape[:-1], x.shape[-1]
    scales = scales.reshape(*x.shape[:-2], rows, columns // BLOCK)
    codes = packed.view(*x.shape[:-2], rows, columns // 2)
    if x.ndim > 1:
        codes, scales = (part[..., : x.shape[-2], :] for part in (codes, scales))
    return QuantizedTensor(
        codes.reshape(*lead, columns // 2),
        scales.reshape(*lead, columns // BLOCK).contiguous(),
        blocks.decode,
        (*lead, columns if options.hadamard else last),
        options.block,
    )


def _upper_bytes(numbers: Tensor) -> Tensor:
    """The byte of each number that holds its sign."""
    size = numbers.element_size()
    return numbers.contiguous().view(torch.uint8)[:, size - 1 :: size]


def _is_transposed_view(x: Tensor, options: QuantizeOptions) -> bool:
    return x.ndim == options.batch_dims + 2 and not x.is_contiguous() and x.mT.is_contiguous()


def _padded_shape(x: Tensor, dim: int, options: QuantizeOptions) -> tuple[int, int]:
    """Rows and columns of x, padded to whole blocks."""
    rows, columns = x.shape[-2:] if x.ndim > 1 else (1, x.shape[-1])
    if dim == -2 or options.block == "16x16":
        rows += -rows % BLOCK
    if dim == -1 or options.block == "16x16":
        columns += -columns % BLOCK
    return rows, columns


def _scale_blocks(x: Tensor, dim: int, options: QuantizeOptions) -> _ScaledBlocks | None:
    """Everything up to the scales; None for the cases that the definition computes."""
    check(x, options)
    square, batch_dims = options.block == "16x16", options.batch_dims
    rows, columns = _padded_shape(x, dim, options)
    padding = (0, columns - x.shape[-1], 0, rows - (x.shape[-2] if x.ndim > 1 else 1))
    padded = any(padding)
    if x.numel() == 0 or (options.stochastic and square and padded):
        return None
    x = x.detach() if x.ndim > 1 else x.detach()[None]
    matrices = x.shape[:-2].numel()
    if padded:
        x = F.pad(x, padding)
    sixteen_rows = square or dim == -2  # a group is sixteen rows, or else one row
    shape = (-1, BLOCK, columns) if sixteen_rows else (-1, columns // BLOCK, BLOCK)
    hadamard_dim = None
    if options.hadamard:
        hadamard_dim = 1 if sixteen_rows and dim == -2 else -1
    groups, largest = _block_amax(x.reshape(shape), sixteen_rows, hadamard_dim)
    if square:
        largest = largest.unflatten(-1, (-1, BLOCK)).amax(-1)
    if batch_dims == 0:
        amax = largest.amax()
    else:
        amax = largest.reshape(*x.shape[:batch_dims], -1).amax(-1)
    scaling.check_finite(amax, options.name)
    if options.amax is not None:
        amax = scaling.check_finite(options.amax, f"amax of {options.name}")
    encode, decode = scaling.tensor_scales(amax)
    if options.stochastic and bool((decode < SMALLEST_SCALE).any()):
        return None
    each = len(groups) // max(encode.numel(), 1)
    encode_of_group, decode_of_group = (
        scale.reshape(-1, 1).expand(-1, each).reshape(-1, 1) for scale in (encode, decode)
    )
    scales = scaling.block_scales(largest, encode_of_group)
    times, factor = scaling.block_factors(scales, decode_of_group)
    clips = options.stochastic or bool((largest * times).amax() >= 7)
    if square:
        times, factor = (s.repeat_interleave(BLOCK, -1) for s in (times, factor))
    dither = None
    if options.stochastic:
        bits = options.bits
        if bits is not None:
            bits = bits if bits.ndim > 1 else bits[None]
            bits_padding = (0, columns - bits.shape[-1], 0, rows - bits.shape[-2])
            bits = F.pad(bits, bits_padding).reshape(groups.shape)
        row_length = rows if dim == -2 else columns  # of the quantized tensor
        groups_per_matrix = len(groups) // matrices
        dither = _Dither(options.seed, bits, dim == -2, groups_per_matrix, row_length // 8)
    block_dim = 1 if sixteen_rows else -1
    return _ScaledBlocks(
        groups,
        times.unsqueeze(block_dim),
        factor.unsqueeze(block_dim),
        scales,
        decode,
        clips,
        dither,
    )


def _pieces(groups: Tensor) -> Iterator[slice]:
    each = max(1, PIECE // max(1, groups[0].numel()))
    for start in range(0, len(groups), each):
        yield slice(start, min(start + each, len(groups)))


def _block_amax(
    groups: Tensor, sixteen_rows: bool, hadamard_dim: int | None
) -> tuple[Tensor, Tensor]:
    """The groups after the Hadamard transform (if any), and each block's amax in float32."""
    transformed = groups if hadamard_dim is None else torch.empty_like(groups)
    shape = (len(groups), groups.shape[2] if sixteen_rows else groups.shape[1])
    largest = torch.empty(shape, dtype=torch.float32, device=groups.device)
    for piece in _pieces(groups):
        part = groups[piece]
        if hadamard_dim is not None:
            part = transformed[piece].copy_(hadamard_transform(part, hadamard_dim))
        if sixteen_rows:
            # Without its sign a float orders like an integer, and integers are compared faster.
            integer = torch.int32 if part.element_size() == 4 else torch.int16
            largest[piece] = part.abs().view(integer).amax(1).view(part.dtype)
        else:
            flat = part.reshape(1, -1).float().abs()
            largest[piece] = F.max_pool1d(flat, BLOCK, BLOCK).view(len(part), -1)
    return transformed, largest


def _rounded(blocks: _ScaledBlocks) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of the tensor rounded to the grid of E2M1: float32, overwritten by the next one.

    With stochastic rounding the values come doubled.
    """
    for piece in _pieces(blocks.groups):
        part = blocks.groups[piece]
        v = torch.mul(part, blocks.encode[piece])
        if blocks.clips:
            v.clamp_(-e2m1.E2M1_MAX, e2m1.E2M1_MAX)
        e = (v.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_min_(1.0)
        if blocks.dither is None:
            yield piece, v.add_(e, alpha=_SHIFT).sub_(e, alpha=_SHIFT)
        else:
            y = blocks.dither.of_piece(piece, v).addcdiv_(v, e, value=2.0)
            yield piece, y.floor_().mul_(e)
