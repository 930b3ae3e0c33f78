"""The committed coursework is made from the exercises, and a learner's copy has no solution."""

from __future__ import annotations

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemotron_lite.course import exercises
from nemotron_lite.course.exercises import Check, Exercise
from nemotron_lite.coursework import make
from nemotron_lite.coursework.make import BEGIN, END, CourseworkError
from tests.coursework.conftest import Fresh, toy

ALL = {e.id: e for chapter in make.chapters() for e in exercises.exercises(chapter)}
every_exercise = pytest.mark.parametrize("exercise", ALL.values(), ids=ALL)
uses_nbgrader = pytest.mark.xdist_group("nbgrader")


def example(stub: str, solution: str) -> Exercise:
    """An exercise of which only stub and solution matter."""
    return Exercise(
        id="99.twice",
        title="Twice",
        objective="O1: double.",
        minutes=1,
        difficulty=1,
        points=1,
        task="Double it.",
        stub=stub,
        solution=solution,
        hints=("a", "b", "c"),
        checks=(Check("anything", lambda function: None),),
    )


STUB = 'def twice(x):\n    """Double x."""\n    raise NotImplementedError\n'


def code(notebook: dict[str, Any], name: str) -> str:
    """The source of the code cell with that id."""
    (cell,) = [c for c in notebook["cells"] if c["id"] == name]
    assert cell["cell_type"] == "code"
    return "".join(cell["source"])


@uses_nbgrader
def test_the_committed_notebooks_are_a_fresh_generation_byte_for_byte(fresh: Fresh) -> None:
    assert len(fresh.texts) == 2 * len(make.chapters()) > 0
    problems = make.differences(fresh.texts, make.exercises_folder())
    assert not problems, f"{problems}; run `python -m nemotron_lite.coursework.make` and commit"


@uses_nbgrader
@every_exercise
def test_what_is_handed_out_is_the_stub_of_the_chapter(fresh: Fresh, exercise: Exercise) -> None:
    chapter, name = f"chapter_{exercise.id[:2]}", exercise.id.replace(".", "-")
    released = json.loads(fresh.texts[f"release/{chapter}/{chapter}.ipynb"])
    assert code(released, name) == exercise.stub.strip()
    source = json.loads(fresh.texts[f"source/{chapter}/{chapter}.ipynb"])
    assert BEGIN in code(source, name)


@uses_nbgrader
def test_no_line_of_a_solution_is_handed_out(fresh: Fresh) -> None:
    released = "".join(text for name, text in fresh.texts.items() if name.startswith("release/"))
    assert "SOLUTION" not in released
    bodies = [make.answer_cell(e).partition(BEGIN)[2].partition(END)[0] for e in ALL.values()]
    lines = {
        line.strip() for body in bodies for line in body.splitlines() if len(line.strip()) > 30
    }
    assert lines
    assert [line for line in sorted(lines) if json.dumps(line)[1:-1] in released] == []


@every_exercise
def test_the_answer_in_the_source_earns_everything(exercise: Exercise) -> None:
    result = exercises.grade(exercise, exercise.build(make.answer_cell(exercise)))
    assert (result.passed, result.points) == (True, exercise.points), result.message


@pytest.mark.parametrize("chapter", make.chapters())
def test_the_source_is_a_function_of_the_exercises(chapter: str) -> None:
    found = exercises.exercises(chapter)
    one, two = (make.source_notebook(chapter, found) for _ in range(2))
    assert make.notebook_text(one) == make.notebook_text(two)
    ids = [cell["id"] for cell in one["cells"]]
    assert len(set(ids)) == len(ids) == 2 + 3 * len(found) + sum(bool(e.needs) for e in found)
    assert all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    graded = [c["metadata"]["nbgrader"] for c in one["cells"] if "nbgrader" in c["metadata"]]
    assert sum(g.get("points", 0) for g in graded) == sum(e.points for e in found)


def test_a_test_cell_grades_the_learners_function_for_points() -> None:
    exercise = example(STUB, "def twice(x):\n    return 2 * x\n")
    tree = ast.parse(make.test_cell(exercise))
    assert ast.unparse(tree.body[-1]) == "check('99.twice', twice).points"


