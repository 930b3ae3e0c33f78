"""What every mixer provides, and what a layer's cache can do.

A residual layer holds one mixer: Mamba-2, attention, a mixture of experts or an MLP. All that is
special about a kind of layer is in the file of its mixer:

- the computation: `mixer(x, cache, context)`;
- its initial weights: `init_weights`;
- its cache: `empty_cache` makes a `LayerCache` of the class `CACHE`; both are None where a layer
  remembers nothing;
- its lines of the ledger: `parameter_lines`, `flop_lines` and `cache_lines` give formulas for its
  parameters, its FLOPs and its cache, in the letters of the course. `LETTERS` says which field of
  the config each letter stands for;
- its matrices: `matrices` names them and their role in a precision recipe.

The model, the cache, the checks of inputs, the ledger and the recipes use these methods and do not
need to know which kinds exist. `block.MIXERS` says which mixer each letter of a pattern stands for.
`config.LAYER_KINDS` has the same letters with a name for each, because a config must be checked
without importing the layers; a test compares the two.

The methods about sizes are class methods that take a config: a ledger or an empty cache needs no
model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor, nn

from nemotron_lite.backends.compiled_step import MixerStruct, StateStruct
from nemotron_lite.config import NemotronConfig

# Dtypes of a model as safetensors names them, and those of its SSM states.
WIDE_DTYPE = {"F32": "F32", "BF16": "F32", "F16": "F32", "F64": "F64"}

P = ParamSpec("P")
Made = TypeVar("Made")


class LedgerLine(NamedTuple):
    """One line of the ledger, for one layer.

    Attributes:
        name: of the tensors or of the operation.
        formula: a number of parameters, FLOPs per token or cached values, as Python arithmetic.
        active: the formula of the parameters that one token uses, where it is not all of them.
    """

    name: str
    formula: str
    active: str | None = None


class Matrix(NamedTuple):
    """One module of a mixer that holds weight matrices, as precision recipes see it.

    Attributes:
        name: path of the module in the mixer.
        role: a key of `quantization.recipe.ROLES`.
        parameters: numbers in its matrices.
    """

    name: str
    role: str
    parameters: int


class CompiledCall(NamedTuple):
    """What a mixer must know of a call of the compiled code.

    Attributes:
        rows: of the batch.
        tokens: of each row that are read.
        keys: tokens of the longest row, these included.
        draft: whether they are a draft.
        dtype: of the model.
    """

    rows: int
    tokens: int
    keys: int
    draft: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class CacheOptions:
    """How a layer's cache is made. `Cache.empty` checks the values.

    Attributes:
        batch: rows.
        capacity: tokens per row that the KV buffers have room for.
        dtype: of keys, values and inputs of the convolution.
        ssm_dtype: of the SSM states.
        ssm_seed: of the stochastic rounding of float16 states; None rounds to nearest.
        device: where the buffers are.
    """

    batch: int
    capacity: int
    dtype: torch.dtype
    ssm_dtype: torch.dtype
    ssm_seed: int | None
    device: torch.device


class SavedLayer(NamedTuple):
    """What a file holds for one layer.

    Attributes:
        stored: shape and dtype of each of `LayerCache.TENSORS`; a dtype as safetensors names it.
        extra: what `LayerCache.saved_extra` gave.
        rows: of the batch.
        tokens: of the longest row, at least 1.
        layer: its index in the model.
    """

    stored: Mapping[str, tuple[tuple[int, ...], str]]
    extra: Mapping[str, Any] | None
    rows: int
    tokens: int
    layer: int

    def misfit(self) -> ValueError:
        """The error for tensors that do not fit each other or the batch."""
        held = " and ".join(
            f"{name} {shape} {dtype}" for name, (shape, dtype) in self.stored.items()
        )
        return ValueError(
            f"{held} of layer {self.layer} are not those of {self.rows} rows and {self.tokens} "
            "tokens"
        )


class SavedSizes(NamedTuple):
    """What the tensors of one saved layer say about the model; all layers of a kind agree."""

    dtype: str  # of the model, as safetensors names it
    sizes: tuple[int, ...]  # as `LayerCache.sizes`
    state: tuple[object, ...] = ()  # dtype and rounding seed of a state, where there is one


def ordinary_tensors(make: Callable[P, Made]) -> Callable[P, Made]:
    """A decorator: the tensors that `make` creates are ordinary ones, also in inference mode.

    PyTorch refuses to change an inference tensor in place once inference mode is off. Buffers that
    are ordinary tensors can be changed in every mode, so a cache can be continued in every mode.
    """

    @wraps(make)
    def ordinary(*args: P.args, **kwargs: P.kwargs) -> Made:
        with torch.inference_mode(False), torch.no_grad():
            return make(*args, **kwargs)

    return ordinary


class LayerCache(ABC):
    """The cache of one layer: what it keeps of the tokens that it has read.

    A layer reads a draft without advancing its cache; `accept` then takes in a part of the draft.

    Buffers that are changed in place are made under `ordinary_tensors`.
    """

    TENSORS: ClassVar[tuple[str, ...]]  # names of its buffers, in the object and in a saved file

    @property
    def buffers(self) -> list[Tensor]:
        """All its tensors, at full capacity."""
        return [getattr(self, name) for name in self.TENSORS]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, without what a waiting draft adds."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def draft_nbytes(self) -> int:
        """Bytes that are kept for a draft that waits for `accept`, beside the buffers."""
        return 0

    @property
    @abstractmethod
    def sizes(self) -> tuple[int, ...]:
        """The sizes that follow from the model's config: no batch, no capacity."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that has to equal that of the model."""
        return self.buffers[0].dtype

    @abstractmethod
    def clone(self) -> LayerCache:
        """An independent copy, without a draft."""

    @ordinary_tensors
    def repeat(self, times: int) -> LayerCache:
        """A copy with each row `times` times, side by side."""
        copy = self.clone()
        for name in self.TENSORS:
            setattr(copy, name, getattr(copy, name).repeat_interleave(times, 0))
        return copy

    @abstractmethod
    def accept(self, counts: int | Int[Tensor, "b"]) -> None:
        """Take in the first `counts` tokens of the draft and drop the others."""

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` per row in all, if the cache grows with the context."""

    def saved_tensors(self, tokens: int) -> dict[str, Tensor]:
        """The part of the buffers that belongs to the first `tokens` tokens, by name."""
        return {name: getattr(self, name).contiguous() for name in self.TENSORS}

    def saved_extra(self) -> dict[str, Any] | None:
        """What has to be saved beside the tensors, as JSON; None if there is nothing."""
        return None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Buffers are ordinary tensors again, also when copied or unpickled in inference mode."""
        self.__dict__.update(state)
        for name in self.TENSORS:
            if getattr(self, name).is_inference():
                with torch.inference_mode(False):
                    setattr(self, name, getattr(self, name).clone())

    @classmethod
    @abstractmethod
    def check_saved(cls, saved: SavedLayer) -> SavedSizes:
        """Compare what a file holds for one layer with each other, before it is read.

        Raises:
            ValueError: what does not fit.
        """

    @classmethod
    @abstractmethod
    def from_saved(
        cls, tensors: Mapping[str, Tensor], extra: Mapping[str, Any] | None
    ) -> LayerCache:
        """The cache whose `saved_tensors` and `saved_extra` these are."""


# One token of each row, `b d`; the layer's cache, which is advanced; the tokens before it.
TokenStep = Callable[[Tensor, Any, int | Tensor], Tensor]


class Mixer(nn.Module):
    """The base class of all mixers. A subclass also defines `forward(x, cache, context)`.

    `forward` changes `cache` in place and returns the mixer's output: of every token, or with
    `context.last_only` of each row's last real token. Everything that a call may ask for is in
    `context`, so that a mixer is only ever called as a module and hooks on it run in every case.
    """

    LETTERS: ClassVar[Mapping[str, str]] = {}  # letter of the formulas -> field of the config
    CACHE: ClassVar[type[LayerCache] | None] = None  # what `empty_cache` makes

    @classmethod
    def build(cls, config: NemotronConfig, name: str) -> Mixer:
        """The mixer of one layer; `name` is its path in the model."""
        return cls(config)

    def init_weights(
        self, std: float, residual_divisor: float, generator: torch.Generator | None = None
    ) -> None:
        """Draw fresh weights.

        Args:
            std: standard deviation of the matrices.
            residual_divisor: divides the matrices that write into the residual stream.
            generator: where the random numbers come from; None is torch's global generator.
        """
        raise NotImplementedError

    def token_step(self, rows: int) -> TokenStep:
        """`forward` for one token in each of `rows` rows, as a function of few calls.

        It makes every choice once, reads the weights that the module has now, and calls no module:
        one_token.py says when it may be used. The results are those of `forward`, bit for bit.
        """
        raise NotImplementedError

    def compiled_part(self) -> MixerStruct:
        """The mixer as the compiled code sees it (compiled_tokens.py).

        Raises:
            NotCompiledError: something that the code does not compute.
        """
        raise NotImplementedError

    def compiled_state(
        self, part: Any, state: StateStruct, cache: Any, call: CompiledCall
    ) -> Callable[[], None] | None:
        """Write into `state` where the cache is; returns what is to be done after the call.

        Args:
            part: what `compiled_part` returned.
            state: of this layer.
            cache: of this layer.
            call: what is read.

        Raises:
            NotCompiledError: a cache that the code cannot use.
        """
        return None

    @classmethod
    def empty_cache(
        cls, config: NemotronConfig, layer: int, options: CacheOptions
    ) -> LayerCache | None:
        """The cache before the first token; None for a mixer that looks at one token at a time.

        Args:
            layer: index of the layer in the model, so that each layer rounds with its own seeds.
        """
        return None

    @classmethod
    def parameter_lines(cls, config: NemotronConfig) -> list[LedgerLine]:
        """Its parameters, tensor by tensor."""
        raise NotImplementedError

    @classmethod
    def flop_lines(cls, config: NemotronConfig, mode: str) -> list[LedgerLine]:
        """Its FLOPs per token; `mode` is "prefill", "decode" or "train"."""
        raise NotImplementedError

    @classmethod
    def cache_lines(cls, config: NemotronConfig) -> list[LedgerLine]:
        """Values that one sequence keeps after t tokens, named "kv", "conv" or "ssm"."""
        return []

    @classmethod
    def matrices(cls, config: NemotronConfig) -> list[Matrix]:
        """Its modules with weight matrices, in the order of the computation."""
        raise NotImplementedError
