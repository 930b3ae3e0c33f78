"""A Nemotron whose modules fetch their tensors before they run, and let them go afterwards.

The model is built on the meta device, so its parameters have shapes and no memory. Then `forward`
of every module that has tensors of its own is wrapped:

    fetch the module's tensors, put them in the place of those on meta
    run the module's own forward
    put those on meta back

So a module computes what it always computes, whatever its class, and no layer knows about this.
Routed experts and the embedding are replaced by modules that fetch a part of their tensors
(experts.py). The layers' functions for decoding (layers/one_token.py) and the prepared copies of
matrices (`Linear.prepare_for_decoding`) need weights that stay; a wrapped `forward` switches them
off.

Weights cannot be changed: the model refuses to be trained, cast, moved, copied and pickled, and to
give a state_dict. `save` writes it, tensor by tensor.

The wrappers refer to their modules weakly. With a strong reference each module would be part of a
cycle, and the memory of a model that nobody uses any more would stay until the next run of Python's
garbage collector: two budgets instead of one where a model is loaded again.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn

from nemotron_lite.layers.moe import Experts
from nemotron_lite.model import Nemotron
from nemotron_lite.offload.experts import OffloadedEmbedding, OffloadedExperts
from nemotron_lite.offload.source import Entry, Part, WeightSource
from nemotron_lite.offload.store import WeightStore
from nemotron_lite.outputs import Hidden
from nemotron_lite.progress import Progress
from nemotron_lite.quantization.packed_layers import PackedExperts, PackedWeight

M = TypeVar("M", bound=Nemotron)


class Offloaded(Nemotron):
    """A model whose weights are in a `WeightStore`. Made by `attach_weights`.

    Attributes:
        store: the weights in memory; `store.traffic` counts what was used and fetched.
    """

    store: WeightStore
    _example: Tensor  # on the device and in the dtype of the weights
    _shapes: dict[str, tuple[tuple[int, ...], torch.dtype]]  # by name in the state_dict
    _progress = False
    _bar: Progress | None = None

    def _some_weight(self) -> Tensor:
        return self._example if "store" in self.__dict__ else super()._some_weight()

    def read(self, name: str, expert: int | None = None) -> Tensor:
        """A tensor of the model, or one expert's slice of it, straight from the source.

        Raises:
            KeyError: the model has no tensor of this name.
        """
        shape, dtype = self._shapes[name]
        out = torch.empty(shape if expert is None else shape[1:], dtype=dtype, device="cpu")
        if expert is None and _is_of_experts(name) and shape:
            for number, slot in enumerate(out.unbind()):
                self.store.source.read(name, slot, expert=number)
        else:
            self.store.source.read(name, out, expert=expert)
        return out

    @torch.no_grad()
    def _hidden(self, *args: Any, **kwargs: Any) -> Hidden:
        if not self._progress:
            return super()._hidden(*args, **kwargs)
        with Progress("layers", self.config.num_layers) as bar:
            self._bar = bar
            try:
                return super()._hidden(*args, **kwargs)
            finally:
                self._bar = None

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits in float32 (float64 for a float64 model)."""
        return super().head(hidden)

    def train(self: M, mode: bool = True) -> M:
        """Only `train(False)`, which is `eval()`.

        Raises:
            RuntimeError: the model is to be trained.
        """
        if mode and "store" in self.__dict__:
            _refuse("be trained: its weights are fetched when they are used, and cannot change")
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """`to`, `cpu`, `float` and others; the model itself, if nothing changes."""
        if "store" not in self.__dict__:
            return super()._apply(fn, recurse)
        moved = fn(self._example)
        if moved.device != self._example.device or moved.dtype != self._example.dtype:
            _refuse(
                f"be moved or cast: it is in {self.dtype} on the CPU. Give the dtype when it is "
                "made (dtype=...)"
            )
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: it would hold all weights.

        Raises:
            RuntimeError: always.
        """
        if "store" in self.__dict__:
            _refuse("give a state_dict, which would hold all weights. save(model, path) writes it")
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: weights come from the source.

        Raises:
            RuntimeError: always.
        """
        if "store" in self.__dict__:
            _refuse("take a state_dict: its weights come from the source it was made with")
        return super().load_state_dict(*args, **kwargs)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Refused: a compiler cannot follow how weights are fetched.

        Raises:
            RuntimeError: always.
        """
        _refuse("be compiled")

    def prepare_for_decoding(self, smallest: int = 80_000) -> NoReturn:
        """Refused: it would keep a copy of each matrix in memory.

        Raises:
            RuntimeError: always.
        """
        _refuse("be prepared for decoding, which keeps a copy of each matrix in memory")

    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Refused, as `load_state_dict` is.

        Raises:
            RuntimeError: always.
        """
        if "store" in self.__dict__:
            _refuse("be initialized: its weights come from the source it was made with")
        super().init_weights(generator)

    def __getstate__(self) -> NoReturn:
        _refuse("be copied or pickled. Make it again by the same call")


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"an offloaded model cannot {what}. A model in memory can: Nemotron(config), or load(path) "
        "without offload=True."
    )


