"""A learner's function or class, as the grading process sees it: each use is a message.

A check gets something that behaves like the learner's own function, although that function runs in
another process (`learner_process`):

- tensors, numbers, tuples, dicts and configs go there and come back (`wire`); what the function
  changed in place is changed here too;
- autograd works across. A result is the output of `_Across`, whose backward asks the other process
  for the gradients of that call;
- a class becomes a class whose instances stand for objects over there: attributes, methods, calls,
  `parameters`, `state_dict`. Parameters have twins here, which get the gradients. If a check
  changes a twin, the next call sends the new values;
- an object that is no plain data stays there. Here it is a `RemoteObject`, which can be handed back
  as an argument;
- an exception comes back with its type, its text and a traceback through the learner's lines.

Nothing here compares anything with what a learner's object says about itself: `==` on a
`RemoteObject` is identity.

Left out: gradients of gradients, and functions as arguments.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import hashlib
import inspect
import linecache
import time
import weakref
from collections.abc import Callable, Iterable
from types import CellType, CodeType, FunctionType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nemotron_lite.coursework.wire import (
    Channel,
    ClosedError,
    LateError,
    Reader,
    WireError,
    Writer,
)

GRACE = 5.0  # seconds between the signal that interrupts a call and the end of its process
KEPT = 50  # graphs that are no longer needed, before the other process is told
SPECIAL = ("__call__", "__getitem__", "__setitem__", "__len__", "__iter__", "__contains__")
MALFORMED = "its answer was malformed; did the code write into the grader's pipe?"
ENDED = "its Python process ended (os._exit, a crash, or more memory than the limit)"
LATE = "it was stopped because its time was over: an endless loop?"


class GoneError(Exception):
    """The learner's process has ended, or had to be stopped; the message says why."""

    raised_by_learner = False


class OutOfTimeError(Exception):
    """The time of an exercise is used up."""

    raised_by_learner = False


