"""A conversation with a learner's process: cells, look-ups, calls, and what goes wrong.

Requests go out with a time limit, and answers are read as data. An answer that is malformed, does
not come or has another number than its request ends the session: `gone` then says why. An
exception of the learner's code is raised here with its type, its text and a traceback through the
learner's lines.

Parameters of a learner's module have twins here, which get the gradients. If a check changes a
twin, as an optimizer does, the next request carries the new values.
"""

from __future__ import annotations

import builtins
import hashlib
import linecache
import re
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from nemotron_lite.coursework.calls import Call, Token
from nemotron_lite.coursework.remote import (
    SPECIAL,
    Method,
    RemoteObject,
    named_tuple,
    outline,
    remote_class,
    remote_function,
    remote_type,
)
from nemotron_lite.coursework.texts import writable
from nemotron_lite.coursework.wire import (
    Channel,
    ClosedError,
    LateError,
    Reader,
    WireError,
    Writer,
)

BLANK_LINES = re.compile(r"\A(?:[^\S\n]*\n)*")
GRACE = 5.0  # seconds between the signal that interrupts a call and the end of its process
KEPT = 50  # graphs that are no longer needed, before the other process is told
USES = ("call", "get", "set", "backward")  # requests that run the code of an answer
MALFORMED = "its answer was malformed; did the code write into the grader's pipe?"
MOST_TEXT = 2000  # characters of an error
MOST_FRAMES = 30
MOST_OUTPUTS = 50  # of a cell, and their sizes in characters: the other process has the same limits
MOST_SHOWN, MOST_PICTURE = 100_000, 1_400_000
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
        self.wrote = False  # whether a call changed an argument in place
        self.mirrors = True  # whether such changes are made here too
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

    def begin(self, seconds: float | int) -> None:
        """Start the clock of a cell or an exercise."""
        self.late, self._ends = False, time.monotonic() + seconds

    def hello(self, seconds: float | int) -> dict[str, Any]:
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
            self.ask("drop", None, **drop)
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
            if op not in USES:  # these run no code of an answer, unless it changed its process
                self._end(WireError(MALFORMED))
            self._raise(answer["error"])
        return answer, body_back

    def _receive(self, deadline: float) -> tuple[dict[str, Any], bytearray]:
        try:
            answer, body = self.channel.receive(deadline)
            if type(answer.get("id")) is not int or answer["id"] != self._count:
                raise WireError("an answer is malformed")
        except WireError as error:
            self._end(error)
        return answer, body

    def _end(self, error: WireError) -> NoReturn:
        """Note why the process cannot be used any more, and raise that."""
        raise self._ended(error) from error

    def _ended(self, error: WireError) -> GoneError:
        self.late = isinstance(error, LateError)
        self.gone = LATE if self.late else ENDED if isinstance(error, ClosedError) else MALFORMED
        return GoneError(self.gone)

    def _raise(self, data: Any) -> None:
        """Raise what the learner's code raised."""
        try:
            names = [str(name)[:80] for name in data["classes"][:MOST_FRAMES]]
            text = writable(str(data["text"])[:MOST_TEXT])
            frames, outer = _frames(data["frames"]), _frames(data["outer"])
            self.late = self.late or data.get("late") is True
        except Exception:  # anything that is not what an error looks like
            data = {}
            names, text, frames, outer = ["Exception"], MALFORMED, [], []
        kind: type[Exception] = Exception
        for name in names:
            found = getattr(builtins, name, None) if name.isidentifier() else None
            if isinstance(found, type) and issubclass(found, Exception):
                kind = found
                break
        title = names[0] if names and names[0].isidentifier() else "Exception"
        own = [(file, line) for file, line, _ in (*outer, *frames) if file in self.files]
        module = "triton" if data.get("module") == "triton" else "learner"
        own_text = {"__str__": lambda self: text, "__init__": lambda self, *given: None}
        raised = type(title, (kind,), {**own_text, "__module__": module})
        # Some kinds have a __new__ of their own: OSError, and groups, which need their parts.
        error: Any = raised(text, [Exception(text)]) if _is_group(kind) else raised(text)
        # `check` asks an error from another process who raised it, and in which line.
        error.raised_by_learner = bool(frames) and frames[-1][0] in self.files
        error.learner_line = linecache.getline(*own[-1]).strip() if own else ""
        raise error.with_traceback(self._traceback(frames)) from None

    def _traceback(self, frames: Iterable[tuple[str, int, str]]) -> TracebackType | None:
        """A traceback through the lines of the learner's cells; other files are not named."""
        trace: TracebackType | None = None
        for file, line, name in reversed(list(frames)):
            known = file in self.files
            code = compile("raise error", file if known else "<library>", "exec")
            code = code.replace(co_firstlineno=line, co_name=name, co_qualname=name)
            try:
                exec(code, {"error": ValueError()})
            except ValueError as error:
                inner = error.__traceback__.tb_next if error.__traceback__ else None
                assert inner is not None
                trace = TracebackType(trace, inner.tb_frame, inner.tb_lasti, inner.tb_lineno)
        return trace

    @contextmanager
    def copies(self) -> Iterator[None]:
        """Calls in this block get copies: what they write into their arguments is not seen here."""
        self.mirrors = False
        try:
            yield
        finally:
            self.mirrors = True

    # The notebook

    def run(self, name: str, source: str, seconds: float | int) -> list[dict[str, Any]]:
        """Execute a cell; returns its outputs."""
        file = f"<{name}>"
        source = BLANK_LINES.sub("", source)  # IPython does that, and counts lines from there
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
        if type(number) is not int:
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

    def reset(self) -> None:
        """Forget all objects, parameters and graphs, on both sides, but not what was looked up."""
        for known in (self._twins, self._twin_numbers, self._sent, self._objects):
            known.clear()
        self._drop = {"tokens": [], "leaves": [], "objects": []}
        self.ask("reset", kept=sorted(self._kept))

    def restore(self, name: str, before: Any) -> None:
        """Undo `define`."""
        self.ask("restore", name=name, before=before)

    # Uses of functions and objects

    def use(self, op: str, target: int, **fields: Any) -> Any:
        """Call something, or read or set an attribute, and return the result."""
        call = Call(self)
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
        if answer.get("method") is True and op == "get":
            return Method(self, target, fields["name"])
        try:
            return call.result(answer, body, fields.get("receiver"))
        except WireError as error:
            self._end(error)
        except Exception as error:  # nothing but the answer is read here, so the fault is its own
            raise self._ended(WireError("an answer is malformed")) from error

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
        except Exception as error:
            raise self._ended(WireError("an answer is malformed")) from error
        return list(found)

    def twin(self, number: Any) -> Tensor:
        """The twin of a parameter that lives in the other process."""
        if type(number) is not int or number not in self._twins:
            raise WireError("an answer is malformed")
        return self._twins[number]

    def take_parameters(self, pairs: Any, reader: Reader) -> None:
        """Make twins of new parameters, and take over values that changed over there."""
        if not isinstance(pairs, list):
            raise WireError("an answer is malformed")
        for pair in pairs:
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int:
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
        if type(number) is not int:
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


