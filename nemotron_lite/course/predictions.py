"""`predict`, then `measured`: commit to a number before you see it.

A guess that was written down teaches more than a result that was only read: the surprise has a
size. `predict` shows the question and keeps the guess; `measured` puts guess, measurement and
their ratio side by side, and checks that the measurement lies where the chapter's text says it
lies. A guess of None is recorded as "no guess" and costs nothing.

The measurement is shown in HTML only, because it differs between machines. Pass `exact=True` for a
number that does not, such as a count of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_lite.course import _output

Bound = float | int | None


class PredictionError(LookupError):
    """A measurement that nobody was asked to predict, or a guess that cannot be one."""


@dataclass(frozen=True)
class Guess:
    """What was asked under one key, and the answer; None where the reader did not commit."""

    question: str
    value: float | int | str | None
    unit: str
    options: tuple[str, ...]


_GUESSES: dict[str, Guess] = {}


def forget() -> None:
    """Drop every guess; `setup` does it."""
    _GUESSES.clear()


def predict(
    key: str,
    question: str,
    *,
    guess: float | int | str | None = None,
    unit: str = "",
    options: Sequence[str] = (),
) -> None:
    """Ask for a number, or for one of some options, and keep the answer under `key`.

    Raises:
        PredictionError: a guess that is neither a number nor one of `options`.
    """
    choices = tuple(options)
    if guess is not None and choices and guess not in choices:
        raise PredictionError(f"guess is {guess!r}; expected one of {list(choices)}, or None.")
    if guess is not None and not choices and not _is_number(guess):
        raise PredictionError(
            f"guess is {guess!r}; expected a finite number{f' of {unit}' if unit else ''}, or None."
        )
    _GUESSES[key] = Guess(question, guess, unit, choices)
    answer = _worded(_GUESSES[key])
    choose = f"\nOptions: {' | '.join(choices)}" if choices else ""
    invite = f" Write yours into <code>predict({key!r}, …, guess=…)</code> and run the cell again."
    rich = f"<b>Predict.</b> {_output.inline(question)}"
    if choices:
        rich += "<br>Options: " + " · ".join(_output.inline(choice) for choice in choices)
    rich += f"<br>Your guess: <b>{_output.inline(answer)}</b>."
    _output.emit(
        f"Predict: {question}{choose}\nYour guess: {answer}",
        _output.card(rich + (invite if guess is None else "")),
    )


def measured(
    key: str,
    value: Any,
    *,
    unit: str = "",
    digits: int = 3,
    low: Bound = None,
    high: Bound = None,
    exact: bool = False,
) -> None:
    """Show the guess beside the measurement, and hold the measurement to its bounds.

    Args:
        key: the one that `predict` was given.
        value: a number (a tensor with one element will do), or one of the options.
        unit: of the value; the one from `predict` unless said otherwise.
        digits: how many the display shows.
        low, high: where the chapter says the value lies, ends included.
        exact: the value is the same on every machine; keep it in the committed text.

    Raises:
        PredictionError: nothing was predicted under `key`.
        AssertionError: the value is not finite, or outside its bounds.
    """
    if key not in _GUESSES:
        known = f"Predicted so far: {_output.listed(_GUESSES)}." if _GUESSES else ""
        raise PredictionError(
            f"measured({key!r}) has no prediction. Run the cell with predict({key!r}, …) first. "
            f"{known}".rstrip()
        )
    guess = _GUESSES[key]
    if hasattr(value, "item"):
        value = value.item()
    unit = unit or guess.unit
    shown = _output.with_unit(_output.number(value, digits), unit)
    _output.emit(
        f"measured: {key} = {shown}" if exact else f"measured: {key}",
        _side_by_side(guess, value, shown),
    )
    _hold(key, value, low, high, unit)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _worded(guess: Guess) -> str:
    if guess.value is None:
        return "no guess"
    return _output.with_unit(_output.number(guess.value), "" if guess.options else guess.unit)


def _hold(key: str, value: Any, low: Bound, high: Bound, unit: str) -> None:
    if isinstance(value, str):
        return
    if not math.isfinite(value):
        raise AssertionError(f"measured({key!r}) is {value}: something went wrong before it.")
    if (low is not None and value < low) or (high is not None and value > high):
        between = f"from {low} to {high}"
        if low is None or high is None:
            between = f"at most {high}" if low is None else f"at least {low}"
        raise AssertionError(
            f"measured({key!r}) is {value:.6g}{f' {unit}' if unit else ''}; the chapter expects "
            f"{between}. A busy machine can do this to a time: run the cell once more. If it "
            "stays, the text around this cell does not hold here, and that is worth a report."
        )


def _side_by_side(guess: Guess, value: Any, shown: str) -> str:
    verdict = _verdict(guess, value)
    cells = (
        ("you predicted", _output.inline(_worded(guess))),
        ("measured", _output.inline(shown)),
        ("", _output.inline(verdict)),
    )
    columns = "".join(
        f'<td style="text-align: left; padding-right: 24px; vertical-align: top">'
        f'<span style="color: {_output.FAINT}">{name or "&nbsp;"}</span><br>'
        f'<span style="font-size: 125%">{text}</span></td>'
        for name, text in cells
    )
    table = f'<table style="margin: 4px 0 0 0"><tbody><tr>{columns}</tr></tbody></table>'
    return _output.card(_output.inline(guess.question) + table, edge=_output.RIGHT)


def _verdict(guess: Guess, value: Any) -> str:
    if guess.value is None:
        return "no guess to compare with"
    if guess.options or isinstance(value, str):
        return "as you said" if guess.value == value else "not what you said"
    expected = float(guess.value)
    if expected == value:
        return "exactly"
    if value * expected <= 0:
        return f"off by {_output.number(value - expected)}"
    ratio = value / expected
    if 0.95 <= ratio <= 1.05:
        return "within 5 %"
    times, side = (ratio, "above") if ratio > 1 else (1 / ratio, "below")
    return f"{times:.3g} × {side} your guess"
