"""Whatever a learner's process answers, it ends as an answer, an error or the end of its session.

Here the other end of the pipes is held by the test, which answers what no honest process does:
values of the wrong type in every place, answers to other requests, bytes that are no message.
"""

from __future__ import annotations

import copy
import json
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nemotron_lite.coursework.session import GoneError, OutOfTimeError, Session
from nemotron_lite.coursework.wire import HEAD, Channel, WireError

ODD: list[Any] = [
    None, True, False, 0, -1, 7, 2**70, -(10**400), 1.5, float("nan"), float("inf"), "", "text",
    "\ud800", "x" * 10_000, [], [[]], [None], {}, {"k": "tensor"}, {"k": []}, {"k": {}, "v": {}},
    {"k": "argument", "v": []}, {"k": "argument", "v": 99}, {"k": "parameter", "v": [1]},
    {"k": "parameter", "v": True}, {"k": "dtype", "v": []}, {"k": "dtype", "v": {}},
    {"k": "complex", "v": [10**400, 0]}, {"k": "complex", "v": []}, {"k": "range", "v": [0, 1, 0]},
    {"k": "slice", "v": [[], {}, 1]}, {"k": "set", "v": [{"k": "list", "v": []}]},
    {"k": "dict", "v": [[[], 1]]}, {"k": "dict", "v": [[{"k": "dict", "v": []}, 1]]},
    {"k": "object", "h": True}, {"k": "object", "h": "1"}, {"k": "object", "h": 1, "fields": 3},
    {"k": "object", "h": 1, "fields": ["a"], "items": [{}]},
    {"k": "object", "h": 1, "type": [], "special": {}}, {"k": "object", "h": 1, "data": {"c": []}},
    {"k": "data", "c": "os:system", "v": {"command": "true"}}, {"k": "data", "c": [], "v": []},
    {"k": "tensor", "out": 0}, {"k": "tensor", "out": True}, {"k": "tensor", "out": -1},
    {"k": "tensor", "s": 0, "o": 0, "d": "float32", "n": [1], "t": [1], "out": 0},
]  # fmt: skip
FIELDS = ("value", "results", "changed", "parameters", "storages", "error", "method", "outputs",
          "object", "there", "file", "class", "name", "special", "before")  # fmt: skip
ERROR = {"classes": ["ValueError"], "text": "no", "frames": [["<cell>", 1, "f"]], "outer": []}


class Forger:
    """The other end: answers each request with a header and body of the test's choice."""

    def __init__(self) -> None:
        here_read, there_write = os.pipe()
        there_read, here_write = os.pipe()
        self.session = Session(Channel(here_read, here_write), b"")
        self.session.files.add("<cell>")
        self.there = Channel(there_read, there_write)

    def answers(self, header: dict[str, Any], body: bytes, use: Callable[[Session], Any]) -> Any:
        """Use the session once, while a thread gives the answer."""

        def give() -> None:
            request, _ = self.there.receive(time.monotonic() + 10)
            self.there.send({"id": request["id"], **header}, body, time.monotonic() + 10)

        thread = threading.Thread(target=give, daemon=True)
        thread.start()
        self.session.begin(5)
        try:
            return use(self.session)
        finally:
            thread.join(10)

    def close(self) -> None:
        for channel in (self.session.channel, self.there):
            channel.close()


@pytest.fixture
def forger() -> Iterator[Forger]:
    made = Forger()
    yield made
    made.close()


def call(session: Session) -> Any:
    args = (torch.ones(2, requires_grad=True), [1], {"a": 2})
    return session.use("call", 1, method=None, args=args, kwargs={})


USES: dict[str, Callable[[Session], Any]] = {
    "call": call,
    "get": lambda session: session.use("get", 1, name="width"),
    "set": lambda session: session.use("set", 1, name="width", value=3),
    "run": lambda session: session.run("cell", "x = 1", 5),
    "lookup": lambda session: session.lookup("f"),
    "define": lambda session: session.define("f", ["x"]),
    "reset": lambda session: session.reset(),
}
PLAIN = (
    bool,
    int,
    float,
    str,
    tuple,
    list,
    dict,
    set,
    frozenset,
    type(None),
    slice,
    range,
    complex,
)


@pytest.mark.parametrize("use", USES)
def test_values_of_any_type_in_any_place_do_no_harm(use: str) -> None:
    for field in FIELDS:
        for value in ODD:
            forger = Forger()
            honest: dict[str, Any] = {"value": None, "results": 0, "storages": []}
            header = {**honest, field: value}
            error = raised_by(forger.answers, header, b"", USES[use])
            allowed: tuple[type, ...] = (GoneError, OutOfTimeError, NameError, TypeError)
            learners = type(error).__module__ == "learner" and field == "error"
            assert error is None or isinstance(error, allowed) or learners, (field, value, error)
            forger.close()


def raised_by(use: Callable[..., Any], *args: Any) -> BaseException | None:
    try:
        use(*args)
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("value", ODD, ids=lambda value: ascii(value)[:30])
@pytest.mark.parametrize("key", ERROR)
def test_errors_of_any_form_are_errors(forger: Forger, key: str, value: Any) -> None:
    header = {"error": {**ERROR, key: value}}
    with pytest.raises(Exception) as caught:
        forger.answers(header, b"", call)
    str(caught.value).encode()
    assert isinstance(caught.value, Exception)


KINDS = [
    "SystemExit", "KeyboardInterrupt", "BaseException", "GeneratorExit", "StopIteration", "OSError",
    "FileNotFoundError", "UnicodeDecodeError", "UnicodeEncodeError", "ExceptionGroup",
    "BaseExceptionGroup", "MemoryError", "RecursionError", "ImportError", "SyntaxError", "KeyError",
    "AttributeError", "NotImplementedError", "GoneError", "OutOfTimeError", "WireError", "Warning",
    "print", "int", "__import__", "no identifier", "x.y", "\ud800", "",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=ascii)
