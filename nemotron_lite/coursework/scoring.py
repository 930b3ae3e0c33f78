"""Score one submission: execute its cells in a learner's process, and check the answers from here.

The cells run in order. Where the notebook has a test cell, that cell is not executed: the function
or class that the learner has by then is looked up, and the checks of the exercise run in this
process, on a stand-in (`remote`), with hidden seeds. So what stands in a test cell, or what the
code does to `check` or to torch in its own process, has no effect on the score.

If the process ends, or had to be stopped, it is started again without the cell that did it, and the
grading goes on with the next exercise.

An exercise may use what earlier ones built. If the learner's own function passed, it is used;
otherwise the package's reference takes its place while the later exercise is graded, so that one
mistake costs points once. That holds for what it needs indirectly, too. That reference reaches the
learner's process only then, when its own exercise has already been graded. Functions from other
chapters are always the references.

An answer could clear its arguments, return zeros, and so be compared with the reference of zeros.
If an answer changed arguments in place, the checks run again with copies, and a check has to pass
both times; except where the reference too passes only by what it writes into its arguments.
"""

from __future__ import annotations

import ast
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from nemotron_lite.course import exercises
from nemotron_lite.course.exercises import PRELUDE, Exercise
from nemotron_lite.course.syntax import parse
from nemotron_lite.coursework.clean_copy import (
    Assignment,
    GradedExercise,
    grade_id,
    text_of,
)
from nemotron_lite.coursework.isolation import Isolation, LearnerProcess, Limits
from nemotron_lite.coursework.session import GoneError, OutOfTimeError, Session

STARTING = 120.0  # seconds until torch is imported
MOST_STARTS = 12  # processes of one submission
NO_TIME = "the time of the whole submission was over before it was graded"


@dataclass
class Score:
    """What one exercise earned. `status` is passed, partial, failed, error, stopped or died.

    `error`: its function could not be looked up. `stopped`: it ran too long. `died`: the process
    ended, or its answers were malformed. Points of checks that passed are kept in each case.
    """

    id: str
    kind: str
    points: float
    max_points: float
    status: str
    message: str
    checks: list[tuple[str, bool]] = field(default_factory=list)


