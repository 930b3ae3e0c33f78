"""Summary of a checkpoint's files: which matrices in which format, bits per weight, bytes.

Only headers are read, so even a folder of hundreds of gigabytes takes a moment. Each stored tensor
is assigned to its module. All modules with the same role and the same format make one row:

    routed experts in NVFP4     6 layers     9.03 M weights     4.51 bits each

Bits per weight are stored bits divided by the number of weights in the model. So they include all
scales, and the padding of rows to a multiple of 16. All tensors that are not the matrix of a module
(norms, convolutions, A, D, the selection bias, scales of the cache) are summed in the last row.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nemotron_lite.checkpoint import modelopt, validation
from nemotron_lite.checkpoint.contents import read_contents
from nemotron_lite.checkpoint.errors import CheckpointError, count_and_names
from nemotron_lite.checkpoint.locations import resolve
from nemotron_lite.checkpoint.names import destination_of
from nemotron_lite.checkpoint.weight_files import (
    StoredTensor,
    find_files,
)
from nemotron_lite.config import ConfigError
from nemotron_lite.hf_config import from_hf
from nemotron_lite.quantization.recipe import ModuleFormat, module_formats

OTHER = "other"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1}
_ORDER = ("NVFP4", "FP8", "BF16", "F16", "F32", "F64")


class StorageRow(NamedTuple):
    """Modules with the same role that are stored in the same format.

    Attributes:
        role: a key of `recipe.ROLES`, or `OTHER`.
        format: the dtype in the files (BF16, F32, …), or NVFP4 or FP8.
        modules: number of modules; the experts of a layer count as one. For OTHER, of tensors.
        weights: number of weights in these modules.
        num_bytes: size of the weights and their scales.
    """

    role: str
    format: str
    modules: int
    weights: int
    num_bytes: int

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.num_bytes / self.weights


def storage_summary(path: str | Path) -> list[StorageRow]:
    """What the weight files of a folder hold; formats with the fewest bits first.

    Raises:
        CheckpointError: missing or damaged files, or scales that do not belong to their weights.
    """
    folder = resolve(path)
    contents = read_contents(folder)
    hf, found, problems = contents.hf, contents.found, [*contents.problems]
    places: dict[str, ModuleFormat] = {}
    try:
        config = from_hf(hf) if hf else None
        if config is not None and not problems:
            too_large = validation.size_problem(config, found.stored)
            problems += [too_large] if too_large else []
        if config is not None and not problems:
            places = {place.path: place for place in module_formats(config, "bf16")}
    except ConfigError as error:
        problems.append(str(error))
    unknown = [
        f"{item.name} ({item.dtype})"
        for item in found.stored
        if item.dtype not in (*_ORDER, *modelopt.QUANTIZED)
    ]
    if unknown:
        problems.append(f"of a dtype that is not supported: {count_and_names(unknown)}")
    if problems:
        raise CheckpointError(folder, problems)

    sums: dict[tuple[str, str], tuple[set[str], float, int]] = {}
    stored_values: dict[str, int] = {}  # number of stored values of each module, with padding
    items = [(item, _module(item.name, places)) for item in found.stored]
    for item, module in items:
        if module is not None:
            stored_values[module.path] = stored_values.get(module.path, 0) + item.numel
    for item, module in items:
        role = OTHER if module is None else module.role
        form = modelopt.FP8 if item.dtype in modelopt.QUANTIZED[1:] else item.dtype
        # Padding does not count as weights: this tensor has its share of the module's weights.
        weights: float = item.numel
        if module is not None:
            weights *= module.parameters / stored_values[module.path]
        names, total, size = sums.get((role, form), (set(), 0.0, 0))
        size += sum(_bytes(tensor) for tensor in _stored_tensors(item, found))
        names.add(item.name if module is None else module.path)
        sums[role, form] = (names, total + weights, size)
    for scale in found.cache_scales.values():
        names, total, size = sums.get((OTHER, scale.dtype), (set(), 0.0, 0))
        sums[OTHER, scale.dtype] = (names | {scale.name}, total + 1, size + _bytes(scale))
    rows = [
        StorageRow(role, dtype, len(names), round(total), size)
        for (role, dtype), (names, total, size) in sums.items()
    ]
    return sorted(rows, key=lambda row: (row.role == OTHER, _ORDER.index(row.format), row.role))


def weight_bytes(path: str | Path) -> int:
    """Size of a folder's weight files in bytes, headers included.

    Raises:
        CheckpointError: weight files are missing.
    """
    folder = resolve(path)
    files, _, problems = find_files(folder)
    if problems:
        raise CheckpointError(folder, problems)
    return sum(file.stat().st_size for file in files)


def _module(name: str, places: dict[str, ModuleFormat]) -> ModuleFormat | None:
    """The module whose matrix is the stored tensor `name`; None if it is no module's matrix."""
    path, _, leaf = destination_of(name).name.rpartition(".")
    return places.get(path) if leaf in ("weight", "up_proj", "down_proj") else None


def _stored_tensors(item: StoredTensor, found: modelopt.GroupedTensors) -> Iterator[StoredTensor]:
    if item.name in found.modules:
        yield from found.modules[item.name].tensors.values()
    else:
        yield item


def _bytes(item: StoredTensor) -> int:
    return item.numel * _BYTES[item.dtype]