def _is_group(kind: type[BaseException]) -> bool:
    return issubclass(kind, BaseExceptionGroup)


def _frames(found: Any) -> list[tuple[str, int, str]]:
    """Where an error was raised; raises an error if the form is another one."""
    return [
        (str(file), max(1, min(int(line), 10**6)), str(name)[:80])
        for file, line, name in found[-MOST_FRAMES:]
    ]


def _outputs(found: Any) -> list[dict[str, Any]]:
    """The outputs of a cell, as far as they have the form and size that they should have."""
    good: list[dict[str, Any]] = []
    for one in found[:MOST_OUTPUTS] if isinstance(found, list) else []:
        kind = one.get("output_type") if isinstance(one, dict) else None
        if kind == "stream" and isinstance(one.get("text"), str):
            name = "stderr" if one.get("name") == "stderr" else "stdout"
            good.append({"output_type": kind, "name": name, "text": _shown(one["text"])})
        elif kind in ("display_data", "execute_result") and isinstance(one.get("data"), dict):
            data = {
                name: _shown(value, MOST_PICTURE if name.startswith("image/") else MOST_SHOWN)
                for name, value in one["data"].items()
                if isinstance(value, str)
            }
            good.append({"output_type": kind, "data": data, "metadata": {}})
        elif kind == "error" and isinstance(one.get("traceback"), list):
            lines = [_shown(str(line)[:MOST_TEXT]) for line in one["traceback"][:MOST_FRAMES]]
            texts = {name: _shown(str(one.get(name, ""))) for name in ("ename", "evalue")}
            good.append({"output_type": kind, **texts, "traceback": lines})
    return good


def _shown(text: str, most: int = MOST_SHOWN) -> str:
    """Text that can be written; a picture cut off is no picture, so it is left out."""
    if len(text) > most:
        return "(too large to be shown)" if most == MOST_PICTURE else text[:most]
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
