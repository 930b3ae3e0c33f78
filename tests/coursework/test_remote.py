"""A learner's function in another process behaves as it does in this one.

Verdicts are compared for all exercises: reference, stub, and mutants. So are the behaviours that a
check can see of a class: parameters, gradients, caches, errors.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron_lite.course import exercises, learner_code
from nemotron_lite.course.chapter_list import chapter_folders
from nemotron_lite.course.exercises import PRELUDE, Exercise
from nemotron_lite.coursework import make
from nemotron_lite.coursework.scoring import reference_sources
from nemotron_lite.coursework.session import Session
from tests.coursework.conftest import run

ALL = {e.id: e for chapter in make.chapters() for e in exercises.exercises(chapter)}
SAMPLED = 2  # mutants of each exercise

CELL = '''
from collections import namedtuple

import torch
from torch import nn

Pair = namedtuple("Pair", "k v")


class Cache:
    def __init__(self):
        self.kept = []

    def __len__(self):
        return len(self.kept)

    @property
    def size(self):
        return len(self.kept)


class Layer(nn.Module):
    """A layer."""

    made = 3

    def __init__(self, d, heads=2):
        super().__init__()
        self.w = nn.Linear(d, d, bias=False)
        self.scale = nn.Parameter(torch.ones(d))
        self.heads = heads

    def forward(self, x, cache=None):
        y = self.w(x) * self.scale
        if cache is not None:
            cache.kept.append(y)
            y = torch.stack(cache.kept).sum(0)
        return y

    def step(self, x, cache):
        return self.forward(x, cache), cache

    def make_cache(self):
        return Cache()

    @staticmethod
    def plus(a):
        return a + 1

    @classmethod
    def build(cls, d):
        return cls(d)

    @property
    def half(self):
        return self.heads / 2

    def pair(self, x):
        return Pair(x, 2 * x)

    def use(self, pair):
        return pair.k + pair.v, type(pair).__name__

    def bad(self, x):
        y = x + 1
        raise ValueError(f"no {x}")

    def missing(self, x):
        raise NotImplementedError

    def in_place(self, x, items, named):
        x += 1
        items.append(x)
        named["new"] = (x, len(items))
        return x

    def fill(self, buffer, y):
        buffer[:2] = y
        return buffer

    def same(self, x):
        return {"x": x, "strides": list(x.stride()), "again": [x]}

    def nothing_flows(self, x):
        return x.detach() * 2
'''


def loaded(kind: Any) -> Any:
    torch.manual_seed(1)
    layer = kind(4)
    weights = torch.Generator().manual_seed(3)
    layer.load_state_dict(
        {
            "w.weight": torch.randn(4, 4, generator=weights),
            "scale": torch.randn(4, generator=weights),
        }
    )
    return layer


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).requires_grad_()


def gradients(kind: Any) -> Any:
    layer, x = loaded(kind), inputs(3, 4)
    y = layer(x)
    y.square().sum().backward()
    return y.detach(), x.grad, {n: (p.detach(), p.grad) for n, p in layer.named_parameters()}


def gradients_of_a_graph(kind: Any) -> Any:
    """What comes before and after the layer takes part, and its input is no leaf."""
    layer, x = loaded(kind), inputs(3, 4)
    y = layer(torch.tanh(x)).sigmoid() + x
    return torch.autograd.grad((y * y).sum(), [x, *layer.parameters()])


def training(kind: Any) -> Any:
    layer, x = loaded(kind), inputs(3, 4).detach()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, dict(layer.state_dict())


def cache(kind: Any) -> Any:
    """A cache that the learner's code made is handed back, and holds tensors of earlier calls."""
    layer, x = loaded(kind), inputs(3, 4)
    kept = layer.make_cache()
    _, kept = layer.step(x, kept)
    y, again = layer.step(2 * x, kept)
    y.sum().backward()
    return kept is again, len(kept), kept.size, bool(kept), x.grad


