"""Checks of a checkpoint folder: everything that is wrong with it, before any weight is read.

A file in the safetensors format begins with eight bytes that give the length of a JSON header. The
header has the dtype, shape and byte range of each tensor, and the bytes of the tensors follow. So a
folder of hundreds of gigabytes can be compared with its config by reading a few kilobytes per file.
The whole folder is compared before a single weight is read, and one `CheckpointError` reports all
problems. Otherwise a user would download again and again, and find one problem each time.

These are problems: files that are missing, truncated or not safetensors; an index that names
tensors or files that do not exist; tensors that are missing, that the config does not expect, that
have another shape, or that occur twice; dtypes that are not supported. No tensor is skipped
silently, even if it looks harmless. The only exception is the MTP module, which the caller can
leave out.

Functions that can find several problems return them as a list of sentences.

Source: reference sheet section 10; the safetensors format. Left out: pickle files, which can run
code when they are opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from nemotron_lite.checkpoint.names import Destination, destination_of, is_stack_of_experts

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# The supported dtypes of weights, as the safetensors format names them.
FLOATS = ("F64", "F32", "F16", "BF16")
# Quantized weights: `modelopt` makes one entry of a weight and its scales.
QUANTIZED = ("NVFP4", "FP8")
NVFP4_BLOCK = 16  # rows of NVFP4 are padded to a multiple of this


class CheckpointError(ValueError):
    """A folder that cannot be loaded, or a model that cannot be saved.

    Attributes:
        problems: all that is wrong, one sentence each.
    """

    def __init__(self, folder: Path, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        header = f"{folder}: {count} problem{'s' if count > 1 else ''}"
        indented = (problem.replace("\n", "\n    ") for problem in self.problems)
        super().__init__("\n  - ".join([header, *indented]))


class StoredTensor(NamedTuple):
    """One tensor in a file."""

    file: Path
    name: str  # as it is spelled in the file
    shape: tuple[int, ...]
    dtype: str  # as the safetensors format names it, such as BF16


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
    if (folder / WEIGHTS).is_file():
        return WeightFiles([folder / WEIGHTS], {}, [])
    if not (folder / INDEX).is_file():
        problem = f"there is neither {WEIGHTS} nor {INDEX}{_other_weight_files(folder)}"
        return WeightFiles([], {}, [problem])
    index, problems = read_json(folder / INDEX)
    weight_map = index.get("weight_map")
    valid = isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())
    if not valid or not weight_map:
        problems.append(f"{INDEX} has no weight_map; download or copy it again")
        return WeightFiles([], {}, problems)
    names = sorted(set(weight_map.values()))
    # A name that contains a path would read files outside the folder.
    outside = [name for name in names if Path(name).name != name]
    missing = [n for n in names if n not in outside and not (folder / n).is_file()]
    if outside:
        problems.append(f"{INDEX} names files outside the folder: {shorten(outside)}")
    if missing:
        problems.append(
            f"{INDEX} names {len(missing)} of {len(names)} files that are not in the folder: "
            f"{shorten(missing)}; download or copy them"
        )
    files = [folder / name for name in names if name not in outside and name not in missing]
    return WeightFiles(files, weight_map, problems)


def _other_weight_files(folder: Path) -> str:
    """The end of an error message: weight files under other names, and what to do."""
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        names = shorten(file.name for file in shards)
        return f", but there is {names}: the index is missing, download or copy it"
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        names = shorten(file.name for file in pickles)
        return (
            f", but there is {names}: pickle files are not supported. Open the model with the"
            " program that wrote it and save it with safe_serialization=True"
        )
    return "; download or copy the weights"


def read_headers(folder: Path) -> tuple[list[StoredTensor], list[str]]:
    """Name, shape and dtype of every tensor in a folder's weight files, and the problems found."""
    files, weight_map, problems = find_files(folder)
    stored: list[StoredTensor] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118, a handle is no mapping
                    tensor = handle.get_slice(name)
                    shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                    stored.append(StoredTensor(file, name, shape, dtype))
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name} {_why_unreadable(file, error)}")
    if weight_map and not problems:
        found = {(item.name, item.file.name) for item in stored}
        missing = [name for name, file in weight_map.items() if (name, file) not in found]
        if missing:
            problems.append(
                f"{INDEX} lists tensors that are not in the files it names: "
                f"{_count_and_names(missing)}; the index and the files belong to different"
                " checkpoints"
            )
    return stored, problems


def _why_unreadable(file: Path, error: Exception) -> str:
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(8)
        if start == b"version ":
            return "is a Git LFS pointer and not the file itself; run `git lfs pull` in the folder"
        length = int.from_bytes(start, "little")
        if len(start) == 8 and length < size:
            try:
                header = json.loads(handle.read(length))
                header.pop("__metadata__", None)
                expected = 8 + length + max(v["data_offsets"][1] for v in header.values())
            except (ValueError, KeyError, TypeError, AttributeError):
                expected = 0
            if expected > size:
                return (
                    f"is truncated: it has {size:,} of {expected:,} bytes; download or copy it"
                    " again"
                )
    return f"is no readable safetensors file ({size:,} bytes; {error}); download or copy it again"


