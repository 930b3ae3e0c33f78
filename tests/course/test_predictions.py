"""Guess first: what is kept, what is shown where, and what a measurement is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from nemotron_lite.course import measured, predict, predictions
from nemotron_lite.course.predictions import PredictionError
from tests.course.conftest import Shown


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    predictions.reset_guesses()
    yield
    predictions.reset_guesses()


def test_the_guess_stands_beside_the_measurement(shown: Callable[..., Shown]) -> None:
    asked = shown(predict, "crossover", "From which length on?", guess=500, unit="tokens")
    assert asked.plain == "Predict: From which length on?\nYour guess: 500 tokens"
    seen = shown(measured, "crossover", 740.2)
    assert "500 tokens" in seen.html
    assert "740 tokens" in seen.html
    assert "1.48 × above your guess" in seen.html


def test_a_measured_value_stays_out_of_the_text(shown: Callable[..., Shown]) -> None:
    shown(predict, "ms", "How long?")
    assert shown(measured, "ms", 12.345, unit="ms").plain == "measured: ms"


def test_an_exact_value_is_kept(shown: Callable[..., Shown]) -> None:
    shown(predict, "n", "How many?", unit="parameters")
    seen = shown(measured, "n", 120_668_707_840, exact=True)
    assert seen.plain == "measured: n = 120,668,707,840 parameters"


def test_no_guess_costs_nothing(shown: Callable[..., Shown]) -> None:
    assert "Your guess: no guess" in shown(predict, "n", "How many?").plain
    assert "no guess to compare with" in shown(measured, "n", 3).html


@pytest.mark.parametrize(
    ("guess", "value", "words"),
    [
        (3, 3, "exactly"),
        (100, 103, "within 5 %"),
        (10, 5, "2 × below your guess"),
        (-1, 2, "off by 3"),
        (0, 2, "off by 2"),
    ],
)
def test_the_verdict_has_a_size(
    shown: Callable[..., Shown], guess: float, value: float, words: str
) -> None:
    shown(predict, "x", "?", guess=guess)
    assert words in shown(measured, "x", value).html


def test_options(shown: Callable[..., Shown]) -> None:
    asked = shown(predict, "which", "Which wins?", guess="scan", options=["scan", "attention"])
    assert "Options: scan | attention" in asked.plain
    assert "as you said" in shown(measured, "which", "scan").html
    assert "not what you said" in shown(measured, "which", "attention").html


@pytest.mark.parametrize("guess", ["many", float("nan"), True])
def test_a_guess_is_a_number(guess: object) -> None:
    with pytest.raises(PredictionError, match="expected a finite number of ms"):
        predict("x", "?", guess=guess, unit="ms")


def test_a_guess_is_one_of_the_options() -> None:
    with pytest.raises(PredictionError, match=r"expected one of \['a', 'b'\]"):
        predict("x", "?", guess="c", options=["a", "b"])


def test_measuring_without_a_prediction_is_an_error() -> None:
    predict("one", "?")
    with pytest.raises(PredictionError, match=r"measured\('two'\) has no prediction.*far: one"):
        measured("two", 3)


@pytest.mark.parametrize(
    ("value", "bounds", "words"),
    [
        (3.0, dict(low=4), "is 3 ms; the chapter expects at least 4"),
        (9.0, dict(high=8), "expects at most 8"),
        (9.0, dict(low=1, high=8), "expects from 1 to 8"),
        (float("nan"), {}, "expected a finite number"),
        (torch.tensor(9.0), dict(high=8), "at most 8"),
    ],
)
def test_bounds_are_held(
    shown: Callable[..., Shown], value: object, bounds: dict[str, float], words: str
) -> None:
    predict("x", "?", unit="ms")
    seen = shown(measured, "x", value, fails=True, **bounds)
    assert isinstance(seen.error, AssertionError)
    assert words in str(seen.error)
    assert seen.plain == "measured: x", "the reader sees the value before the complaint"


def test_bounds_are_inclusive(shown: Callable[..., Shown]) -> None:
    predict("x", "?")
    shown(measured, "x", 4, low=4, high=4)


def test_html_is_escaped(shown: Callable[..., Shown]) -> None:
    assert "<b>x</b>" not in shown(predict, "x", "Is <b>x</b> shown?").html


def test_in_plain_python_the_text_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    predict("x", "How many?", guess=3)
    assert capsys.readouterr().out == "Predict: How many?\nYour guess: 3\n"
