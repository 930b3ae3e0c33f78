"""The stored values of a model's tensors, read one tensor at a time.

Each is cast or decoded, and copied into a tensor of the model.
A safetensors file is mapped into memory, and pages that were read count as used memory until the
file is closed. Therefore it is closed and opened again after every `REOPEN_AFTER` bytes: beside the
model, that many bytes are in memory, or one tensor, if it is larger.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nemotron_lite.checkpoint import modelopt
from nemotron_lite.checkpoint.errors import CheckpointError, count_and_names, printable
from nemotron_lite.checkpoint.modelopt import GroupedTensors
from nemotron_lite.checkpoint.names import Destination
from nemotron_lite.checkpoint.packed_loading import module_and_scale
from nemotron_lite.checkpoint.weight_dtypes import WeightDtypes
from nemotron_lite.checkpoint.weight_files import StoredTensor
from nemotron_lite.model import Nemotron

REOPEN_AFTER = 64 * 2**20  # bytes read from a mapped file before it is opened again
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, modelopt.NVFP4: 0.5625}  # the others 1
QuantizedTensors = dict[str, Tensor]  # weight, weight_scale, ... of one module


def read_weights(
    folder: Path,
    model: Nemotron,
    shapes: Mapping[str, tuple[int, ...]],
    matched: Mapping[Destination, StoredTensor],
    found: GroupedTensors,
    dtypes: WeightDtypes,
    device: torch.device,
) -> dict[str, Tensor]:
    """The model's tensors with the stored values, by name."""
    # The tensors that `install_packed_layers` added: of packed layers, and scales of the cache.
    state = model.state_dict()
    added = state.keys() - shapes.keys()
    tensors: dict[str, Tensor] = {}
    invalid: dict[str, float] = {}  # names of tensors with invalid values, and one such value

    def copy_into(
        name: str, shape: tuple[int, ...], dtype: torch.dtype, expert: int | None, value: Tensor
    ) -> None:
        if name not in tensors:
            tensors[name] = torch.empty(shape, dtype=dtype, device=device)
        target = tensors[name] if expert is None else tensors[name][expert]
        target.copy_(value.view(target.shape))

    for (name, expert), item, source in _stream(folder, matched, found):
        if isinstance(source, Tensor):
            if name in shapes:
                copy_into(name, shapes[name], dtypes.of(name, source.dtype), expert, source)
            continue
        stored = found.modules[item.name]
        for part, wrong in modelopt.invalid_values(source):
            invalid[f"{stored.module}.{part}"] = wrong
        if invalid:
            continue  # the model will not be used
        module = name.removesuffix(".weight")
        if f"{module}.weight_scale" in added:
            for part, value in modelopt.as_packed(stored, source).items():
                meta = state[f"{module}.{part}"]
                copy_into(f"{module}.{part}", tuple(meta.shape), meta.dtype, expert, value)
        else:
            weight = modelopt.decode(stored, source, shapes[name][-2:])
            copy_into(name, shapes[name], dtypes.main, expert, weight)
    for disk_name, value in _read_scales(folder, found.cache_scales.values()):
        name = ".".join(module_and_scale(disk_name))
        if not bool(value.isfinite()) or float(value) <= 0:
            invalid[disk_name] = float(value)
        elif name in added:
            copy_into(name, (), torch.float32, None, value)
    if invalid:
        first, wrong = next(iter(invalid.items()))
        others = f" ({count_and_names(invalid)})" if len(invalid) > 1 else ""
        problem = (
            f"invalid values{others}: {printable(first)} holds {wrong:g}; expected finite numbers, "
            "and scales above 0. Copy the files again"
        )
        raise CheckpointError(folder, [problem])
    return tensors


def _read_scales(folder: Path, items: Iterable[StoredTensor]) -> Iterator[tuple[str, Tensor]]:
    """The numbers in these tensors, with their names."""
    by_file: dict[Path, list[str]] = {}
    for item in items:
        by_file.setdefault(item.file, []).append(item.name)
    for file, names in by_file.items():
        try:
            with safe_open(file, framework="pt") as handle:
                for name in names:
                    yield name, handle.get_tensor(name).float().reshape(())
        except OSError as error:
            problem = f"{file.name} could not be read to its end: {error}"
            raise CheckpointError(folder, [problem]) from error


def _stream(
    folder: Path, matched: Mapping[Destination, StoredTensor], found: GroupedTensors
) -> Iterator[tuple[Destination, StoredTensor, Tensor | QuantizedTensors]]:
    """Each destination with its stored values, in file order; files are reopened now and then."""
    batch: list[tuple[Destination, StoredTensor]] = []
    size = 0.0
    for destination, item in matched.items():
        if batch and (item.file != batch[0][1].file or size >= REOPEN_AFTER):
            yield from _read(folder, batch, found)
            batch, size = [], 0.0
        batch.append((destination, item))
        size += _BYTES.get(item.dtype, 1) * max(1, item.numel)
    yield from _read(folder, batch, found)


def _read(
    folder: Path, batch: list[tuple[Destination, StoredTensor]], found: GroupedTensors
) -> Iterator[tuple[Destination, StoredTensor, Tensor | QuantizedTensors]]:
    with ExitStack() as stack:
        handles: dict[Path, Any] = {}

        def get(item: StoredTensor) -> Tensor:
            # A weight and its scales may be in different shards.
            try:
                if item.file not in handles:
                    opened = safe_open(item.file, framework="pt")
                    handles[item.file] = stack.enter_context(opened)
                return handles[item.file].get_tensor(item.name)
            except OSError as error:
                problem = f"{item.file.name} could not be read to its end: {error}"
                raise CheckpointError(folder, [problem]) from error

        for destination, item in batch:
            if item.name in found.modules:
                parts = found.modules[item.name].tensors
                yield destination, item, {name: get(part) for name, part in parts.items()}
            else:
                yield destination, item, get(item)
