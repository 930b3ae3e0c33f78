"""A fake GPU for the tests of the device run; the tests move its clock."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class FakeGpu:
    """The part of torch.cuda that timing uses. `now` is the time of its clock in milliseconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.capturing = False
        self.stream: Any = None
        self.forward_on: Any = None

    def takes(self, milliseconds: float, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, but each call moves the fake clock forward by this time."""

        def call(*args: Any, **options: Any) -> Any:
            self.now += milliseconds
            self.forward_on = self.stream
            return function(*args, **options)

        return call

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, later: Event) -> float:
                return later.at - self.at

        class Graph:
            def replay(self) -> None:
                gpu.now += self.cost

        class Stream:
            def wait_stream(self, other: object) -> None: ...

        @contextlib.contextmanager
        def on(stream: Stream) -> Iterator[None]:
            before, gpu.stream = gpu.stream, stream
            yield
            gpu.stream = before

        @contextlib.contextmanager
        def capture(graph: Graph, stream: Stream) -> Iterator[None]:
            start, gpu.capturing = gpu.now, True
            assert stream is gpu.forward_on, "autograd would run on another stream than the capture"
            try:
                yield
            finally:
                gpu.capturing = False
            graph.cost = gpu.now - start

        fakes = {
            "Event": Event, "CUDAGraph": Graph, "graph": capture,
            "Stream": Stream, "stream": on, "current_stream": lambda: gpu.stream,
            "synchronize": lambda: None, "empty_cache": lambda: None, "is_available": lambda: True,
            "get_device_name": lambda: "Fake GPU 100", "get_device_capability": lambda: (9, 0),
            "get_device_properties": lambda _: SimpleNamespace(L2_cache_size=250),
        }  # fmt: skip
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
