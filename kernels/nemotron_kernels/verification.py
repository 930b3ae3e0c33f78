"""The acceptance rule of speculative decoding: few reads, and two numbers written per sequence.

    accept d_j while u_j q_j(d_j) < p_j(d_j);  then draw from max(p_j - q_j, 0), or from p_{k+1}

A program handles one sequence. Each drafted position up to the first rejection needs two numbers, p
and q at the drafted token. Then one pair of rows is read at most twice: once for the sum of the
residual, and once to the position where the cumulative sum passes the target. The residual is not
stored. The traffic is that of these rows: at most 2 x 2 x v x 4 bytes per sequence that rejects. On
average it is 1.5 passes instead of 2, because the second one stops where the token is found.

The draw is the inverse of the cumulative sum, as in the definition. Sums of a block are in float32,
the sum over blocks is in float64, which costs little for a few numbers. A vocabulary has 131,072
terms, and an error of 1e-6 of the sum means one wrong token in a million. Against the definition,
which sums in float64 throughout, tokens differ only where the target falls that close to a
boundary.

Rounding may put the target beyond the last term. Then the last token with a nonzero weight is
taken.

Source: the definition in nemotron_lite/ops/verification.py. Left out: several programs for one
sequence, which would help a single sequence on a large GPU; the softmax and the filters before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_kernels._compat import Config, by_arch, check_inputs, on_device, unit_stride

BLOCKS = {0: Config({"BLOCK": 2**14}), 80: Config({"BLOCK": 4096}, num_warps=8)}


class Verified(NamedTuple):
    """The fields of `nemotron_lite.ops.Verdict`."""

    accepted: Int[Tensor, "b"]
    token: Int[Tensor, "b"]


@triton.jit
def _residual(p_row, q_row, offsets, end, q_end):
    """max(p - q, 0) of one block; q counts as zero from `q_end` on."""
    p = tl.load(p_row + offsets, mask=offsets < end, other=0.0)
    q = tl.load(q_row + offsets, mask=offsets < tl.minimum(end, q_end), other=0.0)
    rest = p - q
    return tl.where(rest > 0, rest, 0.0)


@triton.jit
def _sum_of(p_row, q_row, size, q_end, BLOCK: tl.constexpr):
    total = tl.zeros((1,), dtype=tl.float64)
    for first in range(0, size, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        total += tl.sum(_residual(p_row, q_row, offsets, size, q_end), axis=0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _verify_kernel(
    p_ptr,
    q_ptr,
    drafts_ptr,
    uniforms_ptr,
    lengths_ptr,
    accepted_ptr,
    token_ptr,
    k,
    size,
    p_row,
    p_place,
    q_row,
    q_place,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    kept = length * 0
    going = length >= 0
    for j in range(0, k):
        # Drafts after a rejection, or beyond the row's length, are not read.
        reads = going & (j < length)
        token = tl.load(drafts_ptr + row * k + j, mask=reads, other=0).to(tl.int64)
        place = row * p_row + kept.to(tl.int64) * p_place + token
        ours = tl.load(p_ptr + place, mask=reads, other=0.0).to(tl.float64)
        place = row * q_row + kept.to(tl.int64) * q_place + token
        theirs = tl.load(q_ptr + place, mask=reads, other=1.0).to(tl.float64)
        u = tl.load(uniforms_ptr + row * (k + 1) + j, mask=reads, other=1.0)
        going = reads & (u * theirs < ours)
        kept += going.to(kept.dtype)

    p_first = p_ptr + row * p_row + kept.to(tl.int64) * p_place
    q_first = q_ptr + row * q_row + kept.to(tl.int64) * q_place
    q_end = tl.where(kept < length, size, 0)
    total = _sum_of(p_first, q_first, size, q_end, BLOCK)
    # Rounding can make p - q zero everywhere. Then the token is drawn from p, the best
    # approximation.
    empty = total <= 0.0
    q_end = tl.where(empty, 0, q_end)
    if empty:
        total = _sum_of(p_first, q_first, size, q_end, BLOCK)

    target = tl.load(uniforms_ptr + row * (k + 1) + k) * total
    before = total * 0.0
    found = length * 0 - 1
    last = length * 0
    for first in range(0, size, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        end = tl.where(found < 0, size, 0)  # reads no more blocks once the token is found
        rest = _residual(p_first, q_first, offsets, end, q_end)
        sums = before + tl.cumsum(rest, axis=0).to(tl.float64)
        passed = (sums > target) & (rest > 0)
        hit = tl.min(tl.where(passed, offsets, size), axis=0).to(found.dtype)
        found = tl.where((found < 0) & (hit < size), hit, found)
        heaviest = tl.max(tl.where(rest > 0, offsets, -1), axis=0).to(last.dtype)
        last = tl.maximum(last, heaviest)
        before += tl.sum(rest, axis=0).to(tl.float64)
    tl.store(accepted_ptr + row, kept.to(tl.int64))
    tl.store(token_ptr + row, tl.where(found < 0, last, found).to(tl.int64))


def verify(
    p: Float[Tensor, "b k1 v"],
    q: Float[Tensor, "b k v"],
    drafts: Int[Tensor, "b k"],
    uniforms: Float[Tensor, "b k1"],
    lengths: Int[Tensor, "b"] | None = None,
) -> Verified:
    """Accept or reject drafted tokens, and draw the token that follows; one kernel.

    Args:
        p: the model's probabilities, float32, at the drafted positions and the one after them.
        q: the probabilities from which the drafts were drawn, float32.
        drafts: the drafted tokens.
        uniforms: in [0, 1): one for each drafted token, and one for the token that follows.
        lengths: drafted tokens of each row; all k when None.

    Raises:
        ValueError: probabilities that are not float32, or shapes that do not fit.
        RuntimeError: tensors on the CPU outside the interpreter.
    """
    if p.dtype != torch.float32 or q.dtype != torch.float32:
        raise ValueError(
            f"verify: probabilities are {p.dtype} and {q.dtype}; the kernel takes float32. Use "
            "nemotron_lite.ops with impl='torch'."
        )
    check_inputs("verify", p, q, drafts, lengths)
    b, places, size = p.shape
    k = places - 1
    if q.shape != (b, k, size) or drafts.shape != (b, k) or uniforms.shape != (b, places):
        raise ValueError(
            f"verify: p {tuple(p.shape)} needs q {(b, k, size)}, drafts {(b, k)} and uniforms "
            f"{(b, places)}; got {tuple(q.shape)}, {tuple(drafts.shape)}, {tuple(uniforms.shape)}."
        )
    p, q = unit_stride(p), unit_stride(q)
    if lengths is None:
        lengths = torch.full((b,), k, dtype=torch.int64, device=p.device)
    accepted = torch.empty(b, dtype=torch.int64, device=p.device)
    token = torch.empty(b, dtype=torch.int64, device=p.device)
    if b:
        with on_device(p):
            _verify_kernel[(b,)](
                p,
                q if k else p,
                drafts.contiguous() if k else accepted,
                uniforms.double().contiguous(),
                lengths.contiguous(),
                accepted,
                token,
                k,
                size,
                p.stride(0),
                p.stride(1),
                q.stride(0),
                q.stride(1),
                **by_arch(BLOCKS).kwargs,
            )
    return Verified(accepted, token)
