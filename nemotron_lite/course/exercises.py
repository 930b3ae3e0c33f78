"""Exercises: what a learner is asked to write, and how the answer is graded.

An exercise is data: a task, a stub, a reference solution, three hints that grow stronger, and
checks. The `exercises.py` of a chapter defines `EXERCISES`; the notebook cell, the coursework and
the tests of the graders are all made from it.

    Exercise(
        id="01.discretise", title="Discretise", objective="O1: …", minutes=10, difficulty=2,
        points=4, task="…markdown…", hints=("…", "…", "…"),
        stub="def discretise(A, dt): …; raise NotImplementedError",
        solution="def discretise(A, dt): return torch.exp(dt * A)",
        checks=(Check("one step by hand", by_hand, hint=1, points=2),
                Check("gradients", gradients_agree, hint=3, points=2)),
    )

A check is a function that takes the learner's function and raises AssertionError when the answer
is wrong (`compare` has the helpers: close, gradients, raises, keeps_inputs, strided). It runs with
its own seed, so its inputs are the same each time and the notebook's random numbers do not change.
It never looks the function up by name: the function that is passed in is the one that is graded.

Stub and solution can use the names of `PRELUDE`, what their own first lines import, and the
functions of the exercises that they need: with `needs=("01.combine_spans",)` they may call
`combine_spans`. In a notebook that is the learner's own function, from an earlier cell.

Left out: protection from a learner who wants to cheat. Anybody can read the checks.
"""

from __future__ import annotations

import ast
import linecache
import random
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

from nemotron_lite.course import learner_code, output
from nemotron_lite.course.chapter_list import chapter_folders
from nemotron_lite.course.compare import close, gradients, keeps_inputs, raises, strided
from nemotron_lite.course.syntax import parse

__all__ = [
    "PRELUDE",
    "Check",
    "CheckResult",
    "Exercise",
    "ExerciseError",
    "close",
    "exercise",
    "exercises",
    "grade",
    "gradients",
    "keeps_inputs",
    "raises",
    "strided",
]

PRELUDE = (
    "import math\n\nimport torch\nimport torch.nn.functional as F\nfrom torch import Tensor, nn\n"
)
KINDS = ("must", "optional", "stretch")


class ExerciseError(ValueError):
    """An exercise that does not exist, or whose definition is not valid."""


@dataclass(frozen=True)
class Check:
    """One test of an answer: `run(function)` raises AssertionError if the answer is wrong.

    `hint` is the number of the hint to read when this check fails.
    """

    name: str
    run: Callable[[Callable[..., Any]], None]
    hint: int = 1
    points: int = 1


