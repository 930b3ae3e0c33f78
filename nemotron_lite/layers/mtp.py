"""Multi-token prediction: one small module that predicts one token further each time it is applied.

At depth k it joins the hidden state of position i with the token that actually came k later,

    x     = W [ norm_e(Emb(t_{i+k})) ; norm_h(h^{k-1}_i) ]      embedding first, hidden second
    x     = x + Attn(norm(x));   x = x + LatentMoE(norm(x))
    h^k_i = norm_final(x)        ->  the shared head predicts t_{i+k+1}

with h^0 the backbone's output after its final norm. The weights are the same at every depth: Super
trains two depths, and a drafter may apply more. Embedding and head belong to the backbone.

Drafting (generation/speculative/) needs the output of one token per row, and the keys and values of
every token. With `context.last_only` no more than that is computed: after the last layer with a
cache, only the last token of each row goes on.

Source: Nemotron 3 Super report 2.1.2; reference sheet 5.1 and 5.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers.block import Block, run_layers
from nemotron_lite.layers.context import ForwardContext
from nemotron_lite.layers.linear import Linear
from nemotron_lite.layers.mixer import LayerCache, LedgerLine
from nemotron_lite.layers.norm import RMSNorm
from nemotron_lite.layers.one_token import TokenSteps, decodes_compiled


class _Entry(Block):
    """The module's first layer, which also holds what joins embedding and hidden state."""

    def __init__(self, config: NemotronConfig, kind: str, name: str) -> None:
        super().__init__(config, kind, name)
        d = config.hidden_size
        self.enorm = RMSNorm(d, config.norm_eps)
        self.hnorm = RMSNorm(d, config.norm_eps)
        self.eh_proj = Linear(2 * d, d)

    def init_weights(
        self, std: float, residual_divisor: float, generator: torch.Generator | None = None
    ) -> None:
        super().init_weights(std, residual_divisor, generator)
        self.enorm.init_weights()
        self.hnorm.init_weights()
        self.eh_proj.init_weights(std, generator=generator)

    def join(
        self, embedded: Float[Tensor, "b t d"], hidden: Float[Tensor, "b t d"]
    ) -> Float[Tensor, "b t d"]:
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))


class MTP(nn.Module):
    """The module of `config.mtp_pattern`, with parameters named as in published checkpoints."""

    _token_steps: TokenSteps | None = None  # of these very layers; neither copied nor saved

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        layers = [
            (Block if j else _Entry)(config, kind, f"mtp.layers.{j}")
            for j, kind in enumerate(config.mtp_pattern)
        ]
        layers[-1].add_module("final_layernorm", RMSNorm(config.hidden_size, config.norm_eps))
        self.layers = nn.ModuleList(layers)

    def init_weights(
        self, std: float, residual_divisor: float, generator: torch.Generator | None = None
    ) -> None:
        """Fresh weights for every layer (see `Mixer.init_weights`)."""
        for layer in self.layers:
            cast(Block, layer).init_weights(std, residual_divisor, generator)
        self._final_norm.init_weights()

    @property
    def _entry(self) -> _Entry:
        return cast(_Entry, self.layers[0])

    @property
    def _final_norm(self) -> RMSNorm:
        return cast(RMSNorm, self.layers[-1].final_layernorm)

    def forward(
        self,
        hidden: Float[Tensor, "b t d"],
        embedded: Float[Tensor, "b t d"],
        cache: Sequence[LayerCache | None] | None = None,
        context: ForwardContext = ForwardContext(),
    ) -> Float[Tensor, "b _ d"]:
        """h^k from h^{k-1} and the embeddings of the tokens k later.

        With `context.last_only` all tokens are taken into the module's own cache, and the result is
        h^k of each row's last real token, `b 1 d`.
        """
        if context.last_only:
            return self._final_norm(self._last_tokens(hidden, embedded, cache, context))
        x = self._entry.join(embedded, hidden)
        return self._final_norm(run_layers(self.layers, x, cache, context))

    def _last_tokens(
        self,
        hidden: Float[Tensor, "b t d"],
        embedded: Float[Tensor, "b t d"],
        cache: Sequence[LayerCache | None] | None,
        context: ForwardContext,
    ) -> Float[Tensor, "b 1 d"]:
        """The residual stream of the last real tokens after all layers."""
        entries = cache or [None] * len(self.layers)
        last_cached = max((j for j, entry in enumerate(entries) if entry is not None), default=-1)
        if last_cached < 0:  # no layer has a cache: the other tokens change nothing
            hidden, embedded = context.last_tokens(hidden), context.last_tokens(embedded)
        x = self._entry.join(embedded, hidden)
        if cache is not None and (x.shape[1] == 1 or decodes_compiled()):
            # A step of a draft, or what was accepted of the last one: few tokens.
            found = self._steps().run(x, entries, replace(context, last_only=False))
            if found is not None:
                return found[:, -1:]
        every, alone = replace(context, last_only=False), ForwardContext()
        for j, (layer, entry) in enumerate(zip(self.layers, entries, strict=True)):
            read = every if j < last_cached else context if j == last_cached else alone
            x = layer(x, entry, read)
        return x

    def _steps(self) -> TokenSteps:
        if self._token_steps is None or self._token_steps.layers is not self.layers:
            self._token_steps = TokenSteps(self.layers)
        return self._token_steps

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_token_steps": None}

    @staticmethod
    def parameter_lines() -> list[LedgerLine]:
        """Parameters of the module beside those of its layers, for the ledger."""
        return [
            LedgerLine("enorm, hnorm", "2 * d"),
            LedgerLine("eh_proj", "2 * d * d"),
            LedgerLine("final_layernorm", "d"),
        ]

    @staticmethod
    def flop_lines() -> list[LedgerLine]:
        """FLOPs per token and depth beside those of its layers, for the ledger."""
        return [LedgerLine("eh_proj", "4*d*d")]
