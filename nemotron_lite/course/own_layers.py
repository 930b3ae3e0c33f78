"""Put layers that a learner wrote into a model, in place of the package's.

    mine = with_own_layers(model, "M", Mamba2)      a copy of the model with the learner's class
    mine(tokens).logits                             runs theirs, and has to give the same numbers
    generate(mine, prompt, 50)                      so does this, token by token
    train(mine, source, recipe)                     and this

The learner's class is an ordinary `nn.Module` that knows nothing of the package but the config:

    module = make(config)                           its parameters have the package's names
    y = module(x)                                   b t d -> b t d, causal
    cache = module.empty_cache(1)                   any object: tensors, a dict, a class of theirs
    y = module(x, cache)                            continues from the cache and changes it in place
    y, cache = module(x, cache)                     or returns a new cache, as nn.GRU does

Everything else that a layer has to deal with is done here, in the simplest way that is right:

- Rows of a batch may have different lengths. Each row has a cache of its own, and its padding is
  cut off before the learner's module sees it.
- Rows of concatenated documents are split, and the module reads one document at a time.
- A layer of the kinds E and - looks at one token at a time, so it needs no cache and no splitting.
  A router can be watched and balanced in training like the package's: after each call its module
  has `routing`, a pair of scores `tokens e` and chosen experts `tokens k`, and its part `gate` has
  the buffer of the selection bias.

Left out: drafts of speculative decoding, saving a cache to a file, states in float16, and the
layers of the MTP module, which stay the package's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite.cache import Cache
from nemotron_lite.config import LAYER_KINDS, NemotronConfig
from nemotron_lite.layers import ForwardContext, LayerCache, Mixer, RouterStats
from nemotron_lite.layers.mixer import SavedSizes
from nemotron_lite.model import Nemotron

Make = Callable[[NemotronConfig], nn.Module]
_WHOLE_TEXTS = ForwardContext()


def with_own_layers(model: Nemotron, kind: str, make: Make) -> Nemotron:
    """A copy of `model` in which every layer of one kind computes with the learner's module.

    Args:
        model: it stays as it is.
        kind: the letter of the layers in the pattern, such as "M".
        make: makes a module from a config; a class of modules is enough. The weights of the
            package's layer are loaded into it, so its parameters need the same names and shapes.

    Raises:
        ValueError: the pattern has no such layer.
        RuntimeError: parameters with other names or shapes; torch lists them.
    """
    if kind not in LAYER_KINDS or kind not in model.config.pattern:
        raise ValueError(
            f"kind={kind!r}: expected one of the letters in the model's pattern, "
            f"{model.config.pattern!r}."
        )
    changed = copy.deepcopy(model)
    changed.__class__ = _OwnNemotron
    layers: Any = changed.backbone.layers
    for layer in layers:
        if layer.kind == kind:
            module = make(model.config).to(model.device, model.dtype)
            module.load_state_dict(layer.mixer.state_dict(), strict=True)
            own = module.train(model.training)
            layer.mixer = OwnMixer(own) if kind in "M*" else OwnTokenMixer(own, layer.mixer)
    return changed


class OwnMixer(Mixer):
    """The mixer of a layer, computed by the learner's module `own`."""

    def __init__(self, own: nn.Module) -> None:
        super().__init__()
        self.own = own

    def forward(
        self,
        x: Float[Tensor, "b t d"],
        cache: OwnCache | None = None,
        context: ForwardContext = _WHOLE_TEXTS,
    ) -> Float[Tensor, "b t d"]:
        """Call the module: on everything at once, document by document, or row by row."""
        if context.draft:
            raise ValueError(
                "a model with layers of your own cannot read a draft: use draft=False."
            )
        if cache is not None:
            return self._row_by_row(x, cache, context)
        if context.seq_idx is None or bool((context.seq_idx == context.seq_idx[:, :1]).all()):
            return _pair(self.own(x))[0]
        return torch.cat(
            [
                self._document_by_document(row, documents)
                for row, documents in zip(x.split(1), context.seq_idx, strict=True)
            ]
        )

    def _document_by_document(
        self, row: Float[Tensor, "1 t d"], documents: Int[Tensor, "t"]
    ) -> Float[Tensor, "1 t d"]:
        counts = torch.unique_consecutive(documents, return_counts=True)[1].tolist()
        return torch.cat([_pair(self.own(part))[0] for part in row.split(counts, dim=1)], dim=1)

    def _row_by_row(
        self, x: Float[Tensor, "b t d"], cache: OwnCache, context: ForwardContext
    ) -> Float[Tensor, "b t d"]:
        y = torch.zeros_like(x)
        lengths = [x.shape[1]] * len(x) if context.lengths is None else context.lengths.tolist()
        for row, (length, own_cache) in enumerate(zip(lengths, cache.rows, strict=True)):
            if length:
                found, after = _pair(self.own(x[row : row + 1, :length], own_cache), own_cache)
                y[row, :length] = found[0]
                cache.rows[row] = after
        return y


