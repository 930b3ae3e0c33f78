"""The file of a saved cache: its layout, and everything that is checked before it is used.

A damaged cache must not give other logits without a word. So the file says twice what it holds, and
both must agree:

    tensors      one safetensors entry per buffer: "3.k", "0.conv", "mtp.0.v"; and where `generate`
                 has left a transcript, "transcript.tokens", the token ids of the rows one after the
                 other, and "transcript.hidden", one vector for each row
    metadata     format   the version of this layout
                 cache    JSON: patterns of the layers, lengths of the rows, seeds of rounding, and
                          the rows whose token ids are known
                 sha256   of format, cache, and the name, dtype, shape and bytes of each tensor

`read` goes from cheap to expensive. It wants a regular file, then a header that safetensors
accepts, then metadata of the right types and ranges, then exactly the tensors that follow from
them, with shapes and dtypes that fit each other. Up to here no tensor has been read, and nothing
larger than the file can be allocated. Then tensors are read and the checksum is compared. Whether
the cache fits a model, and its token ids the vocabulary, is asked at its first call
(input_checks.py).

Source: safetensors' format description; FIPS 180-4 for SHA-256. Left out: signatures. Whoever can
write the file can also write a checksum that fits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemotron_lite.files import NOT_UTF8, atomic_file, check_utf8, is_utf8
from nemotron_lite.input_files import FileError, check_regular, parse_json
from nemotron_lite.layers import MIXERS, LayerCache
from nemotron_lite.layers.mixer import WIDE_DTYPE, SavedLayer, SavedSizes

FORMAT = "nemotron_lite.cache.v6"
TOKENS, HIDDEN = "transcript.tokens", "transcript.hidden"
_FAMILY = "nemotron_lite.cache."
_DESCRIBED = ("patterns", "lengths", "extras", "known")  # fields of a saved cache that are JSON
_MOST = 2**62  # of a length; more would overflow int64 later
_REMEDY = "Read the text again with the model, and save the cache again"


class SavedCache(NamedTuple):
    """What a file holds.

    Attributes:
        patterns: of the backbone's layers and of the MTP module's; "" without one.
        lengths: tokens of each row in the backbone, and in the MTP module.
        extras: what a layer saves beside its tensors, by the name of the layer.
        known: for each row whether its token ids are saved; None without a transcript.
        tensors: by name: "3.k" is the keys of layer 3, "mtp.0.k" those of the MTP module's first.
            With a transcript also `TOKENS`, int64, and `HIDDEN`, `b d`.
    """

    patterns: tuple[str, str]
    lengths: tuple[list[int], list[int]]
    extras: dict[str, dict[str, Any]]
    known: list[bool] | None
    tensors: dict[str, Tensor]

    def layer(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Tensors and extra of one layer, "3" or "mtp.0"."""
        prefix = f"{name}."
        mine = {
            key[len(prefix) :]: tensor
            for key, tensor in self.tensors.items()
            if key.startswith(prefix)
        }
        return mine, self.extras.get(name)

    def tokens(self) -> list[list[int] | None]:
        """The token ids of each row; None for a row whose ids are not known."""
        if self.known is None:
            return [None] * len(self.lengths[0])
        ids = iter(self.tensors[TOKENS].tolist())
        return [
            list(islice(ids, length)) if known else None
            for known, length in zip(self.known, self.lengths[0], strict=True)
        ]


def write(path: str | Path, saved: SavedCache) -> None:
    """Write one file, all or nothing.

    Raises:
        ValueError: tensors without numbers (on the meta device), or a name that is not UTF-8.
        OSError: the disk refused the write; what was there before stays.
    """
    if any(tensor.is_meta for tensor in saved.tensors.values()):
        raise ValueError("a cache on the meta device has no numbers to save: use another device.")
    check_utf8(path)
    tensors = {name: tensor.detach().cpu() for name, tensor in saved.tensors.items()}
    description = json.dumps({name: getattr(saved, name) for name in _DESCRIBED})
    metadata = {
        "format": FORMAT,
        "cache": description,
        "sha256": _checksum(FORMAT, description, tensors),
    }
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def is_cache_file(path: str | Path) -> bool:
    """Whether a file was written by `write`, in this or an earlier layout; damaged ones are not."""
    try:
        check_regular(path)
        with safe_open(path, framework="pt", device="cpu") as file:
            return (file.metadata() or {}).get("format", "").startswith(_FAMILY)
    except Exception:  # whatever safetensors says about a file that is none of its own
        return False


