"""The choice between the implementations of an operation.

Each public function of `ops` takes `impl`:

    "naive"   the definition, written to be read
    "torch"   one plain PyTorch form, differentiated by autograd
    "cpu"     the fast form: the same arithmetic, tuned for CPUs. Its code is not tied to a device;
              it also runs on other devices, and faster there than the plain form
    "gpu"     for attention: the fastest of PyTorch's own kernels on a GPU, without gradients
    "triton"  a kernel of `nemotron_kernels`, for NVIDIA GPUs (and for Triton's interpreter)
    "traced"  the form that `torch.compile` and `torch.export` can read, where the plain one has a
              loop over chunks or asks a tensor for its numbers (traceable.py)
    "auto"    the fastest one: the Triton kernel for tensors on an NVIDIA GPU of sm_80 or newer, if
              the operation has a kernel, it takes the dtype and triton is installed; otherwise
              "cpu"; "torch" for operations that have no tuned form

While a program is compiled or exported, "auto" is "traced" or "torch", on every device. The tuned
forms reuse scratch memory, write into their inputs and have gradients of their own. A compiler that
reads them breaks its graph at each of these places, or fails. It plans memory and gradients itself,
and needs the plain equations for that.

Two operations decide about "auto" before they call `choose`, because they look at more than the
tensor: `causal_attention` takes "gpu" on a GPU where no gradients are recorded, and `linear` takes
"cpu" only for products that oneDNN multiplies faster than PyTorch's default library.

An operation need not have all of them. An `impl` that cannot be used is an error that says why;
there is no silent fallback. Triton is imported when a kernel is first used, and not before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST_CAPABILITY = (8, 0)  # the first compute capability the kernels are tested for


def choose(
    op: str, impl: str, x: Tensor, **implementations: Callable[..., Any]
) -> Callable[..., Any]:
    """The implementation of `op` called `impl`, for inputs like `x`.

    Raises:
        ValueError: `op` has no implementation called `impl`.
    """
    if impl == "auto":
        if torch.compiler.is_compiling():
            return implementations["traced" if "traced" in implementations else "torch"]
        if _on_gpu(x) and "triton" in implementations and _kernels_take(x):
            return implementations["triton"]
        return implementations["cpu" if "cpu" in implementations else "torch"]
    if impl not in implementations:
        names = ", ".join(repr(name) for name in ("auto", *implementations))
        raise ValueError(f"{op} has no implementation {impl!r}; choose one of {names}.")
    return implementations[impl]


def chooses_cpu(x: Tensor) -> bool:
    """Whether "auto" is the tuned form for CPUs, for a caller that asks once for many operations.

    Tensors of a subclass, such as those of `FakeTensorMode`, are left to each operation.
    """
    compiles = torch.compiler.is_compiling()
    return not compiles and type(x) is Tensor and x.is_cpu and not _on_gpu(x)


def _on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def _kernels_take(x: Tensor) -> bool:
    return x.dtype in KERNEL_DTYPES and _kernels_installed() and _capable(x.get_device())


@lru_cache
def _capable(device: int) -> bool:
    """Whether this is an NVIDIA GPU that is new enough. AMD GPUs call themselves "cuda" too."""
    return torch.version.hip is None and (
        torch.cuda.get_device_capability(device) >= OLDEST_CAPABILITY
    )


@lru_cache
def _kernels_installed() -> bool:
    return find_spec("triton") is not None and find_spec("nemotron_kernels") is not None
