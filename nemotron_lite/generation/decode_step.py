"""One step of decoding as a function of tensors, for `torch.export` and what reads its graphs.

    logits, state = step(tokens, lengths, state)

`model(token, cache)` changes a `Cache` in place: Python objects with buffers that grow. An exported
program has tensors only, of fixed shapes. So here the cache is a list of tensors, and the step
returns new ones:

    attention     k, v          b kv s p     room for s tokens, given at the start
    Mamba         conv, ssm     b k-1 c and b h p n

in the order of the layers; `lengths` says how many tokens each row has read. The caller adds one to
them after each step. The prompt is read by `model(tokens, cache)` as usual, and `tensors(cache)`
turns the cache into the list.

    step = DecodeStep(model)
    cache = model.empty_cache(rows, capacity=1024)
    logits = model(prompts, cache, logits_to_keep=1).logits
    lengths, state = step.tensors(cache)
    program = torch.export.export(step, (tokens, lengths, state))

Left out: drafts and the MTP module, float16 states (their seeds are hashed in Python).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite.cache import Cache
from nemotron_lite.layers import ForwardContext, KVCache, LayerCache, MambaCache
from nemotron_lite.model import Nemotron


class _FixedKVCache(KVCache):
    """Keys and values in buffers that do not grow, and are replaced instead of changed."""

    def append(
        self,
        k: Float[Tensor, "b kv t p"],
        v: Float[Tensor, "b kv t p"],
        starts: int | Int[Tensor, "b"],
    ) -> tuple[Float[Tensor, "b kv s p"], Float[Tensor, "b kv s p"]]:
        """New buffers with the new tokens at `starts`, one start per row."""
        assert isinstance(starts, Tensor)
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        places = starts[:, None] + torch.arange(k.shape[2], device=k.device)
        self.k, self.v = self.k.clone(), self.v.clone()
        self.k[rows, :, places] = k.transpose(1, 2).to(self.k.dtype)
        self.v[rows, :, places] = v.transpose(1, 2).to(self.v.dtype)
        return self.k, self.v


class DecodeStep(nn.Module):
    """A model's step for one token per row, without objects that change.

    Args:
        model: is not copied; its weights become those of the exported program.
    """

    def __init__(self, model: Nemotron) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens: Int[Tensor, "b 1"],
        lengths: Int[Tensor, "b"],
        state: list[Tensor],
    ) -> tuple[Float[Tensor, "b v"], list[Tensor]]:
        """Logits for the token after `tokens`, and the new state. No gradients.

        Args:
            tokens: the newest token of each row.
            lengths: tokens that each row has read before, int64; less than the capacity of `state`.
            state: what `tensors` or the last step returned; it is not changed.

        Raises:
            ValueError: tokens that are not one per row, or a state of another number of tensors.
        """
        if tokens.ndim != 2 or tokens.shape[1] != 1:
            raise ValueError(
                f"tokens has shape {list(tokens.shape)}: expected one token per row, [rows, 1]. "
                "Read longer texts with model(tokens, cache)."
            )
        layers = self._layers(state)
        with torch.no_grad():
            hidden = self.model.backbone(tokens, layers, ForwardContext(lengths))
            logits = self.model.head(hidden[:, 0])
        return logits, [buffer for layer in layers if layer for buffer in layer.buffers]

    def _layers(self, state: list[Tensor]) -> list[LayerCache | None]:
        kinds = self.model.config.pattern
        needed = 2 * sum(kind in "M*" for kind in kinds)
        if len(state) != needed:
            raise ValueError(
                f"the state has {len(state)} tensors; expected {needed}, two for each Mamba and "
                f"attention layer of {kinds!r}. `tensors(cache)` makes it."
            )
        pairs: Iterator[tuple[Tensor, Tensor]] = zip(state[::2], state[1::2], strict=True)
        layers: list[LayerCache | None] = []
        for kind in kinds:
            if kind == "M":
                conv, ssm = next(pairs)
                layers.append(MambaCache(conv, ssm.clone()))  # the step overwrites it
            elif kind == "*":
                layers.append(_FixedKVCache(*next(pairs)))
            else:
                layers.append(None)
        return layers

    @staticmethod
    def tensors(cache: Cache) -> tuple[Int[Tensor, "b"], list[Tensor]]:
        """The lengths and the state of a cache, which share its memory.

        Raises:
            ValueError: a draft is waiting, or SSM states in float16.
        """
        cache.refuse_draft()
        for layer in cache.layers:
            if isinstance(layer, MambaCache) and layer.rounding_seeds is not None:
                raise ValueError(
                    "the cache has SSM states in float16, which are rounded with seeds that an "
                    "exported step cannot make: use a cache with ssm_dtype=None."
                )
        state = [buffer for layer in cache.layers if layer for buffer in layer.buffers]
        return cache.lengths.to(cache.device), state
