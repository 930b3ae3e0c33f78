"""Packed bytes to numbers in few passes over memory, and products with them: `impl="cpu"`.

    w = e2m1(code) * (c * s_dec)              y = x W^T

A byte holds two codes, so a table of 256 entries gives two values at once. The two float32 values
together are eight bytes. Looked up as one 64-bit number they cost one step instead of two, and the
look-up of single elements is the fastest gather on a CPU. Scales in E4M3 come from a table of 256
entries as well, because torch converts them one by one. The values have exactly the bits of the
definition (`QuantizedTensor.dequantize`, `FP8Tensor.dequantize`), at about a fourteenth of its
time.

A product decodes a stripe of rows, multiplies, and decodes the next stripe into the same buffer:
`STRIPE` weights at a time, which stay in the CPU's caches, instead of a whole matrix in
float32. A few rows of x are multiplied in float32 whatever their dtype, which saves rounding the
weights; for many rows, the faster products in 16 bits are worth that rounding.

When tokens are generated one by one, there are many small experts with few tokens each. Their
matrices are gathered while still packed, and multiplied as a batch: the number of calls is the same
for six experts as for one.

Each thread keeps the buffer of a stripe for its next call. The buffer is not used where gradients
are recorded, because the graph would keep what the next stripe overwrites. Left out: C++ kernels of
our own, which could multiply without writing a stripe at all.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float8e4m3fn, Float32, Int, UInt8
from torch import Tensor

from nemotron_lite.backends.constants import kept_constant
from nemotron_lite.dtypes import cast
from nemotron_lite.ops.experts import squared_relu
from nemotron_lite.ops.linear import linear
from nemotron_lite.quantization.nvfp4.e2m1 import E2M1_VALUES
from nemotron_lite.quantization.nvfp4.scaling import BLOCK

STRIPE = 2**17  # weights decoded at once: half a MiB in float32
MOST_KEPT = 2**18  # numbers in the buffer that a thread keeps: a stripe with its padding
FEW_PAIRS = 40  # up to this many (token, slot) pairs each get their own copy of a small expert
FEW_ROWS = 8  # up to this many rows of x, float32 is at least as fast as 16 bits


@dataclass(frozen=True, eq=False)
class EncodedMatrix:
    """The stored bytes of a matrix in NVFP4 or FP8, or of a stack of matrices with a scale each.

    Attributes:
        codes: NVFP4, two in a byte; or FP8.
        scale: of the tensor, or of each matrix of a stack.
        cols: columns of the decoded matrix; rows of NVFP4 are padded to a multiple of 16.
        scales: of NVFP4's blocks; None for FP8.
    """

    codes: UInt8[Tensor, "*rows half"] | Float8e4m3fn[Tensor, "*rows cols"]
    scale: Float32[Tensor, "*stack"]
    cols: int
    scales: Float8e4m3fn[Tensor, "*rows blocks"] | None = None

    @property
    def rows(self) -> int:
        """Rows of one matrix."""
        return self.codes.shape[-2]

    def select(self, experts: int | Int[Tensor, "c"]) -> EncodedMatrix:
        """One matrix of a stack, or several of them as a new stack."""
        if self.scales is None:
            # torch gathers bytes, but not FP8 numbers.
            codes = self.codes.view(torch.uint8)[experts].view(self.codes.dtype)
            return EncodedMatrix(codes, self.scale[experts], self.cols)
        scales = self.scales.view(torch.uint8)[experts].view(self.scales.dtype)
        return EncodedMatrix(self.codes[experts], self.scale[experts], self.cols, scales)

    def stripe(self, first: int, last: int) -> EncodedMatrix:
        """Some rows of a matrix."""
        scales = None if self.scales is None else self.scales[first:last]
        return EncodedMatrix(self.codes[first:last], self.scale, self.cols, scales)

    def decode(self, *, keep: bool = False) -> Float32[Tensor, "*rows cols"]:
        """The decoded numbers. Without `keep` the next call may overwrite them."""
        scale = self.scale.view(-1, *[1] * (self.codes.ndim - 1)) if self.scale.ndim else self.scale
        per_element = 1 if self.scales is None else 2
        shape = (*self.codes.shape[:-1], self.codes.shape[-1] * per_element)
        if keep:
            out = torch.empty(shape, dtype=torch.float32, device=self.codes.device)
        else:
            out = scratch(shape, self.codes.device)
        if self.scales is None:
            return decode_e4m3(self.codes, out).mul_(scale)
        factors = decode_e4m3(self.scales).mul_(scale)
        return decode_blocks(self.codes, factors, out)[..., : self.cols]


def decode_blocks(
    codes: UInt8[Tensor, "*rows half"],
    factors: Float32[Tensor, "*rows blocks"],
    out: Float32[Tensor, "*rows cols"],
) -> Float32[Tensor, "*rows cols"]:
    """The values of packed codes, times the factor of their block of 16.

    Args:
        codes: cols / 2 bytes a row.
        factors: cols / 16 of them a row.
        out: where to write; contiguous.
    """
    pairs = out.view(-1).view(torch.int64)
    torch.index_select(_value_pairs(codes.device), 0, codes.reshape(-1).int(), out=pairs)
    out.unflatten(-1, (-1, BLOCK)).mul_(factors.unsqueeze(-1))
    return out


def decode_e4m3(
    codes: Float8e4m3fn[Tensor, "*shape"], out: Float32[Tensor, "*shape"] | None = None
) -> Float32[Tensor, "*shape"]:
    """`codes.float()`, looked up in a table."""
    flat = codes.contiguous().view(torch.uint8).reshape(-1).int()
    if out is None:
        return _e4m3_values(codes.device).index_select(0, flat).view(codes.shape)
    torch.index_select(_e4m3_values(codes.device), 0, flat, out=out.view(-1))
    return out


def multiply(
    x: Float[Tensor, "*rows k"], w: EncodedMatrix, product: Callable[..., Tensor] = linear
) -> Float[Tensor, "*rows n"]:
    """x W^T in the dtype of x, one matrix, a stripe at a time.

    Args:
        product: use `F.linear` where the number of rows changes with each call, as for experts:
            `linear` may use oneDNN, which spends some milliseconds on each new number of rows.
    """
    few = math.prod(x.shape[:-1]) <= FEW_ROWS
    dtype = torch.promote_types(x.dtype, torch.float32) if few else x.dtype
    inputs = cast(x, dtype)
    step = max(1, STRIPE // max(1, w.cols))
    parts = [
        product(inputs, cast(w.stripe(first, first + step).decode(), dtype))
        for first in range(0, w.rows, step)
    ]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return cast(y, x.dtype)


def multiply_experts(
    z: Float[Tensor, "t l"],
    up: EncodedMatrix,
    down: EncodedMatrix,
    weights: Float[Tensor, "t k"],
    indices: Int[Tensor, "t k"],
) -> Float[Tensor, "t l"]:
    """The weighted sum of each token's experts; only experts that some token chose are decoded."""
    small = up.rows * up.cols <= STRIPE
    if small and indices.numel() <= FEW_PAIRS and not torch.is_grad_enabled():
        return _multiply_pairs(z, up, down, weights, indices)
    out = torch.zeros_like(z)
    for e in indices.unique().tolist():
        rows, slots = (indices == e).nonzero(as_tuple=True)
        hidden = squared_relu(multiply(z[rows], up.select(e), F.linear))
        share = cast(weights[rows, slots], z.dtype).unsqueeze(1)
        out = out.index_add(0, rows, multiply(hidden, down.select(e), F.linear) * share)
    return out


