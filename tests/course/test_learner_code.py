"""Is it written, who raised the error, what is its text: for functions, classes and kernels."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nemotron_lite.course import learner_code
from tests.course.sample_exercises import (
    ADD,
    FADE,
    GATE,
    GATE_HEAD,
    GATE_OUT,
    GATE_STEP,
    KERNEL,
    TODO_OUT,
    TODO_STEP,
    forget,
    use,
)


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    use(monkeypatch)
    yield
    forget()


def cell(source: str, space: dict[str, Any], number: int) -> dict[str, Any]:
    """Run source code as IPython runs a cell: its text is in linecache under a file name."""
    name = f"/tmp/ipykernel_1/{number}.py"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec", dont_inherit=True), space)
    return space


def rebuilt(source: str) -> dict[str, Any]:
    """What source code defines, in a module of its own."""
    space: dict[str, Any] = {"__name__": "elsewhere"}
    exec(compile(source, "<answer>", "exec", dont_inherit=True), space)
    return space


def test_what_a_stub_asks_for() -> None:
    assert learner_code.asked_for(FADE.stub) == ("fade",)
    assert learner_code.asked_for(GATE.stub) == ("Gate.out", "Gate.step")
    assert learner_code.asked_for(ADD.stub) == ("add_kernel",)
    assert learner_code.asked_for("def f():\n    return 1\n") == ("f",)


UNWRITTEN = {
    "both": (TODO_OUT + TODO_STEP, ("Gate.out", "Gate.step")),
    "one is written": (GATE_OUT + TODO_STEP, ("Gate.step",)),
    "one is empty": (GATE_OUT + "    def step(self):\n        ...\n", ("Gate.step",)),
    "one was deleted": (GATE_OUT, ("Gate.step",)),
    "one was begun": (
        GATE_OUT + TODO_STEP.replace("raise", "x = 1\n        raise"),
        ("Gate.step",),
    ),
    "none": (GATE_OUT + GATE_STEP, ()),
    "decorated": (
        "    @torch.no_grad()\n" + GATE_OUT + "    @property\n" + TODO_STEP,
        ("Gate.step",),
    ),
}


@pytest.mark.parametrize("name", UNWRITTEN)
def test_methods_that_are_not_written(name: str) -> None:
    """From the source and from the class that it defines: the same."""
    methods, expected = UNWRITTEN[name]
    assert learner_code.unwritten(GATE.stub, GATE_HEAD + methods) == expected
    bodies = GATE.bodies(GATE.build(GATE_HEAD + methods))
    assert learner_code.unwritten_bodies(GATE.stub, bodies) == expected


def test_a_changed_constructor_alone_is_untouched() -> None:
    changed = GATE.stub.replace("self.gain = gain", "self.gain = 2 * gain")
    assert learner_code.is_untouched(GATE.stub, GATE.bodies(GATE.build(changed)))
    one = GATE_HEAD + GATE_OUT + TODO_STEP
    assert not learner_code.is_untouched(GATE.stub, GATE.bodies(GATE.build(one)))


def test_a_kernel_is_found_under_its_name() -> None:
    assert set(ADD.bodies(ADD.build())) == {"add", "add_kernel"}
    assert learner_code.is_untouched(ADD.stub, ADD.bodies(ADD.build(ADD.stub)))
    empty = ADD.build(KERNEL.format(body="    pass\n"))
    assert not learner_code.is_untouched(ADD.stub, ADD.bodies(empty))  # the head is computed
    assert not learner_code.is_untouched(ADD.stub, ADD.bodies(ADD.build()))


class Proxy:
    """Stands for a function of another process."""

    def __call__(self, *arguments: object) -> None:
        error = ValueError("shape '[7]' is invalid")
        error.learner_line, error.raised_by_learner = "x.view(7)", True  # type: ignore[attr-defined]
        raise error


def test_an_object_without_code_has_nothing_to_compare() -> None:
    for thing in (Proxy(), len, dict, torch.relu):
        assert learner_code.bodies_of(thing, "f", ["kernel"]) == {}
        assert not learner_code.is_untouched(FADE.stub, FADE.bodies(thing))


def test_a_proxy_says_who_raised_and_where() -> None:
    proxy = Proxy()
    with pytest.raises(ValueError, match="invalid") as raised:
        proxy()
    assert learner_code.raised_by(proxy, raised.value)
    words = "it raised ValueError: shape '[7]' is invalid. Your line: x.view(7)"
    assert learner_code.describe_error(proxy, raised.value) == words


def test_an_error_of_a_kernel_is_the_learners() -> None:
    answer = ADD.build(KERNEL.format(body="    tl.loud(x + i)\n"))
    with pytest.raises(Exception, match="loud") as raised:
        answer(torch.ones(3), torch.ones(3))
    assert type(learner_code.root_cause(raised.value)) is AttributeError
    words = learner_code.describe_error(answer, raised.value)
    assert words.endswith("has no attribute 'loud'. Your line: tl.loud(x + i)")


# --- The text of an answer


FIRST = """
import math
import collections.abc as abc
from fractions import Fraction

