"""Weights of an offloaded model from the files of a checkpoint, read where they lie.

The headers say at which byte of which file each tensor begins. `FileWeights` opens all files when
the model is made, and reads a tensor, one expert or one row when a layer asks for it. Tensors in
the model's dtype are read straight into the store's buffers; others are cast or decoded.

The files are read with ordinary read calls and not mapped into memory. A mapped page counts as
memory of the process as long as the mapping exists, and under a limit on address space (RLIMIT_AS)
a file larger than the limit cannot be mapped at all. A file that gets shorter while it is mapped
ends the process with a signal; here it is a CheckpointError. What the system keeps of the files in
its page cache is memory that it gives back when a program needs it; a second read of the same bytes
is then as fast as a copy.

Files stay open. So if a training run saves into the folder meanwhile, which replaces it as a whole,
this model keeps reading the old files. Invalid values (scales that are zero or not finite) are
found when they are read.

Source: the safetensors format. Left out: files that another program writes over in place; several
reads at once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any

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
        items = [*matched.values(), *self._scales.values()]
        items += [part for module in found.modules.values() for part in module.tensors.values()]
        self._files: dict[Path, FileIO] = {}
        self._starts: dict[tuple[Path, str], int] = {}
        with ExitStack() as stack:
            for file in dict.fromkeys(item.file for item in items):
                self._files[file] = stack.enter_context(self._open(file))
            # They are closed when nobody refers to this object any more.
            weakref.finalize(self, stack.pop_all().close)

    def _open(self, file: Path) -> FileIO:
        """Open a file, and note where its tensors begin."""
        try:
            opened = FileIO(file)
            length = int.from_bytes(opened.read(8), "little")
            header = parse_json(opened.read(length).decode())
        except (OSError, ValueError) as error:  # the safetensors library has read it a moment ago
            raise self._unreadable(file, error) from error
        for name, entry in header.items():
            if name != "__metadata__":
                self._starts[file, name] = 8 + length + entry["data_offsets"][0]
        return opened

    def read(
        self, name: str, out: Tensor, *, expert: int | None = None, row: int | None = None
    ) -> int:
        """Read a weight; see `WeightSource.read`.

        Raises:
            CheckpointError: the file cannot be read to the end of the tensor, or invalid values.
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
        """A tensor, or one row of it, in the dtype of `out`."""
        dtype = _DTYPES[item.dtype]
        raw = out if dtype == out.dtype else torch.empty(out.shape, dtype=dtype)
        self._read_bytes(item, raw, (row or 0) * raw.nbytes)
        if raw is not out:
            out.copy_(raw)
        return raw.nbytes

    def _read_bytes(self, item: StoredTensor, out: Tensor, skip: int) -> None:
        """Fill `out` with the bytes of a tensor, from its byte `skip` on."""
        target = out.reshape(-1).view(torch.uint8).numpy().data
        file, done = self._files[item.file], 0
        try:
            with self._lock:
                file.seek(self._starts[item.file, item.name] + skip)
                while done < len(target):
                    count = file.readinto(target[done:])
                    if not count:
                        raise OSError("it ends before the tensor does")
                    done += count
        except (OSError, ValueError) as error:
            raise self._unreadable(item.file, error, item.name) from error

    def _read_packed(self, module: QuantizedModule, leaf: str, out: Tensor) -> int:
        """One tensor of a packed layer."""
        part = next(part for part in _PARTS[leaf] if part in module.tensors)
        item = module.tensors[part]
        if (_DTYPES[item.dtype], item.shape) == (out.dtype, out.shape) and part == leaf:
            return self._read_valid(item, part, out)
        raw = torch.empty(item.shape, dtype=_DTYPES[item.dtype])
        size = self._read_valid(item, part, raw)
        out.copy_(modelopt.as_packed(module, {part: raw})[leaf].view(out.shape))
        return size

    def _read_valid(self, item: StoredTensor, part: str, out: Tensor) -> int:
        """A tensor of a quantized weight, in its own dtype or as a number in that of `out`."""
        size = self._read_into(item, out)
        for _, wrong in modelopt.invalid_values({part: out}):
            problem = (
                f"invalid values: {printable(item.name)} holds {wrong:g}; expected finite numbers, "
                "and scales above 0. Copy the files again"
            )
            raise CheckpointError(self._folder, [problem])
        return size

    def _read_decoded(self, module: QuantizedModule, out: Tensor) -> int:
        """A quantized weight, decoded."""
        tensors, size = {}, 0
        for part, item in module.tensors.items():
            tensors[part] = torch.empty(item.shape, dtype=_DTYPES[item.dtype])
            size += self._read_valid(item, part, tensors[part])
        out.copy_(modelopt.decode(module, tensors, tuple(out.shape)))
        return size

    def _unreadable(self, file: Path, error: Exception, name: str = "") -> CheckpointError:
        where = f" ({printable(name)})" if name else ""
        problem = f"{printable(file.name)} could not be read{where}: {printable(str(error), 200)}"
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
