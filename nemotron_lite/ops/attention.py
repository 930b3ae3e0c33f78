"""Causal attention with grouped queries, over a cache that may already hold tokens.

    o_i = sum_{j <= i} softmax_j( q_i . k_j / sqrt(p) ) v_j

Each of the few key/value heads serves several query heads (Super: 2 for 32). There is no positional
encoding: the order of tokens is known to attention only through the causal mask, and through the
Mamba layers before it. The softmax is taken in float32.

`starts` says how many tokens were cached before this call: query i of row r stands at position
`starts[r] + i` and sees keys up to there. Keys beyond (left over from a rolled-back draft, or
padding of a shorter row) are never read, so a cache is rolled back by forgetting its length.

PyTorch's flash kernel for CPUs multiplies with MKL, and in BF16 no faster than in float32. Where
oneDNN is faster (BF16; float32 as in linear.py) the products are oneDNN's, a few hundred rows of
scores at a time, in float32 throughout: oneDNN has no product of BF16 matrices that answers in
float32, as scores must be, and rounding the weights costs as much time as multiplying them saves.

On a GPU torch would take cuDNN's kernel, which is fast once it has a plan. It makes one for every
number of keys, and decoding has another number for each token; what that costs shows in the times
of transformers in benchmarks/records/gpu_model_nvidia_h200.json. So cuDNN trains, and whatever
reads or writes with a cache takes the kernels that need no plan.

Source: reference sheet section 3. Left out: windows, sinks, position biases; Nemotron 3 has none.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nemotron_lite.backends.dispatch import choose
from nemotron_lite.ops.linear import prefers_onednn, product
from nemotron_lite.ops.scan import number_documents

# PyTorch's own CPU kernel behind scaled_dot_product_attention, called for the log-denominators.
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ONEDNN = torch.backends.mkldnn.is_available()
SCORES = 2**22  # float32 scores worked on at once: 16 MB; with fewer, products have too few rows
BLOCK = 256  # most queries at once; more would multiply what the mask hides
FEW_SCORES = 2**14  # per head; below, the flash kernel has finished before the blocks have begun
# float32: 1.2 to 1.6 times the flash kernel on an AMD EPYC; no faster for fewer scores.
WIDE_HEAD, FEW_WIDE_SCORES = 32, 2**20
_NO_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def causal_attention(
    q: Float[Tensor, "b h t p"],
    k: Float[Tensor, "b kv s p"],
    v: Float[Tensor, "b kv s p"],
    *,
    starts: int | Int[Tensor, "b"] = 0,
    seq_idx: Int[Tensor, "b t"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h t p"]:
    """Attend from the t newest positions to everything before them.

    Args:
        q: queries of the new tokens.
        k, v: keys and values of cached and new tokens; s >= starts + t. Query head i reads
            key/value head i // (h / kv).
        starts: tokens cached before this call, for all rows or row by row.
        seq_idx: documents of a packed row (needs starts=0): attention stays inside a document.
        impl: "naive" (scores written out) or "torch".

    Raises:
        ValueError: unknown `impl`, too few keys, or `seq_idx` together with cached tokens.
    """
    if seq_idx is not None and not (isinstance(starts, int) and starts == 0):
        raise ValueError("packed documents (seq_idx) cannot continue a cache: starts must be 0.")
    if seq_idx is not None:
        seq_idx = number_documents(seq_idx)
    if isinstance(starts, int) and k.shape[2] < starts + q.shape[2]:
        raise ValueError(
            f"{k.shape[2]} keys do not cover starts={starts} cached and {q.shape[2]} new tokens."
        )
    run = choose("causal_attention", impl, q, naive=_naive, torch=_fast)
    return run(q, k, v, starts, seq_idx)


def _visible(q: Tensor, k: Tensor, starts: int | Tensor, seq_idx: Tensor | None) -> Tensor:
    """True where a query sees a key, `b 1 t s` or `t s`."""
    keys = torch.arange(k.shape[2], device=q.device)
    queries = torch.arange(q.shape[2], device=q.device)
    if isinstance(starts, int):
        seen = keys <= (queries + starts)[:, None]
    else:
        queries = queries + starts.to(q.device)[:, None]
        seen = (keys <= queries[:, :, None]).unsqueeze(1)
    if seq_idx is not None:
        seen = seen & (seq_idx[:, :, None] == seq_idx[:, None, :]).unsqueeze(1)
    return seen


def _naive(q: Tensor, k: Tensor, v: Tensor, starts: int | Tensor, seq_idx: Tensor | None) -> Tensor:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    shared = q.shape[1] // k.shape[1]
    keys = k.to(wide).repeat_interleave(shared, dim=1)
    values = v.to(wide).repeat_interleave(shared, dim=1)
    scores = q.to(wide) @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(~_visible(q, k, starts, seq_idx), -math.inf)
    return (scores.softmax(-1) @ values).to(q.dtype)


def _fast(q: Tensor, k: Tensor, v: Tensor, starts: int | Tensor, seq_idx: Tensor | None) -> Tensor:
    if q.is_cuda and not torch.is_grad_enabled():
        return _on_gpu(q, k, v, starts, seq_idx)
    tokens = q.shape[2]
    if isinstance(starts, int):
        k, v = k[:, :, : starts + tokens], v[:, :, : starts + tokens]
        if tokens == 1:
            return _one_token(q, k, v)
        if seq_idx is None and _multiplies_faster_in_blocks(q, k, starts):
            return _in_blocks(q, k, v, starts)
        if starts == 0 and seq_idx is None:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if seq_idx is None and q.is_cpu and not torch.is_grad_enabled():
            return _cached_then_new(q, k, v, starts)
    else:
        seen = int(starts.max()) + tokens
        k, v = k[:, :, :seen], v[:, :, :seen]
    mask = _visible(q, k, starts, seq_idx)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _on_gpu(
    q: Tensor, k: Tensor, v: Tensor, starts: int | Tensor, seq_idx: Tensor | None
) -> Tensor:
    """Without gradients: no plans, and no mask in memory where the triangle says it all."""
    tokens = q.shape[2]
    seen = (starts if isinstance(starts, int) else int(starts.max())) + tokens
    k, v = k[:, :, :seen], v[:, :, :seen]
    triangle = isinstance(starts, int) and seq_idx is None
    if tokens == 1 and not triangle:
        return _one_token(q, k, v, _visible(q, k, starts, seq_idx))
    with sdpa_kernel(_NO_PLANS):
        if triangle and seen == tokens > 1:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        mask: Tensor | None = None
        if triangle and tokens == 1:
            pass
        elif triangle and q.dtype in (torch.bfloat16, torch.float16):
            # The flash kernel's own, which has no float32. With the import would come triton.
            from torch.nn.attention.bias import causal_lower_right

            mask = causal_lower_right(tokens, seen)
        else:
            mask = _visible(q, k, starts, seq_idx)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _cached_then_new(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """A piece of a prompt behind `start` cached tokens, without a mask.

    All queries see all cached keys, and among the new tokens the mask is the usual triangle. Two
    calls that need no mask are faster than one that does; with z the log of each softmax's
    denominator, the parts join as o = o_old + (o_new - o_old) sigmoid(z_new - z_old).
    """
    b, h, t, p = q.shape
    shared = h // k.shape[1]
    # Queries that share a key head stand below each other, so that no key is copied.
    stacked = q.reshape(b, k.shape[1], shared * t, p)
    old, old_log = _FLASH(stacked, k[:, :, :start], v[:, :, :start])
    k, v = (x[:, :, start:].repeat_interleave(shared, dim=1) for x in (k, v))
    new, new_log = _FLASH(q, k, v, is_causal=True)
    share = torch.sigmoid(new_log - old_log.reshape(b, h, t)).unsqueeze(-1)
    return torch.lerp(old.reshape(q.shape), new, share.to(q.dtype))


def _multiplies_faster_in_blocks(q: Tensor, k: Tensor, start: int) -> bool:
    scores = q.shape[2] * (start + q.shape[2])
    if not q.is_cpu or torch.is_grad_enabled() or scores < FEW_SCORES:
        return False
    if q.dtype == torch.bfloat16:
        return _ONEDNN
    wide = q.shape[3] >= WIDE_HEAD and scores >= FEW_WIDE_SCORES
    return wide and prefers_onednn(q[0, 0], k[0, 0])


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
    """Behind `start` cached tokens: a block of queries against all the keys it sees.

    Queries that share a key head are rows of one product. The keys end at a multiple of `BLOCK`, so
    that all layers and most blocks have few shapes between them: oneDNN prepares each anew.
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
        later = torch.ones(n, end - seen, dtype=torch.bool).triu_(1)
        for row, head in itertools.product(range(b), range(k.shape[1])):
            queries = wide[row, head, :, first : first + n].reshape(shared * n, p)
            answers = _block(queries, keys[row, head, :end], values[row, head, :end], later)
            out[row, head, :, first : first + n] = answers.view(shared, n, p)
    return out.view(q.shape)


def _adjacent_rows(x: Float[Tensor, "b kv s p"]) -> Float[Tensor, "b kv s p"]:
    """Each head a matrix without gaps: copied here once, and not for every block's product."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _block(
    q: Float[Tensor, "r p"], k: Float[Tensor, "s p"], v: Float[Tensor, "s p"], later: Tensor
) -> Float[Tensor, "r p"]:
    """One block of scaled queries; of the newest keys, those that are `later` are not seen."""
    n, newest = later.shape
    scores = product(q, k)
    scores.view(-1, n, len(k))[..., len(k) - newest :].masked_fill_(later, -math.inf)
    torch.softmax(scores, dim=-1, out=scores)
    return product(scores, v.t())


def _one_token(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """Decoding: queries that share a key head are one small matrix; `seen` if not all keys are."""
    grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[-1]) * q.shape[-1] ** -0.5
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = grouped @ k.transpose(-1, -2)
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    weights = torch.softmax(scores, dim=-1, dtype=wide)
    return (weights.to(v.dtype) @ v).view(q.shape)