def read_json(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The JSON object in a file, and no problems; or an empty one, and what is wrong."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, [f"{file.name} is missing; copy it from where the weights are from"]
    except (ValueError, OSError) as error:
        return {}, [f"{file.name} is no readable JSON ({error}); download or copy it again"]
    if not isinstance(value, dict):
        return {}, [
            f"{file.name} holds a {type(value).__name__}, expected an object; download or copy it"
            " again"
        ]
    return value, []


def match_tensors(
    expected: Mapping[str, tuple[int, ...]], stored: Iterable[StoredTensor]
) -> tuple[dict[Destination, StoredTensor], list[str]]:
    """Which stored tensor belongs to which tensor of the model.

    Args:
        expected: the shapes of the model's tensors, by name.
        stored: the tensors in the files.

    Returns:
        The stored tensor of each destination, and the problems: tensors that are missing,
        unexpected, stored twice, or of a wrong shape or dtype.
    """
    matched: dict[Destination, StoredTensor] = {}
    first: dict[str, StoredTensor] = {}  # the first tensor of each name: a stack or one expert
    wrong: set[Destination] = set()  # stored, but not usable: not to be reported as missing too
    unexpected, shapes, duplicates, dtypes = [], [], [], []
    for item in stored:
        destination = destination_of(item.name)
        stacked = destination.expert is None
        shape = expected.get(destination.name)
        if shape is not None and destination.expert is not None:
            # The model has no tensor for an expert number that is too large.
            shape = shape[1:] if destination.expert < shape[0] else None
        if shape is None:
            unexpected.append(item.name)
        elif item.shape != _stored_shape(shape, item.dtype):
            shapes.append(f"{item.name} {list(item.shape)} for {list(shape)}")
            wrong.add(destination)
        elif item.dtype not in FLOATS + QUANTIZED:
            dtypes.append(f"{item.name} ({item.dtype})")
            wrong.add(destination)
        elif destination in matched:
            duplicates.append(_duplicate(item, matched[destination]))
        elif stacked != _is_stacked(first.setdefault(destination.name, item)):
            duplicates.append(_duplicate(item, first[destination.name]))
        else:
            matched[destination] = item
    problems = []
    for names in _backbone_and_mtp(_missing_names(expected, {*matched, *wrong})):
        problems.append(f"missing: {_count_and_names(names)}{_advice_for_missing(names)}")
    for names in _backbone_and_mtp(unexpected):
        problems.append(
            "not in the model that config.json describes: "
            f"{_count_and_names(names)}{_advice_for_unexpected(names)}"
        )
    for label, found in (
        ("of another shape than config.json says (stored for expected)", shapes),
        ("stored twice", duplicates),
        (f"of a dtype that is not supported (expected {', '.join(FLOATS)})", dtypes),
    ):
        if found:
            problems.append(
                f"{label}: {_count_and_names(found)}. Take files that were saved together"
            )
    return matched, problems


def _is_stacked(item: StoredTensor) -> bool:
    return destination_of(item.name).expert is None


def _stored_shape(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    """The shape in the file of a tensor that has `shape` in the model: NVFP4 pads rows."""
    if dtype != "NVFP4" or not shape:
        return shape
    return (*shape[:-1], -(-shape[-1] // NVFP4_BLOCK) * NVFP4_BLOCK)


def _duplicate(one: StoredTensor, other: StoredTensor) -> str:
    if one.name == other.name:
        return f"{one.name} (in {other.file.name} and {one.file.name})"
    return f"{one.name} (also as {other.name})"


def _missing_names(expected: Mapping[str, tuple[int, ...]], found: set[Destination]) -> list[str]:
    """Names of the model's tensors that are not stored; if some experts are, the others' names."""
    missing = []
    for name, shape in expected.items():
        if Destination(name) in found:
            continue
        experts = range(shape[0]) if is_stack_of_experts(name) else ()
        absent = [e for e in experts if Destination(name, e) not in found]
        if not experts or len(absent) == shape[0]:
            missing.append(name)
        else:
            stem, _, matrix = name.rpartition(".")
            missing.extend(f"{stem}.{e}.{matrix}.weight" for e in absent)
    return missing


def _backbone_and_mtp(names: list[str]) -> list[list[str]]:
    """The names of the backbone and those of MTP, without empty lists; their causes differ."""
    mtp = [name for name in names if name.startswith("mtp.")]
    rest = [name for name in names if not name.startswith("mtp.")]
    return [group for group in (rest, mtp) if group]


def _advice_for_missing(names: list[str]) -> str:
    """What to do about missing tensors, if their names show the cause."""
    if not names[0].startswith("mtp."):
        return ". Copy the files again, or take the config.json that belongs to them"
    return (
        ". config.json says that there is an MTP module (num_nextn_predict_layers); transformers"
        " drops it when it saves. Load the original files, or load without it:"
        ' load(path, mtp="drop")'
    )


def _advice_for_unexpected(names: list[str]) -> str:
    """What to do about unexpected tensors, if their names show the cause."""
    if names[0].startswith("mtp."):
        return (
            ". If they are an MTP module that config.json does not mention, set"
            " num_nextn_predict_layers to 1 in it, or leave the module out:"
            ' load(path, mtp="drop")'
        )
    if all(".shared_experts." in name for name in names):
        return (
            ". config.json says n_shared_experts is 0, which transformers ignores: set it to 1 if"
            " the weights were trained with a shared expert"
        )
    return ". Take the config.json that belongs to the weights, or save them again without these"


def _count_and_names(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}, {shorten(names)}"


def shorten(names: Iterable[str], limit: int = 8) -> str:
    """The first few names of a list that may have thousands."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
