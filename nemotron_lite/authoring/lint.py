"""Check that a chapter keeps the rules of the course.

A notebook goes wrong unnoticed: a cell that was not run again, an output of an older version, a
figure without alt text, a number typed from memory, a copy of code that no longer equals the
package. Each rule is a function that takes a notebook (and what it is compared with) and returns a
list of problems, one sentence each. The tests have a small bad notebook for each rule.

    lint_cells   what is stored: executed, no errors, pictures with alt text, sections, sizes
    lint_text    what is written: no copies of the package, no numbers typed by hand, predictions
                 that are measured, exercises as they are defined, objectives with recap and quiz,
                 a header with times and requirements
    lint_build   what the learner builds: no answer above its question, every answer is used

A chapter may have a second notebook, `NN_name_deeper.ipynb`, for those who want to know more. It
has no fixed sections; the other rules hold for it too. An exercise may stand in either notebook.

`lint_notebook` applies all rules to one notebook, `lint_file` to a notebook on disk, `lint_chapter`
to the notebooks of a chapter together. No rule can see whether the chapter is correct and worth
reading: open it and read it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from nemotron_lite.authoring import lint_build as build
from nemotron_lite.authoring import lint_cells as cells
from nemotron_lite.authoring import lint_text as text
from nemotron_lite.authoring.lint_cells import CHAPTER_SECONDS
from nemotron_lite.course import exercises, quizzes
from nemotron_lite.course.exercises import Exercise

__all__ = [
    "CHAPTER_SECONDS",
    "LintContext",
    "lint_chapter",
    "lint_context",
    "lint_file",
    "lint_notebook",
]

DEEPER = "_deeper"  # end of the name of the notebook beside a chapter
PACKAGE = Path(__file__).resolve().parents[1]
PUBLIC_FOLDERS = (
    "checkpoint", "course", "course/plotting", "data", "generation", "layers", "ops",
    "quantization", "train",
)  # fmt: skip


@dataclass(frozen=True)
class LintContext:
    """What the rules compare a chapter with.

    public_names: name → the module that exports it.
    fact_spellings: key of a fact → the ways to write it.
    exercises: the exercises of the chapter.
    quiz_objectives: the objective of each question of its quiz.
    root: the repository, for links to records.
    """

    public_names: Mapping[str, str] = field(default_factory=dict)
    fact_spellings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    exercises: tuple[Exercise, ...] = ()
    quiz_objectives: tuple[str, ...] = ()
    root: Path = PACKAGE.parent


def lint_notebook(
    notebook: NotebookNode, chapter: str, context: LintContext, *, deeper: bool = False
) -> list[str]:
    """All problems of one notebook.

    Args:
        notebook: version 4.
        chapter: its two digits.
        context: what the chapter is compared with.
        deeper: it is the notebook beside the chapter.
    """
    found = [
        *cells.not_executed(notebook),
        *cells.stored_errors(notebook),
        *cells.figures_without_text(notebook),
        *cells.figures_without_picture(notebook),
        *cells.volatile_content(notebook),
        *cells.too_long(notebook, deeper=deeper),
        *cells.too_large(notebook),
        *cells.uncompared_cells(notebook),
        *cells.outside_references(notebook),
        *text.redefined_names(notebook, context.public_names),
        *text.typed_facts(notebook, context.fact_spellings),
        *text.claims_without_record(notebook, context.root),
        *text.changed_exercises(notebook, context.exercises),
        *build.shown_too_early(notebook, context.exercises),
        *build.unused_answers(notebook, context.exercises),
        *build.visible_plumbing(notebook),
        *build.dead_links(notebook, context.root),
    ]
    if deeper:
        return found
    return [
        *found,
        *cells.section_problems(notebook, chapter),
        *build.open_measurements(notebook),
        *text.unmatched_predictions(notebook),
        *text.header_problems(notebook, context.exercises),
        *text.objective_problems(notebook, context.exercises, context.quiz_objectives),
    ]


def lint_file(path: Path) -> list[str]:
    """All problems of the notebook in `path`, whose file name starts with the chapter's digits."""
    chapter, notebook = path.name[:2], nbformat.read(path, as_version=4)
    deeper = path.stem.endswith(DEEPER)
    return lint_notebook(notebook, chapter, lint_context(chapter), deeper=deeper)


def lint_chapter(paths: Sequence[Path]) -> list[str]:
    """Problems of the notebooks of one chapter together: an exercise that has no cell, or two."""
    chapter = paths[0].name[:2]
    notebooks = [nbformat.read(path, as_version=4) for path in paths]
    return text.missing_exercises(notebooks, exercises.exercises(chapter))


def lint_context(chapter: str) -> LintContext:
    """The context of a chapter of this repository, read from the package."""
    objectives = tuple(question.objective for question in quizzes.load_quiz(chapter))
    return LintContext(public_names(), fact_spellings(), exercises.exercises(chapter), objectives)


@cache
def public_names() -> dict[str, str]:
    """Name of each function and class that a chapter must import and not define → its module."""
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
    for folder in PUBLIC_FOLDERS:
        for path in sorted((PACKAGE / folder).glob("*.py")):
            if not path.name.startswith("_") or path.name == "__init__.py":
                yield path


def _exported(tree: ast.Module) -> list[str]:
    """`__all__` if the module has one, else its public functions and classes."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [name for name in ast.literal_eval(node.value) if not name.startswith("_")]
    defined = (n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef))
    return [n.name for n in defined if not n.name.startswith("_") and n.name != "main"]


@cache
def fact_spellings() -> dict[str, tuple[str, ...]]:
    """Key of a fact → the ways to write it that hardly mean anything else."""
    from nemotron_lite.course.factsheet import all_facts

    spelled = {key: text.spellings(fact.value, fact.unit) for key, fact in all_facts().items()}
    return {key: ways for key, ways in spelled.items() if ways}
