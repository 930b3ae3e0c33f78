"""`own`: the answer of the learner where it passes, else the package's; it says which."""

from __future__ import annotations

import linecache
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite.course import Check, check, own, own_answers, progress_store
from nemotron_lite.course.exercises import PRELUDE, ExerciseError, grade
from tests.course.conftest import Shown
from tests.course.sample_exercises import (
    ADD,
    CHAPTER,
    FADE,
    GATE,
    GATE_HEAD,
    GATE_OUT,
    GATE_STEP,
    STUB,
    forget,
    use,
)

MINE = "def fade(dt, A):\n    return (dt * A).exp()\n"
WRONG = "def fade(dt, A):\n    return 1 + dt * A\n"


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    use(monkeypatch)
    yield
    forget()


@pytest.fixture
def course(tmp_path: Path) -> Path:
    folder = tmp_path / ".course"
    folder.mkdir()
    return folder


class Notebook:
    """Cells that run one after another, with their text in linecache as IPython keeps it."""

    count = 0

    def __init__(self) -> None:
        self.space: dict[str, Any] = {"__name__": "__main__"}
        self.run(PRELUDE)

    def run(self, source: str, name: str = "") -> Any:
        Notebook.count += 1
        file = f"/tmp/ipykernel_1/{Notebook.count}.py"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        exec(compile(source, file, "exec", dont_inherit=True), self.space)
        return self.space.get(name)


def test_an_untouched_stub_gives_the_packages_answer(shown: Callable[..., Shown]) -> None:
    stub = Notebook().run(STUB, "fade")
    seen = shown(own, "99.fade", stub)
    assert seen.plain == "99.fade: the package's function runs, because yours is not done yet."
    assert grade(FADE, seen.result).passed
    again = shown(own, "99.fade", seen.result)  # the cell is run again: fade is the package's now
    assert (again.plain, again.result) == (seen.plain, seen.result)


def test_a_wrong_answer_gives_the_packages(shown: Callable[..., Shown]) -> None:
    seen = shown(own, "99.fade", Notebook().run(WRONG, "fade"))
    assert seen.plain == "99.fade: the package's function runs, because yours does not pass yet."
    assert grade(FADE, seen.result).passed


def test_a_right_answer_is_returned_itself(shown: Callable[..., Shown]) -> None:
    mine = Notebook().run(MINE, "fade")
    seen = shown(own, "99.fade", mine)
    assert seen.result is mine
    assert seen.plain == "99.fade: your function runs."
    assert shown(own, "99.fade").result is mine


def test_an_object_that_passed_is_not_graded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Notebook().run(MINE, "fade")
    check("99.fade", mine)
    monkeypatch.setattr(own_answers, "grade", None)  # a call would raise
    assert own("99.fade", mine) is mine


def test_another_object_of_the_same_name_is_graded(shown: Callable[..., Shown]) -> None:
    notebook = Notebook()
    first = notebook.run(MINE, "fade")
    own("99.fade", first)
    seen = shown(own, "99.fade", notebook.run(WRONG, "fade"))
    assert seen.plain == "99.fade: your earlier function runs, because this one does not pass yet."
    assert seen.result is first
    assert shown(own, "99.fade").plain == "99.fade: your function runs."


def test_nothing_done_at_all(shown: Callable[..., Shown]) -> None:
    seen = shown(own, "99.gate")
    assert seen.plain == "99.gate: the package's class runs, because there is none of yours yet."


def test_an_answer_comes_back_after_a_restart(course: Path, shown: Callable[..., Shown]) -> None:
    notebook = Notebook()
    mine = notebook.run(
        "import math\n\ndef inner(x):\n    return x.mul(math.e ** 0).exp()\n\n"
        'def fade(dt, A):\n    return inner(dt * A)\n\ncheck = print\ncheck("99.fade", fade)\n',
        "fade",
    )
    own("99.fade", mine)
    stored = (course / "answers" / "99.fade.py").read_text()
    assert "def inner" in stored
    assert "check(" not in stored
    forget()
    seen = shown(own, "99.fade")
    assert seen.plain == "99.fade: your function of an earlier session runs."
    assert grade(FADE, seen.result).passed
    assert seen.result.__code__.co_names == mine.__code__.co_names
    seen = shown(own, "99.fade", Notebook().run(STUB, "fade"))
    assert seen.plain == "99.fade: your earlier function runs, because this one is not done yet."
    assert "inner" in seen.result.__code__.co_names


def test_without_a_folder_nothing_is_written_and_a_restart_forgets(
    tmp_path: Path, shown: Callable[..., Shown]
) -> None:
    own("99.fade", Notebook().run(MINE, "fade"))
    assert list(tmp_path.iterdir()) == []
    forget()
    assert "the package's function runs" in shown(own, "99.fade").plain


STORED = {
    "it fails today": (WRONG, "your stored answer does not pass its checks today"),
    "no Python": ("def fade(:\n", "your stored answer cannot be run (SyntaxError)"),
    "empty": ("", "your stored answer cannot be run (KeyError)"),
    "raises": ("1 / 0\n", "your stored answer cannot be run (ZeroDivisionError)"),
    "no module": (
        "import nothing_here\n",
        "your stored answer cannot be run (ModuleNotFoundError)",
    ),
    "not a function": ("fade = 3\n", "your stored answer cannot be run (TypeError)"),
    "a stub": (STUB, "your stored answer does not pass its checks today"),
    "ends Python": ("raise SystemExit\n", "your stored answer cannot be run (SystemExit)"),
}


