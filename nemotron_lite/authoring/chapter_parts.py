"""The parts that every chapter has, and a search for chapters that lack one.

A chapter `NN_name` is one notebook, one folder of the package and one folder of tests:

    notebooks/NN_name.ipynb                    perhaps NN_name_deeper.ipynb
    nemotron_lite/course/chapters/chNN_name/   exercises.py checks.py figures.py
                                               quiz.toml predictions.toml
                                               lesson.py, if it has a small model or data of its own
    tests/course/chapters/chNN_name/           mutants.py test_figures.py
                                               test_lesson.py, if there is a lesson.py

Whoever starts a chapter with one of the three finds out from `missing_parts` what is left to do.
Whether the parts are good is for the other tests and for `lint` to say.
"""

from __future__ import annotations

import re
from pathlib import Path

NOTEBOOKS = Path("notebooks")
PACKAGE = Path("nemotron_lite/course/chapters")
TESTS = Path("tests/course/chapters")

_NAME = r"\d\d_\w+"


def chapter_names(root: Path) -> list[str]:
    """Chapters that have at least one part in the repository `root`, such as "01_selective_scan".

    A folder that holds nothing but `__pycache__` does not count.
    """
    notebooks = (root / NOTEBOOKS).glob("*.ipynb")
    names = {path.stem.removesuffix("_deeper") for path in notebooks}
    for folder in (PACKAGE, TESTS):
        for path in (root / folder).glob("ch*"):
            if path.is_dir() and any(part.name != "__pycache__" for part in path.iterdir()):
                names.add(path.name.removeprefix("ch"))
    return sorted(name for name in names if re.fullmatch(_NAME, name))


def parts(root: Path, name: str) -> dict[str, Path]:
    """What each part of a chapter is, and its path below `root`."""
    package, tests = PACKAGE / f"ch{name}", TESTS / f"ch{name}"
    found = {
        "its notebook": NOTEBOOKS / f"{name}.ipynb",
        "its package": package / "__init__.py",
        "its exercises": package / "exercises.py",
        "the checks of its exercises": package / "checks.py",
        "its quiz": package / "quiz.toml",
        "its predictions": package / "predictions.toml",
        "its figures": package / "figures.py",
        "wrong answers for its checks": tests / "mutants.py",
        "tests of its figures": tests / "test_figures.py",
    }
    if (root / package / "lesson.py").is_file():
        found["tests of its lesson"] = tests / "test_lesson.py"
    return found


def missing_parts(root: Path) -> list[str]:
    """One sentence for each part that a chapter of the repository `root` does not have."""
    return [
        f"Chapter {name} lacks {what}: expected the file {path.as_posix()}."
        for name in chapter_names(root)
        for what, path in parts(root, name).items()
        if not (root / path).is_file()
    ]
