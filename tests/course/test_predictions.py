"""Guess first: what is kept, what is shown where, and what a measurement is held to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nemotron_lite.course import measured, output, predict, predictions, progress_store
from nemotron_lite.course.display import WIDGET
from nemotron_lite.course.predictions import (
    PredictionError,
    guess_of,
    guess_widget,
    keep_guess,
    load_predictions,
    parse_predictions,
    read_number,
)
from tests.course.conftest import Shown

TEXT = """
[[predictions]]
key = "ms"
question = "How *long* is a <b>step</b>?"
unit = "ms"
low = 4
high = 8

[[predictions]]
key = "count"
question = "How many parameters?"
unit = "parameters"
low = 120_668_707_840
high = 120_668_707_840
exact = true

[[predictions]]
key = "least"
question = "At least?"
low = 4

[[predictions]]
key = "winner"
question = "Which wins?"
options = ["scan", "attention"]
expected = ["scan"]

[[predictions]]
key = "any"
question = "Anything?"
low = -1e9
digits = 5
"""


@pytest.fixture(autouse=True)
def _chapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A chapter with the predictions above, and no stored guesses."""
    folder = tmp_path / "ch01_x"
    folder.mkdir()
    (folder / "predictions.toml").write_text(TEXT)
    monkeypatch.setattr(predictions, "chapter_folders", lambda: {"01": folder})
    monkeypatch.chdir(tmp_path)
    progress_store.forget_memory()
    predictions.begin("01")
    yield
    progress_store.forget_memory()
    predictions._CURRENT.clear()
    predictions._SHOWN.clear()


def guess(key: str, value: float | str) -> None:
    keep_guess("01", load_predictions("01")[key], value)


def test_the_guess_stands_beside_the_measurement(shown: Callable[..., Shown]) -> None:
    guess("ms", 5)
    seen = shown(measured, "ms", 7.4)
    assert "5 ms" in seen.html
    assert "7.4 ms" in seen.html
    assert "1.48 × above your guess" in seen.html
    assert "<details open>" in seen.html


def test_without_a_guess_the_answer_is_folded(shown: Callable[..., Shown]) -> None:
    html = shown(measured, "ms", 7.4).html
    assert "<details><summary>" in html
    before, _, folded = html.partition("</summary>")
    assert "7.4" in folded
    assert "7.4" not in before
    assert "none yet" in folded


@pytest.mark.parametrize(("key", "value"), [("ms", 7.4), ("count", 120_668_707_840)])
def test_no_answer_is_in_the_compared_text(
    shown: Callable[..., Shown], key: str, value: float
) -> None:
    for _ in range(2):
        assert shown(measured, key, value).plain == f"measured: {key}"
        guess(key, 3)


def test_a_guess_that_is_made_later_opens_the_answer(shown: Callable[..., Shown]) -> None:
    updates: list[tuple[str, str]] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            updates.append((data["text/plain"], data["text/html"]))

    shown(measured, "ms", 6)
    value, handle = predictions._SHOWN["01", "ms"]
    assert (value, handle is not None) == (6, True)
    predictions._SHOWN["01", "ms"] = value, Handle()
    guess("ms", 3)
    ((plain, rich),) = updates
    assert plain == "measured: ms"
    assert "<details open>" in rich
    assert "2 × above your guess" in rich


@pytest.mark.parametrize(
    ("guessed", "value", "words"),
    [
        (3, 3, "exactly"),
        (100, 103, "within 5 %"),
        (10, 5, "2 × below your guess"),
        (-1, 2, "off by 3"),
        (0, 2, "off by 2"),
    ],
)
def test_the_verdict_has_a_size(
    shown: Callable[..., Shown], guessed: float, value: float, words: str
) -> None:
    guess("any", guessed)
    assert words in shown(measured, "any", value).html


def test_digits_are_those_of_the_file(shown: Callable[..., Shown]) -> None:
    assert "3.1416<" in shown(measured, "any", 3.14159265).html


def test_options(shown: Callable[..., Shown]) -> None:
    guess("winner", "scan")
    assert "as you said" in shown(measured, "winner", "scan").html
    guess("winner", "attention")
    assert "not what you said" in shown(measured, "winner", "scan").html


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("least", 3.0, "is 3; the chapter expects at least 4"),
        ("ms", 9.0, "is 9 ms; the chapter expects from 4 to 8. A busy machine"),
        ("ms", float("nan"), "expected a finite number"),
        ("ms", torch.tensor(9.0), "from 4 to 8"),
        ("ms", "5", "expected a finite number"),
        ("count", 3, "from 120668707840 to 120668707840. If it stays"),
        ("winner", "attention", "expects 'scan'"),
        ("winner", "mamba", "expected one of"),
    ],
)
def test_bounds_are_held(shown: Callable[..., Shown], key: str, value: object, words: str) -> None:
    seen = shown(measured, key, value, fails=True)
    assert isinstance(seen.error, AssertionError)
    assert words in str(seen.error)
    assert seen.plain == f"measured: {key}", "the reader sees the value before the complaint"


@pytest.mark.parametrize("value", [4, 8])
def test_bounds_are_inclusive(shown: Callable[..., Shown], value: int) -> None:
    shown(measured, "ms", value)