@pytest.mark.parametrize("name", STORED)
def test_a_stored_answer_that_cannot_be_used_is_replaced_and_named(
    name: str, course: Path, shown: Callable[..., Shown]
) -> None:
    source, words = STORED[name]
    (course / "answers").mkdir()
    (course / "answers" / "99.fade.py").write_text(source)
    seen = shown(own, "99.fade")
    assert seen.plain == f"99.fade: the package's function runs, because {words}."
    assert grade(FADE, seen.result).passed


def test_an_answer_that_cannot_be_stored_says_so(course: Path, shown: Callable[..., Shown]) -> None:
    notebook = Notebook()
    notebook.space["scale"] = object()
    mine = notebook.run("def fade(dt, A):\n    scale\n    return (dt * A).exp()\n", "fade")
    words = "Later chapters cannot use your answer: scale must be defined or imported in the"
    assert words in shown(check, "99.fade", mine).plain
    assert not (course / "answers").exists()
    again = notebook.run("def fade(dt, A):\n    return scale and (dt * A).exp()\n", "fade")
    seen = shown(own, "99.fade", again)
    assert seen.plain.startswith(f"99.fade: your function runs. {words}")
    notebook.run(MINE, "fade")
    assert shown(own, "99.fade", notebook.space["fade"]).plain == "99.fade: your function runs."


def test_an_answer_whose_source_alone_does_not_work_leaves_the_earlier_one(
    course: Path, shown: Callable[..., Shown]
) -> None:
    notebook = Notebook()
    check("99.fade", notebook.run(MINE, "fade"))
    kept = (course / "answers" / "99.fade.py").read_text()
    cell = "SIGNS = []\nSIGNS.append(1)\n\ndef fade(dt, A):\n    return (SIGNS[0] * dt * A).exp()\n"
    words = "built again from its source alone, it does not pass its checks today"
    assert words in shown(check, "99.fade", notebook.run(cell, "fade")).plain
    assert (course / "answers" / "99.fade.py").read_text() == kept


def test_the_packages_class_is_built_with_the_learners_function() -> None:
    calls: list[int] = []
    notebook = Notebook()
    notebook.space["calls"] = calls
    mine = notebook.run(
        "def fade(dt, A):\n    calls.append(1)\n    return torch.exp(dt * A)\n", "fade"
    )
    own("99.fade", mine)
    Gate = own("99.gate")
    calls.clear()
    Gate(2.0).step()
    assert calls == [1]


def test_the_packages_class_falls_back_to_the_packages_function(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A part that passes its own checks, and still does not work in the whole."""
    easy = replace(FADE, points=1, checks=(Check("can be called", lambda fade: None),))
    use(monkeypatch, (easy, GATE, ADD))
    own("99.fade", Notebook().run(WRONG, "fade"))
    Gate = own("99.gate")
    assert grade(GATE, Gate).passed
    gate = Gate(2.0)
    gate.step()
    assert float(gate.gain) == pytest.approx(2 * float(torch.tensor(-2.0).exp()))


def test_the_learners_class_runs_with_the_learners_function_after_a_restart(course: Path) -> None:
    notebook = Notebook()
    notebook.space["own"] = own
    notebook.run(MINE + '\nfade = own("99.fade", fade)\n')
    Gate = notebook.run(GATE_HEAD + GATE_OUT + GATE_STEP, "Gate")
    assert own("99.gate", Gate) is Gate
    assert "def fade" not in (course / "answers" / "99.gate.py").read_text()
    forget()
    Gate = own("99.gate")
    assert Gate.step.__globals__["fade"].__code__.co_names == ("exp",)


def test_a_class_of_which_one_method_is_missing_gets_a_list(shown: Callable[..., Shown]) -> None:
    half = GATE_HEAD + GATE_OUT + "    def step(self):\n        raise NotImplementedError\n"
    seen = shown(check, "99.gate", Notebook().run(half, "Gate"))
    assert seen.plain == (
        "99.gate: not right yet. 1 of 2 checks, 1 of 2 points.\n"
        "  ✓ out\n  ✗ step\n"
        "step: Gate.step is not written yet.\n"
        'Read hint("99.gate", 2) next.'
    )
    seen = shown(own, "99.gate", Notebook().run(half, "Gate"))
    assert seen.plain == "99.gate: the package's class runs, because yours does not pass yet."


def test_a_kernel_comes_back_after_a_restart(course: Path, shown: Callable[..., Shown]) -> None:
    notebook = Notebook()
    stub = notebook.run(ADD.stub, "add")
    assert "not done yet" in shown(check, "99.add", stub).plain
    own("99.add", notebook.run(ADD.solution, "add"))
    forget()
    seen = shown(own, "99.add")
    assert seen.plain == "99.add: your function of an earlier session runs."
    assert torch.equal(seen.result(torch.ones(5), torch.ones(5)), torch.full((5,), 2.0))


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(TypeError, match="pass fade itself"):
        own("99.fade", 3)
    with pytest.raises(ExerciseError, match="There is no exercise"):
        own("99.gates")


def test_the_generators_of_the_notebook_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2).tolist()
    torch.manual_seed(3)
    for found in CHAPTER:
        own(found.id)
    assert torch.rand(2).tolist() == expected
    assert progress_store.get("checks/99.fade") is None
