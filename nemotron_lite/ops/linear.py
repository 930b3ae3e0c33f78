"""y = x W^T on the CPU, by the library that is at home on the processor.

    y = x W^T           grad x = g W           grad W = g^T x

PyTorch hands float32 products to MKL, which takes its AVX-512 kernels on Intel's processors only.
oneDNN, which PyTorch carries as well, writes its kernels for whatever the processor can do. On an
AMD EPYC of the fifth generation, one core, us:

    rows x matrix         512 x 1296x256    1 x 2576x512    5 x 2576x512    1 x 168x64
    MKL                       3100              327             514             5
    oneDNN                    1366              198             359            14
    oneDNN, blocked              -              141             191            14

The single rows come with matrices that no cache holds, as in decoding. A call costs 8 us more, so
small products stay with MKL. Both sum in float32; the results differ by rounding.

`blocked` lays a matrix out in the order in which oneDNN reads it: half the time again, and hardly
more for eight rows than for one. It is a second copy, so it is made only when somebody asks for it
(`Nemotron.prepare_for_decoding`).

Which library answers is decided by the maker of the processor and by sizes, never by a clock: a
run that is repeated on a machine gives the same bits.

Source: measured. Left out: a bias, which no layer of the family has.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

LARGE = 250_000  # numbers in a matrix that is worth a call into oneDNN for a single row
LEAST_WORK = 1_000_000  # multiply-adds that are worth it for any matrix
MOST_BLOCKED_ROWS = 64  # beyond, the layout is not what costs
_IMPLS = ("auto", "torch", "onednn")


def linear(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "o i"], *, impl: str = "auto"
) -> Float[Tensor, "*rows o"]:
    """x W^T, differentiable.

    Args:
        x: float32 for "onednn", any dtype and device for "torch".
        weight: o rows of i numbers.
        impl: "torch" (`F.linear`), "onednn", or "auto": oneDNN for float32 products on the CPU that
            are large enough, where the processor is not Intel's.

    Raises:
        ValueError: unknown `impl`, or "onednn" for tensors it does not take or where this PyTorch
            was built without it.
    """
    if impl == "auto":
        if not _fits(x, weight):
            return F.linear(x, weight)
    elif impl == "torch":
        return F.linear(x, weight)
    elif impl != "onednn":
        raise ValueError(f"linear has no implementation {impl!r}; choose one of {_IMPLS}.")
    elif not _onednn() or not x.is_cpu or not x.dtype == weight.dtype == torch.float32:
        raise ValueError(
            f"impl='onednn' multiplies float32 on the CPU, with a PyTorch that has oneDNN; got "
            f"{x.dtype} and {weight.dtype} on {x.device}. Use impl='torch'."
        )
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight)
    return product(x, weight)


def product(a: Float[Tensor, "*rows i"], b: Float[Tensor, "o i"]) -> Float[Tensor, "*rows o"]:
    """a b^T by oneDNN, without gradients; b may be a transposed view, or have gaps."""
    return torch.ops.mkldnn._linear_pointwise(a, _gapless(b), None, "none", [], "")


def _gapless(b: Tensor) -> Tensor:
    """A matrix or the transpose of one, as it is; a copy of a slice, for which oneDNN has no kernel
    but a loop over single numbers.
    """
    if b.is_mkldnn or b.is_contiguous() or b.t().is_contiguous():
        return b
    return b.contiguous()


def prefers_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether "auto" multiplies these with oneDNN."""
    return _fits(x, weight)


def _fits(x: Tensor, weight: Tensor) -> bool:
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    return (
        (weight.numel() >= LARGE or rows * weight.numel() >= LEAST_WORK)
        and rows > 0
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and _faster_here()
        and not torch.is_autocast_enabled("cpu")
    )


def blocked(weight: Float[Tensor, "o i"]) -> Tensor:
    """A copy of a matrix in oneDNN's own layout, for `product`; opaque to everything else.

    Raises:
        ValueError: not float32 on the CPU, or a PyTorch without oneDNN.
    """
    if not _onednn() or not weight.is_cpu or weight.dtype != torch.float32:
        raise ValueError(
            f"a blocked layout is for float32 on the CPU, with a PyTorch that has oneDNN; got "
            f"{weight.dtype} on {weight.device}."
        )
    with torch.inference_mode(False), torch.no_grad():
        return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 4)


@lru_cache
def _onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@lru_cache
def _faster_here() -> bool:
    """MKL on a processor that is not Intel's, and oneDNN there to do better."""
    if not (_onednn() and torch.backends.mkl.is_available()):
        return False
    return _maker() not in ("", "GenuineIntel")


def _maker() -> str:
    """The processor's maker as it names itself; empty where nothing tells."""
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text().splitlines():
            if line.startswith("vendor_id"):
                return line.split(":", 1)[1].strip()
        return ""
    words = platform.processor()  # "Intel64 Family 6 ..., GenuineIntel" on Windows
    return words.rsplit(", ", 1)[-1] if ", " in words else ""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        rows, inputs = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        return grad_x, product(rows.t(), inputs.t())
