"""The backbone: embeddings, a string of residual layers, and a final norm.

    x = Emb(tokens);   x = x + Mixer_l(RMSNorm_l(x))  for each layer l;   RMSNorm_f(x)

The head and the MTP module read its output (model.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite.config import NemotronConfig
from nemotron_lite.layers import (
    Block,
    ForwardContext,
    LayerCache,
    RMSNorm,
    TokenSteps,
    decodes_compiled,
    run_layers,
)


class Backbone(nn.Module):
    """Everything between token ids and the head."""

    _token_steps: TokenSteps | None = None  # of these very layers; neither copied nor saved

    def __init__(self, config: NemotronConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, kind, f"backbone.layers.{i}") for i, kind in enumerate(config.pattern)
        )
        self.norm_f = RMSNorm(config.hidden_size, config.norm_eps)

    def init_weights(
        self, std: float, residual_divisor: float, generator: torch.Generator | None = None
    ) -> None:
        """Fresh weights (see `layers.Mixer.init_weights`)."""
        nn.init.normal_(self.embeddings.weight, std=std, generator=generator)
        for layer in self.layers:
            cast(Block, layer).init_weights(std, residual_divisor, generator)
        self.norm_f.init_weights()

    def embed(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """Look tokens up.

        Raises:
            ValueError: a token outside the vocabulary, or on another device than the weights.
        """
        try:
            embedded = self.embeddings(tokens)
        except IndexError as error:
            raise ValueError(
                f"tokens range from {int(tokens.min())} to {int(tokens.max())}, but the vocabulary "
                f"has {self.embeddings.num_embeddings} entries. Is this the model's tokenizer?"
            ) from error
        except RuntimeError as error:
            if tokens.device != self.embeddings.weight.device:
                raise self._other_device(tokens) from error
            raise
        if (embedded.is_meta or tokens.is_meta) and type(embedded) is Tensor:
            raise self._other_device(tokens)  # PyTorch would go on with any numbers
        return embedded

    def _other_device(self, tokens: Tensor) -> ValueError:
        return ValueError(
            f"tokens are on {tokens.device} and weights on {self.embeddings.weight.device}: move "
            "one of them with .to(device). On meta there are no numbers to compute with: `load` or "
            "Nemotron(config, device='cpu') makes some."
        )

    def forward(
        self,
        tokens: Int[Tensor, "b t"],
        cache: Sequence[LayerCache | None] | None,
        context: ForwardContext,
    ) -> Float[Tensor, "b t d"]:
        """The residual stream after the final norm."""
        x = self.embed(tokens)
        if cache is None or torch.compiler.is_compiling():
            return self.norm_f(run_layers(self.layers, x, cache, context))
        if self._token_steps is None or self._token_steps.layers is not self.layers:
            self._token_steps = TokenSteps(self.layers)
        found = None
        if x.shape[1] == 1 or (context.draft and decodes_compiled()):
            found = self._token_steps.run(x, cache, context)
        else:
            self._token_steps.forget_refusal()
        return self.norm_f(run_layers(self.layers, x, cache, context) if found is None else found)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_token_steps": None}