def read(path: str | Path) -> SavedCache:
    """What `write` wrote, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or is no saved cache.
    """
    try:
        check_regular(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no cache file at {path}.") from error
    try:
        with torch.inference_mode(False), safe_open(path, framework="pt", device="cpu") as file:
            return _read(path, file)
    except FileError:
        raise
    except OSError as error:
        raise FileError(path, f"cannot be read ({error.strerror or error})") from error
    except Exception as error:  # whatever safetensors says about a file that is none of its own
        if not is_utf8(path):
            raise FileError(path, NOT_UTF8) from error
        reason = str(error)[:200]
        raise FileError(path, f"cannot be read as a safetensors file: {reason}") from error


def _read(path: str | Path, file: Any) -> SavedCache:
    metadata = file.metadata() or {}
    found = metadata.get("format")
    if found != FORMAT:
        older = isinstance(found, str) and found.startswith(_FAMILY) and len(found) < 40
        what = (
            f"is a saved cache of another format, {found!r}, which this version does not read"
            if older
            else "is not a saved cache"
        )
        raise FileError(path, f"{what}; expected {FORMAT!r}. {_REMEDY}.")
    try:
        saved = _description(metadata.get("cache"))
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
        _check_tensors(saved, shapes, dtypes)
    except (ValueError, TypeError) as error:
        raise FileError(path, f"is a damaged cache: {str(error)[:300]}. {_REMEDY}.") from error
    # A copy: what safetensors returns is a view of the file, which may be changed later.
    tensors = {name: file.get_tensor(name).clone() for name in shapes}
    if metadata.get("sha256") != _checksum(FORMAT, metadata["cache"], tensors):
        raise FileError(path, f"is a damaged cache: its checksum does not fit. {_REMEDY}.")
    if saved.known is not None and (tensors[TOKENS] < 0).any():
        raise FileError(path, f"is a damaged cache: a token id is negative. {_REMEDY}.")
    return saved._replace(tensors=tensors)


def _description(text: object) -> SavedCache:
    """A cache as its metadata describes it, without tensors.

    Raises:
        ValueError: another type or a value out of range.
    """
    if not isinstance(text, str):
        raise ValueError("it has no description")
    given = parse_json(text)
    if not isinstance(given, dict) or set(given) != set(_DESCRIBED):
        raise ValueError(f"its description has other fields than {', '.join(_DESCRIBED)}")
    patterns, lengths, extras, known = (given[name] for name in _DESCRIBED)
    if not _is_pair(patterns, str) or not patterns[0] or set("".join(patterns)) - set(MIXERS):
        raise ValueError("patterns are not two texts of known layers")
    if not _is_pair(lengths, list) or not lengths[0] or len(lengths[0]) != len(lengths[1]):
        raise ValueError("lengths are not two lists with a number for each row")
    if not all(type(n) is int and 0 <= n < _MOST for row in lengths for n in row):
        raise ValueError("a length is not a number of tokens")
    if not patterns[1] and any(lengths[1]):
        raise ValueError("it has entries of an MTP module, but no such layers")
    if not isinstance(extras, dict) or not all(
        isinstance(extra, dict) for extra in extras.values()
    ):
        raise ValueError("extras are not one object for each layer that has one")
    rows = len(lengths[0])
    if known is not None and not (
        isinstance(known, list) and len(known) == rows and all(type(k) is bool for k in known)
    ):
        raise ValueError("known does not say for each row whether its token ids are known")
    return SavedCache((patterns[0], patterns[1]), (lengths[0], lengths[1]), extras, known, {})


def _check_tensors(
    saved: SavedCache, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str]
) -> None:
    """Compare names, shapes and dtypes of the tensors with the description and with each other.

    Raises:
        ValueError: the first thing that does not fit.
    """
    patterns, lengths, extras = saved.patterns, saved.lengths, saved.extras
    kinds = {f"{i}": kind for i, kind in enumerate(patterns[0])}
    kinds |= {f"mtp.{i}": kind for i, kind in enumerate(patterns[1])}
    layers = {name: cls for name, kind in kinds.items() if (cls := MIXERS[kind].CACHE) is not None}
    expected = {f"{name}.{part}" for name, cls in layers.items() for part in cls.TENSORS}
    expected |= set() if saved.known is None else {TOKENS, HIDDEN}
    odd = sorted(set(shapes) ^ expected) + sorted(set(extras) - set(layers))
    if odd:
        raise ValueError(f"{odd[0]!r} is missing, or belongs to no layer")
    known: dict[type[LayerCache], SavedSizes] = {}
    for index, (name, kind) in enumerate(kinds.items()):
        if name not in layers:
            continue
        cls, rows = layers[name], lengths[name.startswith("mtp.")]
        stored = {
            part: (shapes[f"{name}.{part}"], dtypes[f"{name}.{part}"]) for part in cls.TENSORS
        }
        layer = SavedLayer(stored, extras.get(name), len(rows), max(*rows, 1), index)
        found = cls.check_saved(layer)
        first = known.setdefault(cls, found)
        if found != first:
            raise ValueError(
                f"layer {name} ({kind!r}) has {found}, but the first of its kind {first}"
            )
    if len({sizes.dtype for sizes in known.values()}) > 1:
        raise ValueError(f"layers have several dtypes: {list(known.values())}")
    if saved.known is not None:
        read = [
            length for length, is_known in zip(lengths[0], saved.known, strict=True) if is_known
        ]
        tokens, hidden = shapes[TOKENS], shapes[HIDDEN]
        if (tokens, dtypes[TOKENS]) != ((sum(read),), "I64"):
            raise ValueError(
                f"token ids {tokens} {dtypes[TOKENS]} are not those of rows with {read} tokens"
            )
        if len(hidden) != 2 or hidden[0] != len(lengths[0]) or dtypes[HIDDEN] not in WIDE_DTYPE:
            raise ValueError(
                f"{HIDDEN} {hidden} {dtypes[HIDDEN]} is not one vector for each of "
                f"{len(lengths[0])} rows"
            )


def _is_pair(value: object, kind: type) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(v) is kind for v in value)


def _checksum(format: str, description: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for text in (format, description):
        digest.update(f"{len(text)}:{text}".encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