class Session:
    """A conversation with one learner's process.

    `gone` says why the process has ended, "" while it runs. `late` is whether a cell or call of the
    present exercise was stopped because its time was over.
    """

    def __init__(self, channel: Channel, secret: bytes = b"") -> None:
        self.channel, self.gone, self.late = channel, "", False
        self.files: set[str] = set()
        self._secret = secret
        self._count = 0
        self._count_of_numbers = 0
        self._kept: set[int] = set()  # objects that never leave: what was looked up
        self._ends = float("inf")
        self._twins: dict[int, Tensor] = {}
        self._twin_numbers: dict[int, int] = {}
        self._sent: dict[int, tuple[Any, ...]] = {}
        self._objects: weakref.WeakValueDictionary[int, RemoteObject] = (
            weakref.WeakValueDictionary()
        )
        self._classes: dict[str, type] = {}
        self._drop: dict[str, list[int]] = {"tokens": [], "leaves": [], "objects": []}

    # Messages

    def begin(self, seconds: float) -> None:
        """Start the clock of a cell or an exercise."""
        self.late, self._ends = False, time.monotonic() + seconds

    def hello(self, seconds: float) -> dict[str, Any]:
        """The first message of the process, sent when it is ready."""
        return self._receive(time.monotonic() + seconds)[0]

    def ask(
        self, op: str, writer: Writer | None = None, **fields: Any
    ) -> tuple[dict[str, Any], bytearray]:
        """Send a request and wait for its answer.

        Raises:
            GoneError: the process has ended, or its answer was malformed or did not come.
            OutOfTimeError: the time was over before.
            Exception: what the learner's code raised.
        """
        if self.gone:
            raise GoneError(self.gone)
        left = self._ends - time.monotonic()
        if self.late or left <= 0:
            self.late = True
            raise OutOfTimeError(LATE)
        if len(self._drop["tokens"]) > KEPT and op != "drop":
            drop, self._drop = self._drop, {"tokens": [], "leaves": [], "objects": []}
            kept = self._kept | set(self._objects)
            drop["objects"] = [number for number in drop["objects"] if number not in kept]
            self.ask("drop", **drop)
        self._count += 1
        request = {"op": op, "id": self._count, "seconds": min(left, 1e6), **fields}
        request["storages"], body = writer.body() if writer else ([], b"")
        deadline = time.monotonic() + left + GRACE
        try:
            self.channel.send(request, body, deadline)
        except WireError as error:
            if isinstance(error, LateError | ClosedError):
                self._end(error)
            raise
        answer, body_back = self._receive(deadline)
        if "error" in answer:
            self._raise(answer["error"])
        return answer, body_back

    def _receive(self, deadline: float) -> tuple[dict[str, Any], bytearray]:
        try:
            answer, body = self.channel.receive(deadline)
            if answer.get("id") != self._count:
                raise WireError("an answer is malformed")
        except WireError as error:
            self._end(error)
        return answer, body

    def _end(self, error: WireError) -> None:
        """Note why the process cannot be used any more."""
        self.late = isinstance(error, LateError)
        self.gone = LATE if self.late else ENDED if isinstance(error, ClosedError) else MALFORMED
        raise GoneError(self.gone) from error

    def _raise(self, data: Any) -> None:
        """Raise what the learner's code raised."""
        try:
            names, text = [str(n)[:80] for n in data["classes"]], str(data["text"])
            frames = [(str(f), int(line), str(name)) for f, line, name in data["frames"]]
            outer = [(str(f), int(line), str(name)) for f, line, name in data["outer"]]
            self.late = self.late or data.get("late") is True
        except (TypeError, KeyError, ValueError):
            names, text, frames, outer = ["Exception"], MALFORMED, [], []
        kind: type[Exception] = Exception
        for name in names:
            found = getattr(builtins, name, None)
            if isinstance(found, type) and issubclass(found, Exception):
                kind = found
                break
        title = names[0] if names and names[0].isidentifier() else "Exception"
        own = [(file, line) for file, line, _ in (*outer, *frames) if file in self.files]
        module = "triton" if data.get("module") == "triton" else "learner"
        raised = type(title, (kind,), {"__str__": lambda self: text, "__module__": module})
        error: Any = raised.__new__(raised)
        # `check` asks an error from another process who raised it, and in which line.
        error.raised_by_learner = bool(frames) and frames[-1][0] in self.files
        error.learner_line = linecache.getline(*own[-1]).strip() if own else ""
        raise error.with_traceback(self._traceback(frames)) from None

    def _traceback(self, frames: Iterable[tuple[str, int, str]]) -> TracebackType | None:
        """A traceback through the lines of the learner's cells; other files are not named."""
        trace: TracebackType | None = None
        for file, line, name in reversed(list(frames)[-30:]):
            known = file in self.files
            code = compile("raise error", file if known else "<library>", "exec")
            line, name = max(1, min(line, 10**6)), name[:80]
            code = code.replace(co_firstlineno=line, co_name=name, co_qualname=name)
            try:
                exec(code, {"error": ValueError()})
            except ValueError as error:
                inner = error.__traceback__.tb_next if error.__traceback__ else None
                assert inner is not None
                trace = TracebackType(trace, inner.tb_frame, inner.tb_lasti, inner.tb_lineno)
        return trace

    # The notebook

    def run(self, name: str, source: str, seconds: float) -> list[dict[str, Any]]:
        """Execute a cell; returns its outputs."""
        file = f"<{name}>"
        self.files.add(file)
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        self.begin(seconds)
        answer, _ = self.ask("run", name=file, source=source)
        return _outputs(answer.get("outputs"))

    def lookup(self, name: str) -> Any:
        """The function or class under a name.

        Raises:
            NameError: there is none.
            TypeError: it cannot be called.
        """
        answer, _ = self.ask("lookup", name=name)
        number = answer.get("object")
        if not isinstance(number, int):
            if answer.get("there") is True:
                raise TypeError(f"{name} is not a function or class.")
            raise NameError(f"name {name!r} is not defined")
        self._kept.add(number)
        file = str(answer.get("file"))
        written = outline(file, str(answer.get("name"))) if file in self.files else None
        special = _special(answer.get("special"))
        if answer.get("class") is True:
            return remote_class(self, number, name, file, special, written)
        return remote_function(self, number, name, file, written)

    def define(self, name: str, sources: list[str], own: str = "") -> Any:
        """Put what sources define under a name, or give it to `own`; returns what was there."""
        answer, _ = self.ask("define", name=name, sources=sources, own=own)
        before = answer.get("before")
        self._kept |= {before} if isinstance(before, int) else set()
        return before

    def restore(self, name: str, before: Any) -> None:
        """Undo `define`."""
        self.ask("restore", name=name, before=before)

    # Uses of functions and objects

    def use(self, op: str, target: int, **fields: Any) -> Any:
        """Call something, or read or set an attribute, and return the result."""
        call = _Call(self)
        about: dict[str, Any] = {"method": fields["method"]} if op == "call" else {}
        if op == "call":
            about["args"], about["kwargs"] = map(call.write, (fields["args"], fields["kwargs"]))
        else:
            about["name"] = fields["name"]
        if op == "set":
            about["value"] = call.write(fields["value"])
        updates = self._changed_twins(call.writer)
        secret = self._secret + str(torch.initial_seed()).encode()
        answer, body = self.ask(
            op,
            call.writer,
            target=target,
            grad=torch.is_grad_enabled(),
            seed=int.from_bytes(hashlib.sha256(secret).digest()[:4], "big"),
            token=call.token.number,
            updates=updates,
            **about,
        )
        if answer.get("method") is True:
            return Method(self, target, fields["name"])
        try:
            return call.result(answer, body, fields.get("receiver"))
        except WireError as error:
            self._end(error)

    def backward(self, token: Token, grads: tuple[Tensor | None, ...]) -> list[Tensor | None]:
        """The gradients of a call's inputs."""
        writer = Writer()
        data = writer.write(list(grads))
        answer, body = self.ask(
            "backward", writer, token=token.number, grads=data, inputs=token.inputs
        )
        try:
            found = Reader(answer, body, classes={}).read(answer.get("value"))
            right = isinstance(found, list) and len(found) == len(token.inputs)
            if not right or not all(one is None or isinstance(one, Tensor) for one in found):
                raise WireError("an answer is malformed")
        except WireError as error:
            self._end(error)
        return list(found)

    def twin(self, number: Any) -> Tensor:
        """The twin of a parameter that lives in the other process."""
        if number not in self._twins:
            raise WireError("an answer is malformed")
        return self._twins[number]

    def take_parameters(self, pairs: Any, reader: Reader) -> None:
        """Make twins of new parameters, and take over values that changed over there."""
        if not isinstance(pairs, list):
            raise WireError("an answer is malformed")
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], int):
                raise WireError("an answer is malformed")
            number, value = pair[0], reader.read(pair[1])
            if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
                raise WireError("an answer is malformed")
            if number in self._twins:
                self._twins[number].data = value
            else:
                self._twins[number] = nn.Parameter(value)
                self._twin_numbers[id(self._twins[number])] = number
            self._sent[number] = _version(self._twins[number])

    def number_of_twin(self, tensor: Tensor) -> int | None:
        """The number of a parameter, if the tensor is its twin."""
        return self._twin_numbers.get(id(tensor))

    def twins(self) -> list[tuple[int, Tensor]]:
        """All twins that gradients are wanted of."""
        return [(n, twin) for n, twin in self._twins.items() if twin.requires_grad]

    def _changed_twins(self, writer: Writer) -> list[list[Any]]:
        changed = []
        for number, twin in self._twins.items():
            if self._sent[number] != _version(twin):
                self._sent[number] = _version(twin)
                changed.append([number, writer.data_of(twin)])
        return changed

    def remote(self, about: dict[str, Any], read: Callable[[Any], Any], receiver: Any) -> Any:
        """What stands here for an object of the other process."""
        number = about.get("h")
        if not isinstance(number, int):
            raise WireError("an answer is malformed")
        data = about.get("data")
        if isinstance(data, dict) and str(data.get("c")) in self._classes:
            return read(data)
        if receiver is not None:
            receiver._become(self, number, about.get("module") is True)
            self._objects[number] = receiver
            return receiver
        known = self._objects.get(number)
        if known is not None:
            return known
        kind = remote_type(str(about.get("type"))[:80], _special(about.get("special")))
        fields, items = about.get("fields"), about.get("items")
        if isinstance(fields, list) and isinstance(items, list) and len(fields) == len(items):
            return named_tuple(kind.__name__, [str(f) for f in fields], [*map(read, items)], number)
        made: RemoteObject = kind.__new__(kind)
        made._become(self, number, about.get("module") is True)
        self._objects[number] = made
        return made

    def allow(self, kind: type) -> None:
        """Remember a dataclass that was sent, so that answers may contain one."""
        self._classes[f"{kind.__module__}:{kind.__qualname__}"] = kind

    @property
    def classes(self) -> dict[str, type]:
        """The dataclasses that answers may contain."""
        return self._classes

    def forget(self, kind: str, number: int) -> None:
        """Note that the other process can forget something."""
        self._drop[kind].append(number)

    def new_number(self) -> int:
        """A number that was not used before."""
        self._count_of_numbers += 1
        return self._count_of_numbers


