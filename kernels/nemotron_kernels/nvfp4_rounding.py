"""Rounding for NVFP4 in registers: block scales, codes, and the Hadamard transform before them.

All of it is integer arithmetic on the bits of float32, or an addition that rounds. So every GPU and
the interpreter give the same bits as PyTorch. (Casts to 8-bit floats are wrong in Triton's
interpreter, and sm_80 does not have them.)

    E4M3, from 2^-6      keep 3 bits of the mantissa: add half of the last one kept (a little less
                         if that is even), cut off, subtract the difference of the two biases
    E4M3, below          the step is 2^-9, and so is float32's at 2^14: v + 2^14 rounds v to it
    E2M1, from 1         keep 1 bit of the mantissa, in the same way
    E2M1, below          the step is 1/2, as float32's at 2^22

Ties go to even in each. Stochastic rounding takes the floor of the value in steps plus a random
number in [0, 1).

Two compiler options would break this, so the launchers do not use them: fusing a multiplication
into the addition that rounds (hence `enable_fp_fusion=False`), and flushing subnormal numbers to
zero.

Divisions are `div_rn`, rounded to nearest; `/` on a GPU is not.

From sm_100 on, one instruction rounds two numbers to E2M1 and packs them (`encode_pair`). A test
checks that the compiled code contains it. Only a Blackwell GPU can show that its result is the
same.

Source: nemotron_lite/quantization/nvfp4, which is the definition; reference sheet 6.2; Philox as in
`state_update`. Left out: `cvt.rs`, stochastic rounding with 8 random bits per number: its
results differ from all other implementations, and sm_120 does not have it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemotron_kernels._compat import DOT_F32

# Transformer Engine's signs of the Hadamard transform. In NEGATIVE, bit j is set if sign j is -1.
SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
NEGATIVE = tl.constexpr(sum(1 << j for j, sign in enumerate(SIGNS) if sign < 0))
FLT_MAX = tl.constexpr(3.4028234663852886e38)
PHILOX_ROUNDS = tl.constexpr(5)


@triton.jit
def tensor_scales(amax):
    """(s_enc, s_dec) of a tensor with this largest magnitude."""
    encode = tl.minimum(tl.div_rn(2688.0, tl.where(amax == 0, 1.0, amax)), FLT_MAX)
    encode = tl.where(amax == 0, 1.0, encode)
    return encode, tl.div_rn(1.0, encode)


@triton.jit
def round_e4m3(v):
    """float32 >= 0 -> uint8: the nearest E4M3 value; 448 for anything larger."""
    v = tl.minimum(v, 448.0)
    bits = v.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    small = (v + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(v < 0.015625, small, normal).to(tl.uint8)


@triton.jit
def decode_e4m3(code):
    """E4M3 value in a uint8 (not NaN) -> float32."""
    # In the upper bits of a float16 it is the value times 2^-8, subnormal values included.
    wide = code.to(tl.uint16)
    bits = ((wide & 0x7F) << 7) | ((wide & 0x80) << 8)
    return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def block_factors(code, decode):
    """(1 / (c * s_dec), c * s_dec) of each block: the factors to encode and to decode."""
    factor = decode_e4m3(code) * decode
    encode = tl.minimum(tl.div_rn(1.0, tl.where(factor == 0, 1.0, factor)), FLT_MAX)
    return tl.where(factor == 0, FLT_MAX, encode), factor


@triton.jit
def round_e2m1(size):
    """(code 0 .. 7, its value) nearest to a magnitude from 0 to 6."""
    bits = size.to(tl.int32, bitcast=True)
    upper = bits + 0x1FFFFF + ((bits >> 22) & 1)
    shifted = size + 4194304.0
    small = size < 1.0
    code = tl.where(small, shifted.to(tl.int32, bitcast=True) - 0x4A800000, (upper >> 22) - 252)
    whole = (upper & 0x7FC00000).to(tl.float32, bitcast=True)
    return code, tl.where(small, shifted - 4194304.0, whole)


@triton.jit
def encode_pair(even, odd):
    """Two numbers in a byte, by the instruction of sm_100; ties to even, larger numbers to 6."""
    return tl.inline_asm_elementwise(
        "{ .reg .b8 both; cvt.rn.satfinite.e2m1x2.f32 both, $2, $1; cvt.u32.u8 $0, both; }",
        "=r,f,f",
        [even, odd],
        dtype=tl.uint32,
        is_pure=True,
        pack=1,
    ).to(tl.uint8)


@triton.jit
def round_stochastically(v, halves):
    """Round v (from -6 to 6) stochastically to E2M1 with 16 random bits: (code, magnitude).

    The step is e / 2. Here e is the largest power of two that is at most |v|, but at least 1. On a
    GPU, floor treats subnormal numbers as zero. The argument of floor is never subnormal, because
    the dither is at least 2^-17.
    """
    e = tl.maximum(v.to(tl.int32, bitcast=True) & 0x7F800000, 0x3F800000)
    inverse = (0x7F800000 - e).to(tl.float32, bitcast=True)  # 2 / e
    # (1 + r 2^-16) - (1 - 2^-17) is exactly the dither of the definition, r 2^-16 + 2^-17.
    one = (halves.to(tl.int32) << 7) | 0x3F800000
    dither = one.to(tl.float32, bitcast=True) - 0.99999237060546875
    steps = tl.abs(tl.floor(v * inverse + dither))
    value = steps * (e.to(tl.float32, bitcast=True) * 0.5)
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value < 1.0, steps.to(tl.int32), (bits >> 22) - 252), value


@triton.jit
def random_halves(
    seed, row, first, counters, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """16 random bits for each number of a tile, as `nemotron_lite.ops.philox` lays them out.

    Args:
        seed: 64 bits.
        row: int64 `ROWS, 1`, counted over the whole tensor; `1, ROWS` if TRANSPOSED.
        first: the tile's first column, a multiple of 8.
        counters: number of Philox counters per row of the tensor: an eighth of its columns.
        TRANSPOSED: whether the tile is `COLUMNS, ROWS`.
    """
    eighth = first // 8 + tl.arange(0, COLUMNS // 8)
    if TRANSPOSED:
        counter = row * counters + eighth[:, None]
    else:
        counter = row * counters + eighth[None, :]
    w0, w1, w2, w3 = tl.randint4x(seed, counter, PHILOX_ROUNDS)
    # join puts its second argument into the last place: words 0 2 | 1 3 become 0 1 2 3.
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.uint32, bitcast=True)
    halves = tl.join(words & 0xFFFF, words >> 16)
    if TRANSPOSED:
        halves = tl.trans(tl.reshape(halves, [COLUMNS // 8, ROWS, 8]), 0, 2, 1)
        halves = tl.reshape(halves, [COLUMNS, ROWS])
    else:
        halves = tl.reshape(halves, [ROWS, COLUMNS])
    return halves


@triton.jit
def hadamard(x, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Multiply each 16 columns by diag(signs) H / 4; x is `ROWS, COLUMNS`, or its transpose.

    Each of four rounds computes sums and differences of neighbors. The sums become the first half
    of the sixteen and the differences the second half, so that numbers which were 2 apart are
    neighbors in the next round. After four rounds each number is at its own position again.
    """
    sign = 1 - 2 * ((NEGATIVE >> (tl.arange(0, COLUMNS) % 16)) & 1)
    sign = sign.to(tl.float32) * 0.25
    if TRANSPOSED:
        transformed = x * sign[:, None]
        for _ in tl.static_range(4):
            pairs = tl.trans(tl.reshape(transformed, [COLUMNS // 16, 8, 2, ROWS]), 0, 1, 3, 2)
            first, second = tl.split(pairs)
            pairs = tl.trans(tl.join(first + second, first - second), 0, 3, 1, 2)
            transformed = tl.reshape(pairs, [COLUMNS, ROWS])
    else:
        transformed = x * sign[None, :]
        for _ in tl.static_range(4):
            first, second = tl.split(tl.reshape(transformed, [ROWS, COLUMNS // 16, 8, 2]))
            pairs = tl.trans(tl.join(first + second, first - second), 0, 1, 3, 2)
            transformed = tl.reshape(pairs, [ROWS, COLUMNS])
    return transformed


@triton.jit
def widened(x):
    """x in float32, from a float of 16 or 32 bits."""
    if DOT_F32:
        if x.dtype == tl.bfloat16:  # the interpreter gets subnormal numbers wrong
            return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def rounded_to(x, dtype: tl.constexpr):
    """float32 rounded to `dtype`, ties to even."""
    if DOT_F32:
        if dtype == tl.bfloat16:  # the interpreter truncates, and gets subnormal numbers wrong
            bits = x.to(tl.uint32, bitcast=True)
            bits = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
            return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)
