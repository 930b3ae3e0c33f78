"""`progress_page`: what a learner has done, chapter by chapter.

    progress_page()                                              # a table in a notebook
    python -m nemotron_lite.course.progress_report [folder]      # the same text in a terminal

It only reads: the exercises, quizzes and predictions of the chapters, and the facts that
`progress_store` kept in the folder of the notebook. Nothing is sent anywhere.

An exercise is *done* when its checks passed once. A later attempt that fails does not undo that.
Opening and quiz count the questions whose last answer was right. A prediction counts when a guess
was made, whether it was close or not.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from nemotron_lite.course import output, progress_store
from nemotron_lite.course.chapter_list import chapter_folders
from nemotron_lite.course.checking import has_passed, hints_read
from nemotron_lite.course.exercises import Exercise, exercises
from nemotron_lite.input_files import read_text

HEAD = ("exercise", "kind", "state", "date", "hints")
TOTALS = ("chapter", "must", "optional", "opening", "quiz", "predictions")


@dataclass(frozen=True)
class ChapterProgress:
    """The rows of a chapter's exercises, and its counts as `done/of`."""

    name: str
    exercises: tuple[tuple[str, ...], ...]
    must: str
    optional: str
    opening: str
    quiz: str
    predictions: str


def progress_page() -> None:
    """Show the exercises done, quiz answers and predictions of every chapter."""
    chapters = [chapter_progress(chapter) for chapter in chapter_folders()]
    totals = [(c.name, c.must, c.optional, c.opening, c.quiz, c.predictions) for c in chapters]
    where = (
        f"Kept in {progress_store.folder()}."
        if progress_store.folder()
        else "There is no folder .course here: progress is forgotten when the kernel stops. "
        "`make lab` opens the chapters in work/, where it is kept."
    )
    plain = [output.plain_table(TOTALS, totals)]
    linked = [(_link(c.name), *row[1:]) for c, row in zip(chapters, totals, strict=True)]
    rich = [output.html_table(TOTALS, linked, title="Progress")]
    for chapter in chapters:
        plain.append(output.plain_table(HEAD, chapter.exercises, title=chapter.name))
        cells = [[output.inline_html(cell) for cell in row] for row in chapter.exercises]
        rich.append(output.html_table(HEAD, cells, title=chapter.name))
    faint = f'<div style="color: {output.FAINT}">{output.inline_html(where)}</div>'
    output.show_output("\n\n".join([*plain, where]), "".join([*rich, faint]))


def chapter_progress(chapter: str) -> ChapterProgress:
    """What was done of one chapter, such as "01"."""
    folder = chapter_folders()[chapter]
    found = exercises(chapter)
    quiz = _toml(folder / "quiz.toml")
    guesses = [
        progress_store.get(f"guesses/{chapter}.{one['key']}") is not None
        for one in _toml(folder / "predictions.toml").get("predictions", [])
    ]
    return ChapterProgress(
        name=folder.name.removeprefix("ch"),
        exercises=tuple(_row(one) for one in found),
        must=_done([one for one in found if one.kind == "must"]),
        optional=_done([one for one in found if one.kind != "must"]),
        opening=_right(f"quiz/{chapter}.opening", len(quiz.get("opening", []))),
        quiz=_right(f"quiz/{chapter}.questions", len(quiz.get("questions", []))),
        predictions=f"{sum(guesses)}/{len(guesses)}" if guesses else "",
    )


def _row(found: Exercise) -> tuple[str, ...]:
    stored = progress_store.get(f"checks/{found.id}")
    state, date = "", ""
    if isinstance(stored, dict):
        when = progress_store.saved_at(f"checks/{found.id}")
        date = f"{datetime.fromisoformat(when).astimezone():%Y-%m-%d}" if when else ""
        earned = stored.get("points", 0)
        earned = earned if type(earned) in (int, float) else 0
        points = f"{earned:.6g} of {found.points} points"
        state = "✓ done" if has_passed(found.id) else f"begun, {points}"
    return found.id, found.kind, state, date, f"{len(hints_read(found.id))}/3"


def _done(found: Sequence[Exercise]) -> str:
    return f"{sum(has_passed(one.id) for one in found)}/{len(found)}" if found else ""


def _right(prefix: str, of: int) -> str:
    """How many of a quiz's questions were answered right; "" if it has none."""
    answers = [progress_store.get(f"{prefix}.{number}") for number in range(1, of + 1)]
    right = [a for a in answers if isinstance(a, dict) and a.get("right") is True]
    return f"{len(right)}/{of}" if of else ""


def _link(name: str) -> str:
    """The name of a chapter as a link to its notebook, where that is in the folder."""
    file = f"{name}.ipynb"
    return f'<a href="{file}">{name}</a>' if Path(file).is_file() else name


def _toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(read_text(path)) if path.is_file() else {}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the progress that is kept in a folder."""
    parser = argparse.ArgumentParser(
        prog="python -m nemotron_lite.course.progress_report",
        description="Print which exercises, quiz questions and predictions were done.",
    )
    parser.add_argument(
        "folder", type=Path, nargs="?", help="with the notebooks (default: work, if it is here)"
    )
    folder = parser.parse_args(arguments).folder
    if folder is None:
        folder = Path("work") if Path("work").is_dir() else Path()
    if not (folder / progress_store.FOLDER).is_dir():
        print(
            f"{folder.resolve()} holds no progress: it has no folder {progress_store.FOLDER}. "
            "`make lab` opens the chapters in work/ and keeps it there.",
            file=sys.stderr,
        )
        return 1
    with chdir(folder):
        progress_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
