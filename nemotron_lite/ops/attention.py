"""Causal attention with grouped queries, over a cache that may already hold tokens.

    o_i = sum_{j <= i} softmax_j( q_i . k_j / sqrt(p) ) v_j

Each of the few key/value heads serves several query heads (Super: 2 for 32). There is no positional
encoding: attention knows the order of tokens only through the causal mask, and through the Mamba
layers before it. The softmax is taken in float32.

`starts` says how many tokens were cached before this call: query i of row r is at position
`starts[r] + i` and sees keys up to there. Keys beyond (left over from a rolled-back draft, or
padding of a shorter row) are never read, so a cache is rolled back by shortening its length.

The definition writes all scores out. The plain form is PyTorch's `scaled_dot_product_attention`,
which walks over the keys in tiles and keeps a running softmax; it gets a mask only where the causal
triangle is not enough. `backends/cpu_attention.py` and `gpu_attention.py` choose among faster ways.

Source: reference sheet section 3. Left out: windows, sinks, position biases; Nemotron 3 has none.
"""

from __future__ import annotations

import math
from typing import Any, SupportsIndex

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor

from nemotron_lite.arguments import integer
from nemotron_lite.backends import cpu_attention, gpu_attention
from nemotron_lite.backends.dispatch import choose
from nemotron_lite.dtypes import autocast_dtype, cast, wide_dtype, without_autocast
from nemotron_lite.masks import keys_seen, number_documents, visible_keys


def causal_attention(
    q: Float[Tensor, "b h t p"],
    k: Float[Tensor, "b kv s p"],
    v: Float[Tensor, "b kv s p"],
    *,
    starts: SupportsIndex | Integer[Tensor, "b"] = 0,
    seq_idx: Integer[Tensor, "b t"] | None = None,
    impl: str = "auto",
) -> Float[Tensor, "b h t p"]:
    """Attend from the t newest positions to everything before them.

    Args:
        q: queries of the new tokens.
        k, v: keys and values of cached and new tokens; s >= starts + t. Query head i reads
            key/value head i // (h / kv). Read in the dtype of q, where they have another one (a
            float32 cache under autocast).
        starts: tokens cached before this call, for all rows or row by row.
        seq_idx: which document each token belongs to, where a row holds several (needs starts=0):
            attention stays inside a document.
        impl: "naive" (scores written out), "torch" (`scaled_dot_product_attention`), "cpu",
            "traced" (asks no tensor for a number, so that a compiler can read it), or "gpu"
            (without gradients; on a CPU as well). "auto" takes "gpu" for tensors on a GPU when no
            gradients are recorded, otherwise "cpu".

    Raises:
        ValueError: unknown `impl`, too few keys, or `seq_idx` together with cached tokens.
    """
    if not isinstance(starts, int):
        starts = _starts(starts, q.shape[0])
    if seq_idx is not None and not (isinstance(starts, int) and starts == 0):
        raise ValueError(
            "causal_attention: concatenated documents (seq_idx) cannot continue a cache, so starts "
            "must be 0. Read them without a cache, or each document in a row of its own."
        )
    documents = None if seq_idx is None else number_documents(seq_idx)
    if isinstance(starts, int) and not 0 <= starts <= k.shape[2] - q.shape[2]:
        keys_seen(starts, q.shape[2], k.shape[2])  # raises
    narrow = autocast_dtype(q)
    if narrow is not None and q.dtype != torch.float64:
        q = q.to(narrow)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        seen = keys_seen(starts, q.shape[2], k.shape[2])
        k, v = k[:, :, :seen].to(q.dtype), v[:, :, :seen].to(q.dtype)
    if impl == "auto" and q.is_cuda and not _records_or_compiles():
        impl = "gpu"
    run = choose(
        "causal_attention",
        impl,
        q,
        naive=_naive,
        torch=_torch,
        cpu=cpu_attention.attend,
        traced=_traced,
        gpu=gpu_attention.attend,
    )
    if narrow is not None:
        run = without_autocast(run, q)
    return run(q, k, v, starts, documents)


def _starts(starts: Any, rows: int) -> int | Tensor:
    """One integer for all rows, or an int64 tensor of one per row."""
    if not isinstance(starts, Tensor) or starts.ndim == 0:
        return integer("starts", starts, low=0)
    inexact = starts.is_floating_point() or starts.is_complex() or starts.dtype == torch.bool
    if inexact or list(starts.shape) != [rows]:
        raise ValueError(
            f"causal_attention: starts has shape {list(starts.shape)} and dtype {starts.dtype}; "
            f"expected [{rows}] and integers, one per row."
        )
    return cast(starts, torch.int64)


def _naive(
    q: Tensor, k: Tensor, v: Tensor, starts: int | Tensor, documents: Tensor | None
) -> Tensor:
    keys_seen(starts, q.shape[2], k.shape[2])
    wide = wide_dtype(q)
    shared = q.shape[1] // k.shape[1]
    keys = k.to(wide).repeat_interleave(shared, dim=1)
    values = v.to(wide).repeat_interleave(shared, dim=1)
    scores = q.to(wide) @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])
    visible = visible_keys(q.shape[2], k.shape[2], starts, documents, q.device)
    scores = scores.masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ values).to(q.dtype)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, starts: int | Tensor, documents: Tensor | None
) -> Tensor:
    seen = keys_seen(starts, q.shape[2], k.shape[2])
    k, v = k[:, :, :seen], v[:, :, :seen]
    if seen == q.shape[2] and documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    mask = visible_keys(q.shape[2], seen, starts, documents, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _traced(
    q: Tensor, k: Tensor, v: Tensor, starts: int | Tensor, documents: Tensor | None
) -> Tensor:
    if isinstance(starts, int):
        return _torch(q, k, v, starts, documents)
    mask = visible_keys(q.shape[2], k.shape[2], starts, documents, q.device)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def _records_or_compiles() -> bool:
    return torch.is_grad_enabled() or torch.compiler.is_compiling()
