"""Make the coursework from the exercises: notebooks with the solutions, and without them.

An exercise is written once, in the `exercises.py` of its chapter: task, stub, reference solution,
hints and checks. The chapter shows its stub, `check` grades it, and this module makes from it the
notebook that an instructor hands out:

    exercises/source/chapter_NN/chapter_NN.ipynb     with the solution, never handed out
    exercises/release/chapter_NN/chapter_NN.ipynb    made from it by nbgrader, with the stub again

Each exercise becomes three cells: the task, the answer (the stub, in which the source replaces each
`raise NotImplementedError` by the solution between BEGIN SOLUTION and END SOLUTION), and a locked
test cell that calls `check` on the learner's function or class. Its last expression is the number
of points earned, which nbgrader takes as partial credit. An exercise that needs the functions of
others has a fourth cell, which puts them there: the learner's own where they pass their checks.

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
from nemotron_lite.course.syntax import parse
from nemotron_lite.files import check_writable_folder

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


Written = ast.FunctionDef | ast.AsyncFunctionDef


def _functions(source: str) -> dict[str, Written]:
    """The functions and methods that some source defines, by names such as `Mamba2.forward`."""
    found: dict[str, Written] = {}
    for node in parse(source).body:
        if isinstance(node, Written):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            methods = (one for one in node.body if isinstance(one, Written))
            found |= {f"{node.name}.{method.name}": method for method in methods}
    return found


def _is_stub(function: Written) -> bool:
    """Whether a learner writes it: its last statement raises NotImplementedError."""
    last = function.body[-1]
    return isinstance(last, ast.Raise) and "NotImplementedError" in ast.unparse(last)


def _statements(function: Written) -> list[ast.stmt]:
    """The body of a function without its docstring."""
    return function.body[1:] if _is_docstring(function.body[0]) else function.body


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(
        getattr(statement.value, "value", None), str
    )


def _first_line(node: ast.stmt, lines: list[str]) -> int:
    """The number of a statement's first line from zero, its decorators and comment included."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)]) - 1
    while first > 0 and lines[first - 1].strip().startswith("#"):
        first -= 1
    return first


def _text(node: ast.stmt, lines: list[str]) -> str:
    return textwrap.dedent("\n".join(lines[_first_line(node, lines) : node.end_lineno]))


def _own_statements(exercise: Exercise, name: str, stub: Written, solution: Written) -> str:
    """What the solution writes in one function, without what the stub gives at its beginning."""
    given, body = _statements(stub)[:-1], _statements(solution)
    same = 0
    while same < min(len(given), len(body)) and ast.dump(given[same]) == ast.dump(body[same]):
        same += 1
    if same < len(given):
        raise CourseworkError(
            f"{exercise.id}: the stub of {name} gives `{ast.unparse(given[same])}`, and the "
            "solution does not; begin both with the same statements."
        )
    if same == len(body):
        raise CourseworkError(
            f"{exercise.id}: the solution of {name} has no statements; write one."
        )
    lines = exercise.solution.splitlines()
    return textwrap.dedent("\n".join(lines[_first_line(body[same], lines) : solution.end_lineno]))


def _beside(exercise: Exercise) -> tuple[list[str], dict[str, list[str]]]:
    """What the solution has and the stub lacks: statements, and methods of each class."""
    lines = exercise.solution.splitlines()
    stub_body = parse(exercise.stub).body
    known = {ast.dump(node) for node in stub_body}
    named = {getattr(node, "name", "") for node in stub_body} - {""}
    classes = {node.name: node for node in stub_body if isinstance(node, ast.ClassDef)}
    statements, methods = [], {}
    for node in parse(exercise.solution).body:
        if isinstance(node, ast.ClassDef) and node.name in classes:
            given = {getattr(one, "name", ast.dump(one)) for one in classes[node.name].body}
            methods[node.name] = [
                _text(one, lines)
                for one in node.body
                if getattr(one, "name", ast.dump(one)) not in given and not _is_docstring(one)
            ]
        elif (
            getattr(node, "name", "") not in named
            and ast.dump(node) not in known
            and not _is_docstring(node)
        ):
            statements.append(_text(node, lines))
    return statements, methods


