"""The two scales of NVFP4, in Transformer Engine's order of operations, which is normative here.

A tensor has one scale in float32, and each block of 16 has one in E4M3 (8 bits, largest 448):

    amax   = max |x|, over the tensor
    s_enc  = min(2688 / amax, FLT_MAX);  1 where amax = 0          2688 = 6 * 448
    s_dec  = 1 / s_enc                                             the stored scale of the tensor
    c      = e4m3( min(amax_block * (s_enc * fl(1/6)), 448) )      the stored scale of the block
    encode = min( 1 / (c * s_dec), FLT_MAX )
    code   = e2m1( x * encode ),  saturating at 6
    value  = e2m1^-1(code) * (c * s_dec)

Every operation is rounded once, in float32, to nearest. Three details follow from this order. They
are easily lost in a "simplification":

- c may be zero: in a block of zeros, and in a block whose largest value is below about 2.2e-6 of
  the tensor's. Such a block decodes to zero, whatever its codes are.
- c is rounded to nearest, so it may be a little too small. Then the largest value of the block lies
  above 6 and is clipped: by at most 1/16 for ordinary c, by more where c is subnormal in E4M3.
- FLT_MAX in `encode` keeps 0 * (1 / 0) from being NaN.

Other libraries use other orders and give other bits. The paper (arXiv 2509.25149) writes
amax_block / 6 before the multiplication with s_enc, which rounds twice, so c can differ in its last
bit. torchao's `nvfp4_quantize` divides by amax / 2688 and does not let c fall below 2^-6, so a weak
block keeps a scale that is far too large for it. ModelOpt stores amax / 2688, which can differ from
1 / (2688 / amax) in the last bit. None of these is offered here, because choosing one would change
checkpoints without notice.

Source: Transformer Engine, core_nvfp4.cuh and reference_nvfp4.py; reference sheet 6.2.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Float8e4m3fn, Float32
from torch import Tensor

from nemotron_lite.quantization.nvfp4.e2m1 import E2M1_MAX

E4M3_MAX = 448.0
FLT_MAX = torch.finfo(torch.float32).max
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 16


def round_e4m3(x: Float32[Tensor, "*shape"]) -> Float8e4m3fn[Tensor, "*shape"]:
    """The nearest E4M3 value, ties to even, saturating at 448.

    x is clamped before the cast: beyond 448 torch gives NaN or 448, depending on its version.
    """
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def check_finite(amax: Tensor, name: str, format: str = "NVFP4") -> Tensor:
    """Return `amax`, the largest magnitude of a tensor, if it is finite.

    Raises:
        ValueError: naming the tensor.
    """
    if not bool(amax.isfinite().all()):
        raise ValueError(
            f"{name} holds NaN or infinity (its largest magnitude is {float(amax.max())}); "
            f"expected finite numbers, because {format} has codes for neither. Find where they "
            "come from before quantizing."
        )
    return amax


def check_dtype(x: Tensor, name: str) -> None:
    """Refuse a tensor that is not float32, bfloat16 or float16.

    Raises:
        ValueError: naming the tensor.
    """
    if x.dtype not in FLOATS:
        raise ValueError(
            f"{name} is {x.dtype}; expected float32, bfloat16 or float16. Cast it first: the "
            "scales are computed in float32."
        )


def tensor_amax(
    x: Float[Tensor, "..."], *, batch_dims: int = 0, name: str = "tensor"
) -> Float32[Tensor, "..."]:
    """The largest magnitude, in float32: of the whole tensor, or of each tensor of a batch.

    Raises:
        ValueError: NaN or infinity in x.
    """
    rest = tuple(range(batch_dims, x.ndim))
    if x.numel() == 0:
        return torch.zeros(x.shape[:batch_dims], dtype=torch.float32, device=x.device)
    return check_finite(x.detach().abs().amax(rest).float(), name)


def tensor_scales(
    amax: Float32[Tensor, "..."],
) -> tuple[Float32[Tensor, "..."], Float32[Tensor, "..."]]:
    """(s_enc, s_dec) for a tensor with this largest magnitude."""
    # Divide a tensor by a tensor: torch computes `number / tensor` as number * (1 / tensor), which
    # rounds twice and gives another result for a quarter of all amax.
    encode = (torch.full_like(amax, E2M1_MAX * E4M3_MAX) / amax).clamp(max=FLT_MAX)
    encode = torch.where(amax == 0, 1.0, encode)
    return encode, 1.0 / encode


def block_scales(
    amax: Float32[Tensor, "..."], encode: Float32[Tensor, "..."]
) -> Float8e4m3fn[Tensor, "..."]:
    """c of each block, from its largest magnitude and s_enc (which broadcasts)."""
    sixth = torch.tensor(1 / E2M1_MAX, dtype=torch.float32, device=amax.device)
    return round_e4m3(amax * (encode * sixth))


def block_factors(
    scales: Float8e4m3fn[Tensor, "..."], decode: Float32[Tensor, "..."]
) -> tuple[Float32[Tensor, "..."], Float32[Tensor, "..."]]:
    """(encode, c * s_dec) of each block: the factors of x and of the decoded codes."""
    factor = scales.float() * decode
    return (1.0 / factor).clamp(max=FLT_MAX), factor
