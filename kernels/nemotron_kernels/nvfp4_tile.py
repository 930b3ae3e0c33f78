"""The two kernels of `nvfp4_quantizer`: the largest magnitude of a tile, and a tile in NVFP4.

m is the row index of the quantized tensor and k its column index; sixteen columns share a scale.
If memory is contiguous along k, a tile is `ROWS, COLUMNS`, and two or four threads share a block.
If it is contiguous along m, as for the transpose of a matrix, TRANSPOSED is true and a tile is
`COLUMNS, ROWS`: it is read in long contiguous runs, and each thread has all sixteen values of its
blocks. The values are not transposed; only the bytes of codes are, which are a quarter as many.

For blocks of 16 x 16, the maximum is also taken over 16 rows m. The Hadamard transform works along
the sixteen values of a block. Random bits depend on the position of a number in the tensor and not
on tiles, so both forms use the same ones.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from nemotron_kernels.nvfp4_rounding import (
    block_factors,
    encode_pair,
    hadamard,
    random_halves,
    round_e2m1,
    round_e4m3,
    round_stochastically,
    rounded_to,
    tensor_scales,
    widened,
)


@triton.jit
def _place(M, K, STACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(matrix, first row, first column) of this program's tile.

    A division costs 30 instructions, so there are as few as possible.
    """
    across = tl.cdiv(K, COLUMNS)
    tile = tl.program_id(0)
    matrix = tl.full([], 0, tl.int64)
    if STACKED:
        tiles = across * tl.cdiv(M, ROWS)
        matrix = (tile // tiles).to(tl.int64)
        tile = tile % tiles
    down = tile // across
    return matrix, down * ROWS, (tile - down * across) * COLUMNS


@triton.jit
def _rows(m, TRANSPOSED: tl.constexpr):
    """Row indices, as a vector along the row axis of a tile."""
    if TRANSPOSED:
        m = m[None, :]
    else:
        m = m[:, None]
    return m


@triton.jit
def _columns(k, TRANSPOSED: tl.constexpr):
    """Column indices, as a vector along the column axis of a tile."""
    if TRANSPOSED:
        k = k[:, None]
    else:
        k = k[None, :]
    return k


@triton.jit
def _at(ptr, matrix, m, k, stride_b, stride_m, stride_k):
    """Addresses of a tile."""
    return ptr + matrix * stride_b + m.to(tl.int64) * stride_m + k.to(tl.int64) * stride_k


@triton.jit
def _load(
    x_ptr,
    matrix,
    m,
    k,
    M,
    K,
    stride_b,
    stride_m,
    stride_k,
    TRANSPOSED: tl.constexpr,
    HADAMARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile in float32, zero outside the matrix.

    HADAMARD: the Hadamard transform of the tile, rounded to the dtype of x.
    """
    at = _at(x_ptr, matrix, m, k, stride_b, stride_m, stride_k)
    x = tl.load(at, mask=(m < M) & (k < K), other=0.0)
    wide = widened(x)
    if HADAMARD:
        wide = widened(rounded_to(hadamard(wide, TRANSPOSED, ROWS, COLUMNS), x.dtype))
    return wide


@triton.jit
def _nvfp4_amax(
    x_ptr,
    partial_ptr,
    M,
    K,
    stride_b,
    stride_m,
    stride_k,
    STACKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HADAMARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    matrix, m, k = _place(M, K, STACKED, ROWS, COLUMNS)
    m, k = (
        _rows(m + tl.arange(0, ROWS), TRANSPOSED),
        _columns(k + tl.arange(0, COLUMNS), TRANSPOSED),
    )
    strides = stride_b, stride_m, stride_k
    x = _load(x_ptr, matrix, m, k, M, K, *strides, TRANSPOSED, HADAMARD, ROWS, COLUMNS)
    # Without the sign bit, floats are ordered like integers, and NaN is above infinity.
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.store(partial_ptr + tl.program_id(0), tl.max(tl.max(size, axis=1), axis=0))


@triton.jit
def _largest(
    x, TRANSPOSED: tl.constexpr, SQUARE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The largest magnitude of each block: `ROWS, COLUMNS / 16`, or its transpose."""
    size = tl.abs(x)
    if TRANSPOSED:
        largest = tl.max(tl.reshape(size, [COLUMNS // 16, 16, ROWS]), axis=1)
        if SQUARE:
            tiles = tl.max(tl.reshape(largest, [COLUMNS // 16, ROWS // 16, 16]), axis=2)
            tiles = tl.broadcast_to(tiles[:, :, None], [COLUMNS // 16, ROWS // 16, 16])
            largest = tl.reshape(tiles, [COLUMNS // 16, ROWS])
    else:
        largest = tl.max(tl.reshape(size, [ROWS, COLUMNS // 16, 16]), axis=2)
        if SQUARE:
            tiles = tl.max(tl.reshape(largest, [ROWS // 16, 16, COLUMNS // 16]), axis=1)
            tiles = tl.broadcast_to(tiles[:, None, :], [ROWS // 16, 16, COLUMNS // 16])
            largest = tl.reshape(tiles, [ROWS, COLUMNS // 16])
    return largest


@triton.jit
def _times(x, factor, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Each number times the factor of its block."""
    if TRANSPOSED:
        blocks = tl.reshape(x, [COLUMNS // 16, 16, ROWS]) * factor[:, None, :]
    else:
        blocks = tl.reshape(x, [ROWS, COLUMNS // 16, 16]) * factor[:, :, None]
    return tl.reshape(blocks, x.shape)


@triton.jit
def _pairs(x, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The even columns of a tile, and the odd ones."""
    if TRANSPOSED:
        pairs = tl.trans(tl.reshape(x, [COLUMNS // 2, 2, ROWS]), 0, 2, 1)
    else:
        pairs = tl.reshape(x, [ROWS, COLUMNS // 2, 2])
    return tl.split(pairs)


def _name(kernel: Any) -> str:
    constants = kernel.constants
    parts = [
        "_nvfp4_fake_quantize" if constants["FAKE"] else "_nvfp4_quantize",
        "_columns" if constants["TRANSPOSED"] else "",
        "_hadamard" if constants["HADAMARD"] else "",
        "_square" if constants["SQUARE"] else "",
        ("", "_stochastic", "_stochastic")[constants["ROUNDING"]],
    ]
    return "".join(parts)


@triton.jit(repr=_name, do_not_specialize=["seed"])
def _quantize_kernel(
    x_ptr,
    amax_ptr,
    bits_ptr,
    codes_ptr,
    scales_ptr,
    scale_ptr,
    out_ptr,
    seed,
    each,
    M,
    K,
    filled,
    given,
    width,
    stride_b,
    stride_m,
    stride_k,
    bits_b,
    bits_m,
    bits_k,
    out_b,
    out_m,
    out_k,
    STACKED: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SQUARE: tl.constexpr,
    HADAMARD: tl.constexpr,
    ROUNDING: tl.constexpr,
    FAKE: tl.constexpr,
    NATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    matrix, top, first = _place(M, filled, STACKED, ROWS, COLUMNS)
    m = _rows(top + tl.arange(0, ROWS), TRANSPOSED)
    k = _columns(first + tl.arange(0, COLUMNS), TRANSPOSED)
    tensor = matrix
    if STACKED:
        tensor = matrix // each
    strides = stride_b, stride_m, stride_k
    x = _load(x_ptr, matrix, m, k, M, K, *strides, TRANSPOSED, HADAMARD, ROWS, COLUMNS)
    encode, decode = tensor_scales(tl.load(amax_ptr + tensor))
    largest = _largest(x, TRANSPOSED, SQUARE, ROWS, COLUMNS)
    c = round_e4m3(largest * (encode * 0.1666666716337204))  # 1/6 in float32
    times, factor = block_factors(c, decode)
    v = _times(x, times, TRANSPOSED, ROWS, COLUMNS)
    if ROUNDING != 0 or not NATIVE:  # the NATIVE instruction clips
        v = tl.minimum(tl.maximum(v, -6.0), 6.0)
    sign = v.to(tl.int32, bitcast=True) & -0x80000000
    row = matrix * M + m
    if ROUNDING == 0:
        code, value = round_e2m1(tl.abs(v))  # the compiler removes what is not used
    else:
        if ROUNDING == 1:
            if seed.dtype.is_ptr():
                seed = tl.load(seed)
            halves = random_halves(seed, row, first, filled // 8, TRANSPOSED, ROWS, COLUMNS)
        else:
            at = _at(bits_ptr, matrix, m, k, bits_b, bits_m, bits_k)
            halves = tl.load(at, mask=(m < M) & (k < given), other=0)
        code, value = round_stochastically(v, halves)
    if FAKE:
        value = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        value = rounded_to(
            _times(value, factor, TRANSPOSED, ROWS, COLUMNS), out_ptr.dtype.element_ty
        )
        at = _at(out_ptr, matrix, m, k, out_b, out_m, out_k)
        tl.store(at, value, mask=(m < M) & (k < width))
    else:
        if NATIVE:
            if ROUNDING != 0:
                v = (value.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
            even, odd = _pairs(v, TRANSPOSED, ROWS, COLUMNS)
            code = encode_pair(even, odd)
        else:
            even, odd = _pairs(code | ((sign >> 28) & 8), TRANSPOSED, ROWS, COLUMNS)
            code = (even | (odd << 4)).to(tl.uint8)
        byte = _columns(first // 2 + tl.arange(0, COLUMNS // 2), TRANSPOSED)
        block = _columns(first // 16 + tl.arange(0, COLUMNS // 16), TRANSPOSED)
        at = codes_ptr + row * (filled // 2) + byte
        tl.store(at, code, mask=(m < M) & (byte < filled // 2))
        at = scales_ptr + row * (filled // 16) + block
        tl.store(at, c, mask=(m < M) & (block < filled // 16))
        # The program of the first tile of each tensor also writes the scale of the tensor.
        if (top == 0) & (first == 0) & (matrix == tensor * each):
            tl.store(scale_ptr + tensor, decode)
