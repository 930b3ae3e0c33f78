"""Attention layers, the few global anchors of the hybrid.

Grouped-query attention with full context and nothing else: no positions, no biases, no norms on
queries and keys. In Super 8 of 88 layers are of this kind, and 32 query heads share 2 key/value
heads; so the part of the memory that grows with the context is 8,192 bytes per token in BF16.

Source: reference sheet section 3.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite import ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.linear import Linear


class KVCache:
    """Keys and values of one attention layer, `b kv s p`, in a buffer that doubles when full.

    Entries are only ever written behind the tokens a row already has. What stands beyond a row's
    length is never read, so cutting a row back costs nothing: forget its length.
    """

    def __init__(self, k: Float[Tensor, "b kv s p"], v: Float[Tensor, "b kv s p"]) -> None:
        self.k, self.v = k, v

    @property
    def capacity(self) -> int:
        """Tokens per row that fit without growing."""
        return self.k.shape[2]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` per row in all, keeping what is there."""
        if tokens > self.capacity:
            self.k, self.v = self._grown(self.k, tokens), self._grown(self.v, tokens)

    @staticmethod
    def _grown(old: Float[Tensor, "b kv s p"], tokens: int) -> Float[Tensor, "b kv s2 p"]:
        new = old.new_zeros(*old.shape[:2], tokens, old.shape[3])
        new[:, :, : old.shape[2]] = old
        return new

    def append(
        self,
        k: Float[Tensor, "b kv t p"],
        v: Float[Tensor, "b kv t p"],
        starts: int | Int[Tensor, "b"],
    ) -> tuple[Float[Tensor, "b kv s p"], Float[Tensor, "b kv s p"]]:
        """Write new tokens behind `starts`; the buffers, which may be longer than what is valid."""
        new = k.shape[2]
        needed = (starts if isinstance(starts, int) else int(starts.max())) + new
        if needed > self.capacity:
            self.reserve(max(needed, 2 * self.capacity))
        if isinstance(starts, int):
            self.k[:, :, starts:needed] = k
            self.v[:, :, starts:needed] = v
        else:
            rows = torch.arange(k.shape[0], device=k.device)[:, None]
            places = starts.to(k.device)[:, None] + torch.arange(new, device=k.device)
            self.k[rows, :, places] = k.transpose(1, 2).to(self.k.dtype)
            self.v[rows, :, places] = v.transpose(1, 2).to(self.v.dtype)
        return self.k, self.v


class Attention(nn.Module):
    """Projections around `ops.causal_attention`."""

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, width)
        self.k_proj = Linear(config.hidden_size, shared)
        self.v_proj = Linear(config.hidden_size, shared)
        self.o_proj = Linear(width, config.hidden_size)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        cache: KVCache | None = None,
        context: ForwardContext = ForwardContext(),
    ) -> Float[Tensor, "b t d"]:
        """Attend to this call's tokens and, with a cache, to those before them."""
        q = self._heads(self.q_proj(x))
        k = self._heads(self.k_proj(x))
        v = self._heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.append(k, v, context.starts)
        y = ops.causal_attention(q, k, v, starts=context.starts, seq_idx=context.seq_idx)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def answer_last(
        self, x: Float[Tensor, "b t d"], cache: KVCache, context: ForwardContext
    ) -> Float[Tensor, "b 1 d"]:
        """Remember every token, answer for the last real one of each row: what drafting needs."""
        k, v = cache.append(
            self._heads(self.k_proj(x)), self._heads(self.v_proj(x)), context.starts
        )
        q = self._heads(self.q_proj(context.last(x)))
        y = ops.causal_attention(q, k, v, starts=context.of_last(x).starts)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def _heads(self, x: Float[Tensor, "b t hp"]) -> Float[Tensor, "b h t p"]:
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)