def _version(twin: Tensor) -> tuple[Any, ...]:
    return twin._version, twin.data_ptr(), twin.dtype


def _special(found: Any) -> tuple[str, ...]:
    return tuple(name for name in SPECIAL if isinstance(found, list) and name in found)


def _outputs(found: Any) -> list[dict[str, Any]]:
    """The outputs of a cell, as far as they have the form that they should have."""
    good = []
    for one in found if isinstance(found, list) else []:
        kind = one.get("output_type") if isinstance(one, dict) else None
        if kind == "stream" and isinstance(one.get("text"), str):
            name = "stderr" if one.get("name") == "stderr" else "stdout"
            good.append({"output_type": kind, "name": name, "text": one["text"]})
        elif kind in ("display_data", "execute_result") and isinstance(one.get("data"), dict):
            data = {k: v for k, v in one["data"].items() if isinstance(v, str)}
            good.append({"output_type": kind, "data": data, "metadata": {}})
        elif kind == "error" and isinstance(one.get("traceback"), list):
            lines = [str(line) for line in one["traceback"]]
            texts = {name: str(one.get(name, "")) for name in ("ename", "evalue")}
            good.append({"output_type": kind, **texts, "traceback": lines})
    return good


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


class _Call:
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
        if not isinstance(count, int) or sorted(reader.plain) != list(range(count)):
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
            if not isinstance(change, list) or len(change) != 2 or change[0] not in self.given:
                raise WireError("an answer is malformed")
            given, now = self.given[change[0]], reader.read(change[1])
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

    def __init__(self, answer: dict[str, Any], body: bytearray, call: _Call, receiver: Any) -> None:
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
        if not isinstance(place, int) or place in self.plain:
            raise WireError("an answer is malformed")
        self.plain[place] = super().tensor(data)
        return self.plain[place]

    def _opaque_value(self, data: dict[str, Any]) -> Any:
        kind, value = data.get("k"), data.get("v")
        if kind == "argument" and value in self.call.given:
            return self.call.given[value]
        if kind == "parameter":
            return self.call.session.twin(value)
        if kind == "object":
            made = self.call.session.remote(data, self.read, self.receiver)
            if isinstance(made, RemoteObject):
                self.objects.append(made)
            return made
        raise WireError("an answer is malformed")


