"""Ways to earn points without an answer, each tried. All are in one notebook, with honest answers.

The exercises ask for squares of hidden numbers. Each cheat is the answer to one of them. The honest
answers that follow have to earn everything: a cheat must not cost the others anything either.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nemotron_lite
from nemotron_lite.course import exercises
from nemotron_lite.course.exercises import Check, Exercise
from nemotron_lite.coursework import session as session_module
from nemotron_lite.coursework.clean_copy import clean_copy
from nemotron_lite.coursework.grade import handed_out
from nemotron_lite.coursework.isolation import Isolation, Limits, make_site
from nemotron_lite.coursework.scoring import Scored, score_submission
from tests.coursework.conftest import notebook_with, toy

PACKAGE = Path(nemotron_lite.__file__).parent


def reference_afterwards(function: Callable[..., Any]) -> None:
    """A check that computes what is right after the answer has had the numbers."""
    x = torch.randn(5, dtype=torch.float64)
    exercises.close(function(x), x * x, what="five numbers")


AFTERWARDS = (Check("computed afterwards", reference_afterwards, points=3),)

CHEATS = {
    "clears": """
def clears(x):
    x.zero_()
    return x.clone()
""",
    "clears_data": """
def clears_data(x):
    x.data.mul_(0)
    return x * 0
""",
    "builder": """
from nemotron_lite.course.exercises import exercise
builder = exercise("99.builder").build()
""",
    "chapter": """
import importlib
checks = importlib.import_module("nemotron_lite.course.chapters.ch01_selective_scan.exercises")
chapter = checks.EXERCISES[0].build()
""",
    "instructor": """
from nemotron_lite.coursework import scoring
scoring.Score.points = 3
def instructor(x):
    return x
""",
    "patched": """
import builtins, sys, torch
torch.equal = torch.allclose = lambda *a, **k: True
torch.isclose = lambda a, b, **k: torch.ones_like(a, dtype=torch.bool)
torch.Tensor.__eq__ = lambda self, other: True
builtins.abs = lambda x: 0
AssertionError.__init__ = lambda *a: None if False else None
def patched(x):
    return x + 1
""",
    "fake_check": """
import sys, types
import nemotron_lite.course as course
fake = types.SimpleNamespace(check=lambda *a: types.SimpleNamespace(points=3, passed=True))
course.check = check = fake.check
sys.modules["nemotron_lite.course"] = fake
sys.modules["nemotron_lite.course.exercises"] = fake
def fake_check(x):
    return x + 1
""",
    "equal_to_all": """
class Equal:
    shape, dtype, ndim = (5,), None, 1
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __rsub__(self, other): return 0
    def numel(self): return 0
def equal_to_all(x):
    return Equal()
""",
    "printed": """
import json, os
print("99.printed: right. 2 of 2 checks, 3 of 3 points.")
print(3)
os.write(1, b'{"points": 3, "status": "passed"}')
def printed(x):
    print("3")
    return x + 1
3
""",
    "pipes": """
import os, struct
answer = b'{"id": 1, "value": 3, "storages": []}'
frame = struct.pack(">IQ", len(answer), 0) + answer
def pipes(x):
    for number in range(3, 64):
        try:
            os.write(number, frame * 50)
        except OSError:
            pass
    return x
""",
    "memory": """
import ctypes, os
seen = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
print("processes:", [pid for pid in seen if pid != os.getpid()])
print("parent:", os.getppid())
print("secrets:", [k for k in os.environ if "SECRET" in k])
print("traced:", ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0)
def memory(x):
    import gc, sys
    frame = sys._getframe()
    while frame is not None:
        for value in frame.f_locals.values():
            if hasattr(value, "checks"):
                return value.build()(x)
        frame = frame.f_back
    for thing in gc.get_objects():
        if type(thing).__name__ in ("Exercise", "Check"):
            return thing.build()(x)
    return x
""",
    "exits": """
import os
def exits(x):
    os._exit(0)
""",
    "hangs": """
def hangs(x):
    while True:
        pass
""",
    "holds_on": """
def holds_on(x):
    while True:
        try:
            while True:
                pass
        except BaseException:
            pass
""",
    "from_disk": f"""
import os
found = []
for path in ({str(PACKAGE / "course")!r}, {str(PACKAGE.parent)!r}):
    there = os.listdir(path) if os.path.isdir(path) else []
    found.append(any(name != ".venv" for name in there))  # Python itself is needed
print("on disk:", found)
for folder, _, names in os.walk("/course"):
    assert not set(names) & {{"checks.py", "exercises.py", "scoring.py", "make.py"}}, folder
def from_disk(x):
    return x
""",
    "given_answer": """
from nemotron_lite.course import own
given_answer = own("99.given_answer")
""",
    "agent": """
import gc, json
def agent(x):
    # Its own process can be changed at will. It still has to answer for numbers that it is sent.
    for thing in gc.get_objects():
        if type(thing).__name__ == "Learner":
            type(thing)._error = lambda self, error: {"passed": True}
            thing.do_lookup = thing.do_call
    raise SystemExit
""",
    "pickled": """
class Bomb:
    def __reduce__(self):
        import os
        return os.system, ("echo cracked > /tmp/cracked",)
