"""Values on their way between the grading process and a learner's process: JSON and raw bytes.

A message is a JSON header and the bytes of its tensors:

    4 bytes    length of the header        8 bytes    length of the bytes that follow it
    header     {"…": …, "storages": [n0, n1]}
    bytes      storage 0, storage 1, …

Numbers, strings, None, tuples, lists, dicts, dtypes, slices and a few more are JSON. A tensor is
its dtype, shape, strides and place in a storage. So a strided tensor arrives strided, and two views
of one storage arrive as two views of one storage. A dataclass such as `NemotronConfig` goes as
plain data, and is built again by a class that the reader names as allowed.

Never pickle: reading a pickle runs code that its writer chose, and the writer here is a learner's
process. The reader trusts nothing. Sizes, nesting, dtypes, shapes, strides and offsets are checked
before a tensor is made, and anything malformed is a `WireError`.

What cannot be written as data (a module, a cache that a learner's class made) stays where it is.
`Writer.opaque` and `Reader.opaque` say what goes in its place; `calls` and `learner_process` use
them for handles.

This module is used in both processes, and imports only torch and the standard library.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import math
import os
import select
import struct
import time
from collections.abc import Callable
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

HEAD = struct.Struct(">IQ")
LARGEST_HEADER = 16 * 2**20  # bytes
LARGEST_BODY = 256 * 2**20
MOST_ELEMENTS = 2**26  # of one tensor, counted by its shape: strides of 0 need no memory
DEEPEST = 60
DTYPES = {
    name: getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2",
        "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool",
        "complex64", "complex128",
    )
}  # fmt: skip


class WireError(ValueError):
    """A value that cannot be sent, or a message that is malformed, too large or too late."""


class ClosedError(WireError):
    """The other side has closed its end: its process is gone."""


class LateError(WireError):
    """The other side did not answer in time."""


class Channel:
    """A pair of pipes that carries messages. With a deadline, neither reading nor writing hangs."""

    def __init__(self, reading: int, writing: int) -> None:
        self.reading, self.writing = reading, writing
        os.set_blocking(reading, False)
        os.set_blocking(writing, False)

    def send(self, header: dict[str, Any], body: bytes, deadline: float | None = None) -> None:
        """Write one message; `deadline` is a time of `time.monotonic`."""
        text = json.dumps(header).encode()
        if len(text) > LARGEST_HEADER or len(body) > LARGEST_BODY:
            raise WireError(
                f"a value of {(len(text) + len(body)) / 2**20:.0f} MiB is too large to be sent; "
                f"at most {LARGEST_BODY >> 20} MiB."
            )
        left = memoryview(b"".join((HEAD.pack(len(text), len(body)), text, body)))
        while left:
            self._wait(self.writing, select.POLLOUT, deadline)
            try:
                left = left[os.write(self.writing, left[: 2**20]) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise ClosedError("its process has ended") from error

    def receive(self, deadline: float | None = None) -> tuple[dict[str, Any], bytearray]:
        """Read one message.

        Raises:
            WireError: it is malformed or too large; the channel cannot be used afterwards.
        """
        text_size, body_size = HEAD.unpack(self._read(HEAD.size, deadline))
        if text_size > LARGEST_HEADER or body_size > LARGEST_BODY:
            raise WireError("an answer is malformed or too large")
        text, body = self._read(text_size, deadline), self._read(body_size, deadline)
        try:
            header = json.loads(text.decode())
        except (ValueError, RecursionError, MemoryError) as error:
            raise WireError("an answer is malformed") from error
        if not isinstance(header, dict):
            raise WireError("an answer is malformed")
        return header, body

    def close(self) -> None:
        """Close both pipes."""
        os.close(self.reading)
        os.close(self.writing)

    def _read(self, size: int, deadline: float | None) -> bytearray:
        found = bytearray()
        while len(found) < size:
            self._wait(self.reading, select.POLLIN, deadline)
            try:
                piece = os.read(self.reading, min(size - len(found), 2**20))
            except BlockingIOError:
                continue
            if not piece:
                raise ClosedError("its process has ended")
            found += piece
        return found

    @staticmethod
    def _wait(pipe: int, event: int, deadline: float | None) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if deadline is None:
            poll.poll()
        elif not poll.poll(max(0.0, 1000 * (deadline - time.monotonic()))):
            raise LateError("no answer in time")


def _not_sent(value: Any) -> Any:
    raise WireError(f"a {type(value).__name__} cannot be sent.")


def _unknown(data: dict[str, Any]) -> Any:
    raise WireError("an answer is malformed")


class Writer:
    """Turns values into JSON, and collects the storages of their tensors.

    `opaque` is asked about every value that is not plain data. `special` is asked about each tensor
    and may return the data to be sent in its place; otherwise it returns None.
    """

    def __init__(
        self,
        opaque: Callable[[Any], Any] = _not_sent,
        special: Callable[[Tensor], Any] = lambda tensor: None,
    ) -> None:
        self.opaque, self.special = opaque, special
        self._storages: dict[int, dict[str, Any]] = {}

    def write(self, value: Any, depth: int = 0) -> Any:
        """The value as JSON."""
        if depth > DEEPEST:
            raise WireError("a value is nested too deeply to be sent.")
        if value is None or isinstance(value, bool | int | float | str):
            return value  # json writes a subclass as the plain number or text that it holds
        if isinstance(value, Tensor):
            special = self.special(value)
            return self.data_of(value) if special is None else special
        if isinstance(value, dict):
            pairs = list(value.items())
            return {"k": "dict", "v": [[self.write(x, depth + 1) for x in pair] for pair in pairs]}
        for kind in (tuple, list, set, frozenset):
            if isinstance(value, kind) and not hasattr(value, "_fields"):
                return {"k": kind.__name__, "v": [self.write(item, depth + 1) for item in value]}
        return self._rare(value, depth)

    def _rare(self, value: Any, depth: int) -> Any:
        if isinstance(value, torch.dtype):
            return {"k": "dtype", "v": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"k": "device", "v": str(value)}
        if value is Ellipsis:
            return {"k": "ellipsis"}
        if isinstance(value, slice | range):
            ends = [value.start, value.stop, value.step]
            return {"k": type(value).__name__, "v": [self.write(end, depth + 1) for end in ends]}
        if type(value) is complex:
            return {"k": "complex", "v": [value.real, value.imag]}
        return self.opaque(value)

    def data(self, value: Any) -> dict[str, Any]:
        """A dataclass as plain data, with the name of its class."""
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        kind = type(value)
        return {
            "k": "data", "c": f"{kind.__module__}:{kind.__qualname__}",
            "v": {name: self.write(one, 1) for name, one in fields.items()},
        }  # fmt: skip

    def data_of(self, tensor: Tensor) -> dict[str, Any]:
        """A tensor as JSON; its storage is noted."""
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            if tensor.layout is not torch.strided or tensor.device.type != "cpu":
                raise WireError(f"a tensor on {tensor.device}, {tensor.layout}, cannot be sent.")
            plain = tensor.detach().as_subclass(Tensor)
            if plain.is_conj() or plain.is_neg():
                plain = plain.resolve_conj().resolve_neg()
            name = str(plain.dtype).removeprefix("torch.")
            if name not in DTYPES:
                raise WireError(f"a tensor of {name} cannot be sent.")
            size, shape, stride = plain.element_size(), list(plain.shape), list(plain.stride())
            first = plain.storage_offset() * size
            extent = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1
            end = first + extent * size if plain.numel() else first
            storage = plain.untyped_storage()
        key = storage.data_ptr()
        known = self._storages.setdefault(
            key, {"storage": storage, "index": len(self._storages), "lo": first, "hi": end,
                  "tensors": []}
        )  # fmt: skip
        known["lo"], known["hi"] = min(known["lo"], first), max(known["hi"], end)
        data = {"k": "tensor", "s": known["index"], "o": first, "d": name, "n": shape, "t": stride}
        known["tensors"].append(data)
        return data

    def body(self) -> tuple[list[int], bytes]:
        """The sizes of the storages, and their bytes.

        Called once, after all values, and before their JSON becomes text: it completes the places
        of the tensors.
        """
        pieces = []
        for known in self._storages.values():
            # Offsets count from the first byte that is sent. It is aligned, so that every dtype can
            # start at its place.
            lo = known["lo"] - known["lo"] % 16
            for data in known["tensors"]:
                data["o"] -= lo
            size = known["hi"] - lo
            pieces.append(ctypes.string_at(known["storage"].data_ptr() + lo, size) if size else b"")
        return [len(piece) for piece in pieces], b"".join(pieces)


class Reader:
    """Turns JSON into values again. `opaque` is asked about all kinds that are no plain data.

    `classes` are the dataclasses that may be built, as "module:name"; None allows all of this
    package, which is for the learner's process only.
    """

    def __init__(
        self,
        header: dict[str, Any],
        body: bytearray,
        opaque: Callable[[dict[str, Any]], Any] = _unknown,
        classes: dict[str, type] | None = None,
    ) -> None:
        self.opaque, self.classes = opaque, classes
        sizes = header.get("storages", [])
        if not isinstance(sizes, list) or not all(_count(size) for size in sizes):
            raise WireError("an answer is malformed")
        if sum(sizes) != len(body):
            raise WireError("an answer is malformed")
        self._storages: list[tuple[torch.UntypedStorage, int]] = []
        start, view = 0, memoryview(body)
        for size in sizes:
            # A copy of its own: it is aligned, and it lives as long as its tensors.
            piece = bytearray(view[start : start + size])
            whole = torch.frombuffer(piece, dtype=torch.uint8) if size else torch.empty(0)
            self._storages.append((whole.untyped_storage(), size))
            start += size

    def read(self, data: Any, depth: int = 0) -> Any:
        """The value behind some JSON."""
        if depth > DEEPEST:
            raise WireError("an answer is nested too deeply")
        if data is None or isinstance(data, bool | int | float | str):
            return data
        if not isinstance(data, dict):
            raise WireError("an answer is malformed")
        kind, value = data.get("k"), data.get("v")
        if kind == "tensor":
            return self.tensor(data)
        if kind in ("tuple", "list", "set", "frozenset", "dict") and isinstance(value, list):
            return self._container(kind, value, depth)
        if kind == "dtype" and isinstance(value, str) and value in DTYPES:
            return DTYPES[value]
        if kind == "device" and value == "cpu":
            return torch.device("cpu")
        if kind == "ellipsis":
            return Ellipsis
        if kind in ("slice", "range", "complex") and isinstance(value, list):
            ends = [self.read(end, depth + 1) for end in value]
            build: Any = {"slice": slice, "range": range, "complex": complex}[kind]
            try:
                return build(*ends)
            except (TypeError, ValueError, OverflowError) as error:
                raise WireError("an answer is malformed") from error
        if kind == "data" and isinstance(value, dict):
            return self._data(str(data.get("c")), value, depth)
        return self.opaque(data)

    def _container(self, kind: str, value: list[Any], depth: int) -> Any:
        if kind == "dict":
            if not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
                raise WireError("an answer is malformed")
            pairs = [[self.read(x, depth + 1) for x in pair] for pair in value]
            return _hashable(dict, pairs)
        items = [self.read(item, depth + 1) for item in value]
        if kind in ("set", "frozenset"):
            return _hashable(set if kind == "set" else frozenset, items)
        return tuple(items) if kind == "tuple" else items

    def _data(self, name: str, value: dict[str, Any], depth: int) -> Any:
        if self.classes is None and name.startswith("nemotron_lite."):
            module, _, path = name.partition(":")
            try:
                kind: Any = import_module(module)
            except ImportError:  # not among what a learner's process has: its fields at least
                kind = SimpleNamespace
            for part in path.split(".") if kind is not SimpleNamespace else ():
                kind = getattr(kind, part)
        elif self.classes is not None and name in self.classes:
            kind = self.classes[name]
        else:
            return self.opaque({"k": "data", "c": name, "v": value})
        fields = {key: self.read(one, depth + 1) for key, one in value.items()}
        try:
            return kind(**fields)
        except Exception as error:  # a config refuses values in many ways
            raise WireError(f"a {kind.__name__} could not be built: {error}") from error

    def tensor(self, data: dict[str, Any]) -> Tensor:
        """The tensor that some JSON describes, over the storage that came with it."""
        dtype = DTYPES.get(str(data.get("d")))
        shape, stride = data.get("n"), data.get("t")
        place, index = data.get("o"), data.get("s")
        plain = (
            dtype is not None and _count(place) and _count(index)
            and isinstance(shape, list) and isinstance(stride, list)
            and len(shape) == len(stride) <= 32
            and all(map(_count, shape)) and all(map(_count, stride))
        )  # fmt: skip
        if not plain or index >= len(self._storages):  # type: ignore[operator]
            raise WireError("an answer is malformed")
        assert dtype is not None
        assert isinstance(shape, list)
        assert isinstance(stride, list)
        assert isinstance(place, int)
        assert isinstance(index, int)
        storage, size = self._storages[index]
        number = math.prod(shape)
        if number > MOST_ELEMENTS:
            raise WireError(f"a tensor of {number:,} elements is too large to be sent.")
        width = dtype.itemsize
        extent = sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) + 1 if number else 0
        if place % width or place + extent * width > size:
            raise WireError("an answer is malformed")
        if not number:
            return torch.empty_strided(shape, stride, dtype=dtype)
        if dtype is torch.bool:
            raw = torch.empty(0, dtype=torch.uint8).set_(storage, place, (extent,), (1,))  # type: ignore[call-overload]
            if raw.max() > 1:
                raise WireError("an answer is malformed")
        return torch.empty(0, dtype=dtype).set_(storage, place // width, shape, stride)  # type: ignore[call-overload,no-any-return]


def _count(value: Any) -> bool:
    """Whether a value is an integer that can be a size."""
    return type(value) is int and 0 <= value < 2**48


def _hashable(kind: type, items: Any) -> Any:
    try:
        return kind(items)
    except TypeError as error:
        raise WireError("an answer has keys that cannot be keys") from error
