"""Causal attention on a CPU: which way is fastest for these sizes.

    one new token         queries that share a key head are the rows of one small product
    many scores           blocks of queries against all keys they see, multiplied by oneDNN
    after a cache         two calls without a mask, joined by their softmax denominators
    everything else       PyTorch's `scaled_dot_product_attention`

PyTorch's flash kernel for CPUs multiplies with MKL, and in BF16 no faster than in float32. Where
oneDNN is faster (BF16; float32 as in cpu_linear.py) oneDNN makes the products, a few hundred rows
of scores at a time, in float32 throughout. oneDNN has no product of BF16 matrices with a float32
result, which scores need; and rounding the weights costs as much time as multiplying them saves.

With gradients, and on devices other than the CPU, only the first and the last way are used. With
gradients on a CPU, BF16 is computed in float32: the flash kernel's backward pass takes three times
as long in BF16.

Source: measured. Left out: a backward pass of our own; PyTorch's is used.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nemotron_lite.backends import private_torch
from nemotron_lite.backends.cpu_linear import prefers_onednn, product
from nemotron_lite.backends.private_torch import attention_with_log
from nemotron_lite.masks import keys_seen, visible_keys

SCORES = 2**22  # float32 scores worked on at once: 16 MB; with fewer, products have too few rows
BLOCK = 256  # most queries at once; with more, more of the products is masked
FEW_SCORES = 2**14  # per head; below, the flash kernel has finished before the blocks have begun
# float32: 1.2 to 1.6 times as fast as the flash kernel on an AMD EPYC; no faster for fewer scores.
WIDE_HEAD, FEW_WIDE_SCORES = 32, 2**20


def attend(
    q: Float[Tensor, "b h t p"],
    k: Float[Tensor, "b kv s p"],
    v: Float[Tensor, "b kv s p"],
    starts: int | Int[Tensor, "b"],
    documents: Int[Tensor, "b t"] | None,
) -> Float[Tensor, "b h t p"]:
    """`ops.causal_attention`; documents come from `number_documents`."""
    if q.is_cpu and q.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return attend(q.float(), k.float(), v.float(), starts, documents).to(q.dtype)
    tokens = q.shape[2]
    if isinstance(starts, int):
        k, v = k[:, :, : starts + tokens], v[:, :, : starts + tokens]
        if tokens == 1:
            return one_token(q, k, v)
        if documents is None and _multiplies_faster_in_blocks(q, k, starts):
            return _in_blocks(q, k, v, starts)
        if starts == 0 and documents is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if documents is None and q.is_cpu and not torch.is_grad_enabled():
            return _cached_then_new(q, k, v, starts)
    else:
        seen = keys_seen(starts, tokens, k.shape[2])
        k, v = k[:, :, :seen], v[:, :, :seen]
    mask = visible_keys(tokens, k.shape[2], starts, documents, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def one_token(
    q: Float[Tensor, "b h 1 p"],
    k: Float[Tensor, "b kv s p"],
    v: Float[Tensor, "b kv s p"],
    visible: Bool[Tensor, "b 1 1 s"] | None = None,
) -> Float[Tensor, "b h 1 p"]:
    """Decoding: queries that share a key head are the rows of one small matrix.

    `visible` marks the keys that are read; None means all of them.
    """
    shared = q.shape[1] // k.shape[1]
    grouped = q.view(q.shape[0], k.shape[1], shared, q.shape[-1]) * q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = grouped @ k.transpose(-1, -2)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    weights = torch.softmax(scores, dim=-1, dtype=wide)
    return (weights.to(v.dtype) @ v).view(q.shape)


def _multiplies_faster_in_blocks(q: Tensor, k: Tensor, start: int) -> bool:
    scores = q.shape[2] * (start + q.shape[2])
    if not q.is_cpu or torch.is_grad_enabled() or scores < FEW_SCORES or not len(q):
        return False
    if q.dtype == torch.bfloat16:
        return private_torch.HAS_ONEDNN
    wide = q.shape[3] >= WIDE_HEAD and scores >= FEW_WIDE_SCORES
    return wide and prefers_onednn(q[0, 0], k[0, 0])


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Behind `start` cached tokens: a block of queries against all the keys it sees.

    Queries that share a key head are rows of one product. The keys end at a multiple of `BLOCK`, so
    that the products have few different shapes: oneDNN prepares a kernel for each new one.
    """
    (b, _, t, p), shared = q.shape, q.shape[1] // k.shape[1]
    wide = (q.float() * p**-0.5).reshape(b, k.shape[1], shared, t, p)
    keys, values = (_adjacent_rows(x.float()) for x in (k, v))
    out = torch.empty_like(wide, dtype=q.dtype)
    fitting = max(16, SCORES // (shared * (start + t)))
    rows = min(t, BLOCK, 1 << fitting.bit_length() - 1)  # a power of two, to divide BLOCK
    for first in range(0, t, rows):
        seen, n = start + first, min(rows, t - first)
        end = min(start + t, -(-(seen + n) // BLOCK) * BLOCK)
        later = torch.ones(n, end - seen, dtype=torch.bool, device=q.device).triu_(1)
        for row, head in itertools.product(range(b), range(k.shape[1])):
            queries = wide[row, head, :, first : first + n].reshape(shared * n, p)
            answers = _block(queries, keys[row, head, :end], values[row, head, :end], later)
            out[row, head, :, first : first + n] = answers.view(shared, n, p)
    return out.view(q.shape)


def _adjacent_rows(x: Float[Tensor, "b kv s p"]) -> Float[Tensor, "b kv s p"]:
    """Each head as a matrix without gaps: copied once here, and not for each block's product."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _block(
    q: Float[Tensor, "r p"], k: Float[Tensor, "s p"], v: Float[Tensor, "s p"], later: Tensor
) -> Float[Tensor, "r p"]:
    """One block of scaled queries; of the newest keys, those marked `later` are masked."""
    n, newest = later.shape
    scores = product(q, k)
    scores.view(-1, n, len(k))[..., len(k) - newest :].masked_fill_(later, -math.inf)
    torch.softmax(scores, dim=-1, out=scores)
    return product(scores, v.t())


def _cached_then_new(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """A segment of a prompt behind `start` cached tokens, without a mask.

    All queries see all cached keys, and among the new tokens the mask is the usual triangle. Two
    calls that need no mask are faster than one that does. With z the logarithm of each softmax's
    denominator, the parts are joined as o = o_old + (o_new - o_old) sigmoid(z_new - z_old).
    """
    b, h, t, p = q.shape
    shared = h // k.shape[1]
    # Queries that share a key head are rows of one matrix, so that no key is copied.
    stacked = q.reshape(b, k.shape[1], shared * t, p)
    old, old_log = attention_with_log(stacked, k[:, :, :start], v[:, :, :start])
    k, v = (x[:, :, start:].repeat_interleave(shared, dim=1) for x in (k, v))
    new, new_log = attention_with_log(q, k, v, is_causal=True)
    share = torch.sigmoid(new_log - old_log.reshape(b, h, t)).unsqueeze(-1)
    return torch.lerp(old.reshape(q.shape), new, share.to(q.dtype))