def _check_given(
    exercise: Exercise, stub: dict[str, Written], solution: dict[str, Written]
) -> None:
    """Refuse a solution with another signature, or with another version of a given function."""
    for name, function in stub.items():
        if name not in solution:
            if _is_stub(function):
                raise CourseworkError(f"{exercise.id}: the solution does not define {name}.")
            continue
        asked, given = _signature(name, function), _signature(name, solution[name])
        if asked != given:
            raise CourseworkError(
                f"{exercise.id}: the stub is {asked}, but the solution is {given}; give both the "
                "same name and arguments."
            )
        bodies = [[ast.dump(one) for one in _statements(f)] for f in (function, solution[name])]
        if not _is_stub(function) and bodies[0] != bodies[1]:
            raise CourseworkError(
                f"{exercise.id}: {name} is given in the stub, and the solution changes it."
            )


def answer_cell(exercise: Exercise) -> str:
    """The stub with the reference solution in the place of each `raise NotImplementedError`.

    nbgrader turns each region between BEGIN and END back into that statement. What the solution has
    beside the functions of the stub has to lie in a region: statements such as imports move into
    the function, and further methods of a class follow in the region of its last method.

    Raises:
        CourseworkError: the stub asks for nothing, or the solution does not fit it.
    """
    stub, solution = _functions(exercise.stub), _functions(exercise.solution)
    asked = {name: function for name, function in stub.items() if _is_stub(function)}
    if not asked:
        raise CourseworkError(
            f"{exercise.id}: no function of the stub ends in `raise NotImplementedError`; expected "
            "that as the last statement of each one to write."
        )
    _check_given(exercise, stub, solution)
    statements, methods = _beside(exercise)
    lines = exercise.stub.rstrip().splitlines()
    for number, (name, function) in enumerate(reversed(asked.items())):
        last = function.body[-1]
        region = _own_statements(exercise, name, function, solution[name])
        if "." not in name and statements:
            region, statements = "\n".join([*statements, region]), []
        pad = " " * last.col_offset
        block = [BEGIN, *region.splitlines()]
        text = [pad + line if line else line for line in block]
        owner = name.partition(".")[0]
        for method in methods.pop(owner, []) if "." in name else []:
            text += ["", *textwrap.indent(method, "    ").splitlines()]
        if not number and statements and last.end_lineno == len(lines):
            text += ["", "", *(line for one in statements for line in one.splitlines())]
            statements = []
        lines[last.lineno - 1 : last.end_lineno] = [*text, pad + END]
    if left := [*statements, *(one for of in methods.values() for one in of)]:
        raise CourseworkError(
            f"{exercise.id}: the solution defines {left[0]!r:.80} outside of what the stub asks "
            "for; move it into a function, or give it in the stub."
        )
    cell = "\n".join(lines)
    parse(cell)
    return cell


def _signature(name: str, function: Written) -> str:
    names = [a.arg for a in ast.walk(function.args) if isinstance(a, ast.arg)]
    return f"{name}({', '.join(names)})"


def test_cell(exercise: Exercise) -> str:
    """The graded cell; its value is the number of points earned."""
    name = exercise.function_name
    return f'from nemotron_lite.course import check\n\ncheck("{exercise.id}", {name}).points'


test_cell.__test__ = False  # type: ignore[attr-defined]  # pytest must not collect it


def given_cell(exercise: Exercise) -> str:
    """The locked cell above an exercise that needs others: their functions, by name.

    `own` gives the learner's function if it passes its checks, otherwise the package's answer. So
    an earlier mistake does not cost points again.
    """
    lines = ["from nemotron_lite.course import own", ""]
    for needed in map(exercises.exercise, exercise.needs):
        here = needed.id[:2] == exercise.id[:2]
        name = needed.function_name
        lines.append(f'{name} = own("{needed.id}"{f", {name}" if here else ""})')
    return "\n".join(lines)


