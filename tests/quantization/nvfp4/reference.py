"""NVFP4 in numpy with the casts of ml_dtypes: the reference for the package's bits.

Written from Transformer Engine's order of operations (reference sheet 6.2) and from nothing in
`nemotron_lite`. Each numpy operation on float32 is one rounding, and both casts round to nearest,
ties to even.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

F32 = np.float32
FLT_MAX = np.finfo(F32).max
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn


class Quantized(NamedTuple):
    """Packed codes, E4M3 scales as bytes, the tensor's scale, and the decoded values."""

    codes: np.ndarray
    scales: np.ndarray
    scale: np.ndarray
    values: np.ndarray


def tensor_scales(amax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(divide="ignore", over="ignore"):
        encode = np.minimum(F32(2688) / amax, FLT_MAX)
    encode = np.where(amax == 0, F32(1), encode).astype(F32)
    return encode, F32(1) / encode


def quantize(x: np.ndarray, *, square: bool = False, amax: np.ndarray | None = None) -> Quantized:
    """A matrix, float32, any number of columns (and rows, unless `square` needs 16)."""
    rows, cols = x.shape
    blocks = np.pad(x, ((0, 0), (0, -cols % 16))).reshape(rows, -1, 16)
    encode, decode = tensor_scales(np.abs(x).max() if amax is None else amax)
    largest = np.abs(blocks).max(-1)
    if square:
        tiles = np.pad(largest, ((0, -rows % 16), (0, 0))).reshape(-1, 16, largest.shape[1])
        largest = np.repeat(tiles.max(1), 16, 0)[:rows]
    scales = np.minimum(largest * (encode * F32(1 / 6)), F32(448)).astype(E4M3)
    factor = scales.astype(F32) * decode
    with np.errstate(divide="ignore", over="ignore"):
        times = np.minimum(F32(1) / factor, FLT_MAX)
        v = np.clip(blocks * times[..., None], F32(-6), F32(6))
    nibbles = v.astype(E2M1)
    codes = nibbles.view(np.uint8).reshape(rows, -1)
    values = (nibbles.astype(F32) * factor[..., None]).reshape(rows, -1)[:, :cols]
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return Quantized(packed, scales.view(np.uint8), decode, values)
