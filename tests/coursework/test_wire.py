"""Values arrive as they were sent, and nothing malformed becomes a value."""

from __future__ import annotations

import json
import os
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_lite.config import NemotronConfig
from nemotron_lite.coursework.wire import (
    DTYPES,
    MOST_ELEMENTS,
    Channel,
    ClosedError,
    LateError,
    Reader,
    WireError,
    Writer,
)


def there_and_back(value: Any, writer: Writer | None = None, **reading: Any) -> Any:
    writer = writer or Writer()
    data = writer.write(value)
    sizes, body = writer.body()
    text = json.dumps(data)
    return Reader({"storages": sizes}, bytearray(body), **reading).read(json.loads(text))


@pytest.mark.parametrize(
    "value",
    [
        None, True, 7, -(2**70), 1.5, float("inf"), "text ✓", (1, [2, (3,)]), {}, {"a": (1, 2)},
        {(0, 1): "pair"}, {1, 2}, frozenset({3}), slice(1, None, 2), range(3, 9, 2), Ellipsis,
        1 + 2j, torch.float16, torch.device("cpu"),
    ],
)  # fmt: skip
def test_plain_values_arrive_as_they_were(value: Any) -> None:
    arrived = there_and_back(value)
    assert arrived == value
    assert type(arrived) is type(value)


def test_a_shape_arrives_as_a_tuple_and_nan_as_nan() -> None:
    assert there_and_back(torch.Size([2, 3])) == (2, 3)
    assert there_and_back(float("nan")) != there_and_back(float("nan"))


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_arrives_bit_for_bit(name: str) -> None:
    raw = torch.arange(64, dtype=torch.uint8)
    tensor = raw % 2 == 0 if name == "bool" else raw.view(DTYPES[name])
    arrived = there_and_back(tensor)
    assert arrived.dtype is DTYPES[name]
    assert torch.equal(arrived.view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).T, torch.randn(6, 8)[1::2, ::3], torch.randn(3, 1).expand(3, 5),
        torch.tensor(2.0), torch.empty(0, 3), torch.randn(10)[7:], torch.tensor([float("nan"), 1]),
    ],
    ids=["transposed", "sliced", "expanded", "scalar", "empty", "offset", "nan"],
)  # fmt: skip
def test_strides_arrive_too(tensor: Tensor) -> None:
    arrived = there_and_back(tensor)
    assert arrived.stride() == tensor.stride()
    torch.testing.assert_close(arrived, tensor, rtol=0, atol=0, equal_nan=True)


def test_only_the_part_of_a_storage_that_is_used_is_sent() -> None:
    writer = Writer()
    writer.write(torch.zeros(10_000)[5000:5010])
    sizes, body = writer.body()
    assert sum(sizes) == len(body) < 100


def test_two_views_of_one_storage_stay_views_of_one_storage() -> None:
    wide = torch.randn(4, 6)
    one, other = there_and_back((wide[:, :4], wide[:, 2:]))
    one[:, 2] = 7.0
    assert (other[:, 0] == 7.0).all()


def test_a_config_is_built_again_only_by_a_class_that_is_allowed() -> None:
    config = NemotronConfig.from_preset("tiny-super")
    writer = Writer(lambda value: writer.data(value))
    assert there_and_back(config, writer) == config
    name = "nemotron_lite.config:NemotronConfig"
    writer = Writer(lambda value: writer.data(value))
    assert there_and_back(config, writer, classes={name: NemotronConfig}) == config
    writer = Writer(lambda value: writer.data(value))
    with pytest.raises(WireError):
        there_and_back(config, writer, classes={})


def test_a_class_of_a_module_that_is_not_there_still_shows_its_fields() -> None:
    data = {"k": "data", "c": "nemotron_lite.no_such_module:Thing", "v": {"width": 3}}
    assert Reader({}, bytearray()).read(data) == SimpleNamespace(width=3)


