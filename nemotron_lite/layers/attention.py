"""Attention layers, the few places of the hybrid where a token sees all tokens before it.

Grouped-query attention with full context and nothing else: no positions, no norms on queries and
keys, and biases only where a config asks for them (`attention_bias`). In Super 8 of 88 layers are
of this kind, and 32 query heads share 2 key/value heads. So the part of the cache that grows with
the context is 8,192 bytes per token in BF16.

Source: reference sheet section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite import ops
from nemotron_lite.backends.compiled_step import (
    AttentionStruct,
    LinearStruct,
    NotCompiledError,
    StateStruct,
    address,
)
from nemotron_lite.backends.cpu_attention import attend
from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.linear import linear
from nemotron_lite.layers.mixer import (
    WIDE_DTYPE,
    CacheOptions,
    CompiledCall,
    LayerCache,
    LedgerLine,
    Matrix,
    Mixer,
    SavedLayer,
    SavedSizes,
    TokenStep,
    ordinary_tensors,
)


class KVCache(LayerCache):
    """Keys and values of one attention layer, `b kv s p`, in a buffer that doubles when full.

    New entries are only written after the tokens that a row already has. Entries beyond a
    row's length are never read. So the tokens of a draft are dropped by not counting them, at no
    cost: `Cache` keeps the lengths. Entries of another dtype are cast to that of the buffers.
    """

    TENSORS = ("k", "v")

    def __init__(self, k: Float[Tensor, "b kv s p"], v: Float[Tensor, "b kv s p"]) -> None:
        self.k, self.v = k, v

    @property
    def sizes(self) -> tuple[int, ...]:
        """Key/value heads and their width."""
        return self.k.shape[1], self.k.shape[3]

    @property
    def capacity(self) -> int:
        """Tokens per row that fit without growing."""
        return self.k.shape[2]

    @ordinary_tensors
    def clone(self) -> KVCache:
        """A copy with the same capacity."""
        return KVCache(self.k.clone(), self.v.clone())

    def accept(self, counts: int | Int[Tensor, "b"]) -> None:
        """Nothing to do: the draft's entries are written, and `Cache` counts those that stay."""

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` per row in all, keeping what is there."""
        if tokens > self.capacity:
            self.k, self.v = self._grown(self.k, tokens), self._grown(self.v, tokens)

    @staticmethod
    @ordinary_tensors
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
        """Write new tokens at `starts`; return the buffers, entries beyond the last token too."""
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

    def saved_tensors(self, tokens: int) -> dict[str, Tensor]:
        """Keys and values of the first `tokens` tokens."""
        return {name: getattr(self, name)[:, :, :tokens].contiguous() for name in self.TENSORS}

    @classmethod
    def check_saved(cls, saved: SavedLayer) -> SavedSizes:
        """Keys and values of all tokens of the longest row, in one dtype."""
        (shape, dtype), values = saved.stored["k"], saved.stored["v"]
        fits = len(shape) == 4 and all(shape) and (shape[0], shape[2]) == (saved.rows, saved.tokens)
        alike = values == (shape, dtype) and dtype in WIDE_DTYPE
        if not fits or not alike or saved.extra is not None:
            raise saved.misfit()
        return SavedSizes(dtype, (shape[1], shape[3]))

    @classmethod
    def from_saved(cls, tensors: Mapping[str, Tensor], extra: Mapping[str, Any] | None) -> KVCache:
        """Keys and values as they were saved."""
        return cls(tensors["k"], tensors["v"])


class Attention(Mixer):
    """Projections around `ops.causal_attention`."""

    LETTERS: ClassVar[Mapping[str, str]] = {
        "h": "num_attention_heads",
        "p": "head_dim",
        "j": "num_key_value_heads",
    }
    CACHE = KVCache

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        shared = config.num_key_value_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = linear(config.hidden_size, width, bias)
        self.k_proj = linear(config.hidden_size, shared, bias)
        self.v_proj = linear(config.hidden_size, shared, bias)
        self.o_proj = linear(width, config.hidden_size, bias)

    def init_weights(
        self, std: float, residual_divisor: float, generator: torch.Generator | None = None
    ) -> None:
        """Normal matrices; `o_proj` writes into the residual stream."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            projection.init_weights(std, generator=generator)
        self.o_proj.init_weights(std, residual_divisor, generator)

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        cache: KVCache | None = None,
        context: ForwardContext = ForwardContext(),
    ) -> Float[Tensor, "b _ d"]:
        """Attend to this call's tokens and, with a cache, to those before them."""
        asking, asked = x, context
        if context.last_only and context.seq_idx is None:
            # Keys and values of every token, but one query for each row.
            asking, asked = context.last_tokens(x), context.at_last(x)
        # Autograd adds the three gradients of x in the reverse order of these lines. Another order
        # gives losses that differ in their last digits.
        q = self._heads(self.q_proj(asking))
        k = self._heads(self.k_proj(x))
        v = self._heads(self.v_proj(x))
        if cache is not None:
            k, v = cache.append(k, v, context.starts)
        y = ops.causal_attention(q, k, v, starts=asked.starts, seq_idx=asked.seq_idx)
        return self.o_proj(asked.kept(y.transpose(1, 2).flatten(2)))

    def token_step(self, rows: int) -> TokenStep:
        """The step of `forward` for one token per row."""
        projections = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        query, key, value, out = (projection.product_for(rows) for projection in projections)
        heads = rows, -1, 1, self.head_dim

        def step(x: Tensor, cache: KVCache, starts: int | Tensor) -> Tensor:
            k, v = cache.append(key(x).view(heads), value(x).view(heads), starts)
            return out(attend(query(x).view(heads), k, v, starts, None).reshape(rows, -1))

        return step

    def compiled_part(self) -> AttentionStruct:
        """The four projections."""
        projections = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        heads, kv_heads = (p.out_features // self.head_dim for p in projections[:2])
        return AttentionStruct(*map(LinearStruct.of, projections), heads, kv_heads, self.head_dim)

    def compiled_state(
        self, part: AttentionStruct, state: StateStruct, cache: KVCache, call: CompiledCall
    ) -> None:
        """The buffers, with room for the new tokens."""
        if call.keys > cache.capacity:
            cache.reserve(max(call.keys, 2 * cache.capacity))
        if cache.k.dtype != call.dtype:
            raise NotCompiledError(f"keys are in {cache.k.dtype}, and the weights in {call.dtype}")
        state.first, state.second = address(cache.k), address(cache.v)
        state.capacity = cache.capacity

    def _heads(self, x: Float[Tensor, "b t hp"]) -> Float[Tensor, "b h t p"]:
        return x.view(x.shape[0], x.shape[1], -1, self.head_dim).transpose(1, 2)

    @classmethod
    @ordinary_tensors
    def empty_cache(cls, config: NemotronConfig, layer: int, options: CacheOptions) -> KVCache:
        """Empty buffers for keys and values."""
        shape = (options.batch, config.num_key_value_heads, options.capacity, config.head_dim)
        k, v = (torch.zeros(shape, dtype=options.dtype, device=options.device) for _ in range(2))
        return KVCache(k, v)

    @classmethod
    def parameter_lines(cls, config: NemotronConfig) -> list[LedgerLine]:
        """Its parameters."""
        lines = [
            LedgerLine("q_proj, o_proj", "2 * d * h*p"),
            LedgerLine("k_proj, v_proj", "2 * d * j*p"),
        ]
        if config.attention_bias:
            lines.append(LedgerLine("biases", "h*p + 2*j*p + d"))
        return lines

    @classmethod
    def flop_lines(cls, config: NemotronConfig, mode: str) -> list[LedgerLine]:
        """Its FLOPs per token. The last line grows with the context: a token reads a keys."""
        return [
            LedgerLine("q_proj, o_proj", "2 * 2*d * h*p"),
            LedgerLine("k_proj, v_proj", "2 * 2*d * j*p"),
            LedgerLine("scores and values", "2 * 2*h*p * a"),
        ]

    @classmethod
    def cache_lines(cls, config: NemotronConfig) -> list[LedgerLine]:
        """Keys and values of t tokens."""
        return [LedgerLine("kv", "2 * j*p * t")]

    @classmethod
    def matrices(cls, config: NemotronConfig) -> list[Matrix]:
        """The four projections."""
        d = config.hidden_size
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        return [
            Matrix("q_proj", "attention", d * queries),
            Matrix("k_proj", "attention", d * keys),
            Matrix("v_proj", "attention", d * keys),
            Matrix("o_proj", "attention", queries * d),
        ]