def attributes(kind: Any) -> Any:
    layer = loaded(kind)
    before = layer.half, layer.heads, kind.made, kind.build(4).heads
    layer.heads = 5
    return before, layer.plus(3), kind.plus(4), layer.heads, type(layer).__name__


def named_tuples(kind: Any) -> Any:
    layer = loaded(kind)
    pair = layer.pair(torch.ones(2))
    k, v = pair
    return pair.k, pair.v, k, v, layer.use(pair)


def in_place(kind: Any) -> Any:
    layer = loaded(kind)
    x, items, named = torch.zeros(3, 2).T, [1], {"old": 2}
    result = layer.in_place(x, items, named)
    same = result is x, items[1] is x, named["new"][0] is x
    return x, x.stride(), same, len(items), sorted(named)


def in_place_with_gradients(kind: Any) -> Any:
    layer, y = loaded(kind), inputs(2, 4)
    filled = layer.fill(torch.zeros(4, 4), y)
    (2 * filled).sum().backward()
    middle = layer.in_place(y * 3, [], {})
    return filled.detach(), y.grad, torch.autograd.grad(middle.sum(), y)


def returned_arguments(kind: Any) -> Any:
    layer, x = loaded(kind), inputs(3, 4)
    found = layer.same(x.T)
    turned = x.T
    other = layer.same(turned)
    return found["strides"], other["x"] is turned, other["again"][0] is turned


def no_gradients(kind: Any) -> Any:
    layer, x = loaded(kind), inputs(3, 4)
    with torch.no_grad():
        quiet = layer(x)
    cut = layer.nothing_flows(x)
    return quiet.requires_grad, cut.requires_grad, layer(x).requires_grad


def dtypes(kind: Any) -> Any:
    layer = loaded(kind)
    layer.double()
    return [p.dtype for p in layer.parameters()], layer(inputs(3, 4).double()).detach()


def leaf_in_place(kind: Any) -> Any:
    with pytest.raises(RuntimeError) as caught:
        loaded(kind).in_place(inputs(2, 2), [], {})
    return str(caught.value)


BEHAVIOURS = (
    gradients, gradients_of_a_graph, training, cache, attributes, named_tuples, in_place,
    in_place_with_gradients, returned_arguments, no_gradients, dtypes, leaf_in_place,
)  # fmt: skip


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        alike = isinstance(other, Tensor) and one.dtype is other.dtype
        return alike and torch.equal(one, other)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return bool(one == other)


@pytest.fixture(scope="module")
def layer(start: Callable[..., Session]) -> tuple[Session, Any, Any]:
    """The learner's class as seen from here, and the same class in this process."""
    session = start()
    run(session, CELL, "layer")
    space: dict[str, Any] = {}
    exec(CELL, space)
    return session, session.lookup("Layer"), space["Layer"]


@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda f: f.__name__)
def test_a_class_behaves_as_it_does_here(
    layer: tuple[Session, Any, Any], behaviour: Callable[[Any], Any]
) -> None:
    session, there, here = layer
    session.begin(60)
    assert same(behaviour(here), behaviour(there))


def test_errors_have_their_type_their_text_and_the_learners_line(
    layer: tuple[Session, Any, Any],
) -> None:
    session, there, _ = layer
    session.begin(60)
    made = loaded(there)
    with pytest.raises(ValueError, match="no 7") as caught:
        made.bad(7)
    assert learner_code.raised_by(there, caught.value)
    told = learner_code.describe_error(there, caught.value)
    assert told == 'it raised ValueError: no 7. Your line: raise ValueError(f"no {x}")'
    with pytest.raises(NotImplementedError) as missing:
        made.missing(1)
    assert learner_code.raised_by(there, missing.value)
    with pytest.raises(TypeError, match="missing 1 required positional") as wrong:
        there()
    assert not learner_code.raised_by(there, wrong.value)
    with pytest.raises(RuntimeError) as inside:
        made(torch.ones(3, 5))
    assert "Your line: y = self.w(x) * self.scale" in learner_code.describe_error(
        there, inside.value
    )
    with pytest.raises(AttributeError):
        made.no_such_thing  # noqa: B018


