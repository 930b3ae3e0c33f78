"""The answers of a learner's process: what it does for each request of the grading process.

    run       execute a cell; the answer holds its outputs for the feedback page
    lookup    is there a function or class of that name?
    call      call it, or a method of an object, with these arguments
    get, set  an attribute of an object
    backward  the gradients of an earlier call's tensors
    define    put the reference of an exercise that another one needs under its name

Tensors arrive as new leaves, with the strides they had. A call that is made with gradients on keeps
its graph here until the grading process has no use for it. Objects that are no plain data (modules,
caches that a learner's class made) stay here; the other side holds numbers for them. Arguments that
the code changed in place are sent back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nemotron_lite.course.learner_code import functions_of, root_cause
from nemotron_lite.coursework.learner_shell import (
    MOST_FRAMES,
    MOST_TEXT,
    Alarm,
    Printed,
    TimeOverError,
    error_output,
    error_text,
    make_shell,
)
from nemotron_lite.coursework.wire import Channel, ClosedError, Reader, WireError, Writer

MOST_ITEMS = 100_000  # of an iterator
SPECIAL = ("__call__", "__getitem__", "__setitem__", "__len__", "__iter__", "__contains__")


def special_methods(kind: type) -> list[str]:
    """Which of the methods that operators call an object of this class has."""
    return [name for name in SPECIAL if getattr(kind, name, None) is not None]


def _version(leaf: Any) -> tuple[Any, ...]:
    """Changes when a parameter gets new values, another dtype or other memory."""
    return leaf._version, leaf.dtype, leaf.data_ptr()


class Learner:
    """The state of this process: the notebook's names, objects, leaves and graphs."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.outputs: list[dict[str, Any]] = []
        self.shell = make_shell(self.outputs)
        self.alarm = Alarm()
        self.objects: dict[int, Any] = {}
        self.numbers: dict[int, int] = {}  # id of an object → its number
        self.count = 0
        self.leaves: dict[int, Any] = {}  # inputs of calls with gradients
        self.graphs: dict[int, list[Any]] = {}  # token of a call → its differentiable results
        self.parameters: dict[int, Any] = {}  # leaves that live here
        self.parameter_numbers: dict[int, int] = {}
        self.sent_versions: dict[int, tuple[Any, ...]] = {}
        self.seed: int | None = None

    def serve(self) -> None:
        """Answer requests until the grading process closes its end."""
        while True:
            try:
                request, body = self.channel.receive()
            except ClosedError:
                return
            self.writer = writer = Writer(self._opaque)
            answer: dict[str, Any] = {"id": request["id"]}
            try:
                answer |= getattr(self, f"do_{request['op']}")(request, body, writer)
            except BaseException as error:
                self.writer = writer = Writer(self._opaque)
                answer = {"id": request["id"]}
                answer["error"] = self._error(error)
            answer["storages"], data = writer.body()
            try:
                self.channel.send(answer, data)
            except ClosedError:
                return
            except (WireError, TypeError, ValueError) as error:
                self.channel.send({"id": request["id"], "error": self._error(error)}, b"")

    # Requests

    def do_run(self, request: dict[str, Any], body: bytearray, writer: Any) -> dict[str, Any]:
        """Execute a cell."""
        self.outputs.clear()
        self.shell.compile.cell = request["name"]
        self.shell.failed = False
        streams = Printed("stdout", self.outputs), Printed("stderr", self.outputs)
        try:
            with (
                contextlib.redirect_stdout(streams[0]),  # type: ignore[type-var]
                contextlib.redirect_stderr(streams[1]),  # type: ignore[type-var]
                self.alarm.after(request["seconds"]),
            ):
                self.shell.run_cell(request["source"], store_history=False)
        except TimeOverError as error:
            self.outputs.append(error_output(error))
        return {"outputs": json.loads(json.dumps(self.outputs)), "failed": self.shell.failed}

    def do_lookup(self, request: dict[str, Any], body: bytearray, writer: Any) -> dict[str, Any]:
        """Whether there is something to call under a name, and which cell defines it."""
        found = self.shell.user_ns.get(request["name"])
        if not callable(found):
            return {"object": None, "there": request["name"] in self.shell.user_ns}
        about: dict[str, Any] = {"object": self._number(found), "there": True}
        functions = functions_of(found)
        about["file"] = functions[0].__code__.co_filename if functions else ""
        about["class"] = isinstance(found, type)
        about["name"] = getattr(found, "__name__", "") if functions else ""
        about["special"] = special_methods(found) if isinstance(found, type) else []
        return about

    def do_define(self, request: dict[str, Any], body: bytearray, writer: Any) -> dict[str, Any]:
        """Run sources in a namespace of their own and take over one of the names."""
        space: dict[str, Any] = {"__name__": "given"}
        for source in request["sources"]:
            exec(compile(source, "given", "exec"), space)
        if request["own"]:
            import nemotron_lite.course as stand_in

            stand_in.GIVEN[request["own"]] = space[request["name"]]
        else:
            before = self.shell.user_ns.get(request["name"])
            self.shell.user_ns[request["name"]] = space[request["name"]]
            return {"before": None if before is None else self._number(before)}
        return {}

    def do_restore(self, request: dict[str, Any], body: bytearray, writer: Any) -> dict[str, Any]:
        """Put what `define` replaced back under its name."""
        if request["before"] is None:
            self.shell.user_ns.pop(request["name"], None)
        else:
            self.shell.user_ns[request["name"]] = self.objects[request["before"]]
        return {}

    def do_get(self, request: dict[str, Any], body: bytearray, writer: Any) -> dict[str, Any]:
        """An attribute of an object; a method is only said to be one."""

        def read() -> Any:
            return getattr(self.objects[request["target"]], request["name"])

        return self._used(request, body, writer, read, methods=True)

    def do_set(self, request: dict[str, Any], body: bytearray, writer: Any) -> dict[str, Any]:
        """Set an attribute of an object."""
        arguments = Arguments(self, request, body)
        value = arguments.read(request["value"])
        return self._used(
            request, body, writer,
            lambda: setattr(self.objects[request["target"]], request["name"], value),
        )  # fmt: skip

    def do_call(self, request: dict[str, Any], body: bytearray, writer: Any) -> dict[str, Any]:
        """Call an object or its method."""
        arguments = Arguments(self, request, body)
        args, kwargs = arguments.read(request["args"]), arguments.read(request["kwargs"])
        target = self.objects[request["target"]]
        modules = [target, *arguments.objects]

        def call() -> Any:
            function = target if request["method"] is None else getattr(target, request["method"])
            return function(*args, **kwargs)

        return self._used(request, body, writer, call, arguments=arguments, modules=modules)

    def _used(
        self,
        request: dict[str, Any],
        body: bytearray,
        writer: Any,
        use: Callable[[], Any],
        *,
        methods: bool = False,
        arguments: Arguments | None = None,
        modules: list[Any] | None = None,
    ) -> dict[str, Any]:
        """Run the learner's code with the seed, gradients and time of the request; its result."""
        if request["seed"] != self.seed:
            self.seed = request["seed"]
            torch.manual_seed(self.seed)
        for number, value in request.get("updates", []):
            self._update(number, Arguments(self, request, body).read(value))
        nowhere: list[dict[str, Any]] = []
        with (
            contextlib.redirect_stdout(Printed("stdout", nowhere)),  # type: ignore[type-var]
            contextlib.redirect_stderr(Printed("stderr", nowhere)),  # type: ignore[type-var]
            torch.set_grad_enabled(request["grad"]),
            self.alarm.after(request["seconds"]),
        ):
            result = use()
            if isinstance(result, Iterator) and not isinstance(result, list):
                result = Items(item for item, _ in zip(result, range(MOST_ITEMS), strict=False))
        if methods and isinstance(result, types.MethodType | types.BuiltinMethodType):
            return {"method": True}
        results: list[Any] = []
        writer.special = Results(self, arguments, results, writer)
        answer: dict[str, Any] = {"value": writer.write(result)}
        if arguments is not None:
            answer["changed"] = arguments.changed(writer)
        answer["parameters"] = self._new_parameters(modules or [], writer)
        answer["results"] = len(results)
        if results:
            self.graphs[request["token"]] = results
        return answer

    def do_backward(self, request: dict[str, Any], body: bytearray, writer: Any) -> dict[str, Any]:
        """The gradients of a call's results with respect to leaves."""
        arguments = Arguments(self, request, body)
        grads = arguments.read(request["grads"])
        kept = [
            (result, grad)
            for result, grad in zip(self.graphs[request["token"]], grads, strict=True)
            if grad is not None
        ]
        wanted = [
            self.leaves[number] if kind == "leaf" else self.parameters[number]
            for kind, number in request["inputs"]
        ]
        with torch.enable_grad(), self.alarm.after(request["seconds"]):
            found = torch.autograd.grad(
                [result for result, _ in kept],
                wanted,
                [grad for _, grad in kept],
                allow_unused=True,
                retain_graph=True,
            )
        return {"value": writer.write(list(found))}

    def do_drop(self, request: dict[str, Any], body: bytearray, writer: Any) -> dict[str, Any]:
        """Forget what the grading process has no use for any more."""
        for token in request["tokens"]:
            self.graphs.pop(token, None)
        for leaf in request["leaves"]:
            self.leaves.pop(leaf, None)
        for number in request["objects"]:
            gone = self.objects.pop(number, None)
            if gone is not None:
                self.numbers.pop(id(gone), None)
        return {}

    def do_reset(self, request: dict[str, Any], body: bytearray, writer: Any) -> dict[str, Any]:
        """Forget everything but some objects."""
        for known in (self.leaves, self.graphs, self.parameters, self.sent_versions):
            known.clear()
        self.parameter_numbers.clear()
        self.objects = {n: one for n, one in self.objects.items() if n in request["kept"]}
        self.numbers = {id(one): n for n, one in self.objects.items()}
        return {}

    # Objects and parameters

    def _number(self, thing: Any) -> int:
        """The number of an object that stays here."""
        number = self.numbers.get(id(thing))
        if number is None or self.objects.get(number) is not thing:
            self.count = number = self.count + 1
            self.objects[number] = thing
            self.numbers[id(thing)] = number
        return number

    def _opaque(self, thing: Any) -> Any:
        """What goes to the grading process in the place of a thing that is no plain data."""
        kind = type(thing)
        if isinstance(thing, Items):
            raise WireError("an iterator inside a result cannot be sent.")
        if kind.__module__ == "numpy" and getattr(thing, "shape", None) == ():
            return thing.item()  # a number
        about: dict[str, Any] = {"k": "object", "h": self._number(thing), "type": kind.__name__}
        about["special"] = special_methods(kind)
        fields = getattr(thing, "_fields", None)
        if isinstance(thing, tuple) and isinstance(fields, tuple):
            about["fields"] = [str(name) for name in fields]
            about["items"] = [self.writer.write(item) for item in thing]
        elif isinstance(thing, torch.nn.Module):
            about["module"] = True
        elif dataclasses.is_dataclass(kind) and kind.__module__.startswith("nemotron_lite."):
            about["data"] = self.writer.data(thing)
        return about

    def export(self, leaf: Any) -> tuple[int, bool]:
        """The number of a leaf that lives here, and whether the other side knows it."""
        number = self.parameter_numbers.get(id(leaf))
        if number is not None and self.parameters.get(number) is leaf:
            return number, True
        self.count = number = self.count + 1
        self.parameters[number] = leaf
        self.parameter_numbers[id(leaf)] = number
        return number, False

    def _update(self, number: int, value: Any) -> None:
        leaf = self.parameters[number]
        with torch.no_grad():
            leaf.copy_(value)
        self.sent_versions[number] = _version(leaf)

    def _new_parameters(self, modules: list[Any], writer: Any) -> list[Any]:
        """Parameters of the modules that the other side does not know, and those that changed."""
        for module in modules:
            if isinstance(module, torch.nn.Module):
                for parameter in module.parameters():
                    if parameter.requires_grad:
                        self.export(parameter)
        new = []
        for number, leaf in self.parameters.items():
            version = _version(leaf)
            if self.sent_versions.get(number) != version:
                self.sent_versions[number] = version
                writer.special = lambda tensor: None
                new.append([number, writer.write(leaf.detach())])
        return new

    def _error(self, error: BaseException) -> dict[str, Any]:
        """An error as data: its classes, its text, and where it was raised.

        Of an error that Triton wraps around an error of a kernel, the cause is told.
        """
        cause = root_cause(error)
        return {
            "classes": [kind.__name__ for kind in type(cause).__mro__],
            "module": type(cause).__module__.partition(".")[0],
            "text": error_text(cause)[:MOST_TEXT],
            "late": isinstance(cause, TimeOverError),
            "frames": _frames(cause) or _frames(error),
            "outer": _frames(error),
        }


