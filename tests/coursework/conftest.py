"""What tests of the coursework share: nbgrader's release, a learner's process, toy exercises.

nbgrader takes seconds to start, and so does a process that imports torch. Each is made once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite.course import exercises
from nemotron_lite.course.exercises import Check, Exercise
from nemotron_lite.coursework import isolation as isolation_module
from nemotron_lite.coursework import make
from nemotron_lite.coursework.isolation import Isolation, LearnerProcess, make_site
from nemotron_lite.coursework.session import Session


@dataclass(frozen=True)
class Fresh:
    """A course folder with source/, release/ and gradebook.db, and the notebooks' texts by path."""

    root: Path
    texts: dict[str, str]


@pytest.fixture(scope="session")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Fresh:
    root = tmp_path_factory.mktemp("course")
    return Fresh(root, make.generate(root))


@pytest.fixture(scope="session")
def isolation() -> Isolation:
    """The strongest isolation of this machine."""
    return isolation_module.find_isolation()


@pytest.fixture(scope="module")
def start(
    isolation: Isolation, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Session]]:
    """Starts learners' processes, and ends them after the tests of a file."""
    running = []

    def begin(cells: list[str] | None = None, of: Isolation = isolation) -> Session:
        site, _ = make_site(tmp_path_factory.mktemp("learner"), cells or [])
        process = LearnerProcess(of, site, 4.0)
        running.append(process)
        session = Session(process.channel, b"secret")
        session.hello(120)
        return session

    yield begin
    for process in running:
        process.stop()


def run(session: Session, source: str, name: str = "cell") -> str:
    """Execute a cell and return what it printed; fails if it raised."""
    outputs = session.run(name, source, 60)
    assert not [one for one in outputs if one["output_type"] == "error"], outputs
    return "".join(one.get("text", "") for one in outputs)


def squares(function: Callable[..., Any]) -> None:
    x = torch.randn(5, dtype=torch.float64)
    exercises.close(function(x), x * x, what="the squares of five numbers")


def shape(function: Callable[..., Any]) -> None:
    x = torch.randn(3, 4, dtype=torch.float64).T
    exercises.close(function(x), x * x, what="a matrix with strides")


def toy(name: str, **more: Any) -> Exercise:
    """An exercise that asks for squares; `name` is that of its function."""
    described = {
        "id": f"99.{name}", "title": name, "objective": "O1: square.", "minutes": 1,
        "difficulty": 1, "points": 3, "task": "Square $x$.", "hints": ("a", "b", "c"),
        "stub": f'def {name}(x):\n    """Squares of x."""\n    raise NotImplementedError',
        "solution": f"def {name}(x):\n    return x * x",
        "checks": (Check("five numbers", squares, points=2), Check("strides", shape, hint=2)),
    }  # fmt: skip
    return Exercise(**{**described, **more})


@pytest.fixture
def chapter_99(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[Exercise]], None]:
    """Makes some exercises those of a chapter 99."""

    def put(found: list[Exercise]) -> None:
        known = {one.id: one for one in found}
        real = exercises.exercise, exercises.exercises
        monkeypatch.setattr(exercises, "exercise", lambda i: known.get(i) or real[0](i))
        monkeypatch.setattr(
            exercises, "exercises", lambda c: tuple(found) if c == "99" else real[1](c)
        )

    return put


def notebook_with(answers: dict[str, str], found: list[Exercise]) -> dict[str, Any]:
    """The coursework of chapter 99 with answers in it, by function; the others stay stubs."""
    book = make.release_notebook("99", found)
    names = {one.id.replace(".", "-"): one.function_name for one in found}
    for cell in book["cells"]:
        if names.get(cell["id"]) in answers:
            cell["source"] = answers[names[cell["id"]]]
    return book
