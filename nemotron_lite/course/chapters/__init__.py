"""The chapters: one folder each, `chNN_name`, with everything of that chapter but its notebook.

    exercises.py   the exercises: task, stub, reference solution, hints
    checks.py      what an answer is checked for
    quiz.toml      the questions at the end
    figures.py     the chapter's own figures
    lesson.py      where the chapter has a small model or task of its own

The notebook is `notebooks/NN_name.ipynb`, and the tests are in `tests/course/chapters/chNN_name/`.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def chapter_folders() -> dict[str, Path]:
    """The number of each chapter ("00", "01", ...) and its folder, in order."""
    return {path.name[2:4]: path for path in sorted(FOLDER.glob("ch[0-9][0-9]_*"))}
