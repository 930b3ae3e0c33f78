"""Multi-token prediction: one small module that looks one token further each time it is applied.

At depth k it joins what the model knew at position i with the token that actually came k later,

    x     = W [ norm_e(Emb(t_{i+k})) ; norm_h(h^{k-1}_i) ]      embedding first, hidden second
    x     = x + Attn(norm(x));   x = x + LatentMoE(norm(x))
    h^k_i = norm_final(x)        ->  the shared head predicts t_{i+k+1}

with h^0 the backbone's output after its final norm. The weights are the same at every depth: Super
trains two depths, and drafting may go on beyond them. Embedding and head belong to the backbone.

Drafting (speculative/) wants one answer per row, and the keys and values of every token: `answer`
leaves everything else out. After the last attention layer only the last token of a row goes on.

Source: Nemotron 3 Super report 2.1.2; reference sheet 5.1 and 5.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers.attention import KVCache
from nemotron_lite.layers.block import Block, LayerCache
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.linear import Linear
from nemotron_lite.layers.norm import RMSNorm


class _Entry(Block):
    """The module's first layer, which also holds what joins embedding and hidden state."""

    def __init__(self, config: NemotronConfig, kind: str, name: str) -> None:
        super().__init__(config, kind, name)
        d = config.hidden_size
        self.enorm = RMSNorm(d, config.norm_eps)
        self.hnorm = RMSNorm(d, config.norm_eps)
        self.eh_proj = Linear(2 * d, d)

    def join(
        self, embedded: Float[Tensor, "b t d"], hidden: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))


class MTP(nn.Module):
    """The module of `config.mtp_pattern`, with parameters named as in published checkpoints."""

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        layers = [
            (Block if j else _Entry)(config, kind, f"mtp.layers.{j}")
            for j, kind in enumerate(config.mtp_pattern)
        ]
        layers[-1].add_module("final_layernorm", RMSNorm(config.hidden_size, config.norm_eps))
        self.layers = nn.ModuleList(layers)

    def forward(
        self,
        hidden: Float[Tensor, "b t d"],
        embedded: Float[Tensor, "b t d"],
        cache: Sequence[LayerCache] | None = None,
        context: ForwardContext = ForwardContext(),
    ) -> Float[Tensor, "b t d"]:
        """h^k from h^{k-1} and the embeddings of the tokens k later."""
        entry, last = self.layers[0], self.layers[-1]
        assert isinstance(entry, _Entry)
        assert isinstance(last.final_layernorm, RMSNorm)
        x = entry.join(embedded, hidden)
        for layer, memory in zip(self.layers, cache or [None] * len(self.layers), strict=True):
            x = layer(x, memory, context)
        return last.final_layernorm(x)

    def answer(
        self,
        hidden: Float[Tensor, "b t d"],
        embedded: Float[Tensor, "b t d"],
        cache: Sequence[LayerCache],
        context: ForwardContext,
    ) -> Float[Tensor, "b 1 d"]:
        """Take tokens into the module's own memory; h^k of the last real one of each row."""
        entry, last = self.layers[0], self.layers[-1]
        assert isinstance(entry, _Entry)
        assert isinstance(last.final_layernorm, RMSNorm)
        anchor = max((j for j, memory in enumerate(cache) if memory is not None), default=-1)
        if anchor < 0:  # nothing to remember: the other tokens need not be looked at
            hidden, embedded = context.last(hidden), context.last(embedded)
        x = entry.join(embedded, hidden)
        for j, (layer, memory) in enumerate(zip(self.layers, cache, strict=True)):
            if j == anchor:
                assert isinstance(layer, Block)
                assert isinstance(memory, KVCache)
                x = layer.answer_last(x, memory, context)
            else:
                x = layer(x, memory, context if j < anchor else ForwardContext())
        return last.final_layernorm(x)
