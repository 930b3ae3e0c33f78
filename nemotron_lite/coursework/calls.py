"""One use of a learner's function or object: its arguments go to the other process, a result comes.

Tensors, numbers, tuples, dicts and configs go as data (`wire`). What the function changed in place
is changed here too, and an argument that it returns is that argument.

Autograd works across. Each tensor that is differentiated becomes a leaf in the other process, which
keeps the graph of the call. Its results here are the outputs of `_Across`, whose backward asks for
the gradients of that call. An object that stays there may hold tensors of an earlier call, such as
a cache; it remembers that call's inputs here, so that gradients reach them.

Left out: gradients of gradients, and functions as arguments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_lite.coursework.remote import Method, RemoteObject
from nemotron_lite.coursework.wire import Reader, WireError, Writer

if TYPE_CHECKING:
    from nemotron_lite.coursework.session import Session

MOST_RESULTS = 100_000  # differentiable tensors of one call


class Token:
    """The graph of one call in the other process, kept as long as something here needs it."""

    def __init__(self, session: Session) -> None:
        self.session, self.number = session, session.new_number()
        self.inputs: list[tuple[str, int]] = []
        self.leaves: list[int] = []
        self.needed: list[Token] = []  # graphs of earlier calls whose inputs are among these

    def __del__(self) -> None:
        self.session.forget("tokens", self.number)
        for leaf in self.leaves:
            self.session.forget("leaves", leaf)


class _Across(torch.autograd.Function):
    """The results of a call, with the other process as their backward."""

    @staticmethod
    def forward(ctx: Any, token: Token, results: list[Tensor], *inputs: Tensor) -> Any:
        ctx.token = token
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return None, None, *ctx.token.session.backward(ctx.token, grads)


class Call:
    """One use: writes its arguments, then reads its result."""

    def __init__(self, session: Session) -> None:
        self.session, self.token = session, Token(session)
        self.given: dict[int, Any] = {}  # number → an argument: a tensor, list or dict
        self._numbers: dict[int, int] = {}
        self._leaves: list[tuple[int, Tensor]] = []
        self._objects: list[RemoteObject] = []
        self.writer = _ArgumentWriter(self._opaque, self._tensor)
        self.writer.note = self._note

    def write(self, value: Any) -> Any:
        """An argument as JSON."""
        return self.writer.write(value)

    def _note(self, value: Any) -> int:
        """The number of an argument that may be changed in place."""
        number = self._numbers.get(id(value))
        if number is None:
            number = len(self.given)
            self.given[number] = value
            self._numbers[id(value)] = number
        return number

    def _tensor(self, tensor: Tensor) -> dict[str, Any]:
        twin = self.session.number_of_twin(tensor)
        if twin is not None:
            return {"k": "parameter", "v": twin}
        known = id(tensor) in self._numbers
        data = self.writer.data_of(tensor)
        data["i"] = self._note(tensor)
        if torch.is_grad_enabled() and tensor.requires_grad:
            if not known:
                self._leaves.append((self.session.new_number(), tensor))
            data["leaf"] = next(n for n, one in self._leaves if one is tensor)
            data["inner"] = not tensor.is_leaf
        return data

    def _opaque(self, value: Any) -> Any:
        if isinstance(value, RemoteObject):
            self._objects.append(value)
            return {"k": "object", "h": value._number}
        if (number := getattr(value, "_remote_number", None)) is not None:
            return {"k": "object", "h": number}
        if isinstance(value, Method):
            raise WireError("a method of an object cannot be an argument here.")
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            self.session.allow(type(value))
            return self.writer.data(value)
        raise WireError(f"a check passes a {type(value).__name__}, which cannot be sent.")

    def result(self, answer: dict[str, Any], body: bytearray, receiver: Any = None) -> Any:
        """Take over what the call changed, and return its result."""
        reader = _ResultReader(answer, body, self, receiver)
        self.session.take_parameters(answer.get("parameters", []), reader)
        self._take_changes(answer.get("changed", []), reader)
        value, count = answer.get("value"), answer.get("results", 0)
        result = reader.read(value)
        if (
            type(count) is not int
            or not 0 <= count <= MOST_RESULTS
            or sorted(reader.plain) != list(range(count))
        ):
            raise WireError("an answer is malformed")
        if count:
            reader.connected = self._connect([reader.plain[i] for i in range(count)])
            result = reader.read(value)
        if self._leaves:
            for thing in (*self._objects, *reader.objects):
                thing._remember(self._leaves, self.token)
        return result

    def _connect(self, results: list[Tensor]) -> tuple[Tensor, ...]:
        """Make the results depend on the inputs of the call, for autograd."""
        if not all(one.dtype.is_floating_point or one.dtype.is_complex for one in results):
            raise WireError("an answer is malformed")
        inputs = {("leaf", number): tensor for number, tensor in self._leaves}
        for thing in self._objects:
            for number, (tensor, token) in thing._upstream.items():
                inputs["leaf", number] = tensor
                self.token.needed.append(token)
        inputs |= {("parameter", number): twin for number, twin in self.session.twins()}
        self.token.inputs = list(inputs)
        self.token.leaves = [number for number, _ in self._leaves]
        made: tuple[Tensor, ...] = _Across.apply(self.token, results, *inputs.values())
        return made

    def _take_changes(self, changes: Any, reader: Reader) -> None:
        for change in changes if isinstance(changes, list) else []:
            known = isinstance(change, list) and len(change) == 2 and type(change[0]) is int
            if not known or change[0] not in self.given:
                raise WireError("an answer is malformed")
            given, now = self.given[change[0]], reader.read(change[1])
            self.session.wrote = True
            if not self.session.mirrors:
                continue
            if isinstance(given, Tensor) and isinstance(now, Tensor):
                if now.shape == given.shape and now.dtype == given.dtype:
                    with torch.no_grad():
                        given.copy_(now)
            elif isinstance(given, list) and isinstance(now, list):
                given[:] = now
            elif isinstance(given, dict) and isinstance(now, dict):
                given.clear()
                given.update(now)
            else:
                raise WireError("an answer is malformed")


class _ArgumentWriter(Writer):
    """Numbers the arguments that can be changed in place: lists and dicts."""

    note: Callable[[Any], int]

    def write(self, value: Any, depth: int = 0) -> Any:
        data = super().write(value, depth)
        if isinstance(value, list | dict) and depth:
            data["i"] = self.note(value)
        return data


class _ResultReader(Reader):
    """Reads a result: arguments that came back, twins, objects, and what gradients flow through."""

    def __init__(self, answer: dict[str, Any], body: bytearray, call: Call, receiver: Any) -> None:
        super().__init__(answer, body, self._opaque_value, call.session.classes)
        self.call, self.receiver = call, receiver
        self.plain: dict[int, Tensor] = {}
        self.connected: tuple[Tensor, ...] = ()
        self.objects: list[RemoteObject] = []

    def tensor(self, data: dict[str, Any]) -> Tensor:
        place = data.get("out")
        if place is None:
            return super().tensor(data)
        if self.connected:
            return self.connected[place]
        if type(place) is not int or place in self.plain:
            raise WireError("an answer is malformed")
        self.plain[place] = super().tensor(data)
        return self.plain[place]

    def _opaque_value(self, data: dict[str, Any]) -> Any:
        kind, value = data.get("k"), data.get("v")
        if kind == "argument" and type(value) is int and value in self.call.given:
            return self.call.given[value]
        if kind == "parameter":
            return self.call.session.twin(value)
        if kind == "object":
            made = self.call.session.remote(data, self.read, self.receiver)
            if isinstance(made, RemoteObject):
                self.objects.append(made)
            return made
        raise WireError("an answer is malformed")
