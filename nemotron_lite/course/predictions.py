"""`predict`, then `measured`: guess a number before you see it.

A learner who wrote down a guess learns more from a result than one who only reads it. `predict`
shows the question and stores the guess. `measured` shows guess, measurement and their ratio, and
checks that the measurement is within the bounds that the chapter's text states. A guess of None is
shown as "no guess".

The measurement is shown in HTML only, because it differs between machines. Pass `exact=True` for a
number that does not, such as a count of parameters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_lite.course import output

Bound = float | int | None


class PredictionError(LookupError):
    """A measurement without a prediction, or a guess that is not valid."""


@dataclass(frozen=True)
class Guess:
    """The question under one key, and the guess; None if the reader made none."""

    question: str
    value: float | int | str | None
    unit: str
    options: tuple[str, ...]


_GUESSES: dict[str, Guess] = {}


def reset_guesses() -> None:
    """Delete all guesses; `setup` calls this."""
    _GUESSES.clear()


def predict(
    key: str,
    question: str,
    *,
    guess: float | int | str | None = None,
    unit: str = "",
    options: Sequence[str] = (),
) -> None:
    """Ask for a number, or for one of some options, and store the guess under `key`.

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
    answer = _guess_text(_GUESSES[key])
    choose = f"\nOptions: {' | '.join(choices)}" if choices else ""
    invite = f" Write yours into <code>predict({key!r}, …, guess=…)</code> and run the cell again."
    rich = f"<b>Predict.</b> {output.inline_html(question)}"
    if choices:
        rich += "<br>Options: " + " · ".join(output.inline_html(choice) for choice in choices)
    rich += f"<br>Your guess: <b>{output.inline_html(answer)}</b>."
    output.show_output(
        f"Predict: {question}{choose}\nYour guess: {answer}",
        output.box(rich + (invite if guess is None else "")),
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
    """Show the guess beside the measurement, and check that the measurement is within bounds.

    Args:
        key: the key of the prediction.
        value: a number (a tensor with one element will do), or one of the options.
        unit: of the value; "" takes the unit of the prediction.
        digits: significant digits to show.
        low, high: bounds that the chapter's text states, both included.
        exact: the value is the same on every machine; show it in the compared text too.

    Raises:
        PredictionError: nothing was predicted under `key`.
        AssertionError: the value is not finite, or outside its bounds.
    """
    if key not in _GUESSES:
        known = f"Predicted so far: {output.some_names(_GUESSES)}." if _GUESSES else ""
        raise PredictionError(
            f"measured({key!r}) has no prediction. Run the cell with predict({key!r}, …) first. "
            f"{known}".rstrip()
        )
    guess = _GUESSES[key]
    if hasattr(value, "item"):
        value = value.item()
    unit = unit or guess.unit
    shown = output.with_unit(output.format_number(value, digits), unit)
    output.show_output(
        f"measured: {key} = {shown}" if exact else f"measured: {key}",
        _side_by_side(guess, value, shown),
    )
    _check_bounds(key, value, low, high, unit)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _guess_text(guess: Guess) -> str:
    if guess.value is None:
        return "no guess"
    return output.with_unit(output.format_number(guess.value), "" if guess.options else guess.unit)


def _check_bounds(key: str, value: Any, low: Bound, high: Bound, unit: str) -> None:
    if isinstance(value, str):
        return
    if not math.isfinite(value):
        raise AssertionError(f"measured({key!r}) is {value}; expected a finite number.")
    if (low is not None and value < low) or (high is not None and value > high):
        between = f"from {low} to {high}"
        if low is None or high is None:
            between = f"at most {high}" if low is None else f"at least {low}"
        raise AssertionError(
            f"measured({key!r}) is {value:.6g}{f' {unit}' if unit else ''}; the chapter expects "
            f"{between}. A busy machine can change a measured time: run the cell once more. If "
            "the value stays, the text around this cell is wrong on this machine: report it."
        )


def _side_by_side(guess: Guess, value: Any, shown: str) -> str:
    verdict = _compared_with_guess(guess, value)
    cells = (
        ("you predicted", output.inline_html(_guess_text(guess))),
        ("measured", output.inline_html(shown)),
        ("", output.inline_html(verdict)),
    )
    columns = "".join(
        f'<td style="text-align: left; padding-right: 24px; vertical-align: top">'
        f'<span style="color: {output.FAINT}">{name or "&nbsp;"}</span><br>'
        f'<span style="font-size: 125%">{text}</span></td>'
        for name, text in cells
    )
    table = f'<table style="margin: 4px 0 0 0"><tbody><tr>{columns}</tr></tbody></table>'
    return output.box(output.inline_html(guess.question) + table, edge=output.RIGHT)


def _compared_with_guess(guess: Guess, value: Any) -> str:
    if guess.value is None:
        return "no guess to compare with"
    if guess.options or isinstance(value, str):
        return "as you said" if guess.value == value else "not what you said"
    expected = float(guess.value)
    if expected == value:
        return "exactly"
    if value * expected <= 0:
        return f"off by {output.format_number(value - expected)}"
    ratio = value / expected
    if 0.95 <= ratio <= 1.05:
        return "within 5 %"
    times, side = (ratio, "above") if ratio > 1 else (1 / ratio, "below")
    return f"{times:.3g} × {side} your guess"