def test_the_code_of_a_class_can_be_compared_with_its_stub(layer: tuple[Session, Any, Any]) -> None:
    _, there, here = layer
    assert learner_code.bodies_of(there, "Layer") == learner_code.bodies_of(here, "Layer")


def test_what_is_no_longer_needed_is_forgotten(layer: tuple[Session, Any, Any]) -> None:
    session, there, _ = layer
    count = "import gc, __main__\nfrom torch import nn\n"
    count += "print(sum(type(o).__name__ == 'Layer' for o in gc.get_objects()))"
    for _ in range(60):
        session.begin(60)
        loaded(there)(inputs(3, 4)).sum().backward()
    session.begin(60)
    session.reset()
    assert int(run(session, count)) < 3


def test_a_cell_gives_its_outputs_in_order(layer: tuple[Session, Any, Any]) -> None:
    session = layer[0]
    source = (
        "import sys\nfrom IPython.display import HTML, display\nprint('one')\n"
        "display(HTML('<b>two</b>'))\nprint('three', file=sys.stderr)\n4"
    )
    kinds = [
        (o["output_type"], o.get("text") or o["data"].get("text/html") or o["data"]["text/plain"])
        for o in session.run("outputs", source, 60)
    ]
    assert kinds == [
        ("stream", "one\n"), ("display_data", "<b>two</b>"), ("stream", "three\n"),
        ("execute_result", "4"),
    ]  # fmt: skip
    (error,) = session.run("broken", "x = 1\n1 / 0", 60)
    assert (error["ename"], error["traceback"]) == ("ZeroDivisionError", ["broken, line 2: 1 / 0"])
    (error,) = session.run("no python", "x = (", 60)
    assert error["ename"] == "SyntaxError"
    flood = session.run("flood", "print('x' * 10**7)\nfor i in range(1000): display(i)", 60)
    assert len(flood) <= 50
    assert len(flood[0]["text"]) <= 100_000
    with pytest.raises(NameError):
        session.lookup("nothing")
    run(session, "number = 3")
    with pytest.raises(TypeError, match="not a function or class"):
        session.lookup("number")


def sources(exercise: Exercise) -> list[tuple[str, str]]:
    """Reference, stub and some mutants."""
    folder = chapter_folders()[exercise.id[:2]].name
    mutants = importlib.import_module(f"tests.course.chapters.{folder}.mutants").MUTANTS
    found = mutants[exercise.id]
    some = random.Random(exercise.id).sample(found, min(SAMPLED, len(found)))
    return [
        ("the reference", exercise.solution),
        ("the stub", exercise.stub),
        *((mutant.name, mutant.source) for mutant in some),
    ]


@pytest.fixture(scope="module")
def process(start: Callable[..., Session]) -> Session:
    """One process for the exercises of all chapters."""
    return start([e.stub for e in ALL.values()])


@pytest.mark.parametrize("exercise", ALL.values(), ids=ALL)
def test_verdicts_are_those_of_this_process(exercise: Exercise, process: Session) -> None:
    session = process
    head = "\n".join(
        line for line in exercise.stub.splitlines() if line.startswith(("import ", "from "))
    )
    for name, source in sources(exercise):
        session.begin(120)
        session.reset()
        for needed in map(exercises.exercise, exercise.needs):
            session.define(needed.function_name, reference_sources(needed))
        run(session, f"{PRELUDE}{head}\n{source}", exercise.id)
        answer = session.lookup(exercise.function_name)
        session.begin(120)
        there = exercises.grade(exercise, answer)
        here = exercises.grade(exercise, exercise.build(source))
        verdicts = [(r.passed, r.points, r.failed, r.hint) for r in (here, there)]
        assert verdicts[0] == verdicts[1], f"{name}:\n{here.message}\n{there.message}"