def test_the_solution_takes_the_place_of_the_stubs_last_statement() -> None:
    solution = (
        'def twice(x):\n    """Other words."""\n    # Add, do not multiply.\n    return x + x\n'
    )
    assert make.answer_cell(example(STUB, solution)) == (
        'def twice(x):\n    """Double x."""\n'
        f"    {BEGIN}\n    # Add, do not multiply.\n    return x + x\n    {END}"
    )


def test_what_the_solution_needs_beside_its_function_moves_inside() -> None:
    stub = "import math\n\n\n" + STUB
    solution = (
        "import math\nfrom operator import add\n\n\ndef both(x):\n    return add(x, x)\n\n\n"
        "def twice(x):\n    return both(x) * math.gcd(1, 2)\n"
    )
    exercise = example(stub, solution)
    cell = make.answer_cell(exercise)
    assert cell.startswith(stub.partition("    raise")[0])
    assert cell.count("import math") == 1
    assert exercise.build(cell)(4) == 8


CLASS_STUB = '''
from torch import nn


class Layer(nn.Module):
    """A layer."""

    def __init__(self, d):
        """Its weight."""
        super().__init__()
        self.d = d
        raise NotImplementedError

    def given(self, x):
        return x + self.d

    def forward(self, x):
        """Twice the sum."""
        raise NotImplementedError
'''.strip()

CLASS_SOLUTION = """
import math

from torch import nn


def helper(x):
    return 2 * x


class Layer(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.d = d
        # a weight
        self.w = nn.Linear(d, d)

    def given(self, x):
        return x + self.d

    def forward(self, x):
        # doubled
        return self.more(helper(self.given(x))) * math.gcd(1, 2)

    # further down
    @staticmethod
    def more(x):
        return x
""".strip()


def test_each_method_of_a_class_has_its_region() -> None:
    exercise = example(CLASS_STUB, CLASS_SOLUTION)
    cell = make.answer_cell(exercise)
    assert cell.count(BEGIN) == cell.count(END) == 2
    assert cell.count("super().__init__()") == cell.count("self.d = d") == 1
    assert (
        f"        {BEGIN}\n        # a weight\n        self.w = nn.Linear(d, d)\n        {END}"
        in cell
    )
    assert exercise.build(cell)(3).forward(1) == 8
    cleared = re.sub(f"{BEGIN}.*?{END}", "raise NotImplementedError", cell, flags=re.S)
    assert cleared == CLASS_STUB


def test_a_given_wrapper_stays_as_it_is() -> None:
    stub = (
        "def kernel(x):\n    row = x[0]\n    raise NotImplementedError\n\n\n"
        "def launch(x):\n    return kernel(x)"
    )
    solution = stub.replace("raise NotImplementedError", "return 3 * row")
    exercise = example(stub, solution)
    cell = make.answer_cell(exercise)
    assert cell.count("row = x[0]") == cell.count(BEGIN) == 1
    assert exercise.build(cell)([2]) == 6


@pytest.mark.parametrize(
    ("stub", "solution", "says"),
    [
        (STUB, "def twice(y):\n    return 2 * y\n", r"twice\(x\), but the solution is twice\(y\)"),
        (STUB.replace("raise NotImplementedError", "..."), "def twice(x):\n    return 1\n",
         "no function of the stub ends in `raise NotImplementedError`"),
        (STUB, 'def twice(x):\n    """Double x."""\n', "has no statements"),
        (STUB.replace("    raise", "    y = x\n    raise"), "def twice(x):\n    return 1\n",
         "gives `y = x`, and the solution does not"),
        (CLASS_STUB, CLASS_SOLUTION.replace("x + self.d", "x"), "the solution changes it"),
        (CLASS_STUB, CLASS_SOLUTION.replace("forward", "backward"), "not define Layer.forward"),
        (CLASS_STUB + "\n\n    def last(self):\n        return 1", CLASS_SOLUTION,
         "outside of what the stub asks for"),
    ],
    ids=["arguments", "ellipsis", "empty", "head", "given", "missing", "outside"],
)  # fmt: skip
def test_a_stub_and_a_solution_that_do_not_match_are_refused(
    stub: str, solution: str, says: str
) -> None:
    with pytest.raises(CourseworkError, match=says):
        make.answer_cell(example(stub, solution))