@pytest.mark.parametrize(
    "value",
    [object(), [open], torch.zeros(2).to_sparse(), torch.zeros(2, device="meta")],
    ids=["object", "function", "sparse", "meta"],
)
def test_what_cannot_be_sent_says_so(value: Any) -> None:
    with pytest.raises(WireError, match="cannot be sent"):
        Writer().write(value)


def tensor_data(**changes: Any) -> dict[str, Any]:
    return {"k": "tensor", "s": 0, "o": 0, "d": "float32", "n": [2, 2], "t": [2, 1], **changes}


@pytest.mark.parametrize(
    "data",
    [
        tensor_data(t=[2, -1]), tensor_data(t=[200, 1]), tensor_data(o=4), tensor_data(o=-4),
        tensor_data(o=2, n=[1], t=[1]), tensor_data(d="object"), tensor_data(d=None),
        tensor_data(n=[2]), tensor_data(n="22"), tensor_data(s=1), tensor_data(s=-1),
        tensor_data(s=True), tensor_data(n=[MOST_ELEMENTS + 1], t=[0]), tensor_data(n=[2**40] * 3),
        tensor_data(d="bool", n=[16], t=[1]), {"k": "dict", "v": [[{"k": "list", "v": []}, 1]]},
        {"k": "dict", "v": [1]}, {"k": "set", "v": [{"k": "list", "v": []}]},
        {"k": "slice", "v": []},
        {"k": "range", "v": ["a", 1, 1]}, {"k": "module"}, {"v": 1}, [1], {"k": "tuple"},
        {"k": "dtype", "v": "load"}, {"k": "device", "v": "cuda"},
    ],
)  # fmt: skip
def test_malformed_answers_are_refused(data: Any) -> None:
    body = bytearray(b"\x02" * 16)
    with pytest.raises(WireError):
        Reader({"storages": [16]}, body, classes={}).read(data)


@pytest.mark.parametrize("sizes", [[4], [17], [-1, 17], "16", [16.0], [True] * 16, None])
def test_storages_that_do_not_match_the_bytes_are_refused(sizes: Any) -> None:
    with pytest.raises(WireError):
        Reader({"storages": sizes}, bytearray(16))


def test_nesting_has_a_limit() -> None:
    deep: Any = None
    for _ in range(500):
        deep = {"k": "tuple", "v": [deep]}
    with pytest.raises(WireError, match="nested"):
        Reader({}, bytearray()).read(deep)


def pipes() -> tuple[Channel, Channel]:
    (a, b), (c, d) = os.pipe(), os.pipe()
    return Channel(a, d), Channel(c, b)


def test_a_message_arrives_whole_and_in_order() -> None:
    one, other = pipes()
    one.send({"id": 1}, b"abc")
    one.send({"id": 2}, b"")
    assert other.receive() == ({"id": 1}, bytearray(b"abc"))
    assert other.receive() == ({"id": 2}, bytearray())


@pytest.mark.parametrize(
    "raw",
    [b"\xff" * 40, b"\x00\x00\x00\x02" + bytes(8) + b"{]", b"\x00\x00\x00\x01" + bytes(8) + b"1",
     b"\x00\x00\x00\x02" + bytes(8) + b"\xff\xff"],
    ids=["sizes", "json", "number", "utf-8"],
)  # fmt: skip
def test_bytes_that_are_no_message_are_refused(raw: bytes) -> None:
    one, other = pipes()
    os.write(one.writing, raw)
    with pytest.raises(WireError):
        other.receive(time.monotonic() + 5)


def test_silence_ends_at_the_deadline_and_a_closed_pipe_at_once() -> None:
    one, other = pipes()
    with pytest.raises(LateError):
        other.receive(time.monotonic() + 0.05)
    with pytest.raises(LateError):  # nobody reads, so the pipe is soon full
        one.send({}, bytes(2**22), time.monotonic() + 0.05)
    one.close()
    left = time.monotonic() + 5
    while True:  # what was written before the end is cut off
        try:
            other.receive(left)
        except ClosedError:
            break
