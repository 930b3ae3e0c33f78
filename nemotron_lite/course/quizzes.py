"""`quiz`: a few questions at the end of a chapter, each answer met with its reason.

A quiz is a file, `quizzes/NN.toml`:

    [[questions]]
    objective = "O2"
    question = "What does a large dt do to the state?"

    [[questions.options]]
    text = "It forgets faster."
    right = true
    reason = "exp(dt * A) with A < 0 shrinks as dt grows."

    [[questions.options]]
    text = "It forgets more slowly."
    right = false
    reason = "The other way round: look at exp(dt * A) with A < 0."

Exactly one option is right, and every option has a reason: a wrong answer is where the learning is.
The objective is one of those that the chapter opens with, so that a wrong answer says where to read
again; the rules of `hygiene` see to it that each of them is asked for.
In a running notebook these are radio buttons and the reason appears at once. In the committed file
and in a terminal stand the questions and the options, without the answers, which live in the
package. Nothing is sent anywhere.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_lite.course import _output
from nemotron_lite.course.chapter_list import chapter_folders
from nemotron_lite.course.display import WIDGET, widget_view


class QuizError(ValueError):
    """A quiz file that is missing or does not hold together."""


@dataclass(frozen=True)
class Option:
    """One answer to choose, and what is said when it is chosen."""

    text: str
    right: bool
    reason: str


@dataclass(frozen=True)
class Question:
    """A question, the objective it asks for, and its options, exactly one of them right."""

    objective: str
    question: str
    options: tuple[Option, ...]


def quiz(chapter: str) -> None:
    """Show the quiz of a chapter.

    Raises:
        QuizError: the chapter has none, or its file is not a quiz.
    """
    questions = load_quiz(chapter)
    if not _output.in_notebook():
        _output.emit(at_rest(questions))
        return
    _output.emit(at_rest(questions), more={WIDGET: widget_view(quiz_widget(questions))})


def load_quiz(chapter: str) -> tuple[Question, ...]:
    """Read and validate the `quiz.toml` of a chapter."""
    folders = chapter_folders()
    if chapter not in folders:
        raise QuizError(f"There is no quiz {chapter!r}; quizzes exist for {list(folders)}.")
    path = folders[chapter] / "quiz.toml"
    return read_quiz(path.read_text(), f"{folders[chapter].name}/quiz.toml")


def read_quiz(text: str, name: str = "quiz") -> tuple[Question, ...]:
    """Questions out of the text of a file.

    Raises:
        QuizError: naming the question and what is wrong with it.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise QuizError(f"{name} is not TOML: {error}") from error
    if set(tree) != {"questions"} or not tree["questions"]:
        raise QuizError(f"{name} holds {sorted(tree)}; expected [[questions]] and nothing else.")
    return tuple(_question(f"{name}, question {i}", q) for i, q in enumerate(tree["questions"], 1))


def at_rest(questions: Sequence[Question]) -> str:
    """Questions and options in plain text, without the answers."""
    blocks = []
    for position, asked in enumerate(questions, 1):
        options = [f"   {chr(96 + i)}) {o.text}" for i, o in enumerate(asked.options, 1)]
        blocks.append("\n".join([f"{position}. ({asked.objective}) {asked.question}", *options]))
    return "\n".join(blocks) + "\n(Run this cell to answer.)"


def quiz_widget(questions: Sequence[Question]) -> Any:
    """The live quiz: an ipywidgets box."""
    widgets = _output.lab("ipywidgets")
    score = widgets.HTML()
    state: dict[int, bool] = {}
    blocks = []
    for position, asked in enumerate(questions):
        blocks.append(_block(widgets, position, asked, state, score, len(questions)))
    return widgets.VBox([*blocks, score])


def _block(
    widgets: Any, position: int, asked: Question, state: dict[int, bool], score: Any, of: int
) -> Any:
    title = widgets.HTML(
        f'<div style="line-height: 1.5"><b>{position + 1}.</b> {_output.inline(asked.question)} '
        f'<span style="color: {_output.FAINT}">{asked.objective}</span></div>'
    )
    buttons = widgets.RadioButtons(
        options=[(_plain(option.text), i) for i, option in enumerate(asked.options)],
        value=None,
        layout={"width": "auto", "margin": "0 0 0 16px"},
    )
    reply = widgets.HTML()

    def answer(change: Mapping[str, Any]) -> None:
        if change["new"] is None:
            return
        chosen = asked.options[change["new"]]
        state[position] = chosen.right
        word, edge = ("Right.", _output.RIGHT) if chosen.right else ("Not quite.", _output.WRONG)
        reply.value = _output.card(f"<b>{word}</b> {_output.inline(chosen.reason)}", edge=edge)
        score.value = f"{sum(state.values())} of {of} right, {len(state)} answered"

    buttons.observe(answer, names="value")
    return widgets.VBox([title, buttons, reply], layout={"margin": "0 0 12px 0"})


def _plain(text: str) -> str:
    """Radio buttons show no markup: `*` in code stays, *slanted* and **bold** lose their stars."""
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
        raise QuizError(f"{where} asks nothing.")
    if len(options) < 2:
        raise QuizError(f"{where} has {len(options)} option; a choice needs two.")
    if sum(option.right for option in options) != 1:
        raise QuizError(f"{where} has {sum(o.right for o in options)} right options; expected 1.")
    if len({option.text for option in options}) != len(options):
        raise QuizError(f"{where} has the same option twice.")
    return asked


def _option(where: str, entry: Mapping[str, Any]) -> Option:
    if set(entry) != {"text", "right", "reason"}:
        raise QuizError(f"{where}: an option has {sorted(entry)}; expected text, right, reason.")
    text, right, reason = entry["text"].strip(), entry["right"], entry["reason"].strip()
    if not text or not reason or not isinstance(right, bool):
        raise QuizError(
            f"{where}: option {text!r} needs text, a reason, and right = true or false."
        )
    return Option(text, right, reason)