def test_errors_of_any_kind_are_exceptions_with_their_text(forger: Forger, kind: str) -> None:
    header = {"error": {**ERROR, "classes": [kind, "object"], "text": "it \ud800 said"}}
    with pytest.raises(Exception) as caught:
        forger.answers(header, b"", call)
    assert not isinstance(caught.value, GoneError | OutOfTimeError | WireError)
    assert "said" in str(caught.value)
    str(caught.value).encode()
    assert caught.value.raised_by_learner is True  # type: ignore[attr-defined]


def mutated(header: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    """A header with one of its values, at any depth, replaced or removed."""
    changed = copy.deepcopy(header)
    place: Any = changed
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = chance.choice(keys)
        inner = place[key]
        if isinstance(inner, dict | list) and inner and chance.random() < 0.7:
            place = inner
            continue
        if chance.random() < 0.2:
            del place[key]
        else:
            place[key] = copy.deepcopy(chance.choice(ODD))
        return changed


def test_answers_that_are_slightly_wrong_do_no_harm() -> None:
    """Of an honest answer with gradients, changes, a new parameter and an object."""
    tensor = {"k": "tensor", "s": 0, "o": 0, "d": "float32", "n": [2], "t": [1]}
    honest = {
        "value": {"k": "tuple", "v": [{**tensor, "out": 0}, {"k": "object", "h": 4, "type": "C",
                  "special": ["__len__"], "module": False}, {"k": "dict", "v": [["a", tensor]]}]},
        "results": 1, "changed": [[1, {"k": "list", "v": [1, 2]}]], "storages": [8],
        "parameters": [[5, tensor]],
    }  # fmt: skip
    forger = Forger()
    first, thing, rest = forger.answers(honest, bytes(8), call)
    assert first.requires_grad
    assert type(thing).__name__ == "C"
    assert torch.equal(rest["a"], torch.zeros(2))
    forger.close()
    chance = random.Random(15)
    for _ in range(400):
        forger = Forger()
        header = mutated(honest, chance)
        error = raised_by(forger.answers, header, bytes(8), call)
        assert error is None or isinstance(error, GoneError) or "error" in header, header
        assert bool(forger.session.gone) == isinstance(error, GoneError)
        forger.close()


@pytest.mark.parametrize("id", [0, 2, -1, None, True, "1", 1.0, [1]])
def test_an_answer_to_another_request_ends_the_session(forger: Forger, id: Any) -> None:
    with pytest.raises(GoneError, match="malformed"):
        forger.answers({"id": id, "value": 3}, b"", call)


def test_bytes_that_are_no_message_end_the_session() -> None:
    chance = random.Random(4)
    header = json.dumps({"id": 1, "value": None, "results": 0, "storages": []}).encode()
    good = HEAD.pack(len(header), 0) + header
    deep = b'{"id":' * 100_000
    digits = b'{"id": ' + b"9" * 10_000 + b"}"
    raw = [
        struct.pack(">IQ", 2**32 - 1, 2**64 - 1), struct.pack(">IQ", 5, 2**40), good[:7],
        HEAD.pack(len(deep), 0) + deep, HEAD.pack(len(digits), 0) + digits,
        *(bytes(chance.randrange(256) for _ in range(40)) for _ in range(20)),
    ]  # fmt: skip
    for place in range(0, len(good), 3):
        damaged = bytearray(good)
        damaged[place] ^= 1 << chance.randrange(8)
        raw.append(bytes(damaged))
    for data in raw:
        forger = Forger()
        os.write(forger.there.writing, data[:60_000])
        os.close(forger.there.writing)
        forger.there.writing = os.open(os.devnull, os.O_WRONLY)
        forger.session.begin(1)
        error = raised_by(forger.session.ask, "reset")
        assert error is None or isinstance(error, GoneError), (data, error)
        assert bool(forger.session.gone) == isinstance(error, GoneError)
        forger.close()


def test_values_that_lie_arrive_as_plain_values(start: Callable[..., Session]) -> None:
    """Of a real process: subclasses become what they hold, or stay there."""
    session = start()
    session.begin(60)
    source = """
import enum, torch
class Number(int):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0
    def __repr__(self): return "4000"
    __hash__ = int.__hash__
class Real(float):
    def __lt__(self, other): return True
class Text(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
class Many(list):
    def __len__(self): return 99
class Named(dict):
    def __getitem__(self, key): return 1
class Pair(tuple):
    def __eq__(self, other): return True
    __hash__ = tuple.__hash__
class Lying(torch.Tensor):
    def __eq__(self, other): return torch.ones(2, dtype=torch.bool)
class Color(enum.IntEnum):
    RED = 3
class Same:
    def __eq__(self, other): return True
def lies():
    tensor = torch.Tensor._make_subclass(Lying, torch.zeros(2))
    return [Number(3), Real(2.5), Text("a"), Many([1]), Named(a=2), Pair((1,)), tensor, Color.RED,
            float("nan"), Same()]
"""
    session.run("lies", source, 60)
    found = session.lookup("lies")()
    kinds = [int, float, str, list, dict, tuple, torch.Tensor, int, float]
    assert [type(one) for one in found[:9]] == kinds
    assert found[:6] == [3, 2.5, "a", [1], {"a": 2}, (1,)]
    assert found[0] != 4000
    assert found[2] != "b"
    assert torch.equal(found[6], torch.zeros(2))
    assert found[8] != found[8]
    assert found[9] != 3
    assert found[9] != found[0]
