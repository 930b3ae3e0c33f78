"""In which dtype to compute, and how to change a dtype without needless calls.

Statistics, softmax, states and router scores are computed in float32 whatever the dtype of the
model is; tests that want more digits pass float64 and get float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without a call into torch where nothing changes: decoding makes hundreds."""
    return x if x.dtype == dtype else x.to(dtype)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
