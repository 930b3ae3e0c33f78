"""`predict`, then `measured`: guess a number before you see it.

A learner who wrote down a guess learns more from a result than one who only reads it. The questions
of a chapter are in its `predictions.toml`, so that no bound in a cell gives the answer away:

    [[predictions]]
    key = "speed"
    question = "How many times faster than the loop is the scan in chunks, at 2,048 tokens?"
    unit = "times"
    low = 3
    high = 500

    [[predictions]]
    key = "winner"
    question = "Which of the two uses less memory at 4,096 tokens?"
    options = ["attention", "the scan"]
    expected = ["the scan"]

`low` and `high` (at least one of them, both included) are the bounds that the chapter's text
relies on; `expected` is the same for options, and can be left out. `exact = true` says that the
value is the same on every machine, such as a count of parameters. `digits` is the number of
significant digits to show, 3 if it is left out.

In a notebook, `predict("speed")` shows an input box and stores the guess with the rest of the
learner's progress, so a guess is still there the next day. No guess is fine: everything runs
without one. `measured("speed", value)` checks the bounds and shows guess and value side by side. It
is folded until there is a guess; a guess that is made later opens it. The plain text of both never
contains the answer.
"""

from __future__ import annotations

import html
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemotron_lite.course import output, progress_store
from nemotron_lite.course.chapter_list import chapter_folders
from nemotron_lite.course.display import show_live
from nemotron_lite.input_files import read_text

Value = float | int | str
FILE = "predictions.toml"
_FIELDS = {"key", "question", "unit", "options", "expected", "low", "high", "exact", "digits"}


class PredictionError(ValueError):
    """A `predictions.toml` that is missing or not valid, or a key that it does not have."""


@dataclass(frozen=True)
class Prediction:
    """One question of a chapter, and what its measurement must be for the text to be true."""

    key: str
    question: str
    unit: str = ""
    options: tuple[str, ...] = ()
    expected: tuple[str, ...] = ()
    low: float | int | None = None
    high: float | int | None = None
    exact: bool = False
    digits: int = 3


# The chapter given to `setup`, and the outputs of `measured` that a later guess opens.
_CURRENT: dict[str, str] = {}
_SHOWN: dict[tuple[str, str], tuple[Value, Any]] = {}


def begin(chapter: str) -> None:
    """Make `chapter` the one whose predictions are asked for; `setup` calls this."""
    _CURRENT["chapter"] = chapter
    _SHOWN.clear()


def predict(key: str) -> None:
    """Show the question under `key` and, in a notebook, a box for the guess.

    Raises:
        PredictionError: `setup` has not been called, or the chapter has no such prediction.
    """
    chapter, asked = _asked(key, "predict")
    plain = static_text(asked)
    if not output.in_notebook():
        output.show_output(plain)
        return
    guess = guess_of(chapter, key)
    yours = "" if guess is None else f"<br>Your guess: <b>{html.escape(_shown(asked, guess))}</b>"
    show_live(
        guess_widget(chapter, asked),
        "Run this cell to write your guess.",
        plain,
        output.box(_question_html(asked) + _answers_html(asked) + yours),
    )


def measured(key: str, value: Any) -> None:
    """Check that a measurement is within its bounds, and show it beside the guess.

    Args:
        key: the key of the prediction.
        value: a number (a tensor with one element will do), or one of the options.

    Raises:
        PredictionError: `setup` has not been called, or the chapter has no such prediction.
        AssertionError: the value is not finite, outside its bounds, or not an expected option.
    """
    chapter, asked = _asked(key, "measured")
    if hasattr(value, "item"):
        value = value.item()
    rich = measured_html(asked, value, guess_of(chapter, key))
    _SHOWN[chapter, key] = value, output.show_output(f"measured: {key}", rich, updatable=True)
    _check_bounds(asked, value)


def guess_of(chapter: str, key: str) -> Value | None:
    """The stored guess; None if there is none, or if it no longer fits the question."""
    guess = progress_store.get(f"guesses/{chapter}.{key}")
    asked = load_predictions(chapter)[key]
    fits = guess in asked.options if asked.options else _is_number(guess)
    return guess if fits else None


def keep_guess(chapter: str, asked: Prediction, guess: Value) -> None:
    """Store a guess, and show it in the output of `measured`, if that has run already."""
    progress_store.put(f"guesses/{chapter}.{asked.key}", guess)
    if (chapter, asked.key) in _SHOWN:
        value, handle = _SHOWN[chapter, asked.key]
        output.update_output(handle, f"measured: {asked.key}", measured_html(asked, value, guess))


def load_predictions(chapter: str) -> dict[str, Prediction]:
    """Key → prediction, from the `predictions.toml` of a chapter.

    Raises:
        PredictionError: there is no such chapter or file, or the file is not valid.
    """
    folders = chapter_folders()
    if chapter not in folders:
        raise PredictionError(
            f"There is no chapter {chapter!r} with predictions; choose one of {list(folders)}."
        )
    path, name = folders[chapter] / FILE, f"{folders[chapter].name}/{FILE}"
    if not path.exists():
        raise PredictionError(f"{name} does not exist; write it, with [[predictions]].")
    return parse_predictions(read_text(path), name)