def test_a_question_at_rest_has_every_form(
    shown: Callable[..., Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "in_notebook", lambda: True)
    live, rest = shown(predict, "ms").bundles
    assert live["text/plain"] == "Run this cell to write your guess."
    assert WIDGET in live
    assert rest["text/plain"] == "Predict: How *long* is a <b>step</b>?\nA number, in ms."
    assert "How <i>long</i> is a &lt;b&gt;step&lt;/b&gt;?" in rest["text/html"]
    assert "scan | attention." in shown(predict, "winner").bundles[1]["text/plain"]


def test_a_terminal_shows_the_question(capsys: pytest.CaptureFixture[str]) -> None:
    predict("winner")
    measured("winner", "scan")
    printed = capsys.readouterr().out
    assert printed == "Predict: Which wins?\nOptions: scan | attention.\nmeasured: winner\n"


def test_a_saved_number_is_kept_and_found_again() -> None:
    asked = load_predictions("01")["ms"]
    title, row, reply = guess_widget("01", asked).children
    field, unit, save = row.children
    assert "&lt;b&gt;" in title.value
    assert unit.value == "ms"
    field.value = "1,024"
    assert guess_of("01", "ms") == 1024, "Enter, or leaving the field, keeps the guess"
    assert "Saved: 1,024 ms" in reply.value
    again = guess_widget("01", asked)
    assert again.children[1].children[0].value == "1,024"
    assert "Saved: 1,024 ms" in again.children[2].value
    save.click()
    assert guess_of("01", "ms") == 1024


@pytest.mark.parametrize("typed", ["many", "nan", "3 or 4", "1e400", "<b>"])
def test_a_bad_number_gets_a_sentence(typed: str) -> None:
    guess("ms", 7)
    _, row, reply = guess_widget("01", load_predictions("01")["ms"]).children
    row.children[0].value = typed
    assert "is not a number. Write one such as 3, 0.5 or 2e3" in reply.value
    assert "<b>”" not in reply.value
    assert guess_of("01", "ms") == 7


def test_no_guess_is_fine() -> None:
    _, row, reply = guess_widget("01", load_predictions("01")["ms"]).children
    assert reply.value == ""
    row.children[-1].click()
    assert "There is no guess yet." in reply.value
    assert guess_of("01", "ms") is None


def test_an_option_is_kept_with_save() -> None:
    asked = load_predictions("01")["winner"]
    _, row, reply = guess_widget("01", asked).children
    field, save = row.children[0].children
    assert field.value is None
    save.click()
    assert "Choose one" in reply.value
    field.value = "attention"
    assert guess_of("01", "winner") is None, "arrow keys walk over the options before Save"
    save.click()
    assert guess_of("01", "winner") == "attention"
    assert guess_widget("01", asked).children[1].children[0].children[0].value == "attention"


def test_a_guess_of_another_question_is_forgotten() -> None:
    guess("winner", "scan")
    progress_store.put("guesses/01.winner", "mamba")
    assert guess_of("01", "winner") is None
    progress_store.put("guesses/01.ms", "scan")
    assert guess_of("01", "ms") is None


@pytest.mark.parametrize(
    ("typed", "number"),
    [("3", 3), (" 1,024 ", 1024), ("2e3", 2000), ("12 %", 12), (".5", 0.5), ("-1", -1),
     ("1_000", 1000), ("1,5", 1.5), ("0,5", 0.5), ("3 000", 3000), ("3 4", None), ("", None),
     ("1.234,5", None), ("12,34,567", None), ("1,234.5", 1234.5), ("-2,5 %", -2.5),
     ("inf", None), ("1 or 2", None)],
)  # fmt: skip
def test_numbers_are_read_as_people_write_them(typed: str, number: float | None) -> None:
    assert read_number(typed) == number


@pytest.mark.parametrize("call", [predict, lambda key: measured(key, 1)])
def test_an_unknown_key_says_which_there_are(call: Callable[[str], None]) -> None:
    with pytest.raises(PredictionError, match=r"no prediction 'two'; its keys are \['ms'"):
        call("two")
    predictions._CURRENT.clear()
    with pytest.raises(PredictionError, match="run the cell with setup"):
        call("ms")


def test_a_chapter_without_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PredictionError, match=r"no chapter '99'"):
        load_predictions("99")
    (tmp_path / "ch01_x/predictions.toml").unlink()
    with pytest.raises(PredictionError, match=r"ch01_x/predictions.toml does not exist"):
        load_predictions("01")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('key = "ms"', 'key = "Ms"', "prediction 1 .* has the key 'Ms'"),
        ('key = "ms"', "", "has the key ''"),
        ('key = "ms"', 'key = "count"', "has the key 'count' twice"),
        ('"At least?"', '" "', r"prediction 3 \(least\) has no question"),
        ("low = 4\nhigh = 8", "", "neither options nor a bound"),
        ("low = 4\nhigh = 8", "low = 9\nhigh = 8", "low = 9 above high = 8"),
        ("low = 4\nhigh = 8", 'low = "4"', "low = '4'; expected a finite number"),
        ("low = 4\nhigh = 8", "low = 4\nguess = 3", r"unknown fields \['guess'\]"),
        ("exact = true", 'exact = "yes"', "exact = 'yes'"),
        ("digits = 5", "digits = 0", "digits = 0"),
        ('["scan", "attention"]', '["scan"]', "two or more"),
        ('["scan", "attention"]', '["scan", 3]', "expected texts"),
        ('["scan", "attention"]', '["scan", "attention"]\nunit = "ms"', "belong to a number"),
        ('["scan"]', '["mamba"]', "expects .*'mamba'"),
        ("[[predictions]]", "title = 1\n[[predictions]]", "nothing else"),
        ("[[predictions]]", "[[predictions", "is not TOML"),
    ],
)
def test_a_bad_file_is_refused(old: str, new: str, words: str) -> None:
    parse_predictions(TEXT)
    assert old in TEXT
    with pytest.raises(PredictionError, match=words):
        parse_predictions(TEXT.replace(old, new, 1))
