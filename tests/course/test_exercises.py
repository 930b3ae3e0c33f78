"""`check` grades the function that is passed in, never passes a stub, and names a hint."""

from __future__ import annotations

import random
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import nemotron_lite
from nemotron_lite.course import (
    Check,
    exercises,
)
from nemotron_lite.course.chapter_list import chapter_folders
from nemotron_lite.course.exercises import ExerciseError, close, grade
from nemotron_lite.course.sources import source_of
from tests.course.sample_exercises import (
    ADD,
    FADE,
    GATE,
    GATE_STEP,
    KERNEL,
    STUB,
    by_hand,
    forget,
    many,
    use,
)

RIGHT = """99.fade: right. 3 of 3 checks, 6 of 6 points.
  ✓ by hand
  ✓ many values
  ✓ gradients"""


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use(monkeypatch)
    yield
    forget()


def test_the_reference_passes_with_full_points() -> None:
    result = grade(FADE, FADE.build())
    assert result.passed
    assert (result.points, result.max_points, result.hint) == (6, 6, None)
    assert result.message == RIGHT


UNTOUCHED = {
    "the stub itself": STUB,
    "dots": "def fade(dt, A):\n    ...\n",
    "a docstring": 'def fade(dt, A):\n    """Words."""\n',
    "pass": "def fade(dt, A):\n    pass\n",
    "return None": "def fade(dt, A):\n    return None\n",
    "a stub with another docstring": STUB.replace("How much", "So much"),
    "begun": "def fade(dt, A):\n    x = dt * A\n    raise NotImplementedError\n",
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_an_unfinished_answer_is_not_called_wrong(name: str) -> None:
    result = grade(FADE, FADE.build(UNTOUCHED[name]))
    assert not result.passed
    assert result.points == 0
    assert result.message == (
        '99.fade: not done yet. Fill in fade and run the cell again; hint("99.fade") helps.'
    )


def test_something_else_that_is_not_implemented_is_a_mistake() -> None:
    source = "import numbers\n\n\ndef fade(dt, A):\n    return numbers.Complex.real.fget(dt)\n"
    message = grade(FADE, FADE.build(source)).message
    assert "it raised NotImplementedError. Your line: return numbers" in message


def test_a_stub_that_computes_something_wrong_is_recognised() -> None:
    given = "def fade(dt, A):\n    out = dt * A  # yours\n    return out\n"
    exercise = replace(FADE, stub=given)
    same_but_moved = "\n\n" + given.replace("  # yours", "")
    assert "not done yet" in grade(exercise, exercise.build(same_but_moved)).message
    assert "not right" in grade(exercise, exercise.build(given.replace("*", "+"))).message


def test_a_class_can_be_the_answer() -> None:
    head = "class Gate:\n    def __init__(self, a):\n        self.a = a\n\n"
    stub = head + "    def out(self):\n        ...\n"
    solution = stub.replace("...", "return self.a * 2")

    def run(Gate: Any) -> None:
        close(Gate(3).out(), 6)

    exercise = replace(FADE, stub=stub, solution=solution, points=1, checks=(Check("x", run),))
    assert grade(exercise, exercise.build()).passed
    assert "not done yet" in grade(exercise, exercise.build(stub)).message
    assert (
        "is a `return` missing"
        in grade(exercise, exercise.build(stub.replace("...", "self.a * 2"))).message
    )


WRONG = {
    "wrong everywhere": ("dt * A", 1, 0, "fade at A = 0 is"),
    "right at zero only": ("1 + dt * A", 2, 1, "fade differs in 4 of 5 values"),
    "no gradient": ("torch.exp(dt * A.detach())", 3, 3, "the gradient of A does not exist"),
    "raises": ("torch.exp(dt @ A[None])", 1, 0, "it raised RuntimeError: both arguments to matmul"),
    "returns nothing": (None, 1, 0, "is None: is a `return` missing?"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_names_its_hint(name: str) -> None:
    body, number, points, words = WRONG[name]
    line = "    dt = dt + 0\n" if body is None else f"    return {body}\n"
    result = grade(FADE, FADE.build("def fade(dt, A):\n" + line))
    assert not result.passed
    assert (result.hint, result.points) == (number, points)
    assert words in result.message
    assert result.message.endswith(f'Read hint("99.fade", {number}) next.')


def test_the_learners_own_line_is_quoted() -> None:
    source = "def fade(dt, A):\n    twice = dt * 2\n    return twice.reshape(7) * A\n"
    message = grade(FADE, FADE.build(source)).message
    assert "it raised RuntimeError: shape '[7]' is invalid" in message
    assert "Your line: return twice.reshape(7) * A" in message


def test_a_result_that_a_check_cannot_use_is_reported() -> None:
    def two(function: Callable[..., Any]) -> None:
        first, second = function(torch.ones(1), torch.ones(1))
        close(first, second)

    exercise = replace(FADE, points=1, checks=(Check("two", two),))
    words = "its result could not be used: TypeError: cannot unpack non-iterable"
    assert words in grade(exercise, FADE.build("def fade(dt, A):\n    dt + A\n")).message


def test_the_learners_own_assertion_is_quoted() -> None:
    source = "def fade(dt, A):\n    assert dt < 0\n    return dt\n"
    message = grade(FADE, FADE.build(source)).message
    assert "it raised AssertionError. Your line: assert dt < 0" in message


def test_what_is_passed_in_is_what_is_graded() -> None:
    seen = []

    def spy(function: Callable[..., Any]) -> None:
        seen.append(function)

    exercise = replace(FADE, points=1, checks=(Check("spy", spy),))
    mine = FADE.build()
    grade(exercise, mine)
    assert seen == [mine]
    assert seen[0] is mine


def test_a_check_draws_the_same_numbers_each_time_and_restores_the_generators() -> None:
    drawn = []

    def draw(function: Callable[..., Any]) -> None:
        assert torch.is_grad_enabled()
        drawn.append((torch.rand(3).tolist(), random.random()))

    exercise = replace(FADE, points=2, checks=(Check("a", draw), Check("b", draw)))
    torch.manual_seed(5)
    expected = torch.rand(2).tolist()
    for _ in range(2):
        torch.manual_seed(5)
        with torch.no_grad():
            grade(exercise, FADE.build())
        assert torch.rand(2).tolist() == expected
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]
    # Python's own generator apart from the checks: beartype draws from it under test.
    before = random.getstate()
    with exercises._seeded("a"):
        random.random()
    assert random.getstate() == before


def test_the_same_mistake_gives_the_same_message() -> None:
    source = "def fade(dt, A):\n    return torch.exp(dt * A) * (1 + 1e-3 * torch.rand(()))\n"
    assert grade(FADE, FADE.build(source)) == grade(FADE, FADE.build(source))


def test_the_source_of_a_built_class_can_be_shown() -> None:
    built = GATE.build(), GATE.build(GATE.solution.replace("A gain", "The gain"))
    assert [source_of(one)[0].count("The gain") for one in built] == [0, 0]  # the docstring
    assert [source_of(one, docstring=True)[0].count("The gain") for one in built] == [0, 1]
    assert source_of(built[0].step)[0] == textwrap.dedent(GATE_STEP).rstrip()


def test_a_data_class_can_be_part_of_an_answer() -> None:
    source = "from __future__ import annotations\nfrom dataclasses import dataclass\n\n\n"
    source += "@dataclass\nclass Pair:\n    a: Tensor\n\n\n"
    source += "def fade(dt, A):\n    return Pair(dt * A).a.exp()\n"
    assert grade(FADE, FADE.build(source)).passed


def test_an_answer_that_ends_python_is_wrong() -> None:
    source = "import sys\n\n\ndef fade(dt, A):\n    sys.exit(0)\n"
    message = grade(FADE, FADE.build(source)).message
    assert "it raised SystemExit: 0. Your line: sys.exit(0)" in message


def test_a_salt_gives_other_numbers_and_the_reference_passes_with_each() -> None:
    drawn = []

    def draw(function: Callable[..., Any]) -> None:
        drawn.append(tuple(torch.rand(3).tolist()))

    exercise = replace(FADE, points=1, checks=(Check("a", draw),))
    for salt in ("", "one", "two", "one"):
        assert grade(exercise, FADE.build(), salt).passed
        assert grade(FADE, FADE.build(), salt).passed
    assert drawn[1] == drawn[3]
    assert len(set(drawn)) == 3


class FromElsewhere:
    """Forwards calls, as the object that stands for an answer in another process."""

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        try:
            return self._answer(*arguments, **named)
        except Exception as error:
            again: Any = type(error)(*error.args)
            again.raised_by_learner, again.learner_line = True, "return dt.view(7)"
            raise again from None


def test_an_answer_in_another_process_is_graded_by_its_calls() -> None:
    assert grade(FADE, FromElsewhere(FADE.build()), "salt").passed
    wrong = grade(FADE, FromElsewhere(FADE.build("def fade(dt, A):\n    return dt.view(7)\n")))
    assert "Your line: return dt.view(7)" in wrong.message
    assert "not done yet" in grade(FADE, FromElsewhere(FADE.build(STUB))).message
    asserts = FADE.build("def fade(dt, A):\n    assert dt < 0\n")
    assert "it raised AssertionError" in grade(FADE, FromElsewhere(asserts)).message
    half = GATE.build(GATE.stub.replace("raise NotImplementedError", "return self.gain * x", 1))
    message = grade(GATE, FromElsewhere(half)).message
    assert message.startswith("99.gate: not right yet. 1 of 2 checks")


def test_a_class_that_stands_for_one_in_another_process_keeps_its_points() -> None:
    half = GATE.build(GATE.stub.replace("raise NotImplementedError", "return self.gain * x", 1))

    class Elsewhere:
        def __init__(self, gain: float) -> None:
            self._there = half(gain)

        def __getattr__(self, name: str) -> Any:
            return FromElsewhere(getattr(self._there, name))

    result = grade(GATE, Elsewhere)
    assert (result.points, result.failed) == (1, ("step",))
    assert "is not written yet" in result.message


KERNELS = {
    "the stub": ("    raise NotImplementedError\n", "99.add: not done yet"),
    "begun": ("    a = tl.load(x + i, mask=mask)\n    raise NotImplementedError\n", "not done yet"),
    "wrong": (
        "    tl.store(out + i, tl.load(x + i, mask=mask), mask=mask)\n",
        "ten numbers: x + y differs in 10 of 10 values.",
    ),
    "not Triton": ("    tl.loud(x)\n", "has no attribute 'loud'. Your line: tl.loud(x)"),
}


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_is_graded_through_its_launcher(name: str) -> None:
    body, words = KERNELS[name]
    assert words in grade(ADD, ADD.build(KERNEL.format(body=body))).message


def test_a_kernel_that_was_begun_is_not_done_where_it_is_compiled() -> None:
    """Triton's compiler raises an error of its own for a `raise` in a kernel."""
    from triton.compiler.errors import UnsupportedLanguageConstruct

    begun = ADD.build(ADD.stub.replace("    raise", "    a = i + 1\n    raise"))

    def compiled(function: Callable[..., Any]) -> None:
        raise UnsupportedLanguageConstruct(None, None, "raise")

    exercise = replace(ADD, checks=(Check("a", compiled),))
    assert "not done yet" in grade(exercise, begun).message
    assert "not right" in grade(exercise, ADD.build()).message


def test_an_interrupt_is_not_a_wrong_answer() -> None:
    def stop(dt: Any, A: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        grade(FADE, stop)


def test_passing_a_result_instead_of_the_function_is_refused() -> None:
    with pytest.raises(TypeError, match="pass fade itself"):
        grade(FADE, torch.ones(2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(id="1.fade"), "an id such as"),
        (dict(difficulty=6), "a difficulty from 1 to 5"),
        (dict(kind="maybe"), "a kind"),
        (dict(objective="Fade."), "an objective like"),
        (dict(hints=("a", "b")), "three hints"),
        (dict(checks=()), "at least one check"),
        (dict(points=7), "points add up to 7"),
        (dict(checks=(Check("a", by_hand, hint=4, points=6),)), "hint numbers"),
        (dict(checks=(Check("a", many, points=3), Check("a", many, points=3))), "a name for each"),
        (dict(solution="def fate(dt, A):\n    return 1\n"), "the stub defines 'fade'"),
        (dict(stub="x = 1"), "defines no function or class"),
    ],
)
def test_an_invalid_exercise_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ExerciseError, match=words):
        replace(FADE, **change)


def test_the_text_is_what_a_chapter_and_its_exercise_say() -> None:
    assert FADE.text == (
        "### Exercise · Fade\n\n*must · difficulty ●○○○○ · about 5 minutes · O1: fade.*"
        '\n\nWrite `fade`.\n\nStuck? `hint("99.fade")` gives one step at a time, three in all.'
    )


def test_the_cell_is_the_stub_and_its_check() -> None:
    assert FADE.cell == STUB.rstrip() + '\n\n\ncheck("99.fade", fade)'
    assert FADE.function_name == "fade"


def test_a_source_is_built_with_the_imports_of_the_stub() -> None:
    exercise = replace(
        FADE,
        stub="from fractions import Fraction\n\n\n" + STUB,
        solution="def fade(dt, A):\n    return Fraction(1, 2)\n",
    )
    assert exercise.build()(1, 2) == 0.5


@pytest.mark.parametrize("chapter", chapter_folders())
def test_the_exercises_of_a_chapter_are_well_formed(chapter: str) -> None:
    found = exercises.exercises(chapter)
    assert 2 <= len(found) <= 10
    assert all(exercise.id.startswith(f"{chapter}.") for exercise in found)
    # What a learner builds may have the name of the operation or layer, but a chapter imports
    # the names of the package itself, and the learner's must not replace those.
    assert not set(nemotron_lite.__all__) & {exercise.function_name for exercise in found}
