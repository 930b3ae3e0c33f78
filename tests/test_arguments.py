"""What counts as an integer, a number or a boolean wherever a caller gives one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nemotron_lite.arguments import flag, integer, number, shown

NO_INTEGERS = (True, 2.0, "3", None, np.bool_(1), np.float32(1), [1], b"x", torch.tensor([1, 2]))
NO_NUMBERS = (True, "3", None, np.bool_(1), [1], b"x", 1j, torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize(
    "value",
    [3, np.int64(3), np.uint8(3), torch.tensor(3, dtype=torch.uint8), torch.tensor([3])],
    ids=repr,
)
def test_integers_of_numpy_and_torch_become_python_integers(value: Any) -> None:
    found = integer("seed", value, low=0, high=3)
    assert found == 3
    assert type(found) is int


@pytest.mark.parametrize("value", [*NO_INTEGERS, torch.tensor(2.0), torch.tensor(True)], ids=repr)
def test_what_is_no_integer_is_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^top_k=.* expected an integer of at least 1"):
        integer("top_k", value, low=1)


@pytest.mark.parametrize("value", [-1, 4, 10**6000, torch.tensor(7)], ids=lambda v: "value")
def test_an_integer_out_of_range_is_refused_with_the_range(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^top_k=.* expected an integer from 0 to 3\.$"):
        integer("top_k", value, low=0, high=3)


@pytest.mark.parametrize("value", [0.5, np.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_numbers_become_python_floats(value: Any) -> None:
    found = number("top_p", value, low=0, high=1)
    assert found == 0.5
    assert type(found) is float


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_what_is_no_number_is_refused_by_name(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^top_p=.* expected a number"):
        number("top_p", value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1, 2, 10**400])
def test_a_number_out_of_range_or_not_finite_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"^top_p="):
        number("top_p", value, low=0, high=1)


def test_the_smallest_positive_number_is_above_zero() -> None:
    assert number("temperature", 5e-324, above=0) == 5e-324
    with pytest.raises(ValueError, match="expected a number above 0"):
        number("temperature", 0, above=0)


def test_a_flag_is_a_boolean_and_nothing_else() -> None:
    assert flag("adaptive", np.bool_(False)) is False
    assert flag("adaptive", True) is True
    for value in (0, 1, "yes", None, 1.0):
        with pytest.raises(TypeError, match=r"^adaptive="):
            flag("adaptive", value)


def test_a_shown_value_is_short_and_takes_no_time() -> None:
    assert shown("a" * 10**7) == "'" + "a" * 58 + "…"
    assert shown(10**5000) == "…", "Python does not print it"
    assert shown([1, 2]) == "[1, 2]"
    assert len(shown({"a": "b" * 1000}, 20)) == 20
