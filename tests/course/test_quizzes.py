"""Quizzes are complete, give a reason for each answer, and keep answers out of the notebook."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nemotron_lite.course import quizzes
from nemotron_lite.course.chapter_list import chapter_folders
from nemotron_lite.course.quizzes import QuizError, load_quiz, parse_quiz, quiz, quiz_widget
from tests.course.conftest import Shown

TEXT = """
[[questions]]
objective = "O2"
question = "What does `dt` do?"
[[questions.options]]
text = "It forgets *faster*."
right = true
reason = "exp(dt * A) <shrinks>."
[[questions.options]]
text = "Nothing."
right = false
reason = "Look again."

[[questions]]
objective = "O1"
question = "And A?"
[[questions.options]]
text = "It is negative."
right = true
reason = "A = -exp(A_log)."
[[questions.options]]
text = "It is positive."
right = false
reason = "Then the state would grow."
"""
QUIZZES = list(chapter_folders())


@pytest.mark.parametrize("chapter", QUIZZES)
def test_each_quiz_is_whole(chapter: str) -> None:
    asked = load_quiz(chapter)
    assert 5 <= len(asked) <= 8
    assert len({one.question for one in asked}) == len(asked)
    places = [[option.right for option in one.options].index(True) for one in asked]
    assert len(set(places)) > 1, "the right answer is always in the same place"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("right = true", "right = false", "question 1 has 0 right options"),
        ("right = false", "right = true", "question 1 has 2 right options"),
        ('reason = "Look again."', 'reason = ""', "must have text, a reason"),
        ('reason = "Look again."', "", "an option has"),
        ("right = true", 'right = "yes"', "right = true or false"),
        ('"What does `dt` do?"', '" "', "has an empty question"),
        ("[[questions]]", "title = 1\n[[questions]]", "expected"),
        ('text = "Nothing."', 'text = "It forgets *faster*."', "the same option twice"),
        ('question = "And A?"', 'question = "And A?"\nlevel = 1', "question 2 has"),
        ('objective = "O1"\n', "", "question 2 has .* expected objective"),
        ('"O1"', '"1"', "question 2 has the objective '1'; expected one like 'O1'"),
    ],
)
def test_a_bad_quiz_is_refused(old: str, new: str, words: str) -> None:
    parse_quiz(TEXT)
    with pytest.raises(QuizError, match=words):
        parse_quiz(TEXT.replace(old, new, 1))


def test_one_option_is_no_choice() -> None:
    with pytest.raises(QuizError, match="has 1 option"):
        parse_quiz(TEXT[: TEXT.index('[[questions.options]]\ntext = "Nothing."')])


def test_an_unknown_quiz_says_which_there_are() -> None:
    with pytest.raises(QuizError, match=r"no quiz '99'"):
        load_quiz("99")


def test_at_rest_there_are_no_answers(
    shown: Callable[..., Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quizzes, "load_quiz", lambda chapter: parse_quiz(TEXT))
    plain = shown(quiz, "01").plain
    assert "1. (O2) What does `dt` do?\n   a) It forgets *faster*.\n   b) Nothing." in plain
    assert "shrinks" not in plain
    assert "true" not in plain


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The two M layers and the `*` layer.", "The two M layers and the * layer."),
        ("`a * b * c`, *not* **now**", "a * b * c, not now"),
        ("2 * 3 * 4", "2 * 3 * 4"),
        ("d * (2*h*p + n)", "d * (2*h*p + n)"),
    ],
)
def test_radio_buttons_show_words_without_markup(text: str, plain: str) -> None:
    assert quizzes._without_markup(text) == plain


def test_each_answer_gets_its_reason_at_once() -> None:
    box = quiz_widget(parse_quiz(TEXT))
    first, second, score = box.children
    title, buttons, reply = first.children
    assert "<code>dt</code>" in title.value
    assert ">O2</span>" in title.value
    assert buttons.value is None
    assert buttons.options[0][0] == "It forgets faster."
    buttons.value = 1
    assert "Not quite." in reply.value
    assert "Look again." in reply.value
    assert score.value == "0 of 2 right, 1 answered"
    buttons.value = 0
    assert "Right." in reply.value
    assert "&lt;shrinks&gt;" in reply.value
    second.children[1].value = 0
    assert score.value == "2 of 2 right, 2 answered"
