"""Grade a folder of submissions: `make grade SUBMISSIONS=folder`.

    scores.csv           a row for each learner and assignment, a column for each exercise
    scores.json          the same with each check, notes, limits, seed, versions and isolation
    similarity.csv, .html    answers that are alike
    feedback/<student>/<assignment>.html      the executed notebook with points and comments

The steps:

    1. make the assignments from the exercises of the package,
    2. find and read the submitted notebooks (`submissions`), all of them before any is executed,
    3. grade the package's own answers in the same way, and stop unless they earn all points,
    4. execute each submission, cleaned, in a process of its own (`isolation`, `learner_process`),
       and check its answers from here (`one_submission`, `scoring`, `session`),
    5. compare the answers with each other (`similarity`),
    6. write all results into a new folder, which then replaces the old one in one step. It is
       created before step 1, so that a wrong --out is reported before any submission runs.

A submission that cannot be read gets a result that says so. Code that ends its process, or runs too
long, costs the exercise in which it does so. The others are graded all the same.

Checks draw their inputs with seeds that nobody knows: a new secret enters them at each run. It
stands in scores.json afterwards, and `--seed` repeats a run with it.

Left out: a container for each submission. `exercises/README.md` says what is protected, and what is
not.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import secrets
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemotron_lite.arguments import integer, number
from nemotron_lite.course import exercises
from nemotron_lite.coursework.clean_copy import (
    Assignment,
    SubmissionError,
    clean_copy,
    text_of,
)
from nemotron_lite.coursework.isolation import Isolation, Limits, find_isolation
from nemotron_lite.coursework.learner_package import write_package
from nemotron_lite.coursework.make import chapters, release_notebook, source_notebook
from nemotron_lite.coursework.one_submission import (
    Graded,
    execute,
    failed,
    grade_one,
)
from nemotron_lite.coursework.scoring import reference_sources
from nemotron_lite.coursework.scratch import scratch_folder
from nemotron_lite.coursework.similarity import Answer, Pair, write_report
from nemotron_lite.coursework.submissions import Submission, find_submissions
from nemotron_lite.coursework.tables import write_scores
from nemotron_lite.coursework.texts import PageNames, one_line
from nemotron_lite.coursework.workers import run_all
from nemotron_lite.files import atomic_folder
from nemotron_lite.provenance import versions

RESULTS = ("scores.csv", "scores.json", "similarity.csv", "similarity.html", "feedback")
MOST_JOBS = 4
MOST_NAMES = 4  # of learners with a similar answer, in a note
MOST_FAULTS = 5  # of the package's own answers, in a message
MOST_SECONDS = 10**6


class ResultsError(RuntimeError):
    """The results could not be written after the grading; the message says where the scores are."""


def handed_out(names: Sequence[str] | None = None) -> dict[str, Assignment]:
    """The assignments of some chapters (None: all), by name."""
    found = {}
    for chapter in chapters() if names is None else names:
        notebook = release_notebook(chapter, exercises.exercises(chapter))
        name = f"chapter_{chapter}"
        found[name] = Assignment(name, tuple(notebook["cells"]), notebook["metadata"])
    return found


def importing_sources(assignment: Assignment) -> list[str]:
    """Code whose imports a learner's process has to know.

    These are the handed-out cells, and the references of exercises of other chapters.
    """
    sources = [text_of(cell) for cell in assignment.cells if cell["cell_type"] == "code"]
    for one in assignment.exercises:
        for needed in exercises.exercise(one.id).needs:
            if needed[:2] != one.id[:2]:
                sources += reference_sources(exercises.exercise(needed))
    return sources


def _folder_state(folder: Path) -> str:
    """Changes with every change of a file or folder below `folder`; no file is read.

    The time of the last change of a file's content, name or rights (ctime) cannot be set back.
    """
    digest = hashlib.sha256()
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in (*folders, *sorted(files)):
            path = os.path.join(place, name)
            with suppress(OSError):
                found = os.lstat(path)
                state = found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns
                digest.update(os.fsencode(path) + repr(state).encode())
    return digest.hexdigest()


def grade_folder(
    folder: Path,
    out: Path,
    *,
    limits: Limits | None = None,
    jobs: int = 1,
    names: Sequence[str] | None = None,
    seed: str = "",
) -> dict[str, Any]:
    """Grade every submission below `folder` and write the results into `out`.

    Args:
        folder: the submissions; it is only read.
        out: the folder for the results.
        limits: of each submission.
        jobs: submissions at the same time.
        names: chapters whose coursework was handed out, such as "01"; None: all.
        seed: of an earlier run, to repeat it; "" for a new one.

    Returns:
        What scores.json holds.

    Raises:
        SubmissionError: no such folder, nothing in it, `out` lies inside it, `out` cannot be
            written, or the package's own answers do not earn all points. No submission has run
            then.
        ResultsError: the disk refused the results.
    """
    limits = checked(limits or Limits())
    jobs = integer("jobs", jobs, low=1)
    folder, out = folder.resolve(), out.resolve()
    if out == folder or folder in out.parents:
        raise SubmissionError(
            f"the results would go into {out}, among the submissions; choose another --out."
        )
    if out in folder.parents:  # the folder is replaced as a whole, with the submissions in it
        raise SubmissionError(
            f"the results cannot be written into --out {out}: the submissions lie in that folder; "
            "choose another one."
        )
    if not folder.is_dir():
        raise SubmissionError(
            f"{folder} is not a folder; SUBMISSIONS must name a folder with notebooks in it."
        )
    graded: list[tuple[dict[str, Any], list[str]]] = []
    try:
        with ExitStack() as stack:
            try:
                fresh = stack.enter_context(atomic_folder(out, lambda name: name in RESULTS))
            except (OSError, ValueError) as error:
                raise SubmissionError(
                    f"the results cannot be written into --out {out}: {error}"
                ) from error
            _grade_into(fresh, folder, limits, jobs, handed_out(names), seed, graded)
    except OSError as error:
        if not graded:
            raise
        raise ResultsError(_rescued(*graded[0], error)) from error
    return graded[0][0]


def _grade_into(
    fresh: Path,
    folder: Path,
    limits: Limits,
    jobs: int,
    assignments: dict[str, Assignment],
    seed: str,
    graded: list[tuple[dict[str, Any], list[str]]],
) -> None:
    """Grade every submission below `folder` and write the results into the folder `fresh`.

    The summary and the names of the exercises are put into `graded` before anything is written.
    """
    before, salt = _folder_state(folder), seed or secrets.token_hex(8)
    try:
        found = find_submissions(folder, assignments)
    except OSError as error:
        raise SubmissionError(f"{folder} cannot be read: {error}") from error
    isolation = find_isolation()
    with scratch_folder("course-") as work:
        sites = {}
        for name in sorted({one.assignment for one in found if one.copy} & assignments.keys()):
            sites[name] = work / name
            write_package(sites[name], importing_sources(assignments[name]))
        of = {name: assignments[name] for name in sites}
        _check_references(of, sites, isolation, limits, salt, jobs)
        tasks = [
            (one, assignments.get(one.assignment), sites.get(one.assignment, work),
             isolation, limits, salt)
            for one in found
        ]  # fmt: skip
        with tqdm(desc="grading", total=len(tasks), unit="submission", leave=False) as bar:
            done = run_all(
                grade_one, tasks, min(jobs, len(tasks)),
                lambda i, why: failed(found[i], tasks[i][1], why), bar.update,
            )  # fmt: skip
    results = [
        {**graded.row, "file": one_line(str(one.path.relative_to(folder)))}
        for one, graded in zip(found, done, strict=True)
    ]
    summary = {
        "submissions": results, "network": isolation.network, "processes": isolation.processes,
        "files": isolation.files, "other_limits": isolation.limits, "limits": asdict(limits),
        "seed": salt, "versions": versions(("nemotron-lite", "torch")),
        "submissions_unchanged": _folder_state(folder) == before,
        "graded_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    columns = [e.id for a in of.values() for e in a.exercises]
    graded.append((summary, columns))
    _write_results(fresh, found, done, assignments, summary, columns)


def _write_results(
    fresh: Path,
    found: Sequence[Submission],
    done: Sequence[Graded],
    assignments: dict[str, Assignment],
    summary: dict[str, Any],
    columns: Sequence[str],
) -> None:
    """Write the report of similar answers, the pages and both tables."""
    results = summary["submissions"]
    answers: dict[str, list[Answer]] = {e.id: [] for a in assignments.values() for e in a.exercises}
    for one, graded in zip(found, done, strict=True):
        for exercise, source in graded.sources.items():
            answers[exercise].append(Answer(one.student, source))
    given = {e: (exercises.exercise(e).stub, exercises.exercise(e).solution) for e in answers}
    _note_similar(results, write_report(fresh, {e: a for e, a in answers.items() if a}, given))
    names = PageNames()
    (fresh / "feedback").mkdir()
    for one, result, graded in zip(found, results, done, strict=True):
        path = Path("feedback", names.path(one.student, one.assignment or one.path.stem))
        (fresh / path).parent.mkdir(exist_ok=True)
        (fresh / path).write_text(graded.page, encoding="utf-8")
        result["feedback"] = path.as_posix()
    _write_tables(fresh, summary, columns)


def _write_tables(folder: Path, summary: dict[str, Any], columns: Sequence[str]) -> None:
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    (folder / "scores.json").write_text(text, encoding="utf-8")
    write_scores(folder / "scores.csv", summary["submissions"], columns)


def _rescued(summary: dict[str, Any], columns: Sequence[str], error: OSError) -> str:
    """Write the scores among the temporary files, and say where they are."""
    text = f"the results cannot be written into --out: {error}. What was there is unchanged."
    with suppress(OSError):
        folder = Path(tempfile.mkdtemp(prefix="nemotron-lite-scores-"))
        _write_tables(folder, summary, columns)
        return f"{text} The scores, without the pages, are in {folder}."
    return f"{text} Free some space and grade again; --seed {summary['seed']} repeats this run."


def _check_references(
    assignments: dict[str, Assignment],
    sites: dict[str, Path],
    isolation: Isolation,
    limits: Limits,
    salt: str,
    jobs: int,
) -> None:
    """Grade the package's own answers as if a learner had handed them in.

    If they do not earn all points, the cause lies in this machine or this package, and everybody
    would lose points by it.

    Raises:
        SubmissionError: the text names the exercises, and what the checks say.
    """
    tasks = []
    for name, assignment in assignments.items():
        chapter = name.removeprefix("chapter_")
        notebook = source_notebook(chapter, exercises.exercises(chapter))
        copy = clean_copy(json.loads(json.dumps(notebook)), assignment)
        tasks.append((copy, assignment, sites[name], isolation, limits, salt))
    names = list(assignments)
    faults = run_all(faults_of, tasks, min(jobs, len(tasks)), lambda i, why: [f"{names[i]}: {why}"])
    if told_faults := [line for lines in faults for line in lines]:
        most = MOST_FAULTS
        more = f"\n  and {len(told_faults) - most} more" if len(told_faults) > most else ""
        raise SubmissionError(
            "the package's own answers do not earn all points here, so the fault is not the "
            f"learners' (Python {platform.python_version()}):\n  "
            + "\n  ".join(told_faults[:most])
            + more
        )


def faults_of(*task: Any) -> list[str]:
    """What keeps the package's own answers of an assignment from all points; for `run_all`."""
    scored = execute(*task)
    return [
        f"{one.id} earns {one.points:g} of {one.max_points:g} points: {one_line(one.message)}"
        for one in scored.scores
        if one.status != "passed" or one.points != one.max_points
    ]


