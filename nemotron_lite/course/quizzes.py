"""`quiz`: a few questions at the end of a chapter; each answer gets a reason.

A quiz is the file `quiz.toml` of a chapter:

    [[questions]]
    objective = "O2"
    question = "What does a large dt do to the answers?"

    [[questions.options]]
    text = "It forgets faster."
    right = true
    reason = "exp(dt * A) with A < 0 shrinks as dt grows."

    [[questions.options]]
    text = "It forgets more slowly."
    right = false
    reason = "The other way round: look at exp(dt * A) with A < 0."

Exactly one option is right, and every option has a reason, because a learner learns most from a
wrong answer. The objective is one of those at the start of the chapter, so a wrong answer says what
to read again; `authoring.lint` checks that every objective has a question.

In a running notebook the options are radio buttons, and the reason appears at once. The committed
file and a terminal show the questions and options without the answers, which stay in the package.
Nothing is sent anywhere.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_lite.course import output
from nemotron_lite.course.chapter_list import chapter_folders
from nemotron_lite.course.display import WIDGET, widget_view


class QuizError(ValueError):
    """A quiz file that is missing or not valid."""


@dataclass(frozen=True)
class Option:
    """One answer to choose, and the reason that is shown when it is chosen."""

    text: str
    right: bool
    reason: str


@dataclass(frozen=True)
class Question:
    """A question, the objective it tests, and its options, exactly one of them right."""

    objective: str
    question: str
    options: tuple[Option, ...]


def quiz(chapter: str) -> None:
    """Show the quiz of a chapter.

    Raises:
        QuizError: the chapter has none, or its file is not valid.
    """
    questions = load_quiz(chapter)
    if not output.in_notebook():
        output.show_output(static_text(questions))
        return
    output.show_output(static_text(questions), more={WIDGET: widget_view(quiz_widget(questions))})


def load_quiz(chapter: str) -> tuple[Question, ...]:
    """Read and validate the `quiz.toml` of a chapter."""
    folders = chapter_folders()
    if chapter not in folders:
        raise QuizError(f"There is no quiz {chapter!r}; choose one of {list(folders)}.")
    path = folders[chapter] / "quiz.toml"
    return parse_quiz(path.read_text(), f"{folders[chapter].name}/quiz.toml")


def parse_quiz(text: str, name: str = "quiz") -> tuple[Question, ...]:
    """Questions from the text of a file.

    Raises:
        QuizError: the message names the question and the problem.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise QuizError(f"{name} is not TOML: {error}") from error
    if set(tree) != {"questions"} or not tree["questions"]:
        raise QuizError(f"{name} holds {sorted(tree)}; expected [[questions]] and nothing else.")
    return tuple(_question(f"{name}, question {i}", q) for i, q in enumerate(tree["questions"], 1))


def static_text(questions: Sequence[Question]) -> str:
    """Questions and options in plain text, without the answers."""
    blocks = []
    for position, asked in enumerate(questions, 1):
        options = [f"   {chr(96 + i)}) {o.text}" for i, o in enumerate(asked.options, 1)]
        blocks.append("\n".join([f"{position}. ({asked.objective}) {asked.question}", *options]))
    return "\n".join(blocks) + "\n(Run this cell to answer.)"


def quiz_widget(questions: Sequence[Question]) -> Any:
    """The live quiz: an ipywidgets box."""
    widgets = output.import_lab("ipywidgets")
    score = widgets.HTML()
    answers: dict[int, bool] = {}
    blocks = []
    for position, asked in enumerate(questions):
        blocks.append(_question_widget(widgets, position, asked, answers, score, len(questions)))
    return widgets.VBox([*blocks, score])


def _question_widget(
    widgets: Any, position: int, asked: Question, answers: dict[int, bool], score: Any, of: int
) -> Any:
    title = widgets.HTML(
        f'<div style="line-height: 1.5"><b>{position + 1}.</b> '
        f"{output.inline_html(asked.question)} "
        f'<span style="color: {output.FAINT}">{asked.objective}</span></div>'
    )
    buttons = widgets.RadioButtons(
        options=[(_without_markup(option.text), i) for i, option in enumerate(asked.options)],
        value=None,
        layout={"width": "auto", "margin": "0 0 0 16px"},
    )
    reply = widgets.HTML()

    def answer(change: Mapping[str, Any]) -> None:
        if change["new"] is None:
            return
        chosen = asked.options[change["new"]]
        answers[position] = chosen.right
        word, edge = ("Right.", output.RIGHT) if chosen.right else ("Not quite.", output.WRONG)
        reply.value = output.box(f"<b>{word}</b> {output.inline_html(chosen.reason)}", edge=edge)
        score.value = f"{sum(answers.values())} of {of} right, {len(answers)} answered"

    buttons.observe(answer, names="value")
    return widgets.VBox([title, buttons, reply], layout={"margin": "0 0 12px 0"})


def _without_markup(text: str) -> str:
    """Text for radio buttons, which show no markup: *italic* and **bold** lose their stars."""
    pieces = text.split("`")
    for position in range(0, len(pieces), 2):
        pieces[position] = re.sub(
            r"(?<![\w*])(\*{1,2})(\S(?:.*?\S)?)\1(?![\w*])", r"\2", pieces[position]
        )
    return "".join(pieces)


def _question(where: str, entry: Mapping[str, Any]) -> Question:
    if set(entry) != {"objective", "question", "options"}:
        raise QuizError(f"{where} has {sorted(entry)}; expected objective, question and options.")
    options = tuple(_option(where, option) for option in entry["options"])
    asked = Question(entry["objective"], entry["question"].strip(), options)
    if not re.fullmatch(r"O\d", asked.objective):
        raise QuizError(f"{where} has the objective {asked.objective!r}; expected one like 'O1'.")
    if not asked.question:
        raise QuizError(f"{where} has an empty question.")
    if len(options) < 2:
        raise QuizError(f"{where} has {len(options)} option; expected two or more.")
    if sum(option.right for option in options) != 1:
        raise QuizError(f"{where} has {sum(o.right for o in options)} right options; expected 1.")
    if len({option.text for option in options}) != len(options):
        raise QuizError(f"{where} has the same option twice; options must differ.")
    return asked


def _option(where: str, entry: Mapping[str, Any]) -> Option:
    if set(entry) != {"text", "right", "reason"}:
        raise QuizError(f"{where}: an option has {sorted(entry)}; expected text, right, reason.")
    text, right, reason = entry["text"].strip(), entry["right"], entry["reason"].strip()
    if not text or not reason or not isinstance(right, bool):
        raise QuizError(
            f"{where}: option {text!r} must have text, a reason, and right = true or false."
        )
    return Option(text, right, reason)