SCALE = 3
UNUSED = 4
table = {"a": 1}


def helper(x):
    return x * SCALE


# doubles
double = lambda x: 2 * x
"""
ANSWER = """
from __future__ import annotations
import numpy as np
check = own = print
FACTOR = 5; OTHER = 6
first = own("99.fade", None)


# twice the helper
def inner(x):
    return double(helper(x)) + FACTOR


class Base:
    limit = FACTOR


def answer(x, *, y=FACTOR, kind=abc.Sized):
    '''One.'''
    def nested():
        return inner(math.floor(x)) + Fraction(1, 2) + np.float64(Base.limit)
    return nested()


got = answer(2)
check("99.fade", answer)
"""
EXPECTED = """from __future__ import annotations
import math
import collections.abc as abc
from fractions import Fraction
SCALE = 3


def helper(x):
    return x * SCALE
# doubles
double = lambda x: 2 * x
import numpy as np
FACTOR = 5


# twice the helper
def inner(x):
    return double(helper(x)) + FACTOR


class Base:
    limit = FACTOR


def answer(x, *, y=FACTOR, kind=abc.Sized):
    '''One.'''
    def nested():
        return inner(math.floor(x)) + Fraction(1, 2) + np.float64(Base.limit)
    return nested()
"""


def test_the_text_is_the_definition_and_what_it_uses_from_any_cell() -> None:
    space = cell(ANSWER, cell(FIRST, {"__name__": "__main__"}, 1), 2)
    source, problem = learner_code.answer_source(space["answer"], "answer")
    assert problem == ""
    assert sorted(source.split()) == sorted(EXPECTED.split())
    assert "UNUSED" not in source
    assert "check(" not in source
    again = rebuilt(source)
    assert again["answer"](2.5) == space["answer"](2.5) == 22.5


def test_a_name_of_the_exercise_is_not_copied_and_the_name_of_the_stub_is_given() -> None:
    space = cell("def fade(dt, A):\n    return dt\n", {}, 3)
    space = cell("def mine(x):\n    return fade(x, x)\n", space, 4)
    source, _ = learner_code.answer_source(space["mine"], "gate", {"fade"})
    assert source == "\n\ndef mine(x):\n    return fade(x, x)\n\n\ngate = mine\n"


@pytest.mark.parametrize("body", [GATE_OUT + GATE_STEP, "    @torch.no_grad()\n" + GATE_OUT])
def test_the_text_of_a_class_is_found_through_its_methods(body: str) -> None:
    space = cell("import torch\nfrom torch import nn\n\n" + GATE_HEAD + body, {}, 5)
    source, problem = learner_code.answer_source(space["Gate"], "Gate", GATE.provided)
    assert problem == ""
    assert (GATE_HEAD + body).strip() in source


def test_the_text_of_a_class_without_methods_is_found_too() -> None:
    first = "from dataclasses import dataclass\n\n@dataclass\nclass State:\n    n: int = 3\n\n"
    space = cell(first + "class Wrong(ValueError):\n    pass\n", {"__name__": "__main__"}, 9)
    with_module = {**space, "__name__": "__main__"}
    cell("def fade(dt, A):\n    return State(2).n, Wrong\n", with_module, 10)
    source, problem = learner_code.answer_source(with_module["fade"], "fade")
    assert problem == ""
    again = rebuilt(source)
    assert again["fade"](0, 0)[0] == 2


def test_the_text_of_a_kernel_comes_with_its_launcher() -> None:
    space = cell(ADD.solution + '\ncheck = print\ncheck("99.add", add)\n', {}, 6)
    source, problem = learner_code.answer_source(space["add"], "add", ADD.provided)
    assert problem == ""
    assert "@triton.jit\ndef add_kernel(" in source
    assert "check(" not in source


def test_what_cannot_be_written_down_is_named() -> None:
    space = cell("config = object()\n\ndef fade(dt, A):\n    return config\n", {}, 7)
    assert learner_code.answer_source(space["fade"], "fade")[1] == ""  # its statement is there
    space = cell("def fade(dt, A):\n    return config, table\n", {"config": object()}, 8)
    source, problem = learner_code.answer_source(space["fade"], "fade")
    assert (source, problem) == (
        "",
        "config, table must be defined or imported in the same cell",
    )


def test_an_answer_without_text_says_so() -> None:
    space: dict[str, Any] = {}
    exec("def fade(dt, A):\n    return dt\n", space)  # as %%time runs a cell
    for thing in (space["fade"], len, Proxy()):
        source, problem = learner_code.answer_source(thing, "fade")
        assert source == ""
        assert "is not known" in problem
