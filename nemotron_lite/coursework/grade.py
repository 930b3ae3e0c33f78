"""Grade a folder of submissions: `make grade SUBMISSIONS=folder`.

    scores.csv           a row for each learner and assignment, a column for each exercise
    scores.json          the same with each check, notes, limits, seed, versions and isolation
    similarity.csv, .html    answers that are alike
    feedback/<student>/<assignment>.html      the executed notebook with points and comments

The steps:

    1. make the assignments from the exercises of the package,
    2. find the submitted notebooks (`submissions`),
    3. execute each one, cleaned, in a process of its own (`isolation`, `learner_process`), and
       check its answers from here (`scoring`, `session`),
    4. compare the answers with each other (`similarity`),
    5. write all results into a new folder, which then replaces the old one in one step. It is
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
import multiprocessing
import os
import platform
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from nemotron_lite.course import exercises
from nemotron_lite.coursework.feedback import feedback_page
from nemotron_lite.coursework.isolation import Isolation, Limits, find_isolation
from nemotron_lite.coursework.learner_package import write_package
from nemotron_lite.coursework.make import chapters, release_notebook
from nemotron_lite.coursework.scoring import reference_sources, score_submission
from nemotron_lite.coursework.similarity import Answer, Pair, write_report
from nemotron_lite.coursework.submissions import (
    Assignment,
    Submission,
    SubmissionError,
    clean_copy,
    find_submissions,
    grade_id,
    read_notebook,
    text_of,
)
from nemotron_lite.coursework.tables import write_scores
from nemotron_lite.files import atomic_folder

RESULTS = ("scores.csv", "scores.json", "similarity.csv", "similarity.html", "feedback")
MOST_JOBS = 4
MOST_NAMES = 4  # of learners with a similar answer, in a note


def handed_out(names: Sequence[str] | None = None) -> dict[str, Assignment]:
    """The assignments of some chapters (None: all), by name."""
    found = {}
    for chapter in chapters() if names is None else names:
        notebook = release_notebook(chapter, exercises.exercises(chapter))
        name = f"chapter_{chapter}"
        found[name] = Assignment(name, tuple(notebook["cells"]), notebook["metadata"])
    return found


def _result(one: Submission, assignment: Assignment | None, **more: Any) -> dict[str, Any]:
    """A result without points."""
    most: dict[bool, float] = {True: 0.0, False: 0.0}
    for e in assignment.exercises if assignment else ():
        most[exercises.exercise(e.id).kind == "must"] += e.points
    return {
        "student": one.student,
        "assignment": one.assignment,
        "points": 0.0,
        "max_points": most[True] if assignment else None,
        "optional_points": 0.0,
        "max_optional_points": most[False] if assignment else None,
        "status": "unreadable",
        "message": "",
        "notes": list(one.notes),
        "flags": [],
        "exercises": [],
        **more,
    }


def grade_one(
    one: Submission,
    assignment: Assignment | None,
    site: Path,
    isolation: Isolation,
    limits: Limits,
    salt: str,
) -> tuple[dict[str, Any], str, dict[str, str]]:
    """Execute and grade one submission.

    Returns:
        Its result, its feedback page, and the sources of its answers by exercise.
    """
    torch.set_num_threads(1)
    if one.problem or assignment is None:
        result = _result(one, assignment, message=one.problem)
        return result, feedback_page(result), {}
    try:
        copy = clean_copy(read_notebook(one.path), assignment)
    except (SubmissionError, OSError) as error:
        result = _result(one, assignment, message=str(error))
        return result, feedback_page(result), {}
    with tempfile.TemporaryDirectory(prefix="grading-") as folder:
        own_site = site
        if not isolation.jailed:  # there it could be written to
            own_site = Path(folder, "site")
            shutil.copytree(site, own_site)
        try:
            scored = score_submission(copy.notebook, assignment, own_site, isolation, limits, salt)
        except Exception as error:  # the others are graded all the same
            message = f"the grader failed: {type(error).__name__}: {error}; grade it by hand"
            result = _result(
                one, assignment, status="error", message=message, flags=["grader_failed"]
            )
            return result, feedback_page(result, copy.notebook), {}
    right = sum(e.status == "passed" for e in scored.scores)
    wrong = [f"{e.id} {e.status}" for e in scored.scores if e.status != "passed"]
    message = f"{right} of {len(scored.scores)} exercises right"
    result = _result(
        one,
        assignment,
        points=sum(e.points for e in scored.scores if e.kind == "must"),
        optional_points=sum(e.points for e in scored.scores if e.kind != "must"),
        status="graded",
        message=message + (f"; {', '.join(wrong)}" if wrong else ""),
        notes=[*one.notes, *copy.notes, *scored.notes],
        flags=sorted({*copy.flags, *scored.flags}),
        exercises=[asdict(e) for e in scored.scores],
        seconds=scored.seconds,
        network_cut_off=scored.facts.get("cut_off") is True,
        memory_limited=scored.facts.get("memory_limited") is True,
    )
    by_name = {grade_id(cell): text_of(cell) for cell in copy.notebook["cells"]}
    sources = {e.id: by_name[e.answer] for e in assignment.exercises if e.answer in by_name}
    return result, feedback_page(result, copy.notebook, scored.outputs), sources


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


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("nemotron-lite", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _folder_hash(folder: Path) -> str:
    """A hash of all files in a folder, to show that grading changed nothing."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
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
        SubmissionError: no such folder, nothing in it, `out` lies inside it, or `out` cannot be
            written. No submission has run then.
    """
    folder, out, limits = folder.resolve(), out.resolve(), limits or Limits()
    if out == folder or folder in out.parents:
        raise SubmissionError(
            f"the results would go into {out}, among the submissions; choose another --out."
        )
    if not folder.is_dir():
        raise SubmissionError(
            f"{folder} is not a folder; SUBMISSIONS must name a folder with notebooks in it."
        )
    with ExitStack() as stack:
        try:
            fresh = stack.enter_context(atomic_folder(out, lambda name: name in RESULTS))
        except (OSError, ValueError) as error:
            raise SubmissionError(
                f"the results cannot be written into --out {out}: {error}"
            ) from error
        return _grade_into(fresh, folder, limits, jobs, handed_out(names), seed)


def _grade_into(
    fresh: Path,
    folder: Path,
    limits: Limits,
    jobs: int,
    assignments: dict[str, Assignment],
    seed: str,
) -> dict[str, Any]:
    """Grade every submission below `folder` and write the results into the folder `fresh`."""
    before, salt = _folder_hash(folder), seed or secrets.token_hex(8)
    found, isolation = find_submissions(folder, assignments), find_isolation()
    with tempfile.TemporaryDirectory(prefix="course-") as work:
        sites = {}
        for name in {one.assignment for one in found} & assignments.keys():
            sites[name] = Path(work, name)
            write_package(sites[name], importing_sources(assignments[name]))
        tasks = [
            (one, assignments.get(one.assignment), sites.get(one.assignment, Path(work)),
             isolation, limits, salt)
            for one in found
        ]  # fmt: skip
        with _mapped(min(jobs, len(tasks))) as mapped:
            running = mapped(grade_one, *zip(*tasks, strict=True))
            bar = tqdm(running, "grading", len(tasks), unit="submission", leave=False)
            done = list(bar)
    results: list[dict[str, Any]] = []
    answers: dict[str, list[Answer]] = {e.id: [] for a in assignments.values() for e in a.exercises}
    for one, (result, _, sources) in zip(found, done, strict=True):
        results.append({**result, "file": str(one.path.relative_to(folder))})
        for exercise, source in sources.items():
            answers[exercise].append(Answer(one.student, source))
    given = {e: (exercises.exercise(e).stub, exercises.exercise(e).solution) for e in answers}
    _note_similar(results, write_report(fresh, {e: a for e, a in answers.items() if a}, given))
    for one, result, (_, page, _) in zip(found, results, done, strict=True):
        path = Path("feedback", one.student, f"{one.assignment or one.path.stem}.html")
        (fresh / path).parent.mkdir(parents=True, exist_ok=True)
        (fresh / path).write_text(page, encoding="utf-8")
        result["feedback"] = path.as_posix()
    summary = {
        "submissions": results, "network": isolation.network, "processes": isolation.processes,
        "files": isolation.files, "limits": asdict(limits), "seed": salt, "versions": _versions(),
        "submissions_unchanged": _folder_hash(folder) == before,
        "graded_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    (fresh / "scores.json").write_text(text, encoding="utf-8")
    columns = [e.id for a in assignments.values() if a.name in sites for e in a.exercises]
    write_scores(fresh / "scores.csv", results, columns)
    return summary


@contextmanager
def _mapped(jobs: int) -> Iterator[Callable[..., Any]]:
    """`map` over so many processes: the checks seed torch's global generator, so no threads."""
    if jobs <= 1:
        yield map
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        yield pool.map


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
    limits = Limits(chosen.cell_seconds, chosen.seconds, chosen.memory_gib)
    try:
        summary = grade_folder(
            chosen.submissions, chosen.out, limits=limits, jobs=chosen.jobs, seed=chosen.seed
        )
    except SubmissionError as error:
        print(f"Nothing was graded: {error}", file=sys.stderr)
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
        f"{summary['processes']}. Results: {chosen.out}"
    )
    if not summary["submissions_unchanged"]:
        print("WARNING: the folder of submissions changed while it was graded.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
