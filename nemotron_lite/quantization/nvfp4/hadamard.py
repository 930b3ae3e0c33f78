"""The 16-point Hadamard transform with fixed signs, for both inputs of a weight gradient.

One large value among fifteen small ones costs the small ones their bits. Turning the sixteen by an
orthogonal matrix spreads it out:

    y = x diag(signs) H / 4          H_ij = (-1)^popcount(i & j), 16 x 16 (Sylvester's)

A weight gradient is a sum over tokens, dW = dY^T X. If both are turned along the tokens, sixteen at
a time, the product is the same: (R dY)^T (R X) = dY^T X as R is orthogonal. So nothing has to be
turned back, and both may be quantized in between. This is the only place where the recipe uses it;
it does not lower the error of every tensor (a single outlier becomes sixteen middling values).

The sixteen signs are Transformer Engine's constant. Drawing new ones did not help (reference sheet
6.4). Numbers are multiplied with sign / 4 first, then added in the order of the fast transform, of
pairs 1, 2, 4, then 8 apart, in float32, and rounded once to the dtype of x: for bfloat16 that is
what Transformer Engine's kernels hand to their quantizer. A fixed order makes the bits the same on
every machine, as a matrix product's are not.

Source: Transformer Engine, nvfp4_tensor.py; reference sheet 6.3. Left out: other sizes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
POINTS = 16


def hadamard(x: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """Each run of 16 along `dim` times diag(signs) H / 4; orthonormal.

    Args:
        x: floating point; float64 is computed in float64, all else in float32.
        dim: its length must be a multiple of 16.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: another length.
    """
    runs = _runs(x, dim)
    return _restore(butterflies(runs * _signs(runs, 0.25)), x, dim)


def inverse_hadamard(y: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """Undo `hadamard`: H / 4 is its own inverse, so the signs come last.

    Raises:
        ValueError: as `hadamard`.
    """
    runs = butterflies(_runs(y, dim) * 0.25)
    return _restore(runs * _signs(runs, 1.0), y, dim)


def _signs(like: Tensor, size: float) -> Tensor:
    signs = torch.tensor(SIGNS, dtype=like.dtype, device=like.device) * size
    return signs.view(POINTS, 1)


def _runs(x: Tensor, dim: int) -> Tensor:
    """x as [before, 16, after], wide: the sixteen in the middle, what follows `dim` behind."""
    length = x.shape[dim]
    if length % POINTS:
        raise ValueError(
            f"dimension {dim} of {list(x.shape)} is {length} long; the transform takes 16 at a "
            "time. Pad it with zeros."
        )
    dim %= x.ndim
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    after = x.shape[dim + 1 :].numel()
    if after == 1:
        # The sixteen lie side by side; turned over, each step works on long rows.
        return wide.reshape(x.numel() // POINTS, POINTS).t().contiguous().unsqueeze(0)
    return wide.reshape(x.numel() // (POINTS * max(after, 1)), POINTS, after)


def _restore(runs: Tensor, x: Tensor, dim: int) -> Tensor:
    after = x.shape[dim % x.ndim + 1 :].numel()
    if after == 1:
        runs = runs[0].t()
    return runs.to(x.dtype).reshape(x.shape)


def butterflies(runs: Float[Tensor, "before 16 after"]) -> Float[Tensor, "before 16 after"]:
    """H times each column of 16: four rounds of sums and differences."""
    before, _, after = runs.shape
    for apart in (1, 2, 4, 8):
        first, second = runs.view(before, POINTS // (2 * apart), 2, apart, after).unbind(2)
        if torch.is_grad_enabled() and runs.requires_grad:
            runs = torch.stack([first + second, first - second], 2)
        else:
            runs = runs.new_empty(before, POINTS // (2 * apart), 2, apart, after)
            torch.add(first, second, out=runs[:, :, 0])
            torch.sub(first, second, out=runs[:, :, 1])
    return runs.view(before, POINTS, after)