@lru_cache
def offloaded_class(model_class: type[M]) -> type[M]:
    """The subclass of `model_class` that offloaded models have."""
    if issubclass(model_class, Offloaded):
        return model_class
    if model_class is Nemotron:
        return cast("type[M]", Offloaded)
    return type(f"Offloaded{model_class.__name__}", (Offloaded, model_class), {})


def attach_weights(
    model: Nemotron, source: WeightSource, *, budget: int, progress: bool = False
) -> None:
    """Let a model on the meta device fetch its weights from `source`.

    Args:
        model: of an `offloaded_class`, with packed layers where weights are packed. Its tensors
            have the dtypes that the weights get.
        source: has all tensors of the model.
        budget: bytes of weights in memory at most.
        progress: report on stderr how many layers a call has run.

    Raises:
        ValueError: the budget has no room for the largest tensor.
    """
    assert isinstance(model, Offloaded)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    modules, experts, rows = dict[str, Entry](), dict[str, Entry](), dict[str, Part]()
    for path, module in [*model.named_modules()]:
        if isinstance(module, Experts | PackedExperts):
            model.set_submodule(path, OffloadedExperts(module.up_proj, module.down_proj, path))
            for leaf in ("up_proj", "down_proj"):
                stack = f"{path}.{leaf}"
                experts[stack] = _entry_of_expert(stack, getattr(module, leaf))
        elif path.rpartition(".")[0] in experts or path in experts:
            continue
        elif isinstance(module, nn.Embedding):
            with torch.device("meta"):
                table = OffloadedEmbedding(module.num_embeddings, module.embedding_dim)
            table.weight = module.weight
            model.set_submodule(path, table)
            rows[f"{path}.weight"] = _part(f"{path}.weight", module.weight)
        elif tensors := _own_tensors(module):
            modules[path] = _entry(path, tensors, module)
    store = WeightStore(source, modules, experts, rows, budget)
    for path in modules:
        found = model.get_submodule(path)
        found.forward = _FetchingForward(found, path, store)  # type: ignore[method-assign]
    for found in model.modules():
        if isinstance(found, OffloadedExperts | OffloadedEmbedding):
            found.store = store
    model.requires_grad_(False)
    model._example, model._shapes = torch.empty(0, dtype=model.dtype, device="cpu"), shapes
    model._progress = progress
    if progress:
        for number, block in enumerate(model.backbone.layers, 1):
            block.register_forward_hook(_ReportingHook(model, number))
    model.store = store


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a module itself, by their name in it."""
    named = {**module._parameters, **module._buffers}
    return {
        leaf: tensor
        for leaf, tensor in named.items()
        if tensor is not None and leaf not in module._non_persistent_buffers_set
    }


def _part(name: str, tensor: Tensor, weights: int | None = None) -> Part:
    """The description of a tensor on meta, which encodes as many weights as it has numbers."""
    weights = tensor.numel() if weights is None else weights
    return Part(name, tuple(tensor.shape), tensor.dtype, weights)


def _entry(path: str, tensors: dict[str, Tensor], module: object) -> Entry:
    """The tensors of a module, or of one matrix of a stack."""
    counts: dict[str, int] = {}
    if isinstance(module, PackedWeight):  # without the padding of rows; scales are no weights
        counts = dict.fromkeys(module.tensors(), 0) | {"weight": math.prod(module.shape[-2:])}
    parts = {leaf: _part(f"{path}.{leaf}", t, counts.get(leaf)) for leaf, t in tensors.items()}
    return Entry(path, parts)


def _entry_of_expert(stack: str, matrices: PackedWeight | Tensor) -> Entry:
    """The tensors of one expert's matrix; a plain one has the name ""."""
    if isinstance(matrices, PackedWeight):
        return _entry(stack, matrices.tensors(0), matrices)
    return Entry(stack, {"": _part(stack, matrices[0])})


def _is_of_experts(name: str) -> bool:
    """Whether a tensor's first axis is the experts, which a source reads one by one."""
    return ".mixer.experts." in name


class _FetchingForward:
    """A module's forward with its tensors in memory."""

    def __init__(self, module: nn.Module, path: str, store: WeightStore) -> None:
        self._module, self._path, self._store = weakref.ref(module), path, store

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module()
        assert module is not None, "nobody else calls this"
        with self._store.weights_of(self._path) as tensors:
            empty = {leaf: _place(module, leaf)[leaf] for leaf in tensors}
            try:
                for leaf, tensor in tensors.items():
                    place = _place(module, leaf)
                    parameter = place is module._parameters
                    place[leaf] = nn.Parameter(tensor, False) if parameter else tensor
                return type(module).forward(module, *args, **kwargs)
            finally:
                for leaf, tensor in empty.items():
                    _place(module, leaf)[leaf] = tensor


def _place(module: nn.Module, leaf: str) -> dict[str, Any]:
    """Where a module holds this tensor: its parameters or its buffers."""
    return module._parameters if leaf in module._parameters else module._buffers


class _ReportingHook:
    """A hook on a layer that reports its number."""

    def __init__(self, model: Offloaded, number: int) -> None:
        self._model, self._number = weakref.ref(model), number

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        model = self._model()
        if model is not None and (bar := model._bar) is not None:
            traffic = model.store.traffic
            bar.update(self._number, f"{traffic.hit_rate:.0%} of the weights were in memory")
