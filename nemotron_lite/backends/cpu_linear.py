"""y = x W^T on the CPU, by the faster of two libraries: MKL or oneDNN.

    y = x W^T           grad x = g W           grad W = g^T x

PyTorch gives float32 products to MKL, which uses its AVX-512 kernels on Intel's CPUs only. oneDNN,
which PyTorch carries as well, generates its kernels for what the CPU can do. On an AMD EPYC of the
fifth generation, one core, us:

    rows x matrix         512 x 1296x256    1 x 2576x512    5 x 2576x512    1 x 168x64
    MKL                       3100              327             514             5
    oneDNN                    1366              198             359            14
    oneDNN, prepacked            -              141             191            14

On an Intel Xeon with AMX, two cores, MKL is the faster one for most products. A prepacked matrix
wins there for 8 to 64 rows: 1.4 to 2.1 times as fast for 8 rows and half a million entries or more.

`prepack` copies a matrix into the layout that oneDNN reads. The copy needs as much memory as the
matrix, so it is made only on request (`Nemotron.prepare_for_decoding`).

Which library multiplies is measured once per machine (measured_products.py) and kept in a file: a
run that is repeated on one machine gives the same bits. Both libraries sum in float32; the results
differ by rounding.

Source: measured. Left out: a bias, which `layers/linear.py` adds where a config has one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nemotron_lite.backends import measured_products, private_torch
from nemotron_lite.backends.private_torch import onednn_linear, onednn_reorder

MOST_PREPACKED_ROWS = 64  # with more rows, the layout is not what costs time


def linear(x: Float[Tensor, "*rows i"], weight: Float[Tensor, "o i"]) -> Float[Tensor, "*rows o"]:
    """x W^T by oneDNN, differentiable.

    Raises:
        ValueError: not float32 on the CPU, or a PyTorch without oneDNN.
    """
    if (
        not private_torch.HAS_ONEDNN_LINEAR
        or not x.is_cpu
        or not x.dtype == weight.dtype == torch.float32
    ):
        raise ValueError(
            f"linear with impl='cpu' multiplies float32 on the CPU, with a PyTorch that has "
            f"oneDNN; got {x.dtype} and {weight.dtype} on {x.device}. Use impl='torch'."
        )
    return differentiable_product(x, weight)


def differentiable_product(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "o i"]
) -> Float[Tensor, "*rows o"]:
    """`product` that autograd can follow, for tensors that oneDNN takes."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight)
    return product(x, weight)


def plain_product(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "o i"]
) -> Float[Tensor, "*rows o"]:
    """x W^T by PyTorch's own library, differentiable."""
    if (
        x.numel() == weight.shape[1] == x.shape[-1] > 0
        and not torch.is_grad_enabled()
        and type(x) is Tensor
        and type(weight) in (Tensor, nn.Parameter)
        and x.is_cpu
        and not torch.is_autocast_enabled("cpu")
    ):
        return one_row(weight, x).view(*x.shape[:-1], -1)
    return F.linear(x, weight)


def one_row(weight: Float[Tensor, "o i"], x: Float[Tensor, "*ones i"]) -> Float[Tensor, "1 o"]:
    """x W^T of one row, without gradients, as a product of a matrix and a vector.

    The libraries do that in 0.85 (float32) and 0.6 (BF16) of the time of a product of matrices.
    """
    return torch.mv(weight, x.view(-1)).unsqueeze(0)


def product(a: Float[Tensor, "*rows i"], b: Float[Tensor, "o i"]) -> Float[Tensor, "*rows o"]:
    """a b^T by oneDNN, without gradients; b may be a transposed view, have gaps or be prepacked."""
    return onednn_linear(a, _without_gaps(b))


def _without_gaps(b: Tensor) -> Tensor:
    """A matrix or the transpose of one, as it is; a contiguous copy of anything else.

    For a slice with gaps between its rows oneDNN has no kernel, only a loop over single numbers.
    """
    if b.is_mkldnn or b.is_contiguous() or b.t().is_contiguous():
        return b
    return b.contiguous()


def prefers_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether "auto" multiplies these with oneDNN."""
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    return (
        rows > 0
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and private_torch.HAS_ONEDNN_LINEAR
        and measured_products.prefers_onednn(rows, weight.numel())
        and not torch.is_autocast_enabled("cpu")
    )


def product_for(
    weight: Float[Tensor, "o i"], rows: int, prepacked: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """The product that "auto" chooses for `rows b i`, asked once for many calls.

    Args:
        weight: float32 or BF16 on the CPU, as the inputs will be. It may be changed in place later.
        rows: of the inputs.
        prepacked: a copy of the weight from `prepack`, where there is one.

    The calls must be made without gradients and without autocast.
    """
    if weight.dtype == torch.float32 and private_torch.HAS_ONEDNN_LINEAR:
        if prepacked is not None and prefers_prepacked(rows, weight.numel()):
            return partial(_swapped_product, prepacked)
        if measured_products.prefers_onednn(rows, weight.numel()):
            return partial(_swapped_product, weight)
    if rows == 1:
        return partial(one_row, weight)
    return lambda x: F.linear(x, weight)


def _swapped_product(weight: Tensor, x: Tensor) -> Tensor:
    return product(x, weight)


def prefers_prepacked(rows: int, numel: int) -> bool:
    """Whether a copy in oneDNN's layout is the fastest for this many rows and matrix entries."""
    return 0 < rows <= MOST_PREPACKED_ROWS and measured_products.prefers_prepacked(rows, numel)


def prepack(weight: Float[Tensor, "o i"]) -> Tensor:
    """A copy of a matrix in oneDNN's own layout, for `product`; nothing else can read it.

    In a PyTorch without oneDNN it is the matrix itself, which `product` takes as well.

    Raises:
        ValueError: not float32 on the CPU.
    """
    if not weight.is_cpu or weight.dtype != torch.float32:
        raise ValueError(
            "oneDNN's own layout is for float32 on the CPU; got "
            f"{weight.dtype} on {weight.device}. Move the model to the CPU in float32, or "
            "leave its weights in their own layout."
        )
    with torch.inference_mode(False), torch.no_grad():
        return onednn_reorder(weight)


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
