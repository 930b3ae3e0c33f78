"""NVFP4 in few passes over memory: what `impl="torch"` runs, the same bits as the definition.

Training in emulation quantizes every operand of every matrix product, so these passes stand beside
the product itself. Three ideas make them cheap, and none changes a value:

**No table and no comparison.** Let e be the power of two at or below |v|, at least 1. There E2M1
has the step e / 2, and so has float32 at 3 * 2^21 e. Adding that number rounds v to the grid, ties
to even, and subtracting it leaves the rounded value:

    e = bits of v without sign and mantissa             q = (v + 3 * 2^21 e) - 3 * 2^21 e

Stochastic rounding is e / 2 * floor(2 v / e + u). Codes fall out of float16: q * 2^-14 has the code
as the upper bits of its exponent and mantissa.

**Numbers that stay in the cache.** They go through in pieces, from the first pass over a piece to
the last; the scales of all blocks are computed in between, on a sixteenth of the numbers. Blocks
along columns (dim = -2) are maxima over sixteen long rows, several times faster than maxima over
sixteen neighbours; a transposed matrix is recognised and not turned over.

**Clipping where it happens.** Rounded to nearest, |v| < 7 becomes at most 6 by itself, and v stays
below 7 unless a block's scale is subnormal; one look at the blocks decides.

`fake_quantize` does not keep the sign of a zero (-0.1 becomes 0.0, where the codes say -0.0).
What would need more care than speed goes through the definition: dice on square tiles that do not
fill the matrix, and on numbers so small that half a scale could not be represented.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite.ops.philox import words
from nemotron_lite.quantization.nvfp4 import elements, scaling
from nemotron_lite.quantization.nvfp4.hadamard import hadamard as rotate
from nemotron_lite.quantization.nvfp4.scaling import BLOCK
from nemotron_lite.quantization.nvfp4.tensor import (
    Options,
    QuantizedTensor,
    check,
    naive_fake,
    naive_quantize,
)

PIECE = 2**17  # numbers: half a megabyte in float32, of which two copies live at a time
SMALLEST_SCALE = 2.0**-110
_EXPONENT = 0x7F800000
_SHIFT = 3.0 * 2**21


@dataclass(frozen=True)
class _Plan:
    """A tensor cut into groups, with the scales of its blocks, ready to be rounded.

    The blocks lie along the last dimension of `groups` [G, blocks, 16], or along the middle one of
    [G, 16, columns]; `encode` and `factor` broadcast over it.
    """

    groups: Tensor  # filled up, rotated where asked for, in the dtype of x
    encode: Tensor
    factor: Tensor
    scales: Tensor  # E4M3, one each block
    decode: Tensor  # one number, or one each tensor of the batch
    clips: bool
    dice: _Dice | None


@dataclass(frozen=True)
class _Dice:
    """Where the random bits of a piece come from."""

    seed: int | None
    bits: Tensor | None  # laid out as the groups
    across: bool  # whether rows of the quantized tensor are columns here
    groups_each: int  # groups that follow each other along one matrix
    eighths: int  # counters in a row of the quantized tensor

    def u(self, piece: slice, like: Tensor) -> Tensor:
        """The dither of elements.py for the groups of `piece`: (2 r + 1) / 2^17."""
        if self.bits is not None:
            return self.bits[piece].float().mul_(2.0**-16).add_(2.0**-17)
        assert self.seed is not None
        draw = self._across if self.across else self._along
        return draw(self.seed, piece, like)

    def _along(self, seed: int, piece: slice, like: Tensor) -> Tensor:
        each = like[0].numel() // 8
        counter = torch.arange(piece.start * each, piece.stop * each, device=like.device)
        w0, w1, w2, w3 = words(seed, counter)
        # Two words make 64 bits, in memory the four halves in order. Flipping the top bit of each
        # makes them signed numbers r - 2^15, which convert to float32 in one pass.
        pairs = torch.empty(len(counter), 2, dtype=torch.int64, device=like.device)
        pairs[:, 0] = w0 | (w1 << 32)
        pairs[:, 1] = w2 | (w3 << 32)
        halves = pairs.bitwise_xor_(-0x7FFF7FFF7FFF8000).view(torch.int16).float()
        return halves.mul_(2.0**-16).add_(0.5 + 2.0**-17).view(like.shape)

    def _across(self, seed: int, piece: slice, like: Tensor) -> Tensor:
        count, _, columns = like.shape
        group = torch.arange(piece.start, piece.stop, device=like.device)
        matrix, place = group // self.groups_each, group % self.groups_each
        first = matrix * columns * self.eighths + 2 * place
        start = first[:, None] + torch.arange(2, device=like.device)
        column = torch.arange(columns, device=like.device) * self.eighths
        counter = start[:, :, None] + column
        u = torch.empty(count, 2, 8, columns, device=like.device)
        for i, word in enumerate(words(seed, counter)):
            u[:, :, 2 * i] = word & 0xFFFF
            u[:, :, 2 * i + 1] = word >> 16
        return u.mul_(2.0**-16).add_(2.0**-17).view(like.shape)


def fast_fake(x: Tensor, dim: int, options: Options) -> Tensor:
    """`fake_quantize(impl="torch")`; `dim` is -1 or -2."""
    if _lies_turned(x, options):
        return fast_fake(x.mT, -3 - dim, options.turned()).mT
    plan = _plan(x, dim, options)
    if plan is None:
        return naive_fake(x, dim, options)
    out = torch.empty_like(plan.groups)
    scale = 0.5 if options.stochastic else 1.0
    factor = plan.factor * scale
    for piece, q in _rounded(plan):
        torch.mul(q, factor[piece], out=out[piece])
    rows, columns = x.shape[-2:] if x.ndim > 1 else (1, x.shape[-1])
    out = out.view(*x.shape[:-2], *_filled_shape(x, dim, options))
    if options.hadamard:
        rows, columns = (rows, out.shape[-1]) if dim == -1 else (out.shape[-2], columns)
    out = out[..., :rows, :columns]
    return out[0] if x.ndim == 1 else out


def fast_quantize(x: Tensor, options: Options) -> QuantizedTensor:
    """`quantize(impl="torch")`."""
    plan = _plan(x, -1, options)
    if plan is None:
        return naive_quantize(x, options)
    rows, columns = _filled_shape(x, -1, options)
    packed = torch.empty(plan.groups.numel() // 2, dtype=torch.uint8, device=x.device)
    packed = packed.view(len(plan.groups), -1)
    small = 2.0**-15 if options.stochastic else 2.0**-14
    for piece, q in _rounded(plan):
        # A byte: sign, four of the five bits of the exponent that matter, two of the mantissa.
        half = q.mul_(small).to(torch.float16).flatten(1)
        codes = (_upper_bytes(half) >> 1) & 7
        codes |= (_upper_bytes(plan.groups[piece].flatten(1)) >> 4) & 8
        packed[piece] = elements.pack(codes)
    scales = plan.scales
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
        plan.decode,
        (*lead, columns if options.hadamard else last),
        options.block,
    )


def _upper_bytes(numbers: Tensor) -> Tensor:
    """The byte of each number that holds its sign."""
    size = numbers.element_size()
    return numbers.contiguous().view(torch.uint8)[:, size - 1 :: size]


def _lies_turned(x: Tensor, options: Options) -> bool:
    return x.ndim == options.batch_dims + 2 and not x.is_contiguous() and x.mT.is_contiguous()


def _filled_shape(x: Tensor, dim: int, options: Options) -> tuple[int, int]:
    """Rows and columns of x, the blocks filled up."""
    rows, columns = x.shape[-2:] if x.ndim > 1 else (1, x.shape[-1])
    if dim == -2 or options.block == "16x16":
        rows += -rows % BLOCK
    if dim == -1 or options.block == "16x16":
        columns += -columns % BLOCK
    return rows, columns


def _plan(x: Tensor, dim: int, options: Options) -> _Plan | None:
    """Everything up to the scales; None where the definition has to answer."""
    check(x, options)
    square, batch_dims = options.block == "16x16", options.batch_dims
    rows, columns = _filled_shape(x, dim, options)
    short = (0, columns - x.shape[-1], 0, rows - (x.shape[-2] if x.ndim > 1 else 1))
    ragged = any(short)
    if x.numel() == 0 or (options.stochastic and square and ragged):
        return None
    x = x.detach() if x.ndim > 1 else x.detach()[None]
    matrices = x.shape[:-2].numel()
    if ragged:
        x = F.pad(x, short)
    over = square or dim == -2
    shape = (-1, BLOCK, columns) if over else (-1, columns // BLOCK, BLOCK)
    groups = x.reshape(shape)
    groups, largest = _largest(groups, over, dim if options.hadamard else None)
    if square:
        largest = largest.unflatten(-1, (-1, BLOCK)).amax(-1)
    amax = (
        largest.amax() if batch_dims == 0 else largest.reshape(*x.shape[:batch_dims], -1).amax(-1)
    )
    scaling.check_finite(amax, options.name)
    if options.amax is not None:
        amax = scaling.check_finite(options.amax, f"amax of {options.name}")
    encode, decode = scaling.tensor_scales(amax)
    if options.stochastic and bool((decode < SMALLEST_SCALE).any()):
        return None
    each = len(groups) // max(encode.numel(), 1)
    spread_encode, spread_decode = (
        s.reshape(-1, 1).expand(-1, each).reshape(-1, 1) for s in (encode, decode)
    )
    scales = scaling.block_scales(largest, spread_encode)
    times, factor = scaling.block_factors(scales, spread_decode)
    clips = options.stochastic or bool((largest * times).amax() >= 7)
    if square:
        times, factor = (s.repeat_interleave(BLOCK, -1) for s in (times, factor))
    along = 1 if over else -1
    dice = None
    if options.stochastic:
        bits = options.bits
        if bits is not None:
            bits = bits if bits.ndim > 1 else bits[None]
            fill = (0, columns - bits.shape[-1], 0, rows - bits.shape[-2])
            bits = F.pad(bits, fill).reshape(groups.shape)
        across = dim == -2
        long = rows if across else columns
        dice = _Dice(options.seed, bits, across, len(groups) // matrices, long // 8)
    return _Plan(
        groups, times.unsqueeze(along), factor.unsqueeze(along), scales, decode, clips, dice
    )


def _pieces(groups: Tensor) -> Iterator[slice]:
    each = max(1, PIECE // max(1, groups[0].numel()))
    for start in range(0, len(groups), each):
        yield slice(start, min(start + each, len(groups)))


def _largest(groups: Tensor, over: bool, turn: int | None) -> tuple[Tensor, Tensor]:
    """The groups, rotated if asked for, and the largest magnitude of each block, in float32."""
    turned = groups if turn is None else torch.empty_like(groups)
    shape = (len(groups), groups.shape[2] if over else groups.shape[1])
    largest = torch.empty(shape, dtype=torch.float32, device=groups.device)
    for piece in _pieces(groups):
        part = groups[piece]
        if turn is not None:
            part = turned[piece].copy_(rotate(part, 1 if over and turn == -2 else -1))
        if over:
            # Without its sign a float orders like an integer, which is compared faster.
            size = torch.int32 if part.element_size() == 4 else torch.int16
            whole = part.abs().view(size).amax(1).view(part.dtype)
            largest[piece] = whole
        else:
            flat = part.reshape(1, -1).float().abs()
            largest[piece] = F.max_pool1d(flat, BLOCK, BLOCK).view(len(part), -1)
    return turned, largest


def _rounded(plan: _Plan) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of the tensor on the grid of E2M1: float32, overwritten by the next one.

    With dice the values come doubled.
    """
    for piece in _pieces(plan.groups):
        part = plan.groups[piece]
        v = torch.mul(part, plan.encode[piece])
        if plan.clips:
            v.clamp_(-elements.E2M1_MAX, elements.E2M1_MAX)
        e = (v.view(torch.int32) & _EXPONENT).view(torch.float32).clamp_min_(1.0)
        if plan.dice is None:
            yield piece, v.add_(e, alpha=_SHIFT).sub_(e, alpha=_SHIFT)
        else:
            y = plan.dice.u(piece, v).addcdiv_(v, e, value=2.0)
            yield piece, y.floor_().mul_(e)
