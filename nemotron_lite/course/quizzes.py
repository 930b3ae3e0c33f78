"""`quiz`: a few questions at the start and at the end of a chapter; each answer gets a reason.

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

    [[opening]]
    objective = "00.O2"
    …

Exactly one option is right, and every option has a reason, because a learner learns most from a
wrong answer. `[[questions]]` are shown at the end by `quiz("01")`; the objective is one of those at
the start of the chapter, so a wrong answer says what to read again. `[[opening]]` are shown at the
start by `quiz("01", "opening")`: three questions from earlier chapters, with the objective of that
chapter such as "00.O2". What is remembered after a week is learned. In chapter 00 they ask what a
reader should know before the course, and their objective is "before".

In a running notebook the options are radio buttons, and the reason appears at once. Answers are
stored with the learner's progress, and shown when the cell runs again. The committed file and a
terminal show the questions and options without the answers, which stay in the package. Nothing is
sent anywhere.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron_lite.course import output, progress_store
from nemotron_lite.course.chapter_list import chapter_folders
from nemotron_lite.course.display import show_live
from nemotron_lite.input_files import read_text

PARTS = ("questions", "opening")
BEFORE = "before"  # the objective of an opening question of chapter 00


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


def quiz(chapter: str, part: str = "questions") -> None:
    """Show the quiz of a chapter.

    Args:
        chapter: its two digits.
        part: "questions" at the end of the chapter, "opening" at its start.

    Raises:
        QuizError: the chapter has none, or its file is not valid.
    """
    asked = load_quiz(chapter, part)
    plain = static_text(asked)
    if not output.in_notebook():
        output.show_output(plain)
        return
    widget = quiz_widget(asked, f"{chapter}.{part}")
    show_live(widget, "Run this cell to answer.", plain, static_html(asked))


def load_quiz(chapter: str, part: str = "questions") -> tuple[Question, ...]:
    """Read and validate the `quiz.toml` of a chapter.

    Raises:
        QuizError: there is no such chapter or part, or the file is not valid.
    """
    folders = chapter_folders()
    if chapter not in folders:
        raise QuizError(f"There is no quiz {chapter!r}; choose one of {list(folders)}.")
    path, name = folders[chapter] / "quiz.toml", f"{folders[chapter].name}/quiz.toml"
    if part not in PARTS:
        raise QuizError(f"A quiz has no part {part!r}; expected one of {PARTS}.")
    found = parse_quiz(read_text(path), name, part)
    if not found:
        raise QuizError(f"{name} has no [[{part}]].")
    for asked in found if part == "opening" else ():
        if asked.objective != BEFORE and asked.objective[:2] >= chapter:
            raise QuizError(
                f"{name}: an opening question has the objective {asked.objective!r}; expected one "
                f"of a chapter before {chapter}."
            )
    return found


def parse_quiz(text: str, name: str = "quiz", part: str = "questions") -> tuple[Question, ...]:
    """The questions of one part, from the text of a file; all of the file is validated.

    Raises:
        QuizError: the message names the question and the problem.
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise QuizError(f"{name} is not TOML: {error}") from error
    if not tree.get("questions") or not set(tree) <= set(PARTS):
        raise QuizError(
            f"{name} has {sorted(tree)}; expected [[questions]], [[opening]] and nothing else."
        )
    parts = {
        one: tuple(
            _question(f"{name}, {word} {i}", entry, opening=one == "opening")
            for i, entry in enumerate(tree.get(one, ()), 1)
        )
        for one, word in zip(PARTS, ("question", "opening question"), strict=True)
    }
    return parts[part]


def static_text(questions: Sequence[Question]) -> str:
    """Questions and options in plain text, without the answers."""
    blocks = []
    for position, asked in enumerate(questions, 1):
        options = [f"   {chr(96 + i)}) {o.text}" for i, o in enumerate(asked.options, 1)]
        blocks.append("\n".join([f"{position}. ({asked.objective}) {asked.question}", *options]))
    return "\n".join(blocks)


def static_html(questions: Sequence[Question]) -> str:
    """The same as HTML."""
    blocks = []
    for position, asked in enumerate(questions, 1):
        options = "".join(f"<li>{output.inline_html(option.text)}</li>" for option in asked.options)
        style = "margin: 2px 0 12px 16px; list-style-type: lower-alpha"
        blocks.append(
            f'<div>{_title_html(position, asked)}<ol style="{style}">{options}</ol></div>'
        )
    return "".join(blocks)


def quiz_widget(questions: Sequence[Question], name: str = "") -> Any:
    """The live quiz: an ipywidgets box.

    Args:
        questions: to ask.
        name: under which the answers are stored, such as "01.opening"; "" stores none.
    """
    widgets = output.import_lab("ipywidgets")
    score = widgets.HTML()
    answers: dict[int, bool] = {}
    blocks = [
        _question_widget(
            widgets, position, asked, answers, score, len(questions),
            f"quiz/{name}.{position + 1}" if name else "",
        )
        for position, asked in enumerate(questions)
    ]  # fmt: skip
    return widgets.VBox([*blocks, score])


def _question_widget(
    widgets: Any,
    position: int,
    asked: Question,
    answers: dict[int, bool],
    score: Any,
    of: int,
    key: str,
) -> Any:
    title = widgets.HTML(_title_html(position + 1, asked))
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
        if key:
            progress_store.put(key, {"chosen": chosen.text, "right": chosen.right})

    buttons.observe(answer, names="value")
    buttons.value = _stored_answer(key, asked)
    return widgets.VBox([title, buttons, reply], layout={"margin": "0 0 12px 0"})


def _stored_answer(key: str, asked: Question) -> int | None:
    """The number of the option that was chosen in an earlier run, if the quiz still has it."""
    stored = progress_store.get(key) if key else None
    chosen = stored.get("chosen") if isinstance(stored, dict) else None
    texts = [option.text for option in asked.options]
    return texts.index(chosen) if chosen in texts else None


def _title_html(number: int, asked: Question) -> str:
    about = "before the course" if asked.objective == BEFORE else asked.objective
    return (
        f'<div style="line-height: 1.5"><b>{number}.</b> {output.inline_html(asked.question)} '
        f'<span style="color: {output.FAINT}">{about}</span></div>'
    )


def _without_markup(text: str) -> str:
    """Text for radio buttons, which show no markup: *italic* and **bold** lose their stars."""
    pieces = text.split("`")
    for position in range(0, len(pieces), 2):
        pieces[position] = re.sub(
            r"(?<![\w*])(\*{1,2})(\S(?:.*?\S)?)\1(?![\w*])", r"\2", pieces[position]
        )
    return "".join(pieces)


def _question(where: str, entry: Mapping[str, Any], *, opening: bool = False) -> Question:
    if set(entry) != {"objective", "question", "options"}:
        raise QuizError(f"{where} has {sorted(entry)}; expected objective, question and options.")
    options = tuple(_option(where, option) for option in entry["options"])
    asked = Question(entry["objective"], entry["question"].strip(), options)
    pattern, example = r"O\d", "'O1'"
    if opening:
        pattern, example = rf"\d\d\.O\d|{BEFORE}", "'00.O1'"
    if not re.fullmatch(pattern, asked.objective):
        raise QuizError(
            f"{where} has the objective {asked.objective!r}; expected one like {example}."
        )
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
