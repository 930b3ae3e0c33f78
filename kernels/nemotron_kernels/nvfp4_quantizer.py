"""Quantize to NVFP4: the scale of each block, and four bits per number, in one pass.

    amax   = max |x| over the tensor           `nvfp4_amax`, a separate pass before this one
    c      = e4m3( amax_block * (s_enc * fl(1/6)) )
    code   = e2m1( x * 1 / (c * s_dec) )       rounded to nearest, or stochastically

The order of operations is that of `nemotron_lite/quantization/nvfp4/scaling.py`, and so are the
bits. A program takes a tile of the quantized tensor, so each number is read once here and once for
amax: 2 + 2 + 0.5625 bytes per number in 16 bits. `nvfp4_fake_quantize` writes the decoded values
instead of the codes, for emulated training: the same numbers, but never packed.

**Rows and columns.** Blocks lie along the last dimension of the input. For blocks along columns
(gradients of weights are summed over tokens) give `x.mT`: it is not copied, and memory is read
along its contiguous dimension (`nvfp4_tile`).

**Blocks of 16 x 16** for weights: the maximum is also taken over 16 rows, and the scale is stored
for each row.

**Hadamard transform**: it is applied to the tile first, in the amax pass too, and rounded to the
dtype of x, as in the definition. **Stochastic rounding**: Philox bits depend on the number's
position.

NaN and infinity have no code. `nvfp4_amax` reports them (it compares magnitudes as integers, in
which NaN is largest). The caller has to check this, because the check must wait for the device.

Source: reference sheet 6.2 and 6.3; the order of operations is that of Transformer Engine. Left
out: rows and columns of one tensor in one launch, which would read x once less, and scales in the
128 x 4 order of tensor cores.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Float32, Int, UInt8
from torch import Tensor

from nemotron_kernels._compat import (
    Config,
    arch,
    by_arch,
    cdiv,
    check_inputs,
    next_power_of_2,
    on_device,
)
from nemotron_kernels.nvfp4_rounding import FLT_MAX
from nemotron_kernels.nvfp4_tile import _nvfp4_amax, _quantize_kernel

BLOCK = 16
BLOCKS = ("1x16", "16x16")
NEAREST, SEEDED, GIVEN = 0, 1, 2  # ROUNDING: to nearest, or by bits from a seed or from a tensor

# Tiles if memory is contiguous along the rows of the quantized tensor.
ALONG = {
    0: Config({"ROWS": 256, "COLUMNS": 128}, fp_fusion=False),
    80: Config({"ROWS": 32, "COLUMNS": 128}, num_warps=4, fp_fusion=False),
}
# Tiles if it is contiguous along the columns; the key is bytes per element. Each thread loads 16
# bytes, and there are just enough threads for that, so that each thread holds whole blocks.
ACROSS = {
    size: {
        0: Config({"ROWS": 2048, "COLUMNS": 16}, fp_fusion=False),
        80: Config({"ROWS": 512, "COLUMNS": 16}, num_warps=size, fp_fusion=False),
    }
    for size in (2, 4)
}


def nvfp4_amax(
    x: Float[Tensor, "*rows n"], *, hadamard: bool = False, batch_dims: int = 0
) -> Float32[Tensor, "*batch"]:
    """The largest magnitude of x, or of each tensor along the leading `batch_dims` dimensions.

    Args:
        x: float32, bfloat16 or float16.
        hadamard: apply the Hadamard transform first, as `nvfp4_quantize` does.
        batch_dims: number of leading dimensions over which tensors are separate.

    Returns:
        NaN or infinity if x holds one of them.

    Raises:
        ValueError: float64.
        RuntimeError: tensors on the CPU outside the interpreter.
    """
    check_inputs("nvfp4_amax", x)
    batch = x.shape[:batch_dims]
    if x.numel() == 0:
        return torch.zeros(batch, dtype=torch.float32, device=x.device)
    x = _matrices(x, batch_dims)
    _, m, k = x.shape
    config = _config(x)
    tiles = _tiles(x, k, config)
    partial = torch.empty(tiles, dtype=torch.int32, device=x.device)
    with on_device(x):
        _nvfp4_amax[(tiles,)](x, partial, m, k, *x.stride(), HADAMARD=hadamard, **config)
    return partial.view(*batch, -1).amax(-1).view(torch.float32)


def nvfp4_quantize(
    x: Float[Tensor, "*rows n"],
    amax: Float32[Tensor, "*batch"],
    *,
    block: str = "1x16",
    hadamard: bool = False,
    seed: int | Int[Tensor, "1"] | None = None,
    bits: Int[Tensor, "*rows m"] | None = None,
) -> tuple[UInt8[Tensor, "*rows half"], UInt8[Tensor, "*rows blocks"], Float32[Tensor, "*batch"]]:
    """x in NVFP4, with blocks along the last dimension.

    Args:
        x: float32, bfloat16 or float16; finite.
        amax: largest magnitude of x, or of each tensor along the leading dimensions; finite.
        block: "1x16", or "16x16" for matrices.
        hadamard: apply the Hadamard transform to each 16 values first.
        seed: for stochastic rounding: 64 bits as an int, or as a tensor that is read on the device.
        bits: for stochastic rounding: 0 .. 65535 for each number; m is n, or n padded to a multiple
            of 16.

    Returns:
        Codes, E4M3 scales as bytes, and s_dec of each tensor. Rows are padded with zeros to a
        multiple of 16.

    Raises:
        ValueError: float64, an unknown block, shapes that do not fit, both seed and bits.
        RuntimeError: tensors on the CPU outside the interpreter.
    """
    *lead, n = x.shape
    filled = cdiv(n, BLOCK) * BLOCK
    codes = torch.empty(*lead, filled // 2, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*lead, filled // BLOCK, dtype=torch.uint8, device=x.device)
    scale = torch.empty_like(amax)
    _launch("nvfp4_quantize", x, amax, block, hadamard, seed, bits, codes, scales, scale, None)
    return codes, scales, scale


def nvfp4_fake_quantize(
    x: Float[Tensor, "*rows n"],
    amax: Float32[Tensor, "*batch"],
    *,
    block: str = "1x16",
    hadamard: bool = False,
    seed: int | Int[Tensor, "1"] | None = None,
    bits: Int[Tensor, "*rows m"] | None = None,
) -> Float[Tensor, "*rows k"]:
    """The values that `nvfp4_quantize` would store, in the dtype of x; arguments as there.

    Returns:
        A tensor of the shape of x; with `hadamard`, rows are padded to a multiple of 16. It has the
        memory layout of x: for `x.mT` of a contiguous x, it is the transpose of a contiguous
        tensor.

    Raises:
        ValueError, RuntimeError: as `nvfp4_quantize`.
    """
    *lead, n = x.shape
    width = cdiv(n, BLOCK) * BLOCK if hadamard else n
    if not x.is_contiguous() and x.ndim > amax.ndim + 1 and x.stride(-2) == 1:
        out = torch.empty(*lead[:-1], width, lead[-1], dtype=x.dtype, device=x.device).mT
    else:
        out = torch.empty(*lead, width, dtype=x.dtype, device=x.device)
    _launch("nvfp4_fake_quantize", x, amax, block, hadamard, seed, bits, None, None, None, out)
    return out


def _launch(
    op: str,
    x: Tensor,
    amax: Tensor,
    block: str,
    hadamard: bool,
    seed: int | Tensor | None,
    bits: Tensor | None,
    codes: Tensor | None,
    scales: Tensor | None,
    scale: Tensor | None,
    out: Tensor | None,
) -> None:
    on_gpu_seed = seed if isinstance(seed, Tensor) else None
    check_inputs(op, x, amax, bits, on_gpu_seed)
    _check(op, x, amax, block, seed, bits)
    if x.numel() == 0:
        if scale is not None:
            encode = torch.where(
                amax == 0, 1.0, (torch.full_like(amax, 2688.0) / amax).clamp(max=FLT_MAX.value)
            )
            torch.reciprocal(encode, out=scale)
        return
    x = _matrices(x, amax.ndim)
    matrices, m, k = x.shape
    filled = cdiv(k, BLOCK) * BLOCK
    if bits is not None:
        bits = bits.reshape(matrices, m, -1)
    if out is not None:
        out = out.view(matrices, m, -1)
    rounding = NEAREST if seed is None and bits is None else GIVEN if seed is None else SEEDED
    config = _config(x)
    with on_device(x):
        _quantize_kernel[(_tiles(x, filled, config),)](
            x,
            amax.contiguous(),
            bits,
            codes,
            scales,
            scale,
            out,
            seed,
            matrices // max(1, amax.numel()),
            m,
            k,
            filled,
            0 if bits is None else bits.shape[2],
            0 if out is None else out.shape[2],
            *x.stride(),
            *((0,) * 3 if bits is None else bits.stride()),
            *((0,) * 3 if out is None else out.stride()),
            SQUARE=block == "16x16",
            HADAMARD=hadamard,
            ROUNDING=rounding,
            FAKE=out is not None,
            NATIVE=out is None and arch() >= 100,
            **config,
        )


def _matrices(x: Tensor, batch_dims: int) -> Tensor:
    """x as `matrices rows columns`; each tensor of the batch is one or several of the matrices."""
    if x.is_contiguous():
        return x.view(x.shape[:batch_dims].numel(), -1, x.shape[-1])
    if x.ndim == batch_dims + 1:
        x = x.unsqueeze(-2)
    return x.reshape(-1, *x.shape[-2:])


def _config(x: Tensor) -> dict[str, Any]:
    matrices, m, k = x.shape
    transposed = x.stride(2) != 1 and x.stride(1) == 1
    config = by_arch(ACROSS[x.dtype.itemsize] if transposed else ALONG)
    small = {
        "ROWS": min(config["ROWS"], max(BLOCK, next_power_of_2(m))),
        "COLUMNS": min(config["COLUMNS"], max(BLOCK, next_power_of_2(k))),
    }
    return {**config.kwargs, **small, "TRANSPOSED": transposed, "STACKED": matrices > 1}


def _tiles(x: Tensor, columns: int, config: dict[str, Any]) -> int:
    return x.shape[0] * cdiv(x.shape[1], config["ROWS"]) * cdiv(columns, config["COLUMNS"])


def _check(
    op: str, x: Tensor, amax: Tensor, block: str, seed: int | Tensor | None, bits: Tensor | None
) -> None:
    if block not in BLOCKS:
        raise ValueError(f"{op}: block={block!r}; expected one of {BLOCKS}.")
    if amax.ndim >= x.ndim or amax.shape != x.shape[: amax.ndim] or amax.dtype != torch.float32:
        raise ValueError(
            f"{op}: amax is {amax.dtype} of shape {tuple(amax.shape)}; expected float32, one "
            f"number or one for each tensor along leading dimensions of x {tuple(x.shape)}."
        )
    if block == "16x16" and x.ndim != amax.ndim + 2:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)} and amax {tuple(amax.shape)}; square tiles need "
            "matrices, two dimensions after those of amax."
        )
    if seed is not None and bits is not None:
        raise ValueError(f"{op}: seed and bits were both given; expected one of them.")
    if isinstance(seed, int) and not 0 <= seed < 2**63:
        raise ValueError(f"{op}: seed={seed}; expected 0 to 2^63 - 1.")
    if isinstance(seed, Tensor) and (seed.numel() != 1 or seed.dtype != torch.int64):
        raise ValueError(
            f"{op}: seed is {seed.dtype} of shape {tuple(seed.shape)}; expected one int64."
        )
    if bits is not None:
        n = x.shape[-1]
        fits = bits.shape[:-1] == x.shape[:-1] and bits.shape[-1] in (n, cdiv(n, BLOCK) * BLOCK)
        if not fits:
            raise ValueError(
                f"{op}: bits have shape {tuple(bits.shape)}; expected one for each number of x "
                f"{tuple(x.shape)}, or for its rows padded to a multiple of {BLOCK}."
            )
