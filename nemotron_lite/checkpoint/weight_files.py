"""The weight files of a folder: which there are, and what their headers say.

A file in the safetensors format begins with eight bytes that give the length of a JSON header. The
header has the dtype, shape and byte range of each tensor, and the bytes of the tensors follow. So a
folder of hundreds of gigabytes can be compared with its config by reading a few kilobytes per file.

The safetensors library checks the header: its length, that it is JSON, that the byte ranges fit the
shapes and cover the file. This module makes its errors understandable, and checks what the library
does not: that the files are regular files inside the folder, and that an index and its files belong
together.

Functions that can find several problems return them as a list of sentences.

Source: the safetensors format. Left out: pickle files, which can run code when they are opened.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from nemotron_lite.cache_file import is_cache_file
from nemotron_lite.checkpoint.errors import count_and_names, printable, shorten
from nemotron_lite.files import NOT_UTF8, is_utf8
from nemotron_lite.input_files import FileError, parse_json, read_json

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

LONGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses longer ones
LONGEST_FILE_NAME = 255  # bytes; file systems have no longer names
AGAIN = "download or copy it again"
_PICKLES = (".bin", ".pt", ".pth")


class StoredTensor(NamedTuple):
    """One tensor in a file."""

    file: Path
    name: str  # as it is spelled in the file
    shape: tuple[int, ...]
    dtype: str  # as the safetensors format names it, such as BF16

    @property
    def numel(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


class WeightFiles(NamedTuple):
    """The weight files of a folder.

    Attributes:
        files: those that exist.
        weight_map: the index's map from tensor to file name; empty without an index.
        problems: what is wrong with them.
    """

    files: list[Path]
    weight_map: dict[str, str]
    problems: list[str]


def find_files(folder: Path) -> WeightFiles:
    """The weight files of a folder. `model.safetensors` is preferred, as in transformers."""
    for name in (WEIGHTS, INDEX):
        if (fault := _not_a_file(folder / name)) is not None:
            return WeightFiles([], {}, [f"{name} {fault}"])
    if (folder / WEIGHTS).is_file():
        return WeightFiles([folder / WEIGHTS], {}, [])
    if not (folder / INDEX).is_file():
        problem = f"there is neither {WEIGHTS} nor {INDEX}{_other_weight_files(folder)}"
        return WeightFiles([], {}, [problem])
    index, problems = read_object(folder / INDEX)
    weight_map = index.get("weight_map")
    valid = isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())
    if not valid or not weight_map:
        problems = problems or [f"{INDEX} has no weight_map; {AGAIN}"]
        return WeightFiles([], {}, problems)
    names = sorted(set(weight_map.values()))
    present = {entry.name for entry in os.scandir(folder)}
    # A name that contains a path would read files outside the folder.
    outside = [name for name in names if not _is_plain_name(name)]
    inside = [name for name in names if _is_plain_name(name)]
    missing = [name for name in inside if name not in present]
    if outside:
        problems.append(
            f"{INDEX} names files outside the folder: {count_and_names(outside, 'name')}"
        )
    if missing:
        problems.append(
            f"{INDEX} names {len(missing):,} of {len(names):,} files that are not in the folder: "
            f"{shorten(missing)}; download or copy them"
        )
    files = []
    for name in inside:
        if name in present:
            if (fault := _not_a_file(folder / name)) is not None:
                problems.append(f"{printable(name)} {fault}")
            else:
                files.append(folder / name)
    return WeightFiles(files, weight_map, problems)


def _is_plain_name(name: str) -> bool:
    """Whether this names a file of the folder itself."""
    plain = "/" not in name and "\\" not in name and "\0" not in name
    encoded = name.encode("utf-8", errors="surrogatepass")
    return plain and name not in ("", ".", "..") and len(encoded) <= LONGEST_FILE_NAME


def _not_a_file(path: Path) -> str | None:
    """What is wrong with a path that exists and is no regular file; None otherwise."""
    try:
        if path.is_symlink() and not path.exists():
            return "is a link to a file that does not exist; download or copy it"
        if path.exists() and not path.is_file():
            kind = "a folder" if path.is_dir() else "a device or a named pipe"
            return f"is {kind}; expected a regular file"
    except (OSError, ValueError) as error:  # ValueError: a name that cannot be encoded
        return f"cannot be opened ({printable(str(error))})"
    return None


def _other_weight_files(folder: Path) -> str:
    """The end of an error message: weight files under other names, and what to do."""
    found = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", *_PICKLES))
    caches = [file for file in found if is_cache_file(file)]
    shards = [f for f in found if f.suffix == ".safetensors" and f not in caches]
    if shards:
        names = shorten(file.name for file in shards)
        return f", but there is {names}: the index is missing, download or copy it"
    pickles = [f for f in found if f.suffix in _PICKLES and f not in caches]
    if pickles:
        names = shorten(file.name for file in pickles)
        return (
            f", but there is {names}: pickle files are not supported. Open the model with the"
            " program that wrote it and save it with safe_serialization=True"
        )
    if caches:
        names = shorten(file.name for file in caches)
        return (
            f", but there is {names}: a cache that `Cache.save` wrote, which holds no weights. "
            "`Cache.load` opens it; download or copy the weights"
        )
    return "; download or copy the weights"


def read_headers(folder: Path) -> tuple[list[StoredTensor], list[str]]:
    """Name, shape and dtype of every tensor in a folder's weight files, and the problems found."""
    files, weight_map, problems = find_files(folder)
    stored: list[StoredTensor] = []
    unreadable: list[str] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118, a handle is no mapping
                    tensor = handle.get_slice(name)
                    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                    stored.append(StoredTensor(file, name, shape, dtype))
        except (SafetensorError, OSError, ValueError, OverflowError) as error:
            unreadable.append(f"{printable(file.name)} {_why_unreadable(file, error)}")
    problems += unreadable[:8]
    if len(unreadable) > 8:
        problems.append(f"{len(unreadable) - 8:,} more files are not readable")
    if weight_map and not problems:
        found = {(item.name, item.file.name) for item in stored}
        missing = [name for name, file in weight_map.items() if (name, file) not in found]
        if missing:
            problems.append(
                f"{INDEX} lists tensors that are not in the files it names: "
                f"{count_and_names(missing)}; the index and the files belong to different"
                " checkpoints"
            )
    return stored, problems


