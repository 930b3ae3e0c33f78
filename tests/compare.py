"""Compare two implementations of one operation: values and every gradient, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def relative_rms(found: Tensor, exact: Tensor) -> float:
    """rms(found - exact) / rms(exact); inf where anything is not finite."""
    if not found.isfinite().all():
        return float("inf")
    error = (found.double() - exact.double()).square().mean().sqrt()
    return float(error / exact.double().square().mean().sqrt().clamp(min=1e-30))


def run(
    function: Callable[..., Any], inputs: Sequence[Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """Float outputs of `function(*inputs)` in `dtype`, and the gradients of all inputs.

    The gradient of each output is a fixed random tensor, the same whatever the dtype.
    """
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    found = function(*leaves)
    outputs = [found] if isinstance(found, Tensor) else [x for x in found if x.is_floating_point()]
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outputs]
    torch.autograd.backward(outputs, [g.to(x.dtype) for g, x in zip(grads, outputs, strict=True)])
    return [x.detach() for x in outputs], [leaf.grad for leaf in leaves]


def errors(
    fast: Callable[..., Any],
    exact: Callable[..., Any],
    inputs: Sequence[Tensor],
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    """Relative rms error of each output and each gradient of `fast` in `dtype`.

    `exact` sees the same rounded inputs in float64.
    """
    rounded = [x.to(dtype) for x in inputs]
    values, grads = run(fast, rounded, dtype)
    exact_values, exact_grads = run(exact, rounded, torch.float64)
    return [
        relative_rms(a, b) for a, b in zip(values + grads, exact_values + exact_grads, strict=True)
    ]
