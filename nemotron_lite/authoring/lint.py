"""The rules of a chapter, as functions of a notebook: what a reader may rely on, checked.

A notebook rots in quiet ways: a cell nobody ran again, an output from another version, a figure
without words, a number typed from memory, a copy of the package that drifts. Each rule here is a
pure function from a notebook node (and what it is compared with) to a list of faults, one sentence
each, and each has a small bad notebook in the tests that it must catch.

    hygiene_cells   what is stored: executed, no errors, pictures and words, sections, sizes
    hygiene_words   what is said: no copies of the package, no figure by hand, predictions that are
                    measured, exercises as they are defined, objectives that are kept,
                    a header to plan by

`faults` reads all rules over one notebook; `check_file` over a chapter on disk. What no rule can
see is whether the chapter is true and worth reading: open it and read it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from nemotron_lite.authoring import lint_cells as cells
from nemotron_lite.authoring import lint_text as words
from nemotron_lite.authoring.lint_cells import CHAPTER_SECONDS, errors
from nemotron_lite.course import exercises, quizzes
from nemotron_lite.course.exercises import Exercise

__all__ = ["CHAPTER_SECONDS", "Surroundings", "check_file", "errors", "faults", "surroundings"]

PACKAGE = Path(__file__).resolve().parents[1]
PUBLIC_ROOMS = (
    "checkpoint", "course", "course/plotting", "data", "generation", "layers", "ops",
    "quantization", "train",
)  # fmt: skip


@dataclass(frozen=True)
class Surroundings:
    """What a chapter is compared with.

    public: name → where the package exports it. facts: key → ways to write it. exercises: those of
    the chapter. asked: the objective of each question of its quiz. root: the repository, for links
    to records.
    """

    public: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    exercises: tuple[Exercise, ...] = ()
    asked: tuple[str, ...] = ()
    root: Path = PACKAGE.parent


def faults(notebook: NotebookNode, chapter: str, around: Surroundings) -> list[str]:
    """Everything that is wrong with one chapter.

    Args:
        notebook: version 4.
        chapter: its two digits.
        around: what it is compared with.
    """
    return [
        *cells.not_run(notebook),
        *cells.errors(notebook),
        *cells.without_words(notebook),
        *cells.without_picture(notebook),
        *cells.sections(notebook, chapter),
        *cells.leftovers(notebook),
        *cells.too_long(notebook),
        *cells.too_large(notebook),
        *cells.not_compared(notebook),
        *cells.foreign(notebook),
        *words.redefined(notebook, around.public),
        *words.quoted_facts(notebook, around.facts),
        *words.claims(notebook, around.root),
        *words.predictions(notebook),
        *words.exercises(notebook, around.exercises),
        *words.header(notebook, around.exercises),
        *words.objectives(notebook, around.exercises, around.asked),
    ]


def check_file(path: Path) -> list[str]:
    """Everything that is wrong with the chapter in `path`, whose name starts with its digits."""
    chapter = path.name[:2]
    return faults(nbformat.read(path, as_version=4), chapter, surroundings(chapter))


def surroundings(chapter: str) -> Surroundings:
    """What a chapter of this repository is compared with, read from the package."""
    asked = tuple(question.objective for question in quizzes.load_quiz(chapter))
    return Surroundings(public_names(), fact_spellings(), exercises.exercises(chapter), asked)


@cache
def public_names() -> dict[str, str]:
    """Functions and classes that a chapter must import and not write again → their module."""
    found: dict[str, str] = {}
    for path in _public_files():
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        module = module.removesuffix(".__init__")
        for name in _exported(ast.parse(path.read_text())):
            found[name] = min(module, found.get(name, module), key=len)
    return found


def _public_files() -> Iterator[Path]:
    yield from sorted(p for p in PACKAGE.glob("*.py") if not p.name.startswith("_"))
    yield PACKAGE / "__init__.py"
    for room in PUBLIC_ROOMS:
        for path in sorted((PACKAGE / room).glob("*.py")):
            if not path.name.startswith("_") or path.name == "__init__.py":
                yield path


def _exported(tree: ast.Module) -> list[str]:
    """`__all__` where a module has one, else its public functions and classes."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
    defined = (n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef))
    return [n.name for n in defined if not n.name.startswith("_") and n.name != "main"]


@cache
def fact_spellings() -> dict[str, tuple[str, ...]]:
    """Fact → the ways to write it that can hardly mean anything else."""
    from nemotron_lite.course.factsheet import every_fact

    spelled = {key: words.spellings(fact.value, fact.unit) for key, fact in every_fact().items()}
    return {key: ways for key, ways in spelled.items() if ways}
