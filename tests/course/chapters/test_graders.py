"""Tests of the graders: right answers pass, wrong answers fail and name the hint that helps.

Well-known courses have shipped checks that accept an unchanged stub, or that grade the package
instead of the learner's function. So four things are tested for every exercise of every chapter:

- the stub earns nothing,
- the reference solution earns everything,
- each mutant (a wrong answer with a mistake that people have made) fails and names its hint,
- if any statement of the reference solution is deleted, a check fails.

Only what the learner has to write is changed, not what the stub gives: of a class the methods that
it asks for, of a Triton exercise the kernel. A kernel with a mistake can write outside its arrays
and end the process. So Triton exercises are graded in a child; one that dies counts as noticed.

Small alterations (a sign, an operator, a number plus one) are sampled over the whole course. Some
of them change nothing, such as axis 2 for axis -2 of four, so only a minimum share of them has to
be noticed. A chapter without exercises, or an exercise without mutants, fails.
"""

from __future__ import annotations

import ast
import copy
import faulthandler
import importlib
import linecache
import os
import pickle
import random
import signal
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType, ModuleType

import pytest
import torch

from nemotron_lite.course import exercises, learner_code
from nemotron_lite.course.chapter_list import chapter_folders
from nemotron_lite.course.exercises import PRELUDE, CheckResult, Exercise
from nemotron_lite.coursework import make
from tests.course.chapters.mutants import Mutant
from tests.course.sample_exercises import ADD, GATE

CHAPTERS = make.chapters()
EXERCISES = {e.id: e for chapter in CHAPTERS for e in exercises.exercises(chapter)}
FEWEST_MUTANTS = 3
TIME_LIMIT = 20  # seconds; without its `i += 1` a loop never ends

SALTS = ("a", "b", "c")  # of the seeds; coursework is graded with one that nobody knows
SAMPLED = 6  # alterations of each exercise
LEAST_NOTICED = 0.9  # the share of them that must be noticed
EXCHANGED: dict[type, type] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.MatMult: ast.Mult, ast.Pow: ast.Mult, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def _module_of(chapter: str) -> ModuleType:
    return importlib.import_module(
        f"tests.course.chapters.{chapter_folders()[chapter].name}.mutants"
    )


def mutants_of(chapter: str) -> dict[str, list[Mutant]]:
    found: dict[str, list[Mutant]] = _module_of(chapter).MUTANTS
    return found


# Statements that can be deleted without changing any answer, with the reason: (exercise, statement)
# → reason, from the mutants.py of a chapter, which need not have any.
EQUIVALENT: dict[tuple[str, str], str] = {
    key: reason
    for chapter in CHAPTERS
    for key, reason in getattr(_module_of(chapter), "EQUIVALENT", {}).items()
}


MUTANTS = [
    pytest.param(exercise_id, mutant, id=f"{exercise_id}-{mutant.name.replace(' ', '-')}")
    for chapter in CHAPTERS
    for exercise_id, mutants in mutants_of(chapter).items()
    for mutant in mutants
]


class OutOfTimeError(BaseException):
    """A BaseException, because `grade` turns an Exception into a wrong answer."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Interrupt the block after so many seconds."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def functions_to_change(tree: ast.Module, given: Container[str] = ()) -> list[ast.AST]:
    """The functions and methods of a solution, without those that the stub gives."""
    found: list[ast.AST] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name not in given:
            found.append(node)
        elif isinstance(node, ast.ClassDef):
            found += [
                inner
                for inner in node.body
                if isinstance(inner, ast.FunctionDef) and f"{node.name}.{inner.name}" not in given
            ]
    return found


def given_by(exercise: Exercise) -> set[str]:
    """The functions and methods that the stub gives: they are not the learner's to write."""
    every = set(learner_code.bodies_of_source(exercise.stub))
    return every - set(learner_code.asked_for(exercise.stub))


def deletions(source: str, given: Container[str] = ()) -> list[tuple[str, str]]:
    """Each statement of the functions and methods in `source`, and the source without it."""
    places = []
    tree = ast.parse(source)
    for function in functions_to_change(tree, given):
        for node in ast.walk(function):
            for block in ("body", "orelse", "finalbody"):
                statements = getattr(node, block, None)
                if isinstance(statements, list):
                    places += [(node, block, i) for i in range(len(statements))]
    found = {}
    for node, block, i in places:
        statement = getattr(node, block)[i]
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
            continue  # a docstring
        twin = copy.deepcopy(tree)
        for was, now in zip(ast.walk(tree), ast.walk(twin), strict=True):
            if was is node:
                left = getattr(now, block)
                del left[i]
                if not left and block == "body":
                    left.append(ast.Pass())
        found[ast.unparse(twin)] = ast.unparse(statement)
    return [(statement, shorter) for shorter, statement in found.items()]


