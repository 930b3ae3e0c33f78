"""Parsing in two threads, while the garbage collector lets the other thread run in between."""

from __future__ import annotations

import ast
import gc
import threading
import time
from collections.abc import Iterator

import pytest

from nemotron_lite.course.syntax import parse


class SlowToDie:
    """Garbage that only the collector finds, and whose destructor lets another thread run."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        time.sleep(0.0005)


@pytest.fixture
def eager_collector() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(50, 1, 1)
    yield
    gc.set_threshold(*before)


@pytest.mark.usefixtures("eager_collector")
def test_two_threads_parse_at_once() -> None:
    source = "\n".join(f"def f{i}(x: int) -> int:\n    return (x + {i}) * x" for i in range(300))
    expected = len(ast.parse(source).body)
    found: list[int | BaseException] = []

    def run() -> None:
        try:
            for _ in range(20):
                SlowToDie()
                found.append(len(parse(source).body))
        except BaseException as error:
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 40


def test_what_is_no_python_is_refused() -> None:
    with pytest.raises(SyntaxError):
        parse("def f(:")
    assert isinstance(parse("x = 1"), ast.Module)
