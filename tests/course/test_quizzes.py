"""Quizzes are complete, give a reason for each answer, and keep answers out of the notebook."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nemotron_lite.course import output, progress_store, quizzes
from nemotron_lite.course.chapter_list import chapter_folders
from nemotron_lite.course.display import WIDGET
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
OPENING = """
[[opening]]
objective = "00.O2"
question = "What is *read* for each token?"
[[opening.options]]
text = "All experts."
right = false
reason = "Only the chosen ones."
[[opening.options]]
text = "The chosen `experts`."
right = true
reason = "Yes."
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


@pytest.fixture
def chapter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A chapter 01 with the quiz above, and no stored answers."""
    monkeypatch.setattr(quizzes, "chapter_folders", lambda: {"01": tmp_path})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quiz.toml").write_text(OPENING + TEXT)
    progress_store.forget_memory()
    yield tmp_path
    progress_store.forget_memory()


@pytest.mark.usefixtures("chapter")
def test_at_rest_there_are_no_answers(
    shown: Callable[..., Shown], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = shown(quiz, "01").plain
    assert "1. (O2) What does `dt` do?\n   a) It forgets *faster*.\n   b) Nothing." in plain
    monkeypatch.setattr(output, "in_notebook", lambda: True)
    live, rest = shown(quiz, "01").bundles
    assert WIDGET in live
    assert live["text/plain"] == "Run this cell to answer."
    assert rest["text/plain"] == plain
    assert "<li>It forgets <i>faster</i>.</li>" in rest["text/html"]
    for text in (plain, rest["text/html"]):
        assert "shrinks" not in text
        assert "true" not in text


@pytest.mark.usefixtures("chapter")
def test_the_opening_asks_about_earlier_chapters(shown: Callable[..., Shown]) -> None:
    assert shown(quiz, "01", "opening").plain == (
        "1. (00.O2) What is *read* for each token?\n   a) All experts.\n   b) The chosen `experts`."
    )
    assert [one.objective for one in load_quiz("01")] == ["O2", "O1"]


@pytest.mark.parametrize(
    ("objective", "words"),
    [("O2", "expected one like '00.O1'"), ("01.O2", "expected one of a chapter before 01")],
)
def test_an_opening_about_this_chapter_is_refused(
    chapter: Path, objective: str, words: str
) -> None:
    (chapter / "quiz.toml").write_text(OPENING.replace("00.O2", objective) + TEXT)
    with pytest.raises(QuizError, match=words):
        load_quiz("01", "opening")


def test_a_part_that_is_missing_or_unknown_is_named(chapter: Path) -> None:
    with pytest.raises(QuizError, match="has no part 'end'"):
        load_quiz("01", "end")
    (chapter / "quiz.toml").write_text(TEXT)
    with pytest.raises(QuizError, match=r"quiz.toml has no \[\[opening\]\]"):
        load_quiz("01", "opening")


def test_the_first_chapter_opens_with_what_came_before(chapter: Path) -> None:
    (chapter / "quiz.toml").write_text(OPENING.replace("00.O2", "before") + TEXT)
    (asked,) = load_quiz("01", "opening")
    assert "before the course" in quizzes.static_html([asked])


@pytest.mark.usefixtures("chapter")
def test_answers_are_kept_and_shown_again() -> None:
    asked = load_quiz("01")
    quiz_widget(asked, "01.questions").children[0].children[1].value = 1
    assert progress_store.get("quiz/01.questions.1") == {"chosen": "Nothing.", "right": False}
    again = quiz_widget(asked, "01.questions")
    _, buttons, reply = again.children[0].children
    assert buttons.value == 1
    assert "Look again." in reply.value
    assert again.children[-1].value == "0 of 2 right, 1 answered"


@pytest.mark.usefixtures("chapter")
@pytest.mark.parametrize("stored", [{"chosen": "An option of last year."}, "Nothing.", 1])
def test_an_answer_to_another_question_is_forgotten(stored: object) -> None:
    progress_store.put("quiz/01.questions.1", stored)
    assert quiz_widget(load_quiz("01"), "01.questions").children[0].children[1].value is None


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