def alterations(source: str, given: Container[str] = ()) -> list[tuple[str, str]]:
    """Each operator exchanged and each number moved by one: what was changed, and the source."""
    tree = ast.parse(source)
    found = {}
    inside = {
        id(node) for function in functions_to_change(tree, given) for node in ast.walk(function)
    }
    for place, node in enumerate(ast.walk(tree)):
        if id(node) not in inside:
            continue
        for step in (1, -1):
            if altered := _altered(copy.copy(node), step):
                twin = copy.deepcopy(tree)
                _altered(list(ast.walk(twin))[place], step)
                found[ast.unparse(twin)] = f"{ast.unparse(node)} -> {altered}"
    return [(change, other) for other, change in found.items()]


def _altered(node: ast.AST, step: int) -> str:
    """Alter one node in place and return its new text, or "" where there is nothing to alter."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        node.value += step
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in EXCHANGED:
        node.op = EXCHANGED[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in EXCHANGED:
        node.ops = [EXCHANGED[type(node.ops[0])](), *node.ops[1:]]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node.op = ast.UAdd()
    else:
        return ""
    return ast.unparse(node)


def graded(exercise: Exercise, source: str) -> CheckResult | None:
    """The result of an answer; None if it cannot be built, ends its process or never ends."""
    try:
        with time_limit(TIME_LIMIT):
            if "@triton.jit" in exercise.stub:
                return _in_child(lambda: exercises.grade(exercise, exercise.build(source)))
            return exercises.grade(exercise, exercise.build(source))
    except (OutOfTimeError, Exception):
        return None


def _in_child(run: Callable[[], CheckResult]) -> CheckResult:
    """Run in a forked process and take its result over a pipe."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        faulthandler.disable()
        torch.set_num_threads(1)  # the threads of the parent do not exist here
        try:
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(run(), pipe)
        finally:
            os._exit(0)
    os.close(write)
    try:
        with os.fdopen(read, "rb") as pipe:
            result: CheckResult = pickle.load(pipe)
        return result
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def survivors(exercise: Exercise, tried: list[tuple[str, str]]) -> list[str]:
    """Of changes to the solution and their sources: those that no check notices."""
    results = [(statement, graded(exercise, source)) for statement, source in tried]
    return [statement for statement, result in results if result is not None and result.passed]


def test_every_chapter_has_exercises() -> None:
    assert CHAPTERS, "no chapter was found"
    for chapter in CHAPTERS:
        found = exercises.exercises(chapter)
        assert 2 <= len(found) <= 10, f"chapter {chapter} has {len(found)} exercises"
        assert {e.id.partition(".")[0] for e in found} == {chapter}
    assert len(EXERCISES) == sum(len(exercises.exercises(c)) for c in CHAPTERS), (
        "an id is there twice"
    )


def test_an_exercise_needs_earlier_ones_only() -> None:
    order = list(EXERCISES)
    for exercise in EXERCISES.values():
        for needed in exercise.needs:
            assert needed in EXERCISES, f"{exercise.id} needs {needed}, which does not exist"
            assert order.index(needed) < order.index(exercise.id), f"{needed} comes later"


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_an_exercise_that_must_be_done_needs_no_optional_one(chapter: str) -> None:
    found = exercises.exercises(chapter)
    assert any(e.kind == "must" for e in found)
    for exercise in found:
        if exercise.kind == "must":
            assert {EXERCISES[needed].kind for needed in exercise.needs} <= {"must"}, exercise.id


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_exercise_has_three_mutants(chapter: str) -> None:
    mutants = mutants_of(chapter)
    assert set(mutants) == {e.id for e in exercises.exercises(chapter)}
    for exercise_id, of in mutants.items():
        assert len(of) >= FEWEST_MUTANTS, f"{exercise_id} has {len(of)}"
        assert len({m.source for m in of}) == len(of), f"{exercise_id}: the same mutant twice"
        assert all(m.bug.strip() for m in of), f"{exercise_id}: where was this bug seen?"


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_the_untouched_stub_earns_nothing(exercise: Exercise) -> None:
    result = exercises.grade(exercise, exercise.build(exercise.stub))
    assert (result.passed, result.points) == (False, 0)
    assert result.message.startswith(f"{exercise.id}: not done yet")


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_the_reference_earns_everything_and_changes_no_global_state(exercise: Exercise) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state(), torch.get_num_threads()
    for _ in range(2):
        result = exercises.grade(exercise, exercise.build())
        assert result.passed, result.message
        assert result.points == result.max_points == exercise.points
        assert "✗" not in result.message
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_the_reference_passes_with_any_seed(exercise: Exercise) -> None:
    for salt in SALTS:
        result = exercises.grade(exercise, exercise.build(), salt)
        assert result.passed, f"salt {salt!r}: {result.message}"


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_an_answer_comes_back_from_its_text(exercise: Exercise) -> None:
    """As a later chapter finds it: the cell of a learner who wrote the reference is stored."""
    space = {"__name__": "__main__", "check": lambda *arguments: None}
    exec(PRELUDE, space)
    for needed in exercise.needs:
        space[EXERCISES[needed].function_name] = EXERCISES[needed].build()
    cell, file = exercise.cell.replace(exercise.stub.rstrip(), exercise.solution), exercise.id
    linecache.cache[file] = (len(cell), None, cell.splitlines(keepends=True), file)
    exec(compile(cell, file, "exec", dont_inherit=True), space)
    name = exercise.function_name
    source, problem = learner_code.answer_source(space[name], name, exercise.provided)
    assert problem == ""
    result = graded(exercise, source)
    assert result is not None
    assert result.passed, result.message