@dataclass(frozen=True)
class Exercise:
    """A task with its stub, its reference solution, three hints and its checks."""

    id: str
    title: str
    objective: str
    minutes: int
    difficulty: int
    points: int
    task: str
    stub: str
    solution: str
    hints: tuple[str, ...]
    checks: tuple[Check, ...]
    kind: str = "must"
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for wrong, expected in (
            (not re.fullmatch(r"\d\d\.[a-z0-9_]+", self.id), "an id such as '01.discretise'"),
            (not re.match(r"O\d: \S", self.objective), "an objective like 'O1: read it.'"),
            (not 1 <= self.difficulty <= 5, "a difficulty from 1 to 5"),
            (self.kind not in KINDS, f"a kind out of {KINDS}"),
            (self.id in self.needs, "other exercises in `needs`, not itself"),
            (len(self.hints) != 3, "three hints"),
            (not self.checks, "at least one check"),
            (any(not 1 <= c.hint <= 3 for c in self.checks), "hint numbers from 1 to 3"),
            (sum(c.points for c in self.checks) != self.points,
             f"checks whose points add up to {self.points}"),
            (len({c.name for c in self.checks}) != len(self.checks), "a name for each check"),
        ):  # fmt: skip
            if wrong:
                raise ExerciseError(f"Exercise {self.id!r} needs {expected}.")
        in_stub, in_solution = _defined_name(self.stub), _defined_name(self.solution)
        if in_stub != in_solution:
            raise ExerciseError(
                f"Exercise {self.id!r}: the stub defines {in_stub!r}, the solution "
                f"{in_solution!r}; both must define the same name."
            )

    @property
    def function_name(self) -> str:
        """The last function or class that the stub defines; it is what `check` is given."""
        return _defined_name(self.stub)

    @property
    def dots(self) -> str:
        """The difficulty as five dots, such as ●●○○○."""
        return "●" * self.difficulty + "○" * (5 - self.difficulty)

    @property
    def text(self) -> str:
        """The task as a chapter shows it: the last lines of the markdown cell above the stub."""
        return (
            f"### Exercise · {self.title}\n\n"
            f"*{self.kind} · difficulty {self.dots} · about {self.minutes} minutes · "
            f"{self.objective}*\n\n{self.task.strip()}\n\n"
            f'Stuck? `hint("{self.id}")` gives one step at a time, three in all.'
        )

    @property
    def cell(self) -> str:
        """The code cell of the notebook: the stub and the call that grades it."""
        return f'{self.stub.rstrip()}\n\n\ncheck("{self.id}", {self.function_name})'

    def build(self, source: str | None = None, own: Mapping[str, Any] | None = None) -> Any:
        """Run source code and return the function or class that it defines.

        Args:
            source: the solution, if None.
            own: answers to the exercises in `needs`, by id; those that are missing are built from
                their solutions.
        """
        text = self.solution if source is None else source
        imports = [
            node for node in parse(self.stub).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        crc = f"{zlib.crc32(text.encode()):08x}"
        file = f"<{self.id} {crc}>"
        # Data classes, inspect.getsource and pickle look for the module of a class.
        module = ModuleType(f"exercise_{self.id.replace('.', '_')}_{crc}")
        module.__file__ = file
        sys.modules[module.__name__] = module
        space = vars(module)
        exec(PRELUDE + "\n".join(map(ast.unparse, imports)), space)
        for needed in map(exercise, self.needs):
            answer = (own or {}).get(needed.id)
            space[needed.function_name] = needed.build(own=own) if answer is None else answer
        # Tracebacks and inspect.getsource look the text up here.
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        exec(compile(text, file, "exec", dont_inherit=True), space)  # as a notebook compiles it
        return space[self.function_name]

    @cached_property
    def provided(self) -> set[str]:
        """Names that an answer need not define: prelude, imports of the stub, what it needs."""
        head = [
            n for n in parse(PRELUDE + self.stub).body if isinstance(n, ast.Import | ast.ImportFrom)
        ]
        names = {(a.asname or a.name).partition(".")[0] for node in head for a in node.names}
        return names | {exercise(needed).function_name for needed in self.needs}

    def bodies(self, function: Any) -> dict[str, learner_code.Body]:
        """The compiled functions of an answer, by their names in the stub."""
        others = {name.partition(".")[0] for name in learner_code.asked_for(self.stub)}
        return learner_code.bodies_of(
            function, self.function_name, sorted(others - {self.function_name})
        )


@dataclass(frozen=True)
class CheckResult:
    """The result of `check`. `hint` is the number of the hint to read next, None if all pass."""

    passed: bool
    points: int
    max_points: int
    message: str
    exercise_id: str = ""
    hint: int | None = None
    failed: tuple[str, ...] = ()
    shown_in_cell: int | None = field(default=None, repr=False, compare=False)

    def _ipython_display_(self) -> None:
        """Show nothing in the cell that ran `check`: `check` has shown its message there."""
        if output.cell_number() != self.shown_in_cell:
            output.show_output(self.message)


def exercises(chapter: str) -> tuple[Exercise, ...]:
    """The exercises of a chapter, such as "01".

    Raises:
        ExerciseError: the chapter has none.
    """
    folders = chapter_folders()
    if chapter not in folders:
        raise ExerciseError(f"Chapter {chapter!r} has no exercises; choose one of {list(folders)}.")
    name = f"nemotron_lite.course.chapters.{folders[chapter].name}.exercises"
    found: tuple[Exercise, ...] = import_module(name).EXERCISES
    return found


def exercise(exercise_id: str) -> Exercise:
    """One exercise by its id.

    Raises:
        ExerciseError: there is none; the message lists those of its chapter.
    """
    known = {e.id: e for e in exercises(exercise_id.partition(".")[0])}
    if exercise_id not in known:
        raise ExerciseError(f"There is no exercise {exercise_id!r}; choose one of {list(known)}.")
    return known[exercise_id]


def grade(found: Exercise, function: Any, salt: str = "") -> CheckResult:
    """Run the checks of an exercise on a function, without showing or keeping anything.

    Args:
        found: the exercise.
        function: the answer; any object that can be called, such as one that forwards its calls to
            another process.
        salt: enters the seed of each check. Coursework is graded with a secret one.
    """
    if not callable(function):
        raise TypeError(
            f"{found.id} was given {function!r:.60}, which cannot be called; "
            f"pass {found.function_name} itself."
        )
    bodies = found.bodies(function)
    if learner_code.is_untouched(found.stub, bodies):
        return not_done(found)
    wrong: dict[str, str] = {}
    for test in found.checks:
        try:
            with _seeded(f"{found.id}/{test.name}{f'/{salt}' if salt else ''}"):
                test.run(function)
        except (Exception, SystemExit) as error:  # an answer may call sys.exit
            if _is_stub_error(found, function, bodies, error):
                if _nothing_written(found, bodies):
                    return not_done(found)
                wrong[test.name] = f"{_raising_part(found, error)} is not written yet."
            elif isinstance(error, AssertionError) and not learner_code.raised_by(function, error):
                message = learner_code.with_full_stop(str(error))
                wrong[test.name] = message or "the answer is not right."
            else:
                wrong[test.name] = learner_code.describe_error(function, error)
    return _summary(found, wrong)


def _is_stub_error(
    found: Exercise, function: Any, bodies: Mapping[str, learner_code.Body], error: BaseException
) -> bool:
    """Whether a part of the answer that is still to be written raised the error."""
    if isinstance(learner_code.root_cause(error), NotImplementedError):
        return learner_code.raised_by(function, error)
    # Triton's compiler, which refuses a `raise` in a kernel with an error of its own
    unwritten = learner_code.unwritten_bodies(found.stub, bodies)
    return learner_code.raised_by_triton(error) and bool(unwritten) and bool(bodies)


def _nothing_written(found: Exercise, bodies: Mapping[str, learner_code.Body]) -> bool:
    asked = learner_code.asked_for(found.stub)
    known = [name for name in asked if name in bodies]
    if not known:  # it runs in another process: nothing more is known
        return len(asked) == 1
    return set(known) <= set(learner_code.unwritten_bodies(found.stub, bodies))


def _raising_part(found: Exercise, error: BaseException) -> str:
    """The name of the function or method of the stub that raised the error."""
    code = learner_code.raising_code(error)
    for name in learner_code.asked_for(found.stub):
        if code is not None and name.rpartition(".")[2] == code.co_name:
            return name
    return "a part of the stub"


def not_done(found: Exercise) -> CheckResult:
    """The result of an answer of which nothing is written yet."""
    message = (
        f"{found.id}: not done yet. Fill in {found.function_name} and run the cell again; "
        f'hint("{found.id}") helps.'
    )
    cell = output.cell_number()
    return CheckResult(False, 0, found.points, message, found.id, 1, shown_in_cell=cell)


def _summary(found: Exercise, wrong: dict[str, str]) -> CheckResult:
    points = sum(test.points for test in found.checks if test.name not in wrong)
    passing = _count(len(found.checks) - len(wrong), len(found.checks), "check")
    score = f"{passing}, {_count(points, found.points, 'point')}."
    verdict = "not right yet" if wrong else "right"
    lines = [f"{found.id}: {verdict}. {score}"]
    lines += [f"  {'✗' if test.name in wrong else '✓'} {test.name}" for test in found.checks]
    number = None
    if wrong:
        first = next(test for test in found.checks if test.name in wrong)
        number = first.hint
        lines.append(f"{first.name}: {wrong[first.name]}")
        lines.append(f'Read hint("{found.id}", {number}) next.')
    cell = output.cell_number()
    return CheckResult(
        not wrong, points, found.points, "\n".join(lines), found.id, number, tuple(wrong), cell
    )


def _count(number: int, of: int, what: str) -> str:
    return f"{number} of {of} {what}{'' if of == 1 else 's'}"


def _defined_name(source: str) -> str:
    """The name of the last function or class that some source code defines."""
    names = [
        node.name for node in parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)
    ]
    if not names:
        raise ExerciseError(f"{source[:60]!r} defines no function or class; it must define one.")
    return names[-1]


@contextmanager
def _seeded(name: str) -> Iterator[None]:
    """Use a seed made from `name` and switch gradients on; restore both afterwards."""
    seed = zlib.crc32(name.encode())
    state_before = random.getstate()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state_before)
