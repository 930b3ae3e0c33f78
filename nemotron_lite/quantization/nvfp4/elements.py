"""E2M1, the four bits of NVFP4: sixteen codes, rounding to them, and two of them in a byte.

One sign bit, two of exponent, one of mantissa, no NaN and no infinity:

    code       0    1    2    3    4    5    6    7        + 8: the same, negative
    value      0   0.5   1   1.5   2    3    4    6

To the nearest: a tie goes to the even code, which is what `cvt.rn.satfinite.e2m1x2` of the hardware
does; beyond 6 is 6. The sign bit is that of the input, for zeros as well (-0.1 becomes code 8).
Transformer Engine's Python reference gives an exact -0.0 the code 0; hardware, ml_dtypes and
torchao give it 8, and so does this file. The value is the same.

Stochastic: v lies between two neighbours a step apart. It goes to the upper one when its distance
from the lower one, in steps, plus a dither u reaches one:

    q = step * floor(v / step + u)          u = (2 r + 1) / 2^17,  r one of 0 .. 65535

all in float32, step 0.5 below 2, 1 below 4, 2 above. So P(up) is the distance, to the nearest of
2^-16 in steps, and the mean of many roundings is v for either sign. A value on the grid stays.
Hardware (`cvt.rs`) spends 8 bits on a number and no half: its mean is 1/512 of a step too small.

Source: reference sheet 6.1 and 6.2; OCP Microscaling formats 1.0, 5.3.3.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

_SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = _SIZES + tuple(-size for size in _SIZES)
E2M1_MAX = 6.0
# |v| between thresholds i - 1 and i has the code i; on one of them, the even code of the two.
_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
_TIES_UP = (0.75, 1.75, 3.5)


def encode_e2m1(v: Float32[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The code of the nearest E2M1 value, ties to the even code, saturating at 6; v has no NaN."""
    size = v.abs()
    code = torch.zeros_like(v, dtype=torch.uint8)
    for threshold in _TIES_DOWN:
        code += size > threshold
    for threshold in _TIES_UP:
        code += size >= threshold
    return code | (torch.signbit(v).to(torch.uint8) << 3)


def encode_e2m1_stochastic(
    v: Float32[Tensor, "*shape"], bits: Int[Tensor, "*shape"]
) -> UInt8[Tensor, "*shape"]:
    """The code of one of the two E2M1 neighbours of v, chosen by 16 random bits; 6 beyond 6.

    Args:
        v: what to round; no NaN.
        bits: 0 .. 65535.
    """
    v = v.clamp(-E2M1_MAX, E2M1_MAX)
    size = v.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    dither = (bits.float() * 2 + 1) / 2**17
    rounded = step * torch.floor(v / step + dither)
    # -0.1 rounded to zero keeps its sign, as when rounded to nearest.
    return encode_e2m1(torch.copysign(rounded, v))


def decode_e2m1(codes: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The values of codes 0 .. 15."""
    return _table(codes.device)[codes.int()]


def pack(codes: UInt8[Tensor, "*rows cols"]) -> UInt8[Tensor, "*rows half"]:
    """Two codes in a byte: the even column in the low four bits.

    Raises:
        ValueError: an odd number of columns.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"{codes.shape[-1]} columns of codes; packing takes them in pairs.")
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack(packed: UInt8[Tensor, "*rows half"]) -> UInt8[Tensor, "*rows cols"]:
    """The inverse of `pack`."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)


def decode_packed(packed: UInt8[Tensor, "*rows half"]) -> Float[Tensor, "*rows cols"]:
    """`decode_e2m1(unpack(packed))` with one look-up for the two values of a byte; float32."""
    return _pairs(packed.device)[packed.int()].flatten(-2)


@lru_cache
def _table(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)


@lru_cache
def _pairs(device: torch.device) -> Tensor:
    """Both values of each of the 256 bytes."""
    with torch.inference_mode(False):
        byte = torch.arange(256, device=device)
        return _table(device)[torch.stack([byte & 0xF, byte >> 4], -1)]