def _why_unreadable(file: Path, error: Exception) -> str:
    if not is_utf8(file):
        return NOT_UTF8
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            start = handle.read(8)
            length = int.from_bytes(start, "little")
            # A header may be as long as the library accepts; a damaged file names any length.
            header = handle.read(length) if length < min(size, LONGEST_HEADER) else b""
    except OSError as cause:
        return f"cannot be read ({cause.strerror}); check the disk, or {AGAIN}"
    if start == b"version ":
        return "is a Git LFS pointer and not the file itself; run `git lfs pull` in the folder"
    expected = 8 + length + _bytes_of(header)
    if expected > size > 8 + length:
        return f"is truncated: it has {size:,} of {expected:,} bytes; {AGAIN}"
    return (
        f"is no readable safetensors file ({size:,} bytes; {printable(str(error), 200)}); {AGAIN}"
    )


def _bytes_of(header: bytes) -> int:
    """The bytes of tensors that a header announces; 0 if it is damaged."""
    try:
        entries = parse_json(header.decode())
        entries.pop("__metadata__", None)
        return max(int(entry["data_offsets"][1]) for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError):
        return 0


def read_object(file: Path, *, infinity: bool = False) -> tuple[dict[str, Any], list[str]]:
    """The JSON object in a file, and no problems; or an empty one, and what is wrong.

    Args:
        infinity: accept bare Infinity, which the config.json of released models has.
    """
    try:
        return read_json(file, infinity=infinity), []
    except FileNotFoundError:
        if (inside := file.parent / "model" / file.name).is_file():
            return {}, [f"this is the folder of a run; its model is in {inside.parent}"]
        return {}, [f"{file.name} is missing; copy it from where the weights are from"]
    except FileError as error:
        return {}, [f"{file.name} {printable(error.fault, 300)}; {AGAIN}"]