@pytest.mark.parametrize(("exercise_id", "mutant"), MUTANTS)
def test_a_mutant_fails_and_is_sent_to_its_hint(exercise_id: str, mutant: Mutant) -> None:
    exercise = EXERCISES[exercise_id]
    result = graded(exercise, mutant.source)
    assert result is not None, "it could not be graded; a mutant has to get a message"
    assert not result.passed, f"accepted, though: {mutant.bug}"
    assert result.points < exercise.points
    assert f'Read hint("{exercise_id}", {mutant.hint}) next.' in result.message, result.message


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
@pytest.mark.parametrize(
    "answer",
    [lambda *a, **k: None, lambda *a, **k: 1 / 0, lambda *a, **k: a, lambda: 0, len, dict],
    ids=["None", "raises", "its-arguments", "takes-nothing", "len", "dict"],
)
def test_nonsense_fails_without_an_error(exercise: Exercise, answer: Callable[..., object]) -> None:
    result = exercises.grade(exercise, answer)
    assert not result.passed
    assert result.points < exercise.points
    assert exercise.id in result.message


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_what_is_graded_is_what_was_passed_in(exercise: Exercise) -> None:
    """The reference under another name passes, a stub under the right name does not."""
    calls = []
    reference = exercise.build()

    def another_name(*arguments: object, **named: object) -> object:
        calls.append(arguments)
        return reference(*arguments, **named)

    assert exercises.grade(exercise, another_name).passed
    assert calls, "no check called the function"


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_no_statement_of_the_reference_can_be_deleted(exercise: Exercise) -> None:
    tried = deletions(exercise.solution, given_by(exercise))
    alive = survivors(exercise, tried)
    known = {statement for of, statement in EQUIVALENT if of == exercise.id}
    assert tried, "nothing was deleted"
    assert set(alive) == known, f"{len(alive)} of {len(tried)} deletions go unnoticed"


def test_small_alterations_are_noticed() -> None:
    alive, tried = [], 0
    # An altered address of a Triton kernel can store outside of its tensors and end the process.
    safe = [e for e in EXERCISES.values() if "import triton" not in e.solution]
    for exercise in safe:
        changes = alterations(exercise.solution, given_by(exercise))
        some = random.Random(exercise.id).sample(changes, min(SAMPLED, len(changes)))
        alive += [f"{exercise.id}: {change}" for change in survivors(exercise, some)]
        tried += len(some)
    assert tried >= 3 * len(safe)
    assert len(alive) <= (1 - LEAST_NOTICED) * tried, f"of {tried} unnoticed: {alive}"


def test_deletions_are_found_in_every_block() -> None:
    source = (
        "def f(x):\n    'doc'\n    y = 0\n    for i in x:\n        y += i\n"
        "    if y:\n        y = 1\n    else:\n        y = 2\n    return y\n"
    )
    assert [statement.partition("\n")[0] for statement, _ in deletions(source)] == [
        "y = 0",
        "for i in x:",
        "if y:",
        "return y",
        "y += i",
        "y = 1",
        "y = 2",
    ]
    without = dict(deletions(source))
    assert "pass" in without["y += i"]
    assert "else" not in without["y = 2"]


def test_what_a_stub_gives_is_not_changed() -> None:
    head = "class A:\n    def given(self):\n        return 1\n\n    def asked(self):\n        "
    given = given_by(
        replace(GATE, stub=f"{head}raise NotImplementedError\n", solution=head + "pass")
    )
    assert given == {"A.given"}
    source = f"{head}x = 2\n        return x\n"
    assert [statement for statement, _ in deletions(source, given)] == ["x = 2", "return x"]
    assert [change for change, _ in alterations(source, given)] == ["2 -> 3", "2 -> 1"]
    assert len(deletions(source)) == 3


def test_a_kernel_that_ends_its_process_counts_as_noticed() -> None:
    def end(function: object) -> None:
        os.abort()

    exercise = replace(ADD, checks=(replace(ADD.checks[0], run=end),))
    assert graded(exercise, ADD.solution) is None
    result = graded(ADD, ADD.solution)
    assert result is not None
    assert result.passed


def test_alterations_change_one_thing_each() -> None:
    changes = dict(alterations("def f(x):\n    return x + 2 if x == y else -x\n"))
    assert sorted(changes) == sorted(
        ["x + 2 -> x - 2", "2 -> 3", "2 -> 1", "x == y -> x != y", "-x -> +x"]
    )
    assert "x + 3 if x == y else -x" in changes["2 -> 3"]


def loop_forever() -> None:
    with time_limit(1):
        while True:
            pass


def test_an_endless_loop_is_interrupted() -> None:
    with pytest.raises(OutOfTimeError):
        loop_forever()
