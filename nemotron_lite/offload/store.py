"""The weights that are in memory, within a budget; all others pass through one workspace.

    with store.weights_of(path) as tensors: ...      those of a module, until the block ends
    with store.choosing(path, experts): ...          a layer's call, which uses these experts
        store.expert(stack, e)                       one expert's matrix, until the next one
    store.rows(name, ids)                            rows of the embedding

Modules run inside each other, so the workspace is a stack: an inner module's tensors lie behind
those of the outer one, and are gone when it ends. Memory that an evicted expert leaves is used for
the next one of the same size, because fresh memory is slow: the system clears every page.

A call of a layer with experts uses them in the order of their numbers. If it uses more than stay,
an ordinary cache would evict each one shortly before the next call comes to it. So a call evicts
only experts that it does not use itself, and those that do not fit pass through the workspace.

A store serves one call at a time; a second thread waits.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from jaxtyping import Int
from torch import Tensor

from nemotron_lite.offload.plan import Plan, make_plan
from nemotron_lite.offload.source import Entry, Part, WeightSource

Tensors = dict[str, Tensor]  # of one entry, by their name in the module


@dataclass
class Traffic:
    """What layers used and what was fetched for them, since the model was made or `reset`.

    Attributes:
        used_bytes: of the weights that layers used; twice for a weight that two calls used.
        fetched_bytes: of these, the bytes that were not in memory.
        source_bytes: read from the disk or generated for them. It differs from `fetched_bytes`
            where the files have another dtype than the model.
        weights: of the model that the used bytes encode.
        experts: experts' matrices that layers used.
        experts_found: of these, the matrices that were in memory.
    """

    used_bytes: int = 0
    fetched_bytes: int = 0
    source_bytes: int = 0
    weights: int = 0
    experts: int = 0
    experts_found: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the used bytes that were in memory; 0 before anything was used."""
        return 1 - self.fetched_bytes / self.used_bytes if self.used_bytes else 0.0

    @property
    def expert_hit_rate(self) -> float:
        """Share of the experts' matrices that were in memory; 0 before one was used."""
        return self.experts_found / self.experts if self.experts else 0.0

    def reset(self) -> None:
        """Start counting again."""
        for field in fields(self):
            setattr(self, field.name, 0)