class Method:
    """A method of an object in the other process."""

    def __init__(self, session: Session, target: int, name: str) -> None:
        self._session, self._target, self._name = session, target, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call it there."""
        return self._session.use("call", self._target, method=self._name, args=args, kwargs=kwargs)


class RemoteObject:
    """Stands for an object in the learner's process. `==` is identity."""

    _session: Session
    _number: int
    _module: bool
    _upstream: dict[int, tuple[Tensor, Token]]

    def _become(self, session: Session, number: int, module: bool) -> None:
        own = {"_session": session, "_number": number, "_module": module, "_upstream": {}}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def _remember(self, leaves: list[tuple[int, Tensor]], token: Token) -> None:
        """Note that what this object holds may depend on the inputs of a call."""
        if not self._module:
            token.leaves = token.leaves or [number for number, _ in leaves]
            self._upstream.update({number: (tensor, token) for number, tensor in leaves})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in RemoteObject.__annotations__:
            raise AttributeError(name)
        if name == "zero_grad":
            return self._zero_grad
        return self._session.use("get", self._number, name=name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._session.use("set", self._number, name=name, value=value)

    def _zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, which lie in the twins."""
        for parameter in self.parameters():
            parameter.grad = None

    def __del__(self) -> None:
        if "_session" in vars(self):
            self._session.forget("objects", self._number)


def _special_method(name: str) -> FunctionType:
    def method(self: RemoteObject, *args: Any) -> Any:
        found = self._session.use("call", self._number, method=name, args=args, kwargs={})
        return iter(found) if name == "__iter__" else found

    def call(self: RemoteObject, *args: Any, **kwargs: Any) -> Any:
        return self._session.use("call", self._number, method=None, args=args, kwargs=kwargs)

    made = call if name == "__call__" else method
    assert isinstance(made, FunctionType)
    return made


_METHODS = {name: _special_method(name) for name in SPECIAL}


def remote_type(name: str, special: tuple[str, ...]) -> type[RemoteObject]:
    """A class for objects of a type that only the learner's process has."""
    return type(name, (RemoteObject,), {method: _METHODS[method] for method in special})


class _NamedTuple(tuple[Any, ...]):
    """A named tuple of the learner's: items, names, and the number of the object itself."""

    _remote_number: int
    _fields: tuple[str, ...]

    def __getattr__(self, name: str) -> Any:
        if name in self._fields:
            return self[self._fields.index(name)]
        raise AttributeError(name)


def named_tuple(name: str, fields: list[str], items: list[Any], number: int) -> Any:
    """A named tuple that the learner's code made."""
    made = type(name, (_NamedTuple,), {"_fields": tuple(fields), "_remote_number": number})(items)
    return made


def outline(file: str, name: str) -> Any:
    """The function or class of that name in a learner's cell: compiled, and never run.

    `check` compares the code of an answer with the stub, and knows an answer's errors by their
    file. A class is returned as a dict of its methods. None if the cell does not define the name.
    """
    source = "".join(linecache.getlines(file))
    try:
        tree = ast.parse(source)
        code = compile(tree, file, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    space: dict[str, Any] = {}
    found: dict[str, Any] = {}
    decorated = {
        (kind.name, method.name)
        for kind in tree.body
        if isinstance(kind, ast.ClassDef)
        for method in kind.body
        if isinstance(method, ast.FunctionDef) and method.decorator_list
    }
    for constant in _codes(code):
        if constant.co_flags & inspect.CO_OPTIMIZED:
            found[constant.co_name] = space[constant.co_name] = _never_run(constant, space)
        else:
            methods = [c for c in _codes(constant) if c.co_flags & inspect.CO_OPTIMIZED]
            found[constant.co_name] = {c.co_name: _never_run(c, space) for c in methods}
            for method, function in found[constant.co_name].items():
                function.decorated = (constant.co_name, method) in decorated
    return found.get(name)


def _codes(code: CodeType) -> list[CodeType]:
    return [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _never_run(code: CodeType, space: dict[str, Any]) -> FunctionType:
    """A function object that only shows its code."""
    return FunctionType(code, space, code.co_name, None, (CellType(),) * len(code.co_freevars))


def _forwarder(name: str, file: str, call: Callable[..., Any], written: Any) -> Any:
    """A function that only calls `call`. It says that it is in `file`, on a line it does not have.

    What the learner wrote is its `__wrapped__`, as with a decorator.
    """
    source = f"def {name}(*args, **kwargs):\n    return call(*args, **kwargs)\n"
    space: dict[str, Any] = {"call": call}
    exec(_moved(compile(source, file, "exec", dont_inherit=True)), space)
    if isinstance(written, FunctionType):
        space[name].__wrapped__ = written
    return space[name]


def _moved(code: CodeType) -> CodeType:
    constants = tuple(_moved(c) if isinstance(c, CodeType) else c for c in code.co_consts)
    return code.replace(co_firstlineno=10**6, co_consts=constants)


def remote_function(session: Session, number: int, name: str, file: str, written: Any) -> Any:
    """A function that calls the learner's function."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return session.use("call", number, method=None, args=args, kwargs=kwargs)

    return _forwarder(name, file, call, written)


def remote_class(
    session: Session, number: int, name: str, file: str, special: tuple[str, ...], written: Any
) -> Any:
    """A class whose instances stand for instances of the learner's class."""

    def make(receiver: Any, *args: Any, **kwargs: Any) -> None:
        made = session.use("call", number, method=None, args=args, kwargs=kwargs, receiver=receiver)
        if made is not receiver:
            raise TypeError(f"{name}(…) made no object of its own class.")

    class Meta(type):
        """Attributes of the class itself."""

        def __getattr__(cls, attribute: str) -> Any:
            if attribute.startswith("__"):
                raise AttributeError(attribute)
            return session.use("get", number, name=attribute)

    code = written if isinstance(written, dict) else {}
    inherited = remote_type(name, special)
    first = _forwarder("__init__", file, make, code.get("__init__"))
    members = {"__init__": first} if "__init__" in code or not code else {}
    base: Any = type(name, (inherited,), {} if members else {"__init__": first})
    for method in set(special) & set(code):
        members[method] = _forwarder(method, file, _METHODS[method], code[method])
    for method, function in code.items():
        if method not in members and not method.startswith("__"):
            members[method] = (
                _Attribute(function)
                if function.decorated
                else _forwarder(method, file, _remote_method(method), function)
            )
    return Meta(name, (base,), members)


def _remote_method(name: str) -> Callable[..., Any]:
    def call(self: RemoteObject, *args: Any, **kwargs: Any) -> Any:
        return self._session.use("call", self._number, method=name, args=args, kwargs=kwargs)

    return call


class _Attribute(property):
    """A decorated method or a property of a learner's class: what it is, the other process knows.

    `fget` only shows its code, and is never called.
    """

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        name = self.fget.__name__ if self.fget else ""
        if instance is None:
            return type(owner).__getattr__(owner, name)  # type: ignore[attr-defined]
        return instance._session.use("get", instance._number, name=name)
