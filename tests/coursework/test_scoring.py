"""One notebook from cells to scores: what an exercise needs, what breaks, what goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite.course import exercises
from nemotron_lite.course.exercises import Check, Exercise
from nemotron_lite.coursework.clean_copy import clean_copy
from nemotron_lite.coursework.grade import handed_out
from nemotron_lite.coursework.isolation import Isolation, Limits, make_site
from nemotron_lite.coursework.scoring import Scored, copied, reference_sources, score_submission
from tests.coursework.conftest import notebook_with, toy


def fourth_powers(function: Callable[..., Any]) -> None:
    x = torch.randn(4, dtype=torch.float64)
    exercises.close(function(x), x**4, what="fourth powers")


def layer_works(kind: Any) -> None:
    x = torch.randn(4, dtype=torch.float64)
    exercises.close(kind(2.0).forward(x), 2 * x * x, what="the layer")


def writes(function: Callable[..., Any]) -> None:
    x = torch.randn(4, dtype=torch.float64)
    expected = x + 1
    function(x)
    exercises.close(x, expected, what="the argument after the call")


LAYER = "class Scaled(Base):\n    def forward(self, x):\n        {}"
CHAPTER = [
    toy("square"),
    toy("power", needs=("99.square",), checks=(Check("powers", fourth_powers, points=3),),
        solution="def power(x):\n    return square(square(x))"),
    toy("Base", id="99.base", needs=("99.square",), checks=(Check("layer", layer_works, points=3),),
        stub="class Base:\n    def __init__(self, c):\n        self.c = c\n\n"
        "    def forward(self, x):\n        raise NotImplementedError",
        solution="class Base:\n    def __init__(self, c):\n        self.c = c\n\n"
        "    def forward(self, x):\n        return self.c * square(x)"),
    toy("Scaled", id="99.scaled", needs=("99.base",),
        checks=(Check("layer", layer_works, points=3),),
        stub=LAYER.format("raise NotImplementedError"),
        solution=LAYER.format("return super().forward(x)")),
    toy("plus_one", kind="optional", checks=(Check("in place", writes, points=3),),
        stub="def plus_one(x):\n    raise NotImplementedError",
        solution="def plus_one(x):\n    x += 1"),
    toy("far", kind="stretch", needs=("98.other",),
        checks=(Check("powers", fourth_powers, points=3),),
        solution="def far(x):\n    return other(x) ** 2"),
]  # fmt: skip


@pytest.fixture
def score(
    isolation: Isolation, tmp_path: Path, chapter_99: Callable[[list[Exercise]], None]
) -> Callable[..., Scored]:
    chapter_99([*CHAPTER, toy("other", id="98.other")])
    site, _ = make_site(tmp_path, [])

    def run(answers: dict[str, str], **limits: Any) -> Scored:
        assignment = handed_out(["99"])["chapter_99"]
        book = clean_copy(notebook_with(answers, CHAPTER), assignment).notebook
        allowed = Limits(**{"cell_seconds": 20, **limits})
        return score_submission(book, assignment, site, isolation, allowed, "salt")

    return run


def results(scored: Scored) -> dict[str, tuple[float, str]]:
    return {one.id.removeprefix("99."): (one.points, one.status) for one in scored.scores}


RIGHT = {one.function_name: one.solution for one in CHAPTER}


def test_references_earn_everything(score: Callable[..., Scored]) -> None:
    scored = score(RIGHT)
    assert set(results(scored).values()) == {(3.0, "passed")}, scored.scores
    assert {one.kind for one in scored.scores} == {"must", "optional", "stretch"}
    assert scored.facts["memory_limited"] in (True, False)


def test_a_wrong_answer_does_not_cost_those_that_need_it(score: Callable[..., Scored]) -> None:
    """A class that was built on a wrong one is built again, on the package's."""
    wrong = {
        **RIGHT,
        "square": "def square(x):\n    return x * x * x",
        "Base": CHAPTER[2].solution.replace("square(x)", "x"),
    }
    scored = score(wrong)
    found = results(scored)
    assert found["square"] == found["base"] == (0.0, "failed")
    assert found["power"] == found["scaled"] == (3.0, "passed")
    messages = {one.id: one.message for one in scored.scores}
    assert messages["99.power"].endswith("Graded with the package's square.")
    assert messages["99.scaled"].endswith("Graded with the package's square and Base.")
    assert "package's" not in messages["99.far"]


def test_what_is_needed_indirectly_is_replaced_too(score: Callable[..., Scored]) -> None:
    """`Scaled` needs `Base`, which passes, but calls a `square` that does not."""
    scored = score({**RIGHT, "square": "def square(x):\n    return x * x * x"})
    assert results(scored)["base"] == results(scored)["scaled"] == (3.0, "passed")
    messages = {one.id: one.message for one in scored.scores}
    assert messages["99.scaled"].endswith("Graded with the package's square.")


def test_the_learners_own_function_is_used_if_it_passes(score: Callable[..., Scored]) -> None:
    own = "calls = []\ndef square(x):\n    calls.append(1)\n    return x * x"
    needs = "def power(x):\n    assert calls is not None and square.__globals__ is globals()\n"
    scored = score({**RIGHT, "square": own, "power": needs + "    return square(square(x))"})
    assert results(scored)["power"] == (3.0, "passed")


def test_what_breaks_is_told_and_the_rest_is_graded(score: Callable[..., Scored]) -> None:
    broken = {
        **RIGHT,
        "square": "import os\nos._exit(3)",
        "power": "def power(x:",
        "Base": "def base_is_missing():\n    pass",
        "Scaled": LAYER.format("raise NotImplementedError"),
        "plus_one": "import time\ndef plus_one(x):\n    time.sleep(600)",
    }
    scored = score(broken, cell_seconds=3)
    found = results(scored)
    messages = {one.id.removeprefix("99."): one.message for one in scored.scores}
    assert found["square"] == (0.0, "error")
    assert "its cell ended in Stopped: its Python process ended" in messages["square"]
    assert "its cell ended in SyntaxError" in messages["power"]
    assert "was it renamed, or its cell deleted?" in messages["base"]
    assert "not done yet" in messages["scaled"]
    assert found["plus_one"] == (0.0, "stopped")
    assert found["far"] == (3.0, "passed")
    assert scored.flags == ["process_ended"]
    assert any(note.startswith("99-square: its Python process ended") for note in scored.notes)


def test_when_the_whole_time_is_over_the_rest_is_not_graded(score: Callable[..., Scored]) -> None:
    scored = score({**RIGHT, "square": "import time\ntime.sleep(600)"}, seconds=0.5)
    assert {status for _, status in results(scored).values()} == {"stopped"}


def test_references_come_with_what_they_need(chapter_99: Any) -> None:
    chapter_99([*CHAPTER])
    space: dict[str, Any] = {}
    for source in reference_sources(CHAPTER[3]):
        exec(source, space)
    assert space["Scaled"](2.0).forward(3) == 18


def test_copies_keep_gradients_and_leave_the_originals() -> None:
    x = torch.ones(2, requires_grad=True)
    value = {"a": [x, (x, 3)]}
    made = copied(value)
    made["a"][0].data.zero_()
    assert x.sum() == 2
    made["a"][1][0].sum().backward()
    assert torch.equal(x.grad, torch.ones(2))