class WeightStore:
    """Fetches weights from a source, and keeps some.

    Args:
        source: of the weights.
        modules: tensors that every token uses, by the path of their module.
        experts: one expert's matrix of each stack, by the path of the stack: `….experts.up_proj`.
        rows: tables of which rows are read, by name.
        budget: bytes of weights in memory at most, those of the source included.

    Raises:
        ValueError: the budget has no room for the largest tensor.
    """

    def __init__(
        self,
        source: WeightSource,
        modules: Mapping[str, Entry],
        experts: Mapping[str, Entry],
        rows: Mapping[str, Part],
        budget: int,
    ) -> None:
        self.source = source
        self.traffic = Traffic()
        self.lock = threading.RLock()
        self._modules, self._experts, self._rows = modules, experts, rows
        layers = {_layer_of(stack) for stack in experts}
        self.plan: Plan = make_plan(modules, experts, len(layers), budget, source.nbytes)
        self._kept: dict[str, Tensor] = {}  # buffers
        self._chosen = {layer: _LayerExperts(self.plan.per_layer) for layer in layers}
        self._workspace: Tensor | None = None
        self._top = 0  # bytes of the workspace that are in use

    @property
    def nbytes(self) -> int:
        """Bytes of weights in memory now, with the workspace and the source's own."""
        kept = sum(buffer.nbytes for buffer in self._kept.values())
        experts = sum(layer.nbytes for layer in self._chosen.values())
        space = 0 if self._workspace is None else self._workspace.nbytes
        return self.source.nbytes + kept + experts + space

    @contextmanager
    def weights_of(self, path: str) -> Iterator[Tensors]:
        """The tensors of a module, by their name in it. They are valid inside the block."""
        with self.lock:
            entry, begin = self._modules[path], self._top
            try:
                yield self._fetch_module(entry)
            finally:
                self._top = begin

    @contextmanager
    def choosing(self, path: str, experts: Iterable[int]) -> Iterator[None]:
        """One call of the module `path`, which uses these experts and calls `expert` for each."""
        with self.lock:
            layer = self._chosen[path]
            layer.in_use = set(experts)
            try:
                yield
            finally:
                layer.in_use = set()

    def expert(self, stack: str, expert: int) -> Tensors:
        """One expert's matrix, inside `choosing`; valid until the next call of this method."""
        entry, kept = self._experts[stack], self._chosen[_layer_of(stack)]
        self._count_use(entry)
        self.traffic.experts += 1
        found = kept.get((stack, expert))
        if found is not None:
            self.traffic.experts_found += 1
            return entry.views(found)
        buffer = kept.room_for(entry.nbytes)
        if buffer is None:
            return self._fetch(entry, self._space(entry.nbytes), expert)
        tensors = self._fetch(entry, buffer, expert)
        kept.put((stack, expert), buffer)
        return tensors

    def rows(self, name: str, ids: Int[Tensor, "n"]) -> Tensor:
        """Rows of a table, in the order of `ids`; each is read once."""
        part = self._rows[name]
        wanted, places = ids.unique(return_inverse=True)
        out = torch.empty(len(wanted), *part.shape[1:], dtype=part.dtype, device="cpu")
        size = part.nbytes // part.shape[0] * len(wanted)
        with self.lock:
            for place, row in enumerate(wanted.tolist()):
                self.traffic.source_bytes += self.source.read(name, out[place], row=row)
            self.traffic.used_bytes += size
            self.traffic.fetched_bytes += size
            self.traffic.weights += out.numel()
        return out.index_select(0, places)

    def _fetch_module(self, entry: Entry) -> Tensors:
        self._count_use(entry)
        if (found := self._kept.get(entry.path)) is not None:
            # New views each time: those of inference mode could not be used outside of it.
            return entry.views(found)
        if entry.path not in self.plan.kept:
            buffer = self._space(entry.nbytes)
            self._top += entry.nbytes
            return self._fetch(entry, buffer)
        buffer = new_bytes(entry.nbytes)
        tensors = self._fetch(entry, buffer)
        self._kept[entry.path] = buffer
        return tensors

    def _count_use(self, entry: Entry) -> None:
        self.traffic.used_bytes += entry.used_bytes
        self.traffic.weights += entry.weights

    def _fetch(self, entry: Entry, buffer: Tensor, expert: int | None = None) -> Tensors:
        tensors = entry.views(buffer)
        for leaf, part in entry.parts.items():
            self.traffic.source_bytes += self.source.read(part.name, tensors[leaf], expert=expert)
        self.traffic.fetched_bytes += entry.used_bytes
        return tensors

    def _space(self, size: int) -> Tensor:
        """Bytes of the workspace behind those that are in use."""
        if self._workspace is None:
            # Pages that nothing was written to take no memory yet.
            self._workspace = new_bytes(self.plan.workspace)
        return self._workspace[self._top : self._top + size]


class _LayerExperts:
    """The matrices of one layer's experts that stay: the least recently used one is evicted."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.nbytes = capacity, 0
        self.in_use: set[int] = set()  # experts of the call that runs
        self._held: OrderedDict[tuple[str, int], Tensor] = OrderedDict()

    def get(self, key: tuple[str, int]) -> Tensor | None:
        """A buffer that is here."""
        found = self._held.get(key)
        if found is not None:
            self._held.move_to_end(key)
        return found

    def room_for(self, size: int) -> Tensor | None:
        """A buffer for a new matrix, evicting as many as needed; None if it does not fit."""
        needed = self.nbytes + size - self.capacity
        evicted = []
        for key, buffer in self._held.items():  # the least recently used first
            if needed <= 0:
                break
            if key[1] not in self.in_use:
                evicted.append(key)
                needed -= buffer.nbytes
        if needed > 0:
            return None
        free = None
        for key in evicted:
            free = self._held.pop(key)
            self.nbytes -= free.nbytes
        return free if free is not None and free.nbytes == size else new_bytes(size)

    def put(self, key: tuple[str, int], buffer: Tensor) -> None:
        """Keep a buffer that `room_for` gave."""
        self._held[key] = buffer
        self.nbytes += buffer.nbytes


def new_bytes(size: int) -> Tensor:
    """Memory that weights can be written to in every mode: no inference tensor."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=torch.uint8, device="cpu")


def _layer_of(stack: str) -> str:
    """Path of the module that holds a stack of experts."""
    return stack.rpartition(".")[0]