class OwnTokenMixer(Mixer):
    """The mixer of an E or - layer, computed by the learner's module `own`.

    Args:
        own: the learner's module.
        like: the package's mixer in its place, whose name the router statistics carry.
    """

    def __init__(self, own: nn.Module, like: Mixer) -> None:
        super().__init__()
        self.own = own
        self._name = str(getattr(like, "name", ""))

    @property
    def gate(self) -> nn.Module:
        """The learner's router, where training looks for the selection bias."""
        return self.own.get_submodule("gate")

    def forward(
        self, x: Float[Tensor, "b t d"], cache: None = None, context: ForwardContext = _WHOLE_TEXTS
    ) -> Float[Tensor, "b _ d"]:
        """Call the module on all tokens, and hand on what its router decided."""
        x = context.kept(x)
        y: Tensor = self.own(x)
        routing = getattr(self.own, "routing", None)
        if context.router_stats is not None and routing is not None:
            scores, indices = (part.unflatten(0, x.shape[:2]) for part in routing)
            context.router_stats.append(RouterStats(self._name, scores, indices))
        return y


class OwnCache(LayerCache):
    """The caches that the learner's module made, one for each row of the batch.

    Args:
        rows: the learner's objects.
        like: the package's cache in their place. The checks of a call compare its sizes and dtype.
    """

    TENSORS = ()

    def __init__(self, rows: Sequence[Any], like: LayerCache) -> None:
        self.rows, self._sizes, self._dtype = list(rows), like.sizes, like.dtype

    @property
    def buffers(self) -> list[Tensor]:
        """All tensors in the learner's objects."""
        return [tensor for row in self.rows for tensor in _tensors_in(row)]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The sizes of the package's cache."""
        return self._sizes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the package's cache."""
        return self._dtype

    def clone(self) -> OwnCache:
        """A deep copy of the learner's objects."""
        twin = copy.copy(self)
        twin.rows = copy.deepcopy(self.rows)
        return twin

    def repeat(self, times: int) -> OwnCache:
        """Each of the learner's objects `times` times, as copies."""
        twin = copy.copy(self)
        twin.rows = [copy.deepcopy(row) for row in self.rows for _ in range(times)]
        return twin

    def accept(self, counts: int | Int[Tensor, "b"]) -> None:
        """Not possible: no draft was read."""
        raise ValueError(
            "a model with layers of your own reads no drafts, so none can be accepted."
        )

    def reserve(self, tokens: int) -> None:
        """Nothing to do: the learner's module decides how its cache grows."""

    def saved_tensors(self, tokens: int) -> dict[str, Tensor]:
        """Not possible: nothing says which part of the learner's object is valid."""
        raise ValueError("the cache of a model with layers of your own cannot be saved to a file.")

    @classmethod
    def check_saved(cls, *_: Any) -> SavedSizes:
        """Not possible, since it was not saved."""
        raise ValueError("a cache of layers of your own cannot be loaded from a file.")

    @classmethod
    def from_saved(cls, tensors: Mapping[str, Tensor], extra: Mapping[str, Any] | None) -> OwnCache:
        """Not possible, since it was not saved."""
        raise ValueError("a cache of layers of your own cannot be loaded from a file.")


class _OwnNemotron(Nemotron):
    """A model with `OwnMixer` layers: its caches hold the learner's caches of these layers."""

    def empty_cache(
        self,
        batch: SupportsIndex,
        capacity: SupportsIndex = 256,
        mtp: bool = False,
        *,
        ssm_dtype: torch.dtype | None = None,
        ssm_seed: SupportsIndex | None = 0,
    ) -> Cache:
        """`Nemotron.empty_cache`, with the learner's caches in it.

        Raises:
            ValueError: also for states in float16, which the learner's layers do not have.
        """
        if ssm_dtype == torch.float16:
            raise ValueError("layers of your own keep float32 states: leave out ssm_dtype.")
        cache = super().empty_cache(batch, capacity, mtp, ssm_seed=ssm_seed)
        layers: Any = self.backbone.layers
        for i, (layer, like) in enumerate(zip(layers, cache.layers, strict=True)):
            if isinstance(layer.mixer, OwnMixer) and like is not None:
                own: Any = layer.mixer.own
                cache.layers[i] = OwnCache([own.empty_cache(1) for _ in range(cache.batch)], like)
        return cache


def _pair(result: Any, cache: Any = None) -> tuple[Tensor, Any]:
    """The output of the learner's module and its cache: the returned one, or else `cache`."""
    return result if isinstance(result, tuple) else (result, cache)


def _tensors_in(thing: Any) -> Iterator[Tensor]:
    """Tensors in a dict, list or tuple, or in the attributes of an object."""
    if isinstance(thing, Tensor):
        yield thing
        return
    if isinstance(thing, Mapping):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple):
        parts = list(thing)
    else:
        parts = list(getattr(thing, "__dict__", {}).values())
    for part in parts:
        yield from _tensors_in(part)
