"""The 16-point Hadamard transform with fixed signs, for both operands of a weight gradient.

In a block with one large value among fifteen small ones, the small ones lose their bits. An
orthogonal transform of the sixteen spreads the large value over all of them:

    y = x diag(signs) H / 4          H_ij = (-1)^popcount(i & j), 16 x 16 (Sylvester's)

A weight gradient is a sum over tokens, dW = dY^T X. If both operands are transformed along the
tokens, sixteen at a time, the product is the same: (R dY)^T (R X) = dY^T X, because R is
orthogonal. So no inverse transform is needed, and both operands may be quantized in between. This
is the only place where the recipe uses the transform. It does not lower the error of every tensor,
because a single outlier becomes sixteen values of middle size.

The sixteen signs are Transformer Engine's constant. Drawing new signs did not help (reference sheet
6.4). Numbers are first multiplied with sign / 4, then added in the order of the fast transform (of
pairs 1, 2, 4, then 8 apart) in float32, and rounded once to the dtype of x. For bfloat16 this is
what Transformer Engine's kernels pass to their quantizer. A fixed order of additions gives the same
bits on every machine, which a matrix product does not.

Source: Transformer Engine, nvfp4_tensor.py; reference sheet 6.3. Left out: other sizes.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
POINTS = 16


def hadamard_transform(x: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """Multiply each 16 numbers along `dim` with diag(signs) H / 4; orthonormal.

    Args:
        x: floating point; float64 is computed in float64, all else in float32.
        dim: its length must be a multiple of 16.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: another length.
    """
    groups = _groups_of_16(x, dim)
    return _restore(fast_transform(groups * _signs(groups, 0.25)), x, dim)


def inverse_hadamard_transform(
    y: Float[Tensor, "*shape"], dim: int = -1
) -> Float[Tensor, "*shape"]:
    """Undo `hadamard_transform`: H / 4 is its own inverse, so the signs come last.

    Raises:
        ValueError: as `hadamard_transform`.
    """
    groups = fast_transform(_groups_of_16(y, dim) * 0.25)
    return _restore(groups * _signs(groups, 1.0), y, dim)


def _signs(like: Tensor, scale: float) -> Tensor:
    signs = torch.tensor(SIGNS, dtype=like.dtype, device=like.device) * scale
    return signs.view(POINTS, 1)


def _groups_of_16(x: Tensor, dim: int) -> Tensor:
    """x as [before, 16, after] in float32 or float64; "after": the dimensions that follow `dim`."""
    length = x.shape[dim]
    if length % POINTS:
        raise ValueError(
            f"dimension {dim} of {list(x.shape)} is {length} long; expected a multiple of 16. Pad "
            "it with zeros."
        )
    dim %= x.ndim
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    after = x.shape[dim + 1 :].numel()
    if after == 1:
        # The sixteen lie side by side. Transposed, each step of the transform works on long rows.
        return wide.reshape(x.numel() // POINTS, POINTS).t().contiguous().unsqueeze(0)
    return wide.reshape(x.numel() // (POINTS * max(after, 1)), POINTS, after)


def _restore(groups: Tensor, x: Tensor, dim: int) -> Tensor:
    after = x.shape[dim % x.ndim + 1 :].numel()
    if after == 1:
        groups = groups[0].t()
    return groups.to(x.dtype).reshape(x.shape)


def fast_transform(groups: Float[Tensor, "before 16 after"]) -> Float[Tensor, "before 16 after"]:
    """H times each column of 16, by the fast transform: four rounds of sums and differences."""
    before, _, after = groups.shape
    for apart in (1, 2, 4, 8):
        first, second = groups.view(before, POINTS // (2 * apart), 2, apart, after).unbind(2)
        if torch.is_grad_enabled() and groups.requires_grad:
            groups = torch.stack([first + second, first - second], 2)
        else:
            groups = groups.new_empty(before, POINTS // (2 * apart), 2, apart, after)
            torch.add(first, second, out=groups[:, :, 0])
            torch.sub(first, second, out=groups[:, :, 1])
    return groups.view(before, POINTS, after)
