"""The one door of an operation: an explicit choice between its implementations.

Each public function of `ops` takes `impl`:

    "naive"   the definition, written to be read
    "torch"   fast PyTorch, on every device
    "triton"  a kernel of `nemotron_kernels`, on NVIDIA GPUs (and in Triton's interpreter)
    "auto"    the kernel for tensors on an NVIDIA GPU of sm_80 or newer, if there is one and triton
              is installed; else torch

A choice that cannot be met is an error that says why, never a silent fallback. Triton is imported
when a kernel is first used, and not before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # the first compute capability the kernels are compiled and tested for


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x.to(dtype)`, without a call into torch where nothing changes: decoding makes hundreds."""
    return x if x.dtype == dtype else x.to(dtype)


def choose(
    op: str, impl: str, x: Tensor, **implementations: Callable[..., Any]
) -> Callable[..., Any]:
    """The implementation of `op` called `impl`, for inputs like `x`.

    Raises:
        ValueError: `impl` names none of them.
    """
    if impl == "auto":
        if _on_gpu(x) and "triton" in implementations and _takes(x):
            return implementations["triton"]
        return implementations["torch"]
    if impl not in implementations:
        names = ", ".join(repr(name) for name in ("auto", *implementations))
        raise ValueError(f"{op} has no implementation {impl!r}; choose one of {names}.")
    return implementations[impl]


def kernel(module: str, name: str) -> Callable[..., Any]:
    """A function of `nemotron_kernels.<module>`, imported when it is first called.

    Raises (when called):
        ImportError: triton is not installed; the message says what to do.
    """

    def call(*arguments: Any, **options: Any) -> Any:
        return getattr(import_module(f"nemotron_kernels.{module}"), name)(*arguments, **options)

    return call


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _takes(x: Tensor) -> bool:
    return x.dtype in KERNEL_DTYPES and _installed() and _capable(x.get_device())


@lru_cache
def _capable(device: int) -> bool:
    """Whether this is an NVIDIA GPU that is new enough; AMD's answer to "cuda" as well."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= OLDEST


@lru_cache
def _installed() -> bool:
    return find_spec("triton") is not None and find_spec("nemotron_kernels") is not None