def _task(exercise: Exercise, number: int) -> str:
    objective = exercise.objective.strip()
    goal = f"*{objective}*\n\n" if " " in objective else ""  # some are only a chapter's number
    names = [f"`{exercises.exercise(needed).function_name}`" for needed in exercise.needs]
    use = f"Your answer may call {' and '.join(names)}.\n\n" if names else ""
    return (
        f"## {number} · {exercise.title}\n\n"
        f"{exercise.kind} · {exercise.points} points · about {exercise.minutes} minutes · "
        f"difficulty {exercise.dots}\n\n{goal}"
        f"{textwrap.dedent(exercise.task).strip()}\n\n{use}"
        f'Stuck? Run `hint("{exercise.id}")` in a cell of your own; there are three, each stronger '
        "than the one before."
    )


def _opening(chapter: str, exercises: Sequence[Exercise]) -> str:
    rows = [
        f"| {i} | {e.title} | {e.kind} | {e.points} | {e.minutes} |"
        for i, e in enumerate(exercises, 1)
    ]
    for kind, name in ((True, "must"), (False, "optional and stretch, counted apart")):
        of = [e for e in exercises if (e.kind == "must") is kind]
        if of:
            points, minutes = sum(e.points for e in of), sum(e.minutes for e in of)
            rows.append(f"| | all | {name} | {points} | {minutes} |")
    return "\n".join(
        [
            f"# Coursework of chapter {chapter}",
            "",
            "Write your code where a cell says `raise NotImplementedError`, run the cell, then the "
            "one below it, which grades it. Points are given for each part that is right, so an "
            "unfinished answer is worth handing in. Keep the names of the functions and the cells "
            "that grade; add cells of your own wherever you like.",
            "",
            "Your answers are graded with other numbers than the ones you see here. They can use "
            "torch and what the cells already import; other parts of `nemotron_lite` do not exist "
            "where they are graded.",
            "",
            "| | Exercise | Kind | Points | Minutes |",
            "|---|---|---|---|---|",
            *rows,
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


def _notebook(chapter: str, exercises: Sequence[Exercise], *, solved: bool) -> dict[str, Any]:
    if not exercises:
        raise CourseworkError(f"chapter {chapter} has no exercises; add at least one.")
    cells = [
        _cell("markdown", f"{chapter}-opening", _opening(chapter, exercises)),
        _cell("code", f"{chapter}-setup", SETUP),
    ]
    for number, exercise in enumerate(exercises, 1):
        name = exercise.id.replace(".", "-")
        about = {"exercise": exercise.id, "function": exercise.function_name}
        cells.append(_cell("markdown", f"{name}-task", _task(exercise, number)))
        if exercise.needs:
            locked = {**_nbgrader(f"{name}-given", solution=False), "grade": False}
            del locked["points"]
            given = given_cell(exercise)
            cells.append(
                _cell("code", f"{name}-given", given, nbgrader=locked, nemotron_lite=about)
            )
        answer = answer_cell(exercise) if solved else exercise.stub.strip()
        graded = _nbgrader(f"{name}-check", solution=False, points=exercise.points)
        cells += [
            _cell("code", name, answer, nbgrader=_nbgrader(name, solution=True)),
            _cell(
                "code", f"{name}-check", test_cell(exercise), nbgrader=graded, nemotron_lite=about
            ),
        ]
    return {"cells": cells, "metadata": NOTEBOOK_METADATA, "nbformat": 4, "nbformat_minor": 5}


def source_notebook(chapter: str, exercises: Sequence[Exercise]) -> dict[str, Any]:
    """One assignment of nbgrader, with its solutions, as the JSON of a notebook.

    Raises:
        CourseworkError: a stub and its solution do not match, or there is no exercise.
    """
    return _notebook(chapter, exercises, solved=True)


def release_notebook(chapter: str, exercises: Sequence[Exercise]) -> dict[str, Any]:
    """The same as it is handed out, without its solutions.

    nbgrader makes the notebook that is handed out; `make grade` compares submissions with this one,
    which has the same cells and needs no nbgrader.

    Raises:
        CourseworkError: there is no exercise.
    """
    return _notebook(chapter, exercises, solved=False)


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
    command = [sys.executable, str(WORKER)]
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
        if not options.check:
            check_writable_folder(folder)
    except (CourseworkError, OSError, ValueError) as error:
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
