"""Block scales that minimise the error, instead of those that fit the largest value.

NVFP4's rule maps the largest value of a block to 6. That wastes codes where the block is dense near
one of the wide steps (between 4 and 6 there is nothing), and it is only one of the 126 positive
scales of E4M3. A weight is quantized once and read forever, so its scales can be searched:

    c* = argmin over c of  sum_i ( x_i - c s_dec e2m1( x_i / (c s_dec) ) )^2

E4M3's codes are in the order of their values, so candidates are the neighbours of the rule's code:
`REACH` down (larger values are clipped, small ones get finer steps) and `REACH` up (largest mapped
to 4 instead of 6). Eight codes are an octave. The rule's own scale is among the candidates and wins
ties, so no block gets worse. Activations, whose scales are made as they come, keep the rule.

Source: Nemotron 3 Super report 4.2 (sweep of E4M3 candidates by the weight's mean squared error).
Left out: the tensor's scale, which stays 2688 / amax; errors weighted by the inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron_lite.quantization.nvfp4 import E2M1_MAX, QuantizedTensor, pack, quantize
from nemotron_lite.quantization.nvfp4.elements import decode_e2m1, encode_e2m1
from nemotron_lite.quantization.nvfp4.scaling import BLOCK, block_factors

REACH = 8
_LARGEST = 126  # the code of 448


def best_scales(
    x: Float[Tensor, "*rows n"], *, batch_dims: int = 0, reach: int = REACH, name: str = "tensor"
) -> QuantizedTensor:
    """x in NVFP4 with the block scales of least squared error.

    Args:
        x: a weight, blocks along its last dimension.
        batch_dims: this many leading dimensions count separate tensors (1 for stacked experts).
        reach: candidates to either side of the rule's scale.
        name: for errors.

    Raises:
        ValueError: as `quantize`; a negative reach.
    """
    if reach < 0:
        raise ValueError(f"reach={reach}: expected at least 0.")
    rule = quantize(x, batch_dims=batch_dims, name=name)
    blocks = F.pad(x.detach().float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    decode = rule.scale.reshape(*rule.scale.shape, *[1] * (x.ndim - batch_dims))
    middle = rule.scales.view(torch.uint8).short()
    best_code, best_error, best_values = rule.scales, None, None
    for step in sorted(range(-reach, reach + 1), key=abs):
        # A block of zeros, or one flushed to zero, keeps its scale of zero.
        code = torch.where(middle == 0, 0, (middle + step).clamp(1, _LARGEST)).to(torch.uint8)
        scales = code.view(torch.float8_e4m3fn)
        encode, factor = block_factors(scales, decode)
        v = (blocks * encode.unsqueeze(-1)).clamp(-E2M1_MAX, E2M1_MAX)
        values = encode_e2m1(v)
        error = (decode_e2m1(values) * factor.unsqueeze(-1) - blocks).square().sum(-1)
        if best_error is None or best_values is None:
            best_code, best_error, best_values = code, error, values
            continue
        better = error < best_error
        best_code = torch.where(better, code, best_code)
        best_error = torch.where(better, error, best_error)
        best_values = torch.where(better.unsqueeze(-1), values, best_values)
    assert best_values is not None
    codes = pack(best_values.flatten(-2))
    scales = best_code.view(torch.float8_e4m3fn)
    return QuantizedTensor(codes, scales, rule.scale, rule.shape)
