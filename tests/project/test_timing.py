"""A test marked `timing` is tried up to three times, and no other test is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.conftest import TIMING_TRIES, pytest_pyfunc_call


def item(failures: int, marked: bool) -> tuple[SimpleNamespace, list[int]]:
    """A test with a fixture that fails so many times, and the values it was called with."""
    calls: list[int] = []

    def test(number: int) -> None:
        calls.append(number)
        assert len(calls) > failures

    def closest(name: str) -> pytest.Mark | None:
        return pytest.mark.timing.mark if marked and name == "timing" else None

    fake = SimpleNamespace(obj=test, funcargs={"number": 7, "other": 0}, get_closest_marker=closest)
    return fake, calls


@pytest.mark.parametrize(
    ("failures", "marked", "expected", "count"),
    [
        (0, True, True, 1), (1, True, True, 2), (2, True, None, 2), (9, True, None, 2),
        (0, False, None, 0), (9, False, None, 0),
    ],
)  # fmt: skip
def test_tries(failures: int, marked: bool, expected: bool | None, count: int) -> None:
    """None leaves the next call, the last one, to pytest."""
    fake, calls = item(failures, marked)
    assert pytest_pyfunc_call(fake) is expected
    assert calls == [7] * count
    assert count < TIMING_TRIES
