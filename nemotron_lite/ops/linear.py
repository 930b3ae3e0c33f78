"""The product of every projection: y = x W^T. A bias, which no release has, is the layer's.

`F.linear` is the definition and the plain form at once. On some CPUs and for some sizes oneDNN is
faster in float32; `backends/measured_products.py` measures where.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nemotron_lite.backends import cpu_linear
from nemotron_lite.backends.dispatch import choose


def linear(
    x: Float[Tensor, "*rows i"], weight: Float[Tensor, "o i"], *, impl: str = "auto"
) -> Float[Tensor, "*rows o"]:
    """x W^T, differentiable.

    Args:
        x: float32 on the CPU for "cpu", any dtype and device for "torch".
        weight: o rows of i numbers.
        impl: "torch" (`F.linear`), "cpu" (oneDNN), or "auto": "cpu" where it is faster, which is
            for some float32 products on some CPUs; otherwise PyTorch's own library.

    Raises:
        ValueError: unknown `impl`, or "cpu" for tensors that oneDNN does not take or with a PyTorch
            that was built without it.
    """
    if impl == "auto":
        if torch.compiler.is_compiling():
            return F.linear(x, weight)
        if cpu_linear.prefers_onednn(x, weight):
            return cpu_linear.differentiable_product(x, weight)
        return cpu_linear.plain_product(x, weight)
    return choose("linear", impl, x, torch=F.linear, cpu=cpu_linear.linear)(x, weight)