def checked(limits: Limits) -> Limits:
    """The limits, each a number of the right range.

    Raises:
        TypeError, ValueError: the text names the limit.
    """
    return Limits(
        number("cell_seconds", limits.cell_seconds, above=0, high=MOST_SECONDS),
        number("seconds", limits.seconds, above=0, high=MOST_SECONDS),
        number("memory_gib", limits.memory_gib, low=0, high=2**20),
    )


def _note_similar(results: list[dict[str, Any]], pairs: list[Pair]) -> None:
    """Note similar answers in the results, which the feedback pages do not show."""
    alike: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for pair in pairs:
        for one, other in ((pair.one, pair.other), (pair.other, pair.one)):
            found = alike.setdefault((one.student, pair.exercise), [])
            found.append((pair.similarity, other.student))
    for result in results:
        for exercise in (e["id"] for e in result["exercises"]):
            if of := alike.get((result["student"], exercise)):
                names = ", ".join(f"{name} ({share:.0%})" for share, name in of[:MOST_NAMES])
                more = f" and {len(of) - MOST_NAMES} more" if len(of) > MOST_NAMES else ""
                result["notes"].append(f"{exercise}: the answer is like that of {names}{more}")
                result["flags"] = sorted({*result["flags"], "similar"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Grade a folder from the command line and print a line for each submission."""
    parser = argparse.ArgumentParser(prog="make grade SUBMISSIONS=folder", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default, jobs = Limits(), min(os.cpu_count() or 1, MOST_JOBS)
    parser.add_argument("submissions", type=Path, help="folder of submissions; it is only read")
    parser.add_argument("--out", type=Path, default=Path("grades"), help="results (./grades)")
    parser.add_argument(
        "--cell-seconds", type=float, default=default.cell_seconds,
        help="for a cell, and for all checks of an exercise (60)",
    )  # fmt: skip
    parser.add_argument("--seconds", type=float, default=default.seconds, help="for one submission")
    parser.add_argument("--memory-gib", type=float, default=default.memory_gib, help="0: no limit")
    parser.add_argument("--jobs", type=int, default=jobs, help="submissions at the same time")
    parser.add_argument("--seed", default="", help="of scores.json, to repeat a run")
    chosen = parser.parse_args(arguments)
    try:
        limits = checked(Limits(chosen.cell_seconds, chosen.seconds, chosen.memory_gib))
        jobs = integer("jobs", chosen.jobs, low=1)
    except ValueError as error:
        parser.error(str(error))
    for stream in (sys.stdout, sys.stderr):  # a terminal that is not UTF-8
        with suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        summary = grade_folder(
            chosen.submissions, chosen.out, limits=limits, jobs=jobs, seed=chosen.seed
        )
    except SubmissionError as error:
        print(f"Nothing was graded: {error}", file=sys.stderr)
        return 2
    except ResultsError as error:
        print(f"Graded, but {error}", file=sys.stderr)
        return 2
    for one in summary["submissions"]:
        most = "?" if one["max_points"] is None else f"{one['max_points']:g}"
        extra = f" +{one['optional_points']:g}" if one["max_optional_points"] else ""
        print(
            f"{one['student']:<16} {one['assignment'] or '-':<12} "
            f"{one['points']:>5g} of {most + extra:<8} {one['status']}: {one['message']}"
        )
        print("".join(f"{'':<16} note: {note}\n" for note in one["notes"]), end="")
    print(
        f"Network of the submissions: {summary['network']}; files: {summary['files']}; processes: "
        f"{summary['processes']}; limited: {summary['other_limits']}. Results: {chosen.out}"
    )
    if not summary["submissions_unchanged"]:
        print("WARNING: the folder of submissions changed while it was graded.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