def _frames(error: BaseException) -> list[list[Any]]:
    """Where an error was raised, from the learner's code on: file, line and name of each frame."""
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, TimeOverError):  # the last frames are those of the alarm
        frames = traceback.StackSummary(f for f in frames if f.filename != __file__)
    own = [i for i, frame in enumerate(frames) if frame.filename == __file__]
    beyond = frames[own[-1] + 1 :] if own else frames
    return [[f.filename, f.lineno or 1, f.name] for f in beyond][-MOST_FRAMES:]


class Items(list[Any]):
    """The items of an iterator that a call returned."""


class Arguments:
    """Reads the arguments of a call, and finds out later which of them were changed in place."""

    def __init__(self, learner: Learner, request: dict[str, Any], body: bytearray) -> None:
        self.learner = learner
        self.tensors: dict[int, Any] = {}  # number of an argument → the tensor the code gets
        self.numbers: dict[int, int] = {}  # id of that tensor → number
        self.versions: dict[int, int] = {}
        self.containers: dict[int, tuple[Any, list[int]]] = {}
        self.objects: list[Any] = []
        self._before: dict[int, Any] = {}
        owner = self

        class LeafReader(Reader):
            """Makes leaves of the tensors that are differentiated."""

            def tensor(self, data: dict[str, Any]) -> Any:
                plain = super().tensor(data)
                number = data.get("i")
                if number is None:
                    return plain
                if number in owner.tensors:
                    return owner.tensors[number]
                given = plain
                if data.get("leaf") is not None:
                    leaf = plain.requires_grad_()
                    learner.leaves[data["leaf"]] = leaf
                    given = leaf
                    if data.get("inner"):
                        # Not a leaf where the check made it, so it may be changed in place.
                        with torch.enable_grad():
                            new = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype)
                            given = new.copy_(leaf) if _fills(leaf) else leaf.clone()
                owner.tensors[number] = given
                owner.numbers[id(given)] = number
                owner.versions[number] = given._version
                owner._before[number] = given.detach().clone()
                return given

            def read(self, data: Any, depth: int = 0) -> Any:
                value = super().read(data, depth)
                if isinstance(value, list | dict) and isinstance(data, dict) and "i" in data:
                    items = value if isinstance(value, list) else list(value.values())
                    owner.containers[data["i"]] = value, [id(item) for item in items]
                return value

        self._reader = LeafReader(request, body, self._opaque)

    def read(self, data: Any) -> Any:
        """A value from its JSON."""
        return self._reader.read(data)

    def _opaque(self, data: dict[str, Any]) -> Any:
        if data.get("k") == "object":
            found = self.learner.objects[data["h"]]
            self.objects.append(found)
            return found
        if data.get("k") == "parameter":
            return self.learner.parameters[data["v"]]
        raise WireError(f"a request has an unknown kind {data.get('k')!r}")

    def changed(self, writer: Any) -> list[Any]:
        """The arguments that were changed in place, with their new values."""
        found = []
        special = writer.special
        for number, tensor in self.tensors.items():
            now, before = tensor.detach(), self._before[number]
            if now.shape != before.shape or not _same_bytes(now, before):
                writer.special = lambda tensor: None
                found.append([number, writer.write(now)])
        writer.special = special
        for number, (value, before_ids) in self.containers.items():
            items = value if isinstance(value, list) else list(value.values())
            if [id(item) for item in items] != before_ids:
                found.append([number, writer.write(value)])
        return found


