"""What a checkpoint's files hold, matrix by matrix: formats, bits a weight, bytes.

Only headers are read, so a folder of hundreds of gigabytes answers at once. Each stored tensor is
put to the module of the model that it belongs to, and modules of one role in one format make one
line:

    routed experts in NVFP4     6 layers     9.03 M weights     4.51 bits each

Bits a weight are stored bits over the model's own weights, so they count all scales, and the codes
that fill rows up to a multiple of 16. What is no matrix of a module (norms, convolutions, A, D, the
selection bias, scales of the cache) is one last line.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nemotron_lite.checkpoint import modelopt, validation
from nemotron_lite.checkpoint.names import place_of
from nemotron_lite.checkpoint.validation import CheckpointError, Stored
from nemotron_lite.config import ConfigError
from nemotron_lite.hf_config import from_hf
from nemotron_lite.quantization.recipe import ModuleFormat, module_formats

OTHER = "other"
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1}
_ORDER = ("NVFP4", "FP8", "BF16", "F16", "F32", "F64")


class StoredGroup(NamedTuple):
    """Modules of one role that are stored in one format.

    Attributes:
        role: a key of `recipe.ROLES`, or `OTHER`.
        format: as the files call it (BF16, F32, …), or NVFP4 or FP8.
        modules: of the model, a layer's experts counting as one; tensors where the role is OTHER.
        weights: of these modules.
        num_bytes: of the weights with all that is stored beside them.
    """

    role: str
    format: str
    modules: int
    weights: int
    num_bytes: int

    @property
    def bits(self) -> float:
        """Stored bits for each weight."""
        return 8 * self.num_bytes / self.weights


def storage_report(path: str | Path) -> list[StoredGroup]:
    """What the weight files of a folder hold, the narrowest format first.

    Raises:
        CheckpointError: no files, damaged ones, or scales that do not belong to their weights.
    """
    folder = Path(path)
    problems: list[str] = []
    hf = validation.read_json(folder / "config.json", problems)
    files, weight_map = validation.find_files(folder, problems)
    stored = validation.read_headers(files, weight_map, problems)
    found = modelopt.gather(stored, problems)
    try:
        places = {place.path: place for place in module_formats(from_hf(hf), "bf16")} if hf else {}
    except ConfigError as error:
        problems.append(str(error))
    odd = [f"{item.name} ({item.dtype})" for item in found.stored if item.dtype not in _ORDER]
    if odd:
        problems.append(f"of a type that is not read: {validation.some(odd)}")
    if problems:
        raise CheckpointError(folder, problems)

    sums: dict[tuple[str, str], tuple[set[str], float, int]] = {}
    stacks: dict[str, int] = {}  # stored numbers of each module, to divide its weights by
    items = [(item, _module(item.name, places)) for item in found.stored]
    for item, module in items:
        if module is not None:
            stacks[module.path] = stacks.get(module.path, 0) + _count(item)
    for item, module in items:
        role = OTHER if module is None else module.role
        # Filled-up columns are no weights: the module's own number counts, by this tensor's share.
        weights: float = _count(item)
        if module is not None:
            weights *= module.parameters / stacks[module.path]
        names, total, size = sums.get((role, item.dtype), (set(), 0.0, 0))
        size += sum(_bytes(part) for part in _parts(item, found))
        names = names | {item.name if module is None else module.path}
        sums[role, item.dtype] = (names, total + weights, size)
    for scale in found.cache_scales.values():
        names, total, size = sums.get((OTHER, scale.dtype), (set(), 0.0, 0))
        sums[OTHER, scale.dtype] = (names | {scale.name}, total + 1, size + _bytes(scale))
    held = [
        StoredGroup(role, form, len(names), round(total), size)
        for (role, form), (names, total, size) in sums.items()
    ]
    return sorted(held, key=lambda one: (one.role == OTHER, _ORDER.index(one.format), one.role))


def weight_bytes(path: str | Path) -> int:
    """Bytes of a folder's weight files, headers included.

    Raises:
        CheckpointError: there are none.
    """
    problems: list[str] = []
    files, _ = validation.find_files(Path(path), problems)
    if problems:
        raise CheckpointError(Path(path), problems)
    return sum(file.stat().st_size for file in files)


def _module(name: str, places: dict[str, ModuleFormat]) -> ModuleFormat | None:
    """The module whose matrix the stored tensor `name` is."""
    place = place_of(name).name
    path, _, leaf = place.rpartition(".")
    return places.get(path) if leaf in ("weight", "up_proj", "down_proj") else None


def _parts(item: Stored, found: modelopt.Gathered) -> Iterator[Stored]:
    if item.name in found.modules:
        yield from found.modules[item.name].parts.values()
    else:
        yield item


def _count(item: Stored) -> int:
    total = 1
    for length in item.shape:
        total *= length
    return total


def _bytes(item: Stored) -> int:
    return _count(item) * _BYTES[item.dtype]
