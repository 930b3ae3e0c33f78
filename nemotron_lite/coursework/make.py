"""Make the coursework from the exercises: notebooks with the solutions, and without them.

An exercise is written once, in the `exercises.py` of its chapter: task, stub, reference solution,
hints and checks. The chapter shows its stub, `check` grades it, and this module makes from it the
notebook that an instructor hands out:

    exercises/source/chapter_NN/chapter_NN.ipynb     with the solution, never handed out
    exercises/release/chapter_NN/chapter_NN.ipynb    made from it by nbgrader, with the stub again

Each exercise becomes three cells: the task, the answer (the stub, whose last statement the source
replaces by the solution between BEGIN SOLUTION and END SOLUTION), and a locked test cell that calls
`check` on the learner's function. Its last expression is the number of points earned, which
nbgrader takes as partial credit.

The notebooks depend on the exercises alone: cell ids come from exercise ids and nothing holds a
date. So notebooks made again equal the committed files byte for byte.

    python -m nemotron_lite.coursework.make            write source/ and release/
    python -m nemotron_lite.coursework.make --check    print what differs, change nothing

They are written into the exercises/ of the checkout. An installed package has no such folder: name
one with `--folder`.

Left out: questions in prose that a person grades, and different variants for different learners.
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemotron_lite.course import exercises
from nemotron_lite.course.chapter_list import chapter_folders
from nemotron_lite.course.exercises import PRELUDE, Exercise

CHECKOUT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("nbgrader_worker.py")
BEGIN, END = "### BEGIN SOLUTION", "### END SOLUTION"
SETUP = f"{PRELUDE}\nfrom nemotron_lite.course import check, hint"
NOTEBOOK_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


class CourseworkError(ValueError):
    """An exercise or a folder from which no coursework can be made; says what to change."""


def exercises_folder() -> Path:
    """The exercises/ of the checkout that this package lies in.

    Raises:
        CourseworkError: the package is installed without a checkout.
    """
    folder = CHECKOUT / "exercises"
    if not (CHECKOUT / "pyproject.toml").is_file() or not folder.is_dir():
        raise CourseworkError(
            f"{CHECKOUT} is not a checkout of nemotron_lite: it has no exercises/. Name the folder "
            "of the coursework with --folder, or run this in a checkout."
        )
    return folder


def chapters() -> list[str]:
    """The two-digit names of the chapters that have exercises, in order."""
    return list(chapter_folders())


def target_function(source: str) -> ast.FunctionDef:
    """The function that an exercise asks for: the last one that its stub or solution defines."""
    found = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    if not found:
        raise CourseworkError(f"no function is defined in:\n{source}\nAn exercise needs one.")
    return found[-1]


def _is_stub(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Raise) and "NotImplementedError" in ast.unparse(statement)


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(
        getattr(statement.value, "value", None), str
    )


def _lines_of(node: ast.stmt, lines: list[str]) -> list[str]:
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)])
    return lines[first - 1 : node.end_lineno]


def _solution_body(exercise: Exercise) -> str:
    """The statements of the reference solution, without signature, docstring or indentation.

    What the solution imports or defines outside its function, and the stub does not, comes first:
    nbgrader clears one region, so all of it must be inside the function.
    """
    function = target_function(exercise.solution)
    lines = exercise.solution.splitlines()
    beside = {ast.dump(node) for node in ast.parse(exercise.stub).body}
    extras = [
        "\n".join(_lines_of(node, lines))
        for node in ast.parse(exercise.solution).body
        if not (isinstance(node, ast.FunctionDef) and node.name == function.name)
        and ast.dump(node) not in beside
        and not _is_docstring(node)
    ]
    body = function.body[1:] if _is_docstring(function.body[0]) else function.body
    if not body:
        raise CourseworkError(f"{exercise.id}: the solution has no statements; write one.")
    first = body[0].lineno - 1
    while first > function.lineno and lines[first - 1].strip().startswith("#"):
        first -= 1
    own = textwrap.dedent("\n".join(lines[first : function.end_lineno]))
    return "\n".join([*extras, own])


def answer_cell(exercise: Exercise) -> str:
    """The stub with the reference solution in the place of its `raise NotImplementedError`.

    Raises:
        CourseworkError: the stub does not end in that statement, or the solution has another name
            or other arguments.
    """
    stub, solution = target_function(exercise.stub), target_function(exercise.solution)
    if not _is_stub(stub.body[-1]):
        raise CourseworkError(
            f"{exercise.id}: the stub ends in `{ast.unparse(stub.body[-1])}`; expected "
            "`raise NotImplementedError`."
        )
    asked, given = _signature(stub), _signature(solution)
    if asked != given:
        raise CourseworkError(
            f"{exercise.id}: the stub is {asked}, but the solution is {given}; give both the same "
            "name and arguments."
        )
    last = stub.body[-1]
    head = "\n".join(exercise.stub.splitlines()[: last.lineno - 1])
    region = f"{BEGIN}\n{_solution_body(exercise)}\n{END}"
    cell = f"{head}\n{textwrap.indent(region, ' ' * last.col_offset)}"
    ast.parse(cell)
    return cell


def _signature(function: ast.FunctionDef) -> str:
    names = [a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)]
    return f"{function.name}({', '.join(names)})"


def test_cell(exercise: Exercise) -> str:
    """The graded cell; its value is the number of points earned."""
    name = target_function(exercise.stub).name
    return f'from nemotron_lite.course import check\n\ncheck("{exercise.id}", {name}).points'


test_cell.__test__ = False  # type: ignore[attr-defined]  # pytest must not collect it


def _task(exercise: Exercise, number: int) -> str:
    objective = exercise.objective.strip()
    goal = f"*{objective}*\n\n" if " " in objective else ""  # some are only a chapter's number
    return (
        f"## {number} · {exercise.title}\n\n"
        f"{exercise.kind} · {exercise.points} points · about {exercise.minutes} minutes · "
        f"difficulty {exercise.dots}\n\n{goal}"
        f"{textwrap.dedent(exercise.task).strip()}\n\n"
        f'Stuck? Run `hint("{exercise.id}")` in a cell of your own; there are three, each stronger '
        "than the one before."
    )


def _opening(chapter: str, exercises: Sequence[Exercise]) -> str:
    rows = [f"| {i} | {e.title} | {e.points} | {e.minutes} |" for i, e in enumerate(exercises, 1)]
    return "\n".join(
        [
            f"# Coursework of chapter {chapter}",
            "",
            "Write each function where it says `raise NotImplementedError`, run its cell, then the "
            "cell below it, which grades it. Points are given for each part that is right, so an "
            "unfinished answer is worth handing in. Keep the names of the functions and the cells "
            "that grade; add cells of your own wherever you like.",
            "",
            "| | Exercise | Points | Minutes |",
            "|---|---|---|---|",
            *rows,
            f"| | all | {sum(e.points for e in exercises)} | {sum(e.minutes for e in exercises)} |",
        ]
    )


def _cell(kind: str, name: str, source: str, **metadata: Any) -> dict[str, Any]:
    code: dict[str, Any] = {"execution_count": None, "outputs": []} if kind == "code" else {}
    lines = source.splitlines(keepends=True)
    return {"cell_type": kind, "id": name, "metadata": metadata, "source": lines, **code}


def _nbgrader(grade_id: str, *, solution: bool, points: int = 0) -> dict[str, Any]:
    marks = {"grade": not solution, "grade_id": grade_id, "locked": not solution}
    if not solution:
        marks["points"] = points
    return {**marks, "schema_version": 3, "solution": solution, "task": False}


def source_notebook(chapter: str, exercises: Sequence[Exercise]) -> dict[str, Any]:
    """One assignment of nbgrader, with its solutions, as the JSON of a notebook.

    Raises:
        CourseworkError: a stub and its solution do not match, or there is no exercise.
    """
    if not exercises:
        raise CourseworkError(f"chapter {chapter} has no exercises; add at least one.")
    cells = [
        _cell("markdown", f"{chapter}-opening", _opening(chapter, exercises)),
        _cell("code", f"{chapter}-setup", SETUP),
    ]
    for number, exercise in enumerate(exercises, 1):
        name = exercise.id.replace(".", "-")
        about = {"exercise": exercise.id, "function": target_function(exercise.stub).name}
        answer = _nbgrader(name, solution=True)
        graded = _nbgrader(f"{name}-check", solution=False, points=exercise.points)
        cells += [
            _cell("markdown", f"{name}-task", _task(exercise, number)),
            _cell("code", name, answer_cell(exercise), nbgrader=answer),
            _cell(
                "code", f"{name}-check", test_cell(exercise), nbgrader=graded, nemotron_lite=about
            ),
        ]
    return {"cells": cells, "metadata": NOTEBOOK_METADATA, "nbformat": 4, "nbformat_minor": 5}


def notebook_text(notebook: dict[str, Any]) -> str:
    """A notebook as text, exactly as nbformat writes it."""
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def assignment_path(root: Path, kind: str, assignment: str) -> Path:
    """Where nbgrader keeps the `source` or `release` notebook of an assignment."""
    return root / kind / assignment / f"{assignment}.ipynb"


def write_source(root: Path, names: Sequence[str] | None = None) -> list[str]:
    """Write the source notebooks of the chapters (all of them) and return their assignments."""
    assignments = []
    for chapter in chapters() if names is None else names:
        path = assignment_path(root, "source", f"chapter_{chapter}")
        path.parent.mkdir(parents=True, exist_ok=True)
        notebook = source_notebook(chapter, exercises.exercises(chapter))
        path.write_text(notebook_text(notebook), encoding="utf-8")
        assignments.append(path.stem)
    return assignments


def write_release(root: Path, assignments: Sequence[str]) -> None:
    """Let nbgrader make release/ and gradebook.db in `root` from the source/ that lies there.

    Raises:
        CourseworkError: nbgrader is not installed or failed; the message has the end of its log.
    """
    job = {"root": str(root), "assignments": list(assignments)}
    command = [sys.executable, str(WORKER), "release"]
    run = subprocess.run(
        command, input=json.dumps(job), capture_output=True, text=True, check=False
    )
    if run.returncode:
        raise CourseworkError(f"nbgrader could not make the release:\n{run.stderr.strip()[-2000:]}")


def generate(root: Path) -> dict[str, str]:
    """Make the source/ and release/ notebooks of every chapter in `root`: path → text.

    `root` is a working folder; nbgrader also writes a gradebook.db there.
    """
    assignments = write_source(root)
    write_release(root, assignments)
    found = {}
    for kind in ("source", "release"):
        for assignment in assignments:
            path = assignment_path(root, kind, assignment)
            found[str(path.relative_to(root))] = path.read_text(encoding="utf-8")
    return found


def differences(fresh: dict[str, str], folder: Path) -> list[str]:
    """Which committed notebooks are missing, out of date, or belong to no chapter."""
    problems = []
    for name, text in fresh.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.read_text(encoding="utf-8") != text:
            problems.append(f"{name} is out of date")
    for kind in ("source", "release"):
        there = {str(p.relative_to(folder)) for p in (folder / kind).rglob("*") if p.is_file()}
        problems += [f"{name} belongs to no chapter" for name in sorted(there - set(fresh))]
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the notebooks of the coursework."""
    parser = argparse.ArgumentParser(prog="python -m nemotron_lite.coursework.make")
    parser.add_argument("--check", action="store_true", help="change nothing; print what differs")
    parser.add_argument("--folder", type=Path, help="default: the exercises/ of the checkout")
    options = parser.parse_args(arguments)
    try:
        folder = options.folder or exercises_folder()
    except CourseworkError as error:
        print(error, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as work:
        fresh = generate(Path(work))
    problems = differences(fresh, folder)
    if options.check:
        print(
            "\n".join([*problems, f"{len(fresh)} notebooks compared, {len(problems)} differences"])
        )
        return 1 if problems else 0
    for kind in ("source", "release"):
        shutil.rmtree(folder / kind, ignore_errors=True)
    for name, text in fresh.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print("\n".join([*problems, f"{len(fresh)} notebooks written below {folder}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