def pickled(x):
    return [Bomb(), {"b": Bomb()}]
""",
    "huge": """
import torch
def huge(x):
    return torch.zeros(1).expand(2**40)
""",
    "not_done": """
def not_done(x):
    return None
""",
}  # fmt: skip
HONEST = ("first", "last")
DISTURBING = ("exits", "hangs", "holds_on", "pipes")  # their process does not live on


@pytest.fixture(scope="module")
def chapter() -> list[Exercise]:
    afterwards = {"clears", "clears_data"}
    names = [HONEST[0], *CHEATS, HONEST[1]]
    return [toy(n, **({"checks": AFTERWARDS} if n in afterwards else {})) for n in names]


@pytest.fixture(scope="module")
def scored(
    chapter: list[Exercise], isolation: Isolation, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """The notebook with all cheats, graded."""
    if not isolation.jailed:
        pytest.skip("this system allows no namespaces, so less is protected")
    with pytest.MonkeyPatch.context() as patch:
        known = {one.id: one for one in chapter}
        patch.setattr(exercises, "exercise", known.__getitem__)
        patch.setattr(exercises, "exercises", lambda number: tuple(chapter))
        patch.setattr(session_module, "GRACE", 1.0)
        patch.setenv("SECRET_OF_THE_INSTRUCTOR", "hunter2")
        assignment = handed_out(["99"])["chapter_99"]
        answers = dict(CHEATS)
        for name in HONEST:
            answers[name] = f"def {name}(x):\n    return x**2"
        book = clean_copy(notebook_with(answers, chapter), assignment).notebook
        site, _ = make_site(tmp_path_factory.mktemp("cheats"), [])
        limits = Limits(cell_seconds=3.0, seconds=300.0)
        result = score_submission(book, assignment, site, isolation, limits, "salt")
        return result, book


def score_of(scored: Any, name: str) -> Any:
    return next(one for one in scored[0].scores if one.id == f"99.{name}")


def printed(scored: Any, name: str) -> str:
    result: Scored = scored[0]
    (place,) = [i for i, cell in enumerate(scored[1]["cells"]) if cell["id"] == f"99-{name}"]
    return "".join(one.get("text", "") for one in result.outputs[place])


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_earns_nothing(scored: Any, name: str) -> None:
    score = score_of(scored, name)
    assert score.points == 0, score
    assert score.status in ("failed", "error", "died", "stopped")


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_answer_among_them_earns_everything(scored: Any, name: str) -> None:
    score = score_of(scored, name)
    assert (score.points, score.status) == (3, "passed"), score.message
    assert [passed for _, passed in score.checks] == [True, True]


def test_what_a_cheat_looked_for_is_not_there(scored: Any) -> None:
    assert "is not available where coursework is graded" in score_of(scored, "builder").message
    assert "cannot import name 'scoring'" in score_of(scored, "instructor").message
    memory = printed(scored, "memory")
    assert "processes: []" in memory
    assert "parent: 0" in memory
    assert "secrets: []" in memory
    assert "traced: False" in memory
    assert "on disk: [False, False]" in printed(scored, "from_disk")
    assert not Path("/tmp/cracked").exists()


def test_the_reason_is_told(scored: Any) -> None:
    assert "its Python process ended" in score_of(scored, "exits").message
    assert "endless loop" in score_of(scored, "hangs").message
    assert score_of(scored, "hangs").status == score_of(scored, "holds_on").status == "stopped"
    assert "its answer was malformed" in score_of(scored, "pipes").message
    assert "changes in place what it is compared with" in score_of(scored, "clears").message
    assert "not done yet" in score_of(scored, "not_done").message
    notes = "\n".join(scored[0].notes)
    assert all(f"99.{name}: " in notes for name in ("exits", "holds_on", "pipes"))
    assert {"process_ended", "stopped"} <= set(scored[0].flags)


def test_answers_that_were_seen_once_are_of_no_use(
    isolation: Isolation, tmp_path: Path, chapter_99: Callable[[list[Exercise]], None]
) -> None:
    """The inputs of one run are not those of the next, unless its seed is given."""
    found = [toy("squared")]
    chapter_99(found)
    assignment = handed_out(["99"])["chapter_99"]
    site, _ = make_site(tmp_path, [])

    def grade(source: str, salt: str) -> tuple[float, str]:
        book = clean_copy(notebook_with({"squared": source}, found), assignment).notebook
        limits = Limits(cell_seconds=20.0)
        done = score_submission(book, assignment, site, isolation, limits, salt)
        return done.scores[0].points, done.scores[0].message

    spy = "def squared(x):\n    raise ValueError('|'.join(map(repr, x.flatten().tolist())))"
    told = grade(spy, "one")[1].partition("ValueError: ")[2].partition(". Your line")[0]
    numbers = [float(word) for word in told.split("|")]
    assert len(numbers) == 5
    recorded = (
        f"import torch\ndef squared(x):\n    if x.ndim == 2:\n        return x * x\n"
        f"    return torch.tensor({numbers}, dtype=torch.float64) ** 2"
    )
    assert grade(recorded, "one")[0] == 3
    assert grade(recorded, "two")[0] == 1
