"""Muon for matrices, AdamW for everything else, as one optimizer.

    m <- mu m + g                                    momentum
    O  = orthogonal part of (g + mu m)               U V^T of its singular value decomposition
    w <- w - lr (0.2 sqrt(max(rows, columns)) O + wd w)

The momentum of a matrix has a few large singular values, and AdamW moves the matrix mostly along
them. Muon sets all of them near one, so that every direction is learned at the same rate. After
77,000 tokens `lite` had 2.25 to 2.27 bits per byte with it (rates 2.5e-3 to 1e-2), and 2.31 with
AdamW: one seed, updates of 512 tokens.

The factor 0.2 sqrt(max(rows, columns)) gives the update the size that an AdamW update has, so that
learning rate and weight decay of one serve the other (Moonlight).

The orthogonal part is found by five steps of a Newton-Schulz iteration, in products only:

    X <- X / |X|                       then five times:  X <- a X + (b A + c A A) X,  A = X X^T

The singular values end between 0.7 and 1.2, which is near enough. The products run in BF16 where
the device multiplies it faster.

A stack of matrices `e r c` (the experts) is orthogonalized matrix by matrix, in one batch. Not
matrices in this sense, and left to AdamW: the embedding and the head (rows of a table), the
convolution taps, the router, vectors and numbers.

Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon), Liu et al. 2025 (arXiv 2502.16982).
Super was trained with AdamW (reference sheet 7), which stays the default. Left out: the
distribution of the iteration over devices.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from nemotron_lite.backends.measured_products import prefers_bf16

MOMENTUM = 0.95
STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SIZE = 0.2  # of an update, as a root mean square: what AdamW's updates have


class Muon(torch.optim.AdamW):
    """AdamW whose groups with `orthogonal=True` are moved by Muon.

    Args:
        groups: as for AdamW; with `orthogonal=True`, of tensors with two or three dimensions.
        options: those of AdamW, for the other groups.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any) -> None:
        super().__init__([{"orthogonal": False, **group} for group in groups], **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every tensor that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["orthogonal"]]
            super().step()
        finally:
            self.param_groups = groups
        for group in groups:
            if group["orthogonal"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group["lr"], group["weight_decay"])
        return loss

    def _move(self, parameter: Tensor, lr: float, weight_decay: float) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # AdamW expects it when it loads
            state["momentum"] = torch.zeros_like(parameter)
        state["step"] += 1
        momentum = state["momentum"].mul_(MOMENTUM).add_(grad)
        update = orthogonal(grad.add(momentum, alpha=MOMENTUM))
        scale = SIZE * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - lr * weight_decay).add_(update, alpha=-lr * scale)


def orthogonal(x: Float[Tensor, "*e r c"]) -> Float[Tensor, "*e r c"]:
    """The matrix (or matrices) with the singular vectors of x and singular values near one.

    A matrix of zeros stays zero.
    """
    narrow = torch.bfloat16 if prefers_bf16(x.device) else x.dtype
    a, b, c = COEFFICIENTS
    wide = x.shape[-2] <= x.shape[-1]
    y = (x if wide else x.mT).reshape(-1, *sorted(x.shape[-2:]))
    y = y / torch.linalg.matrix_norm(y, keepdim=True).clamp_(min=1e-7)
    y = y.to(narrow).contiguous()
    gram = y.new_empty(len(y), y.shape[1], y.shape[1])
    polynomial, other = torch.empty_like(gram), torch.empty_like(y)
    for _ in range(STEPS):
        torch.bmm(y, y.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=polynomial)
        torch.baddbmm(y, polynomial, y, beta=a, out=other)
        y, other = other, y
    return (y if wide else y.mT).reshape(x.shape).to(x.dtype)
