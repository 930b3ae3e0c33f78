"""What a checkpoint folder holds, and everything that is wrong with it.

A file in the safetensors format begins with eight bytes that give the length of a JSON header; the
header names each tensor with dtype, shape and byte range; the bytes follow. So a folder of hundreds
of gigabytes can be compared with what its config promises by reading a few kilobytes per file. All
of it is compared before a single weight is read, and one `CheckpointError` reports all that is
wrong: whoever downloads for an hour should not learn of the faults one at a time.

What counts as wrong: files that are missing, cut short or no safetensors; an index that names what
is not there; tensors that are missing, that the config has no place for, that have another shape or
that come twice; number formats that are not read. Nothing is skipped quietly, not even tensors that
look harmless, with one exception the caller can ask for: the MTP module.

Source: reference sheet section 10; the safetensors format. Left out: pickle files, which can run
code when they are opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from nemotron_lite.checkpoint.names import Place, is_stack_of_experts, place_of

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Number formats that are read, by the format's own codes.
FLOATS = ("F64", "F32", "F16", "BF16")
# What `modelopt` made one entry of: a weight with its scales.
QUANTIZED = ("NVFP4", "FP8")
NVFP4_ROWS = 16  # rows of NVFP4 are filled up to a multiple of this


class CheckpointError(ValueError):
    """A folder that cannot be loaded, or a model that cannot be saved.

    Attributes:
        problems: everything that is wrong, one sentence each.
    """

    def __init__(self, where: Path, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        count = len(self.problems)
        header = f"{where}: {count} problem{'s' if count > 1 else ''}"
        indented = (problem.replace("\n", "\n    ") for problem in self.problems)
        super().__init__("\n  - ".join([header, *indented]))


class Stored(NamedTuple):
    """One tensor in a file."""

    file: Path
    name: str  # as the file spells it
    shape: tuple[int, ...]
    dtype: str  # code of the format, such as BF16


def find_files(folder: Path, problems: list[str]) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a folder, and the index's tensor-to-file map (empty for a single file).

    `model.safetensors` is preferred to an index, as by transformers.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS], {}
    if not (folder / INDEX).is_file():
        problems.append(f"there is neither {WEIGHTS} nor {INDEX}{_what_else(folder)}")
        return [], {}
    index = read_json(folder / INDEX, problems)
    weight_map = index.get("weight_map")
    named = isinstance(weight_map, dict) and all(isinstance(f, str) for f in weight_map.values())
    if not named or not weight_map:
        problems.append(f"{INDEX} has no weight_map; download or copy it again")
        return [], {}
    names = sorted(set(weight_map.values()))
    # A name with a path in it would reach outside the checkpoint's folder.
    odd = [name for name in names if Path(name).name != name]
    absent = [name for name in names if name not in odd and not (folder / name).is_file()]
    if odd:
        problems.append(f"{INDEX} names files outside the folder: {some(odd)}")
    if absent:
        problems.append(
            f"{INDEX} names {len(absent)} of {len(names)} files that are not in the folder: "
            f"{some(absent)}; download or copy them"
        )
    usable = [folder / name for name in names if name not in odd and name not in absent]
    return usable, weight_map


def _what_else(folder: Path) -> str:
    shards = sorted(folder.glob("*.safetensors"))
    if shards:
        return f", but {some(s.name for s in shards)}: the index is missing, download or copy it"
    pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
    if pickles:
        return (
            f", but {some(p.name for p in pickles)}: pickle files are not read. Open the model with"
            " the program that wrote it and save it with safe_serialization=True"
        )
    return "; download or copy the weights"


def read_headers(
    files: Iterable[Path], weight_map: Mapping[str, str], problems: list[str]
) -> list[Stored]:
    """Name, shape and dtype of every tensor in `files`."""
    stored: list[Stored] = []
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118, a handle is no mapping
                    part = handle.get_slice(name)
                    stored.append(Stored(file, name, tuple(part.get_shape()), part.get_dtype()))
        except (SafetensorError, OSError) as error:
            problems.append(f"{file.name} {_why_unreadable(file, error)}")
    if weight_map and not problems:
        there = {(item.name, item.file.name) for item in stored}
        absent = [n for n, file in weight_map.items() if (n, file) not in there]
        if absent:
            problems.append(
                f"{INDEX} promises what is not in the files it names: {_listed(absent)}; index and"
                " files are not of one checkpoint"
            )
    return stored


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
                needed = 8 + length + max(
                    entry["data_offsets"][1]
                    for name, entry in header.items() if name != "__metadata__"
                )  # fmt: skip
            except (ValueError, KeyError, TypeError, AttributeError):
                needed = 0
            if needed > size:
                return f"is cut short: {size:,} of {needed:,} bytes; download or copy it again"
    return f"is no readable safetensors file ({size:,} bytes; {error}); download or copy it again"


def read_json(file: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; an empty one, and a problem, where the file holds none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"{file.name} is missing; copy it from where the weights are from")
        return {}
    except (ValueError, OSError) as error:
        problems.append(f"{file.name} is no readable JSON ({error}); download or copy it again")
        return {}
    if not isinstance(value, dict):
        problems.append(
            f"{file.name} holds {type(value).__name__}, not an object; download or copy it again"
        )
        return {}
    return value


def match(
    expected: Mapping[str, tuple[int, ...]], stored: Iterable[Stored], problems: list[str]
) -> dict[Place, Stored]:
    """Which stored tensor fills which place of the model.

    Args:
        expected: the model's tensors and their shapes.
        stored: what the files hold.
        problems: receives all that does not fit.
    """
    filled: dict[Place, Stored] = {}
    first: dict[str, Stored] = {}  # of each name: tells a stack from experts one by one
    useless: set[Place] = set()  # stored but wrong: not to be reported as missing as well
    unexpected, shapes, twice, formats = [], [], [], []
    for item in stored:
        place = place_of(item.name)
        stacked = place.expert is None
        shape = expected.get(place.name)
        if shape is not None and place.expert is not None:
            # An index beyond the last expert has no place either.
            shape = shape[1:] if place.expert < shape[0] else None
        if shape is None:
            unexpected.append(item.name)
        elif item.shape != _in_file(shape, item.dtype):
            shapes.append(f"{item.name} {list(item.shape)} for {list(shape)}")
            useless.add(place)
        elif item.dtype not in FLOATS + QUANTIZED:
            formats.append(f"{item.name} ({item.dtype})")
            useless.add(place)
        elif place in filled:
            twice.append(_twice(item, filled[place]))
        elif stacked != (place_of(first.setdefault(place.name, item).name).expert is None):
            twice.append(_twice(item, first[place.name]))
        else:
            filled[place] = item
    for missing in _by_module(_unfilled(expected, {*filled, *useless})):
        problems.append(f"missing: {_listed(missing)}{_about_missing(missing)}")
    for extra in _by_module(unexpected):
        way_out = _about_unexpected(extra)
        problems.append(f"without a place in the model of config.json: {_listed(extra)}{way_out}")
    for label, found in (
        ("of another shape than config.json says (stored for expected)", shapes),
        ("there twice", twice),
        (f"of a type that is not read ({', '.join(FLOATS)} are)", formats),
    ):
        if found:
            problems.append(f"{label}: {_listed(found)}. Take files that were saved together")
    return filled


def _in_file(shape: tuple[int, ...], dtype: str) -> tuple[int, ...]:
    if dtype != "NVFP4" or not shape:
        return shape
    return (*shape[:-1], -(-shape[-1] // NVFP4_ROWS) * NVFP4_ROWS)


def _twice(one: Stored, other: Stored) -> str:
    if one.name == other.name:
        return f"{one.name} (in {other.file.name} and {one.file.name})"
    return f"{one.name} (also as {other.name})"


def _unfilled(expected: Mapping[str, tuple[int, ...]], seen: set[Place]) -> list[str]:
    """Names of the places that nothing was stored for, experts one by one where some are there."""
    missing = []
    for name, shape in expected.items():
        if Place(name) in seen:
            continue
        experts = range(shape[0]) if is_stack_of_experts(name) else ()
        absent = [e for e in experts if Place(name, e) not in seen]
        if not experts or len(absent) == shape[0]:
            missing.append(name)
        else:
            stem, _, matrix = name.rpartition(".")
            missing.extend(f"{stem}.{e}.{matrix}.weight" for e in absent)
    return missing


def _by_module(names: list[str]) -> list[list[str]]:
    """Names of the backbone and names of MTP, which go missing for different reasons."""
    mtp = [name for name in names if name.startswith("mtp.")]
    rest = [name for name in names if not name.startswith("mtp.")]
    return [group for group in (rest, mtp) if group]


def _about_missing(names: list[str]) -> str:
    """A way out, where the names tell which accident this is."""
    if not names[0].startswith("mtp."):
        return ". Copy the files again, or take the config.json that belongs to them"
    return (
        ". config.json says that there is an MTP module (num_nextn_predict_layers); transformers"
        " drops it when it saves. Load the original files, or go on without it:"
        ' load(path, mtp="drop")'
    )


def _about_unexpected(names: list[str]) -> str:
    """A way out, where the names tell which accident this is."""
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
    return ". Take the config.json that belongs to the weights, or write them again without these"


def _listed(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}, {some(names)}"


def some(names: Iterable[str], limit: int = 8) -> str:
    """The first few of a list that may have thousands of entries."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