def _fills(tensor: Tensor) -> bool:
    """Whether no two elements share their place in memory."""
    return all(n == 1 or s > 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    """Equality that takes NaN for equal to itself."""
    if one.dtype is not other.dtype:
        return False
    flat = [t.contiguous().reshape(-1) for t in (one, other)]
    return bool(torch.equal(*(t.view(torch.uint8) for t in flat))) if one.numel() else True


class Results:
    """What is sent in the place of a tensor of a result.

    An argument that is returned is named as that argument. A parameter keeps its identity. A tensor
    that gradients flow through gets a number, and stays in the graph of its call.
    """

    def __init__(
        self, learner: Learner, arguments: Arguments | None, results: list[Any], writer: Any
    ) -> None:
        self.learner, self.results, self.writer = learner, results, writer
        self.arguments = arguments

    def __call__(self, tensor: Any) -> dict[str, Any] | None:
        """The data to be sent, or None for a plain tensor."""
        given = self.arguments
        number = given.numbers.get(id(tensor)) if given is not None else None
        if (
            given is not None
            and number is not None
            and given.tensors[number] is tensor
            and (not tensor.requires_grad or tensor._version == given.versions[number])
        ):
            return {"k": "argument", "v": number}
        if not tensor.requires_grad:
            return None
        if tensor.is_leaf and not any(tensor is leaf for leaf in self.learner.leaves.values()):
            number, _ = self.learner.export(tensor)
            return {"k": "parameter", "v": number}
        data: dict[str, Any] = self.writer.data_of(tensor)
        data["out"] = len(self.results)
        self.results.append(tensor)
        return data