@dataclass
class Scored:
    """A submission that was executed and graded."""

    scores: list[Score]
    outputs: dict[int, list[dict[str, Any]]]  # of each cell that was executed, by its place
    notes: list[str]
    flags: list[str]
    seconds: float
    facts: dict[str, Any]  # what the process said about its limits

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, without the outputs."""
        return {name: value for name, value in asdict(self).items() if name != "outputs"}


def everything_needed(exercise: Exercise) -> list[Exercise]:
    """The exercises that one needs, and those that they need, each after what it needs."""
    found: dict[str, Exercise] = {}
    for needed in map(exercises.exercise, exercise.needs):
        for one in (*everything_needed(needed), needed):
            found.setdefault(one.id, one)
    return list(found.values())


def reference_sources(exercise: Exercise) -> list[str]:
    """Source code that defines the reference of an exercise, with everything it needs."""
    sources = [PRELUDE]
    for needed in map(exercises.exercise, exercise.needs):
        sources += reference_sources(needed)
    imports = [
        ast.unparse(node)
        for node in parse(exercise.stub).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    return [*sources, "\n".join(imports), exercise.solution]


def copied(value: Any) -> Any:
    """A value with copies of its tensors, lists and dicts; gradients flow through."""
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(map(copied, value))
    if isinstance(value, dict):
        return {name: copied(one) for name, one in value.items()}
    return value


class _Run:
    """The execution of one submission, over as many processes as it takes."""

    def __init__(
        self,
        notebook: dict[str, Any],
        handed_out: Assignment,
        site: Path,
        isolation: Isolation,
        limits: Limits,
        salt: str,
    ) -> None:
        self.cells, self.handed_out = notebook["cells"], handed_out
        self.site, self.isolation, self.limits, self.salt = site, isolation, limits, salt
        self.tests = {one.test: one for one in handed_out.exercises}
        self.answers = {one.answer: one for one in handed_out.exercises}
        self.started = time.monotonic()
        self.outputs: dict[int, list[dict[str, Any]]] = {}
        self.scores: dict[str, Score] = {}
        self.notes: list[str] = []
        self.flags: list[str] = []
        self.skipped: set[int] = set()  # cells that ended their process
        self.starts = 0
        self.facts: dict[str, Any] = {}
        self.process: LearnerProcess | None = None
        self.session: Session | None = None

    def left(self) -> float | int:
        """Seconds that are left of the whole submission's."""
        return self.limits.seconds - (time.monotonic() - self.started)

    def start(self, place: int) -> Session:
        """A process in which all cells before `place` have run."""
        if self.session is not None and not self.session.gone:
            return self.session
        self.stop()
        self.starts += 1
        if self.starts > MOST_STARTS:
            raise GoneError(f"its process ended {MOST_STARTS} times")
        if self.left() <= 0:
            raise OutOfTimeError(NO_TIME)
        self.process = LearnerProcess(self.isolation, self.site, self.limits.memory_gib)
        session = self.session = Session(self.process.channel, self.salt.encode())
        try:
            self.facts = session.hello(STARTING)
        except GoneError as error:
            last = (self.process.log().strip().splitlines() or ["its log is empty"])[-1]
            raise GoneError(f"its process did not start: {last[:300]}") from error
        self._give(session)
        for i in range(place):
            if self._runs(i) and i not in self.skipped:
                session.run(self._name(i), text_of(self.cells[i]), self._seconds())
        return session

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.stop()
        self.process = self.session = None

    def _seconds(self) -> float | int:
        return min(self.limits.cell_seconds, max(0.0, self.left()))

    def _name(self, i: int) -> str:
        return str(self.cells[i].get("id", f"cell-{i}"))

    def _runs(self, i: int) -> bool:
        """Whether a cell is executed: code that is not a test cell."""
        cell = self.cells[i]
        return cell["cell_type"] == "code" and grade_id(cell) not in self.tests

    def _give(self, session: Session) -> None:
        """Give `own` the answers to exercises of other chapters."""
        chapter = self.handed_out.name[-2:]
        session.begin(STARTING)
        for one in self.handed_out.exercises:
            for needed in map(exercises.exercise, exercises.exercise(one.id).needs):
                if needed.id[:2] != chapter:
                    sources = reference_sources(needed)
                    session.define(needed.function_name, sources, own=needed.id)

    def everything(self) -> None:
        """Execute and grade the whole notebook."""
        for i, cell in enumerate(self.cells):
            if self._runs(i):
                self.execute(i)
            elif one := self.tests.get(grade_id(cell)):
                self.scores[one.id] = self.grade(one, i)

    def execute(self, i: int) -> None:
        """Execute a cell."""
        try:
            session = self.start(i)
            self.outputs[i] = session.run(self._name(i), text_of(self.cells[i]), self._seconds())
        except (GoneError, OutOfTimeError) as error:
            if self.session is not None and self.session.gone:
                self.skipped.add(i)
                self._note_end(self._name(i), self.session)
            self.outputs[i] = [
                {"output_type": "error", "ename": "Stopped", "evalue": str(error), "traceback": []}
            ]

    def _note_end(self, where: str, session: Session) -> None:
        self.notes.append(f"{where}: {session.gone}; a new process went on without it")
        flag = "stopped" if session.late else "process_ended"
        if flag not in self.flags:
            self.flags.append(flag)

    def grade(self, one: GradedExercise, place: int) -> Score:
        """Check one answer with the functions that it needs in their places."""
        found, points = exercises.exercise(one.id), float(one.points)
        replaced: list[tuple[str, Any]] = []
        score = Score(one.id, found.kind, 0.0, points, "error", "")
        session: Session | None = None
        try:
            session = self.start(place)
            session.begin(self._seconds())
            session.reset()
            replaced = self._give_needed(found, session)
            if replaced and (answer_place := self._place_of(one.answer, place)) is not None:
                # A class may be built on what was replaced, so its cell has to run again.
                self.outputs[answer_place] = session.run(
                    self._name(answer_place), text_of(self.cells[answer_place]), self._seconds()
                )
            session.begin(self._seconds())
            score = self.check(found, session.lookup(one.function), session)
            if broken := self._broken(one, place):
                score.message = f"the answer cell ended in {broken}. {score.message}"
        except GoneError as error:
            score.status, score.message = "died", str(error)
        except OutOfTimeError as error:
            score.status, score.message = "stopped", str(error)
        except (NameError, TypeError) as error:
            score.message = self._missing(one, place, str(error))
        here = [e.function_name for e in everything_needed(found) if e.id[:2] == found.id[:2]]
        if own := [name for name, _ in replaced if name in here]:
            score.message += f"\nGraded with the package's {' and '.join(own)}."
        if session is not None and (session.gone or session.late):
            score.status = "stopped" if session.late else "died"
            if session.gone:
                self._note_end(one.id, session)
        elif session is not None:
            for name, before in replaced:
                session.begin(STARTING)
                session.restore(name, before)
        return score

    def _give_needed(self, found: Exercise, session: Session) -> list[tuple[str, Any]]:
        """Put references in the place of needed functions; names, and what they named before."""
        replaced = []
        for needed in everything_needed(found):
            if needed.id[:2] != found.id[:2] or not self._passed(needed.id):
                name = needed.function_name
                replaced.append((name, session.define(name, reference_sources(needed))))
        return replaced

    def _place_of(self, name: str, before: int) -> int | None:
        """The place of the cell with that grade_id, above `before`."""
        places = (i for i in range(before) if grade_id(self.cells[i]) == name)
        return next(places, None)

    def check(self, found: Exercise, answer: Any, session: Session) -> Score:
        """Run the checks of an exercise on an answer."""
        session.wrote = False
        result = exercises.grade(found, answer, salt=self.salt)
        failed, message = set(result.failed), result.message.removeprefix(f"{found.id}: ")
        if session.wrote and result.points and not (session.gone or session.late):
            session.begin(self._seconds())
            with session.copies():
                again = exercises.grade(found, answer, salt=self.salt)
            if only := set(again.failed) - failed - self._write_by_design(found):
                failed |= only
                message += (
                    f"\nNot counted: {', '.join(sorted(only))}. With copies of its arguments, the "
                    "answer does not pass; it changes in place what it is compared with."
                )
        tried = result.passed or bool(result.failed)  # neither: nothing is written yet
        checks = [(test.name, tried and test.name not in failed) for test in found.checks]
        earned = sum(test.points for test in found.checks if tried and test.name not in failed)
        status = "failed" if not earned else "partial" if failed else "passed"
        most = float(found.points)
        return Score(found.id, found.kind, float(earned), most, status, message, checks)

    def _write_by_design(self, found: Exercise) -> set[str]:
        """The checks that the reference passes only by what it writes into its arguments."""
        reference = found.build()
        if isinstance(reference, type):  # its methods cannot be given copies here
            return {test.name for test in found.checks}

        def on_copies(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = copied((args, kwargs))
            return reference(*args, **kwargs)

        return set(exercises.grade(found, on_copies, salt=self.salt).failed)

    def _passed(self, exercise_id: str) -> bool:
        score = self.scores.get(exercise_id)
        return score is not None and score.status == "passed"

    def _broken(self, one: GradedExercise, place: int) -> str:
        """The error in which the answer's cell ended, "" if there was none."""
        found = self._place_of(one.answer, place)
        for output in self.outputs.get(found, []) if found is not None else []:
            if output["output_type"] == "error":
                return f"{output['ename']}: {output['evalue']}"[:300]
        return ""

    def _missing(self, one: GradedExercise, place: int, problem: str) -> str:
        """Why there is no function to grade."""
        if "is not a function" in problem:
            return problem
        if broken := self._broken(one, place):
            return f"there is no function {one.function}: its cell ended in {broken}"
        return f"there is no function {one.function}; was it renamed, or its cell deleted?"


def score_submission(
    notebook: dict[str, Any],
    handed_out: Assignment,
    site: Path,
    isolation: Isolation,
    limits: Limits,
    salt: str,
) -> Scored:
    """Execute a clean copy of a submission and grade its answers.

    Args:
        notebook: from `submissions.clean_copy`.
        handed_out: the assignment.
        site: what the learner's process can import (`learner_package`).
        isolation: how that process is separated.
        limits: of the submission.
        salt: makes the seeds of the checks.
    """
    run = _Run(notebook, handed_out, site, isolation, limits, salt)
    try:
        run.everything()
    finally:
        run.stop()
    scores = [
        run.scores.get(one.id)
        or Score(one.id, "must", 0.0, float(one.points), "error", "its test cell is missing")
        for one in handed_out.exercises
    ]
    seconds = round(time.monotonic() - run.started, 1)
    return Scored(scores, run.outputs, run.notes, run.flags, seconds, run.facts)
