"""Block scales that minimize the error of a weight, instead of fitting its largest value.

NVFP4's rule maps the largest value of a block to 6. This is not always best: the grid has wide
steps (there is nothing between 4 and 6), and a block may have many values there. The rule's scale
is only one of the 126 positive scales of E4M3. A weight is quantized once and read many times, so
its scales are worth a search:

    c* = argmin over c of  sum_i ( x_i - c s_dec e2m1( x_i / (c s_dec) ) )^2

E4M3's codes are in the order of their values. The candidates are the `REACH` codes below the rule's
code (large values are clipped, small ones get finer steps) and the `REACH` codes above it (the
largest value is mapped to 4 instead of 6). Eight codes are one octave. The rule's own scale is
among the candidates and wins ties, so no block gets worse. Activations keep the rule, because their
scales have to be computed at run time.

Source: Nemotron 3 Super report 4.2 (sweep of E4M3 candidates by the weight's mean squared error).
Left out: a search of the tensor scale, which stays 2688 / amax; errors weighted by the inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron_lite.quantization.nvfp4 import E2M1_MAX, QuantizedTensor, pack_codes, quantize
from nemotron_lite.quantization.nvfp4.e2m1 import decode_e2m1, encode_e2m1
from nemotron_lite.quantization.nvfp4.scaling import BLOCK, block_factors

REACH = 8
_LARGEST = 126  # the code of 448


def search_block_scales(
    x: Float[Tensor, "*rows n"], *, batch_dims: int = 0, reach: int = REACH, name: str = "tensor"
) -> QuantizedTensor:
    """x in NVFP4 with the block scales of least squared error.

    Args:
        x: a weight, blocks along its last dimension.
        batch_dims: this many leading dimensions count separate tensors (1 for a stack of experts).
        reach: candidates on each side of the rule's scale.
        name: of the tensor, for errors.

    Raises:
        ValueError: as `quantize`; a negative reach.
    """
    if reach < 0:
        raise ValueError(f"reach={reach}: expected at least 0.")
    rule = quantize(x, batch_dims=batch_dims, name=name)
    blocks = F.pad(x.detach().float(), (0, -x.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    decode = rule.scale.reshape(*rule.scale.shape, *[1] * (x.ndim - batch_dims))
    rule_code = rule.scales.view(torch.uint8).short()
    best_code, best_error, best_values = rule.scales, None, None
    for offset in sorted(range(-reach, reach + 1), key=abs):
        # A block of zeros, or one flushed to zero, keeps its scale of zero.
        code = torch.where(rule_code == 0, 0, (rule_code + offset).clamp(1, _LARGEST))
        code = code.to(torch.uint8)
        encode, factor = block_factors(code.view(torch.float8_e4m3fn), decode)
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
    codes = pack_codes(best_values.flatten(-2))
    return QuantizedTensor(codes, best_code.view(torch.float8_e4m3fn), rule.scale, rule.shape)