def parse_predictions(text: str, name: str = FILE) -> dict[str, Prediction]:
    """Predictions from the text of a file.

    Raises:
        PredictionError: the message names the prediction and the problem.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PredictionError(f"{name} is not TOML: {error}") from error
    if set(tree) != {"predictions"} or not tree["predictions"]:
        raise PredictionError(
            f"{name} has {sorted(tree)}; expected [[predictions]] and nothing else."
        )
    found: dict[str, Prediction] = {}
    for position, entry in enumerate(tree["predictions"], 1):
        asked = _prediction(f"{name}, prediction {position}", entry)
        if asked.key in found:
            raise PredictionError(f"{name} has the key {asked.key!r} twice; keys must differ.")
        found[asked.key] = asked
    return found


def static_text(asked: Prediction) -> str:
    """Question and options in plain text; the same on every machine, and without the answer."""
    what = f"Options: {' | '.join(asked.options)}" if asked.options else "A number"
    of = f", in {asked.unit}" if asked.unit else ""
    return f"Predict: {asked.question}\n{what}{of}."


def read_number(text: str) -> float | int | None:
    """The number that a learner typed: `1,024`, `2e3`, `12 %`, `.5` or `1,5`; None if it is none.

    A comma or a space groups thousands where three digits follow it. Any other comma is the decimal
    comma of many languages.
    """
    cleaned = text.strip().removesuffix("%").strip()
    if re.fullmatch(r"[+-]?\d{1,3}([, _]\d{3})+(\.\d*)?", cleaned):
        cleaned = re.sub(r"[, _]", "", cleaned)
    elif re.fullmatch(r"[+-]?\d*,\d+", cleaned):
        cleaned = cleaned.replace(",", ".")
    try:
        number = float(cleaned)
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 1e15 else number


def guess_widget(chapter: str, asked: Prediction) -> Any:
    """The live input: the question, a number field or radio buttons, Save, and a reply."""
    widgets = output.import_lab("ipywidgets")
    guess = guess_of(chapter, asked.key)
    reply = widgets.HTML()
    save = widgets.Button(description="Save", tooltip="Save your guess", layout={"width": "auto"})
    if asked.options:
        field = widgets.RadioButtons(
            options=list(asked.options), value=guess, layout={"width": "auto"}
        )
        row = [widgets.VBox([field, save], layout={"align_items": "flex-start"})]
    else:
        field = widgets.Text(
            value="" if guess is None else output.format_number(guess, 15),
            description="Your guess",
            placeholder="a number",
            continuous_update=False,
            style={"description_width": "initial"},
            layout={"width": "240px"},
        )
        row = [field, *([widgets.Label(asked.unit)] if asked.unit else []), save]

    def say(text: str, *, wrong: bool = False) -> None:
        edge = output.WRONG if wrong else output.ACCENT
        reply.value = f'<div role="status">{output.box(html.escape(text), edge=edge)}</div>'

    def keep(_: Any) -> None:
        given = field.value
        if not asked.options and not str(given).strip():
            say("There is no guess yet. Write a number, or go on without one.")
            return
        if asked.options and given is None:
            say("There is no guess yet. Choose one of the options, or go on without one.")
            return
        value = given if asked.options else read_number(given)
        if value is None:
            say(
                f"“{given}” is not a number. Write one such as 3, 0.5 or 2e3, without words.",
                wrong=True,
            )
            return
        keep_guess(chapter, asked, value)
        say(f"Saved: {_shown(asked, value)}. You can change it.")

    save.on_click(keep)
    if not asked.options:
        field.observe(keep, names="value")  # Enter, or leaving the field
    if guess is not None:
        say(f"Saved: {_shown(asked, guess)}.")
    title = widgets.HTML(output.box(_question_html(asked)))
    return widgets.VBox([title, widgets.HBox(row, layout={"flex_flow": "row wrap"}), reply])


def measured_html(asked: Prediction, value: Any, guess: Value | None) -> str:
    """Guess and value side by side, folded as long as there is no guess."""
    shown = output.with_unit(
        output.format_number(value, asked.digits), "" if asked.options else asked.unit
    )
    cells = (
        ("your guess", "none yet" if guess is None else _shown(asked, guess)),
        ("the answer" if asked.exact else "measured here", shown),
        ("", "" if guess is None else _compared(asked, guess, value)),
    )
    columns = "".join(
        f'<td style="text-align: left; padding-right: 24px; vertical-align: top">'
        f'<span style="color: {output.FAINT}">{name or "&nbsp;"}</span><br>'
        f'<span style="font-size: 125%">{output.inline_html(text)}</span></td>'
        for name, text in cells
    )
    table = f'<table style="margin: 4px 0 0 0"><tbody><tr>{columns}</tr></tbody></table>'
    state = "" if guess is None else " open"
    summary = f"<summary><b>Answer:</b> {output.inline_html(asked.question)}</summary>"
    return output.box(f"<details{state}>{summary}{table}</details>", edge=output.RIGHT)


def _asked(key: str, caller: str) -> tuple[str, Prediction]:
    if "chapter" not in _CURRENT:
        raise PredictionError(
            f'{caller}({key!r}) needs a chapter: run the cell with setup("…") first.'
        )
    chapter = _CURRENT["chapter"]
    known = load_predictions(chapter)
    if key not in known:
        raise PredictionError(
            f"Chapter {chapter} has no prediction {key!r}; its keys are {list(known)}."
        )
    return chapter, known[key]


def _prediction(where: str, entry: Mapping[str, Any]) -> Prediction:
    def refuse(problem: str) -> PredictionError:
        return PredictionError(f"{where}{f' ({key})' if key else ''} {problem}")

    key = entry.get("key", "")
    if unknown := sorted(set(entry) - _FIELDS):
        raise refuse(f"has the unknown fields {unknown}; expected some of {sorted(_FIELDS)}.")
    if not isinstance(key, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", key):
        raise refuse(f"has the key {key!r}; expected lower-case letters, digits and _.")
    question = entry.get("question", "")
    if not isinstance(question, str) or not question.strip():
        raise refuse("has no question; write one.")
    options = tuple(entry.get("options", ()))
    expected = tuple(entry.get("expected", ()))
    low, high = entry.get("low"), entry.get("high")
    numbers = [field for field in ("unit", "low", "high", "digits") if field in entry]
    if options and (len(options) < 2 or len(set(options)) != len(options)):
        raise refuse(f"has the options {list(options)}; expected two or more, all different.")
    if any(not isinstance(option, str) for option in options):
        raise refuse(f"has the options {list(options)}; expected texts.")
    if options and numbers:
        raise refuse(f"has options and also {numbers}; those belong to a number.")
    if any(option not in options for option in expected):
        raise refuse(f"expects {list(expected)}; expected some of its options {list(options)}.")
    if not options and low is None and high is None:
        raise refuse("has neither options nor a bound; give low, high or both.")
    for name, bound in (("low", low), ("high", high)):
        if bound is not None and not _is_number(bound):
            raise refuse(f"has {name} = {bound!r}; expected a finite number.")
    if low is not None and high is not None and low > high:
        raise refuse(f"has low = {low} above high = {high}.")
    if not isinstance(entry.get("exact", False), bool):
        raise refuse(f"has exact = {entry['exact']!r}; expected true or false.")
    digits = entry.get("digits", 3)
    if not isinstance(digits, int) or not 1 <= digits <= 15:
        raise refuse(f"has digits = {digits!r}; expected a whole number from 1 to 15.")
    fields = {**entry, "question": question.strip(), "options": options, "expected": expected}
    return Prediction(**fields)


def _question_html(asked: Prediction) -> str:
    return f"<b>Predict.</b> {output.inline_html(asked.question)}"


def _answers_html(asked: Prediction) -> str:
    if asked.options:
        return "<br>" + " · ".join(output.inline_html(option) for option in asked.options)
    return f" <i>(in {html.escape(asked.unit)})</i>" if asked.unit else ""


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False


def _shown(asked: Prediction, guess: Value) -> str:
    return output.with_unit(output.format_number(guess, 15), "" if asked.options else asked.unit)


def _check_bounds(asked: Prediction, value: Any) -> None:
    key = asked.key
    busy = (
        "" if asked.exact else "A busy machine can change a measurement: run the cell once more. "
    )
    report = f"{busy}If it stays so, the text around this cell is wrong here: report it."
    if asked.options:
        if value not in asked.options:
            raise AssertionError(
                f"measured({key!r}) is {value!r}; expected one of {list(asked.options)}."
            )
        if asked.expected and value not in asked.expected:
            raise AssertionError(
                f"measured({key!r}) is {value!r}; the chapter expects "
                f"{' or '.join(map(repr, asked.expected))}. {report}"
            )
        return
    if not _is_number(value):
        raise AssertionError(f"measured({key!r}) is {value!r}; expected a finite number.")
    low, high = asked.low, asked.high
    if (low is not None and value < low) or (high is not None and value > high):
        between = f"from {low} to {high}"
        if low is None or high is None:
            between = f"at most {high}" if low is None else f"at least {low}"
        unit = f" {asked.unit}" if asked.unit else ""
        raise AssertionError(
            f"measured({key!r}) is {value:.6g}{unit}; the chapter expects {between}. {report}"
        )


def _compared(asked: Prediction, guess: Value, value: Any) -> str:
    if asked.options:
        return "as you said" if guess == value else "not what you said"
    expected = float(guess)
    if expected == value:
        return "exactly"
    if value * expected <= 0:
        return f"off by {output.format_number(value - expected)}"
    ratio = value / expected
    if 0.95 <= ratio <= 1.05:
        return "within 5 %"
    times, side = (ratio, "above") if ratio > 1 else (1 / ratio, "below")
    return f"{times:.3g} × {side} your guess"
