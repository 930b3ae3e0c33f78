"""What the helpers of a check say, and that they let nothing wrong pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nemotron_lite.course.exercises import close, gradients, keeps_inputs, raises, strided


@pytest.mark.parametrize(
    ("actual", "expected", "words"),
    [
        (None, torch.ones(2), "is None: is a `return` missing"),
        (..., 1.0, "is Ellipsis"),
        ([1.0], torch.ones(1), "is a list of 1; expected a tensor"),
        (torch.ones(2, 3), torch.ones(3, 2), "shape [2, 3]; expected [3, 2]"),
        (torch.tensor([1.0, torch.nan]), torch.ones(2), "not finite, the first at [1]"),
        (torch.tensor([1.0, 2.5]), torch.ones(2), "The largest difference is at [1]"),
        (torch.tensor([1.0, 2.5]), torch.ones(2), "yours 2.5, expected 1"),
        (torch.tensor([True, False]), torch.tensor([True, True]), "in 1 of 2 values"),
        (3.5, 3, "is 3.5; expected 3"),
        (True, 1, "is a bool; expected a number"),
        ("3", 3, "is a str; expected a number"),
        (float("nan"), 3.0, "is nan"),
        ((1, 2), (1, 2, 3), "has 2 parts; expected 3"),
        (torch.ones(2), (1, 2), "a tensor of shape [2]; expected 2 results"),
        ((torch.ones(1), torch.zeros(1)), (torch.ones(1), torch.ones(1)), "the result, part 1"),
        ("zoh", "euler", "is 'zoh'; expected 'euler'"),
        ({"a": 1}, {"a": 2}, "expected {'a': 2}"),
    ],
)  # fmt: skip
def test_a_difference_is_reported(actual: object, expected: object, words: str) -> None:
    with pytest.raises(AssertionError) as told:
        close(actual, expected)
    assert words in str(told.value)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (torch.ones(2), torch.ones(2) + 1e-6),
        (torch.ones(2, dtype=torch.float64), torch.ones(2)),
        (torch.tensor(3.0), 3),
        (torch.ones(0, 3), torch.ones(0, 3)),
        (torch.tensor([torch.nan, torch.inf]), torch.tensor([torch.nan, torch.inf])),
        ((torch.ones(1), None, 2), [torch.ones(1), None, 2]),
        ([1, "a"], (1, "a")),
    ],
)
def test_what_agrees_passes(actual: object, expected: object) -> None:
    close(actual, expected)


def test_an_infinity_in_place_of_another_is_found() -> None:
    with pytest.raises(AssertionError, match="is -inf; expected inf"):
        close(torch.tensor([-torch.inf]), torch.tensor([torch.inf]))


def test_dtype_only_when_asked() -> None:
    single, double = torch.ones(2), torch.ones(2, dtype=torch.float64)
    close(single, double)
    with pytest.raises(AssertionError, match=r"dtype torch\.float32; expected torch\.float64"):
        close(single, double, dtype=True)


def test_tolerances_are_kept() -> None:
    close(torch.tensor(1.01), torch.tensor(1.0), rtol=0.1)
    with pytest.raises(AssertionError):
        close(torch.tensor(1.01), torch.tensor(1.0), rtol=1e-3, atol=1e-3)
    with pytest.raises(AssertionError):
        close(1.01, 1.0, rtol=1e-3, atol=1e-3)


def product(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y.sum()


WRONG_GRADIENTS: dict[str, tuple[Callable[..., object], str]] = {
    "detached": (lambda x, y: x * y.detach().sum(), "the gradient of y does not exist"),
    "both detached": (lambda x, y: (x * y.sum()).detach(), "the gradient of x does not exist"),
    "through item": (lambda x, y: x * y.sum().item(), "the gradient of y does not exist"),
    "scaled": (
        lambda x, y: x * (2 * y - y.detach()).sum(), "the gradient of y differs in 3 of 3"),
    "another result": (lambda x, y: x + y.sum(), "the result differs"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_GRADIENTS)
def test_a_wrong_gradient_is_reported(name: str) -> None:
    function, words = WRONG_GRADIENTS[name]
    inputs = {"x": torch.tensor([1.0, -2.0]), "y": torch.tensor([0.5, 1.5, 2.0])}
    with pytest.raises(AssertionError) as told:
        gradients(function, product, inputs, what="three numbers")
    assert f"three numbers: {words}" in str(told.value)


def test_right_gradients_pass_by_name_and_in_order() -> None:
    inputs = {"x": torch.randn(2, 3), "y": torch.randn(4)}
    gradients(lambda x, y: y.sum() * x, product, inputs)
    gradients(lambda a, b: b.sum() * a, product, list(inputs.values()))


def test_gradients_of_several_results_and_beside_what_has_none() -> None:
    def reference(x: torch.Tensor, index: torch.Tensor) -> tuple[object, ...]:
        return x[index], 2 * x.detach(), x**2, 7

    def wrong(x: torch.Tensor, index: torch.Tensor) -> tuple[object, ...]:
        return x[index], 2 * x.detach(), x.detach() * x, 7

    inputs = (torch.randn(3), torch.tensor([2, 0]))
    gradients(reference, reference, inputs)
    with pytest.raises(AssertionError, match="the gradient of argument 1 differs"):
        gradients(wrong, reference, inputs)


def test_gradients_keep_the_strides_of_an_input() -> None:
    seen = []

    def reference(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.is_contiguous())
        return x * 2

    gradients(reference, reference, [strided(torch.randn(2, 3))])
    assert seen == [False, False]


def test_strided_has_the_same_values() -> None:
    whole = torch.randn(2, 3, 4)
    assert torch.equal(strided(whole), whole)
    assert not strided(whole).is_contiguous()


def test_raises_asks_for_the_error_and_its_words() -> None:
    def refuse(x: int) -> int:
        raise ValueError(f"{x} is odd")

    raises(refuse, 3, match="odd")
    with pytest.raises(AssertionError, match="it should name 'even'"):
        raises(refuse, 3, match="even")
    with pytest.raises(
        AssertionError, match="an odd number: raised ValueError; expected TypeError"
    ):
        raises(refuse, 3, error=TypeError, what="an odd number")
    with pytest.raises(AssertionError, match="nothing was raised"):
        raises(abs, 3)


def test_raises_leaves_a_stub_alone() -> None:
    def stub() -> None:
        raise NotImplementedError

    with pytest.raises(NotImplementedError):
        raises(stub)


def test_a_changed_input_is_named() -> None:
    with pytest.raises(AssertionError, match="changed its argument 2 in place"):
        keeps_inputs(lambda x, y: y.add_(x), torch.ones(2), torch.ones(2))
    assert keeps_inputs(lambda x, y: x + y, torch.ones(1), 2).item() == 3


def test_numbers_that_four_digits_do_not_tell_apart_have_nine() -> None:
    x = torch.tensor(7.191e-8)
    near = torch.nextafter(x, torch.tensor(1.0))
    with pytest.raises(AssertionError) as raised:
        close(near, x, rtol=0, atol=0)
    found, expected = str(raised.value).removeprefix("the result is ").split("; expected ")
    assert float(found) != float(expected.removesuffix("."))
    with pytest.raises(AssertionError, match=r"is 1; expected 2\."):
        close(torch.tensor(1.0), torch.tensor(2.0))
