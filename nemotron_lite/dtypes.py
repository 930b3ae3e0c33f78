"""In which dtype to compute, and how to change a dtype without needless calls.

Statistics, softmax, states and router scores are computed in float32 whatever the dtype of the
model is; tests that want more digits pass float64 and get float64.

Under `torch.autocast` PyTorch casts the inputs of every matrix product to a smaller dtype. That is
meant for the products with weights (`ops.linear`, the experts), and wrong for the scan, whose
states would lose their digits. So what must not be cast runs with autocast switched off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without a call into torch where nothing changes: decoding makes hundreds."""
    return x if x.dtype == dtype else x.to(dtype)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype to compute in: float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def widened(x: Tensor) -> Tensor:
    """x in `wide_dtype(x)`, in one call: decoding makes hundreds."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype to which autocast casts products on the device of `x`; None where it is off."""
    kind = _kind(x)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def without_autocast(run: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """`run`, in the dtypes of its arguments even where autocast is on for the device of `x`."""
    kind = _kind(x)
    if not torch.is_autocast_enabled(kind):
        return run

    def exact(*args: Any) -> Any:
        with torch.autocast(kind, enabled=False):
            return run(*args)

    return exact


def _kind(x: Tensor) -> str:
    """The type of device whose autocast applies to `x`; meta tensors have none of their own."""
    if x.is_cpu or x.is_meta:
        return "cpu"
    return "cuda" if x.is_cuda else x.device.type


def exact_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator for `backward` of an autograd function, which may be called under autocast."""

    @wraps(backward)
    def exact(ctx: Any, *grads: Any) -> Any:
        return without_autocast(backward, grads[0])(ctx, *grads)

    return exact