def test_what_an_exercise_needs_stands_in_a_locked_cell_above_it(chapter_99: Any) -> None:
    first, second = toy("first"), toy("second", needs=("99.first", "98.other"))
    other = toy("other", id="98.other")
    chapter_99([first, second, other])
    book = make.release_notebook("99", [first, second])
    names = [cell["id"] for cell in book["cells"]]
    assert names[-4:] == ["99-second-task", "99-second-given", "99-second", "99-second-check"]
    (given,) = [cell for cell in book["cells"] if cell["id"] == "99-second-given"]
    assert code(book, "99-second-given").splitlines()[2:] == [
        'first = own("99.first", first)', 'other = own("98.other")',
    ]  # fmt: skip
    marks = given["metadata"]["nbgrader"]
    assert (marks["locked"], marks["grade"], marks["solution"]) == (True, False, False)


def test_optional_points_are_counted_apart() -> None:
    book = make.release_notebook("99", [toy("a"), toy("b"), toy("c", kind="optional", points=3)])
    opening = "".join(book["cells"][0]["source"])
    assert "| | all | must | 6 | 2 |" in opening
    assert "| | all | optional and stretch, counted apart | 3 | 1 |" in opening


@uses_nbgrader
@pytest.mark.parametrize("chapter", make.chapters())
def test_submissions_are_compared_with_what_nbgrader_hands_out(fresh: Fresh, chapter: str) -> None:
    name = f"chapter_{chapter}"
    released = json.loads(fresh.texts[f"release/{name}/{name}.ipynb"])
    ours = make.release_notebook(chapter, exercises.exercises(chapter))

    def plain(book: dict[str, Any]) -> list[tuple[Any, ...]]:
        return [
            (c["id"], c["cell_type"], "".join(c["source"]),
             c["metadata"].get("nbgrader", {}).get("grade_id"))
            for c in book["cells"]
        ]  # fmt: skip

    assert plain(released) == plain(ours)


def test_a_chapter_without_exercises_is_refused() -> None:
    with pytest.raises(CourseworkError, match="chapter 99 has no exercises"):
        make.source_notebook("99", ())


@uses_nbgrader
def test_every_kind_of_difference_is_named(fresh: Fresh, tmp_path: Path) -> None:
    for kind in ("source", "release"):
        shutil.copytree(fresh.root / kind, tmp_path / kind)
    assert make.differences(fresh.texts, tmp_path) == []
    changed, gone, *_ = fresh.texts
    with (tmp_path / changed).open("a") as file:
        file.write(" ")
    (tmp_path / gone).unlink()
    (tmp_path / "release" / "chapter_98.ipynb").write_text("{}")
    assert make.differences(fresh.texts, tmp_path) == [
        f"{changed} is out of date",
        f"{gone} is missing",
        "release/chapter_98.ipynb belongs to no chapter",
    ]


def test_an_error_of_nbgrader_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "WORKER", tmp_path / "nbgrader_worker.py")
    make.WORKER.write_text('raise SystemExit("no BEGIN SOLUTION in cell 3")')
    with pytest.raises(CourseworkError, match="no BEGIN SOLUTION in cell 3"):
        make.write_release(tmp_path, ["chapter_01"])


def test_an_installed_package_asks_for_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make, "CHECKOUT", tmp_path)
    assert make.main(["--check"]) == 2
    message = capsys.readouterr().err
    assert f"{tmp_path} is not a checkout of nemotron_lite" in message
    assert "--folder" in message


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make, "generate", lambda root: pytest.fail("notebooks are generated"))
    (tmp_path / "file").write_text("mine")
    for name in ("file", "file/exercises"):
        assert make.main(["--folder", str(tmp_path / name)]) == 2
        assert f"{tmp_path / 'file'}" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