def _multiply_pairs(
    z: Tensor, up: EncodedMatrix, down: EncodedMatrix, weights: Tensor, indices: Tensor
) -> Tensor:
    """Each (token, slot) pair with its own copy of a small expert, one stripe of them at a time."""
    slots, dtype = indices.shape[1], torch.promote_types(z.dtype, torch.float32)
    pairs, shares = indices.reshape(-1), cast(weights, dtype).reshape(-1, 1, 1)
    inputs = cast(z, dtype).repeat_interleave(slots, 0).unsqueeze(1)  # pairs 1 l
    answers = torch.empty_like(inputs)
    step = max(1, STRIPE // (up.rows * up.cols))
    for first in range(0, len(pairs), step):
        some = slice(first, first + step)
        hidden = torch.bmm(inputs[some], cast(up.select(pairs[some]).decode(), dtype).mT)
        hidden = squared_relu(hidden).mul_(shares[some])
        torch.bmm(hidden, cast(down.select(pairs[some]).decode(), dtype).mT, out=answers[some])
    return cast(answers.view(len(z), slots, -1).sum(1), z.dtype)


class _ScratchBuffers(threading.local):
    """One float32 buffer per device, kept by each thread for the stripes of its next call.

    The buffer grows to the largest stripe that was requested, but never beyond `MOST_KEPT` numbers:
    a larger request gets separate memory, so that no large buffer is kept.
    """

    def __init__(self) -> None:
        self.kept: dict[torch.device, Tensor] = {}

    def __call__(self, shape: tuple[int, ...], device: torch.device) -> Float32[Tensor, "*shape"]:
        """Uninitialized memory that the next call overwrites.

        While gradients are recorded the memory is new each time, because the graph may keep it.
        """
        count = math.prod(shape)
        if torch.is_grad_enabled() or count > MOST_KEPT:
            return torch.empty(shape, dtype=torch.float32, device=device)
        buffer = self.kept.get(device)
        if buffer is None or buffer.numel() < count:
            # An inference tensor could not be written to outside of inference mode.
            with torch.inference_mode(False):
                buffer = torch.empty(count, dtype=torch.float32, device=device)
            self.kept[device] = buffer
        return buffer[:count].view(shape)


scratch = _ScratchBuffers()


@kept_constant
def _value_pairs(device: torch.device) -> Tensor:
    """The two float32 values of each byte as one 64-bit number; the even column comes first."""
    values = torch.tensor(E2M1_VALUES, dtype=torch.float32, device=device)
    byte = torch.arange(256, device=device)
    return values[torch.stack([byte & 0xF, byte >> 4], -1)].view(torch.int64).flatten()


@kept_constant
def _e4m3_values(device: torch.device) -> Tensor:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    return codes.view(torch.float8_e4m3fn).float()
