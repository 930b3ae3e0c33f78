"""E2M1, the four bits of NVFP4: sixteen codes, rounding to them, and two of them in a byte.

One sign bit, two bits of exponent, one of mantissa, no NaN and no infinity:

    code       0    1    2    3    4    5    6    7        + 8: the same, negative
    value      0   0.5   1   1.5   2    3    4    6

**Rounding to nearest.** A tie goes to the even code, as in the hardware's
`cvt.rn.satfinite.e2m1x2`. Values beyond 6 become 6. The sign bit is that of the input, also when
the result is zero (-0.1 becomes code 8). Transformer Engine's Python reference gives an exact -0.0
the code 0; the hardware, ml_dtypes and torchao give it 8, and so does this file. The value is the
same.

**Stochastic rounding.** v lies between two neighbors, one step apart. It goes to the upper one if
its distance from the lower one, in steps, plus a random dither u reaches one:

    q = step * floor(v / step + u)          u = (2 r + 1) / 2^17,  r one of 0 .. 65535

all in float32; the step is 0.5 below 2, 1 below 4, and 2 above. So P(up) is the distance in steps,
to the nearest 2^-16, and the mean of many roundings is v, for either sign. A value on the grid
stays. The hardware (`cvt.rs`) uses 8 random bits for a number and no offset of one half: its mean
is 1/512 of a step too small.

Source: reference sheet 6.1 and 6.2; OCP Microscaling formats 1.0, 5.3.3.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from nemotron_lite.backends.constants import kept_constant

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1_VALUES = _MAGNITUDES + tuple(-magnitude for magnitude in _MAGNITUDES)
E2M1_MAX = 6.0
# |v| between thresholds i - 1 and i has code i; |v| on a threshold has the even one of the two.
_TIES_DOWN = (0.25, 1.25, 2.5, 5.0)
_TIES_UP = (0.75, 1.75, 3.5)


def encode_e2m1(v: Float32[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """The code of the nearest E2M1 value, ties to the even code, saturating at 6; v has no NaN."""
    magnitude = v.abs()
    code = torch.zeros_like(v, dtype=torch.uint8)
    for threshold in _TIES_DOWN:
        code += magnitude > threshold
    for threshold in _TIES_UP:
        code += magnitude >= threshold
    return code | (torch.signbit(v).to(torch.uint8) << 3)


def encode_e2m1_stochastic(
    v: Float32[Tensor, "*shape"], bits: Int[Tensor, "*shape"]
) -> UInt8[Tensor, "*shape"]:
    """The code of one of v's two neighbors in E2M1, chosen by 16 random bits; 6 beyond 6.

    Args:
        v: what to round; no NaN.
        bits: 0 .. 65535.
    """
    v = v.clamp(-E2M1_MAX, E2M1_MAX)
    magnitude = v.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    dither = (bits.float() * 2 + 1) / 2**17
    rounded = step * torch.floor(v / step + dither)
    # -0.1 rounded to zero keeps its sign, as in rounding to nearest.
    return encode_e2m1(torch.copysign(rounded, v))


def decode_e2m1(codes: UInt8[Tensor, "*shape"]) -> Float32[Tensor, "*shape"]:
    """The values of codes 0 .. 15."""
    return _table(codes.device)[codes.int()]


def pack_codes(codes: UInt8[Tensor, "*rows cols"]) -> UInt8[Tensor, "*rows half"]:
    """Two codes in a byte, the even column in the low four bits.

    Raises:
        ValueError: an odd number of columns.
    """
    if codes.shape[-1] % 2:
        raise ValueError(
            f"{codes.shape[-1]} columns of codes; expected an even number, because a byte holds "
            "two codes. Pad with code 0."
        )
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def unpack_codes(packed: UInt8[Tensor, "*rows half"]) -> UInt8[Tensor, "*rows cols"]:
    """The inverse of `pack_codes`."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)


def decode_packed_codes(packed: UInt8[Tensor, "*rows half"]) -> Float[Tensor, "*rows cols"]:
    """`decode_e2m1(unpack_codes(packed))`, with one look-up for the two values of a byte."""
    return _pairs(packed.device)[packed.int()].flatten(-2)


@kept_constant
def _table(device: torch.device) -> Tensor:
    return torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)


@kept_constant
def _pairs(device: torch.device) -> Tensor:
    """The two values of each of the 256 bytes."""
    byte = torch.arange(256, device=device)
    return _table(device)[torch.stack([byte & 0xF, byte >> 4], -1)]
