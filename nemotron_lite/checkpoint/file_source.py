"""Weights of an offloaded model from the files of a checkpoint, read where they lie.

The headers say at which byte of which file each tensor begins. `FileWeights` opens all files when
the model is made, and reads a tensor, one expert or one row when a layer asks for it. Tensors in
the model's dtype are read straight into the store's buffers; others are cast or decoded, a piece
at a time, so that no second copy of a tensor is in memory beside the budget.

The files are read with ordinary read calls and not mapped into memory. A mapped page counts as
memory of the process as long as the mapping exists, and under a limit on address space (RLIMIT_AS)
a file larger than the limit cannot be mapped at all. A file that gets shorter while it is mapped
ends the process with a signal; here it is a CheckpointError. What the system keeps of the files in
its page cache is memory that it gives back when a program needs it; a second read of the same bytes
is then as fast as a copy.

Files stay open. So if a training run saves into the folder meanwhile, which replaces it as a whole,
this model keeps reading the old files. A program that writes over a file in place changes its size
or its time of change; the next read then raises a CheckpointError, and no weight of another model
gets in. Invalid values (scales that are zero or not finite) are found when they are read first.

Source: the safetensors format. Left out: several reads at once. The headers are read before by
weight_files.py, whose library maps each file for a moment: under RLIMIT_AS every single file has to
be smaller than the limit (`save(..., max_shard_bytes=)`). Limits on the memory itself, those of
containers, do not count mapped files.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nemotron_lite.checkpoint import modelopt
from nemotron_lite.checkpoint.errors import CheckpointError, printable
from nemotron_lite.checkpoint.modelopt import GroupedTensors, QuantizedModule
from nemotron_lite.checkpoint.names import Destination
from nemotron_lite.checkpoint.packed_loading import module_and_scale
from nemotron_lite.checkpoint.weight_dtypes import DTYPES, WeightDtypes
from nemotron_lite.checkpoint.weight_files import StoredTensor
from nemotron_lite.input_files import parse_json
from nemotron_lite.model import Nemotron
from nemotron_lite.offload import attach_weights

_DTYPES = dict(zip(modelopt.FLOATS, DTYPES.values(), strict=True))
_DTYPES |= {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}
# The tensors of a packed layer, and what they may be called in a file.
_PARTS = {
    "weight": modelopt.WEIGHTS,
    "weight_scale": modelopt.BLOCK_SCALES,
    "weight_scale_2": ("weight_scale_2", "weight_global_scale"),
    "input_scale": modelopt.INPUT_SCALES,
}
_PIECE = 2**20  # numbers that are cast or decoded at once


class _OpenFile(NamedTuple):
    """A file, its size and time of change when it was opened, and where its tensors begin."""

    handle: FileIO
    version: tuple[int, int]
    starts: dict[str, int]

    @staticmethod
    def version_of(handle: FileIO) -> tuple[int, int]:
        """What differs after another program has written to the file."""
        found = os.fstat(handle.fileno())
        return found.st_size, found.st_mtime_ns


class FileWeights:
    """A `WeightSource` that reads the files of a folder.

    Args:
        folder: for errors.
        matched: the stored tensor of each tensor of the model, or of one expert.
        found: the quantized weights among them, and the scales of the cache.

    Raises:
        CheckpointError: a file cannot be opened, or has no readable header.
    """

    nbytes = 0

    def __init__(
        self, folder: Path, matched: Mapping[Destination, StoredTensor], found: GroupedTensors
    ) -> None:
        self._folder, self._matched, self._modules = folder, matched, found.modules
        self._scales = {
            ".".join(module_and_scale(name)): item for name, item in found.cache_scales.items()
        }
        self._lock = threading.Lock()  # a file has one position
        self._valid = set[str]()  # tensors of quantized weights whose values were looked at
        items = [*matched.values(), *self._scales.values()]
        items += [part for module in found.modules.values() for part in module.tensors.values()]
        self._files: dict[Path, _OpenFile] = {}
        with ExitStack() as stack:
            for file in dict.fromkeys(item.file for item in items):
                self._files[file] = self._open(file, stack)
            # They are closed when nobody refers to this object any more.
            weakref.finalize(self, stack.pop_all().close)

    def _open(self, file: Path, stack: ExitStack) -> _OpenFile:
        """Open a file, and note where its tensors begin."""
        try:
            handle = stack.enter_context(FileIO(file))
            version = _OpenFile.version_of(handle)
            length = int.from_bytes(handle.read(8), "little")
            # The safetensors library has read it a moment ago; it may have changed since.
            header = parse_json(handle.read(min(length, version[0])).decode())
            header.pop("__metadata__", None)
            begins = {name: entry["data_offsets"][0] for name, entry in header.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._unreadable(file, str(error)) from error
        starts = {name: 8 + length + begin for name, begin in begins.items()}
        return _OpenFile(handle, version, starts)

    def read(
        self, name: str, out: Tensor, *, expert: int | None = None, row: int | None = None
    ) -> int:
        """Read a weight; see `WeightSource.read`.

        Raises:
            CheckpointError: the file cannot be read or was changed, or invalid values.
        """
        if name in self._scales:
            return self._read_valid(self._scales[name], "k_scale", out)
        found = self._stored(name, expert)
        if found is not None and found.name not in self._modules:
            stacked = Destination(name, expert) not in self._matched  # all experts in one tensor
            return self._read_into(found, out, expert if stacked else row)
        if found is not None and out.dtype in DTYPES.values():
            return self._read_decoded(self._modules[found.name], out)
        # A tensor of a packed layer; its codes have the name of the plain weight.
        module, _, leaf = name.rpartition(".")
        found = self._stored(module, expert) or self._stored(f"{module}.weight", None)
        assert found is not None
        return self._read_packed(self._modules[found.name], leaf, out)

    def _stored(self, name: str, expert: int | None) -> StoredTensor | None:
        """The stored tensor of a weight, or of the stack that an expert is in."""
        found = self._matched.get(Destination(name, expert))
        return self._matched.get(Destination(name)) if found is None else found

    def _read_into(self, item: StoredTensor, out: Tensor, row: int | None = None) -> int:
        """A tensor, or the part of it that begins at `row` parts of this size, in `out`'s dtype."""
        dtype, flat = _DTYPES[item.dtype], out.view(-1)
        begin = (row or 0) * len(flat) * dtype.itemsize
        if dtype == out.dtype:
            self._read_bytes(item, flat, begin)
            return flat.nbytes
        raw = torch.empty(min(len(flat), _PIECE), dtype=dtype, device="cpu")
        for first in range(0, len(flat), _PIECE):
            part = raw[: len(flat) - first]
            self._read_bytes(item, part, begin + first * dtype.itemsize)
            flat[first : first + len(part)].copy_(part)
        return len(flat) * dtype.itemsize

    def _read_bytes(self, item: StoredTensor, out: Tensor, skip: int) -> None:
        """Fill `out` with the bytes of a tensor, from its byte `skip` on."""
        target = out.view(torch.uint8).numpy().data
        file, done, end = self._files[item.file], 0, False
        try:
            with self._lock:
                file.handle.seek(file.starts[item.name] + skip)
                while done < len(target) and not end:
                    count = file.handle.readinto(target[done:])
                    done, end = done + count, count == 0
                changed = _OpenFile.version_of(file.handle) != file.version
        except (OSError, ValueError) as error:
            raise self._unreadable(item.file, str(error), item.name) from error
        if changed or end:
            problem = "it was changed after the model was loaded. Load the model again"
            raise self._unreadable(item.file, problem, item.name)

    def _read_packed(self, module: QuantizedModule, leaf: str, out: Tensor) -> int:
        """One tensor of a packed layer."""
        part = next(part for part in _PARTS[leaf] if part in module.tensors)
        item = module.tensors[part]
        if (_DTYPES[item.dtype], item.shape) == (out.dtype, out.shape) and part == leaf:
            return self._read_valid(item, part, out)
        raw = torch.empty(item.shape, dtype=_DTYPES[item.dtype], device="cpu")
        size = self._read_valid(item, part, raw)
        out.copy_(modelopt.as_packed(module, {part: raw})[leaf].view(out.shape))
        return size

    def _read_valid(self, item: StoredTensor, part: str, out: Tensor) -> int:
        """A tensor of a quantized weight, in its own dtype or as a number in that of `out`."""
        size = self._read_into(item, out)
        if item.name not in self._valid:  # the file is still the same
            self._check(item, part, out)
            self._valid.add(item.name)
        return size

    def _check(self, item: StoredTensor, part: str, values: Tensor) -> None:
        for _, wrong in modelopt.invalid_values({part: values}):
            problem = (
                f"invalid values: {printable(item.name)} holds {wrong:g}; expected finite numbers, "
                "and scales above 0. Copy the files again"
            )
            raise CheckpointError(self._folder, [problem])

    def _read_decoded(self, module: QuantizedModule, out: Tensor) -> int:
        """A quantized weight, decoded some rows at a time."""
        rows, columns = module.shape
        step = max(1, _PIECE // columns // module.tile[0]) * module.tile[0]
        size = 0
        for first in range(0, rows, step):
            last, tensors = min(first + step, rows), dict[str, Tensor]()
            for part, item in module.tensors.items():
                shape, begin = self._stripe(module, part, first, last)
                tensors[part] = torch.empty(shape, dtype=_DTYPES[item.dtype], device="cpu")
                values = tensors[part].view(-1)
                self._read_bytes(item, values, begin * values.itemsize)
                self._check(item, part, tensors[part])
                size += values.nbytes
            stripe = module._replace(shape=(last - first, columns))
            out[first:last].copy_(modelopt.decode(stripe, tensors, (last - first, out.shape[1])))
        return size

    def _stripe(
        self, module: QuantizedModule, part: str, first: int, last: int
    ) -> tuple[tuple[int, ...], int]:
        """Shape of the part of a stored tensor that some rows need, and the numbers before it."""
        shape = module.tensors[part].shape
        scale = part in modelopt.BLOCK_SCALES
        if part in modelopt.TENSOR_SCALES or (scale and module.algo == modelopt.FP8):
            return shape, 0
        if scale and module.algo == modelopt.FP8_TILES:
            first, last = first // module.tile[0], -(-last // module.tile[0])
        return (last - first, *shape[1:]), first * math.prod(shape[1:])

    def _unreadable(self, file: Path, why: str, name: str = "") -> CheckpointError:
        where = f" ({printable(name)})" if name else ""
        problem = f"{printable(file.name)} could not be read{where}: {printable(why, 200)}"
        return CheckpointError(self._folder, [problem])


def offload_files(
    model: Nemotron,
    folder: Path,
    matched: Mapping[Destination, StoredTensor],
    found: GroupedTensors,
    dtypes: WeightDtypes,
    *,
    budget: int,
    progress: bool,
) -> None:
    """Let a model on the meta device fetch its weights from the files of a folder.

    Args:
        model: of an `offloaded_class`, with packed layers where weights stay quantized.
        matched, found: from `match_tensors` and `group_quantized`.
        dtypes: of the model's tensors.
        budget: bytes of weights in memory at most.
        progress: report on stderr how many layers a call has run.

    Raises:
        CheckpointError: a format of which no parts can be read.
        ValueError: the budget has no room for the largest tensor.
    """
    table = matched[Destination("backbone.embeddings.weight")]
    if table.name in found.modules:
        problem = (
            f"{printable(table.name)} is stored in {table.dtype}, of which no single rows can be "
            "read. Load this checkpoint without offload=True"
        )
        raise CheckpointError(folder, [problem])
    for destination, item in matched.items():
        path, _, leaf = destination.name.rpartition(".")
        module = model.get_submodule(path)
        is_parameter = leaf in module._parameters
        held: dict[str, Any] = module._parameters if is_parameter else module._buffers
        plain = held.get(leaf)
        if plain is None or not plain.is_floating_point() or plain.dtype.itemsize == 1:
            continue  # a packed weight
        quantized = item.name in found.modules
        dtype = dtypes.main if quantized else dtypes.of(destination.name, _DTYPES[item.dtype])
        cast = plain.to(dtype)
        held[leaf] = nn.Parameter(cast, requires_grad=False) if is_parameter else cast
    source = FileWeights(folder, matched, found)
    attach_weights(model, source, budget=budget, progress=progress)
