"""Grade one submission, within a boundary: whatever goes wrong becomes its own row and page.

    find and read     `submissions`, before anything runs
    execute, check    `scoring`
    the page          `feedback`, in limited time; a plain one if that fails

Rows are plain data: what scores.json holds. All text in them that a learner chose is written so
that any file and any terminal can hold it (`texts`), and points are numbers of the right range.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nemotron_lite.course import exercises
from nemotron_lite.coursework.clean_copy import Assignment, CleanCopy, grade_id, text_of
from nemotron_lite.coursework.feedback import feedback_page, plain_page
from nemotron_lite.coursework.isolation import Isolation, Limits
from nemotron_lite.coursework.scoring import Score, Scored, score_submission
from nemotron_lite.coursework.scratch import scratch_folder
from nemotron_lite.coursework.submissions import Submission, told
from nemotron_lite.coursework.texts import one_line, writable
from nemotron_lite.coursework.time_limit import OverTimeError, time_limit

PAGE_SECONDS = 20.0
LONGEST_MESSAGE = 5000  # characters


class ScoreError(ValueError):
    """Points that no exercise can earn: a fault of a check or of the grader."""


@dataclass(frozen=True)
class Graded:
    """What came out: the row, the feedback page, the sources of the answers by exercise."""

    row: dict[str, Any]
    page: str
    sources: dict[str, str]


def row_of(one: Submission, assignment: Assignment | None, **more: Any) -> dict[str, Any]:
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
) -> Graded:
    """Execute and grade one submission; raises nothing that is about it."""
    torch.set_num_threads(1)
    if one.problem or assignment is None or one.copy is None:
        row = row_of(one, assignment, message=one.problem)
        return Graded(row, page_of(row), {})
    try:
        scored = execute(one.copy, assignment, site, isolation, limits, salt)
    except Exception as error:  # the others are graded all the same
        return failed(one, assignment, told(error))
    right = sum(e.status == "passed" for e in scored.scores)
    wrong = [f"{e.id} {e.status}" for e in scored.scores if e.status != "passed"]
    message = f"{right} of {len(scored.scores)} exercises right"
    row = row_of(
        one,
        assignment,
        points=sum(e.points for e in scored.scores if e.kind == "must"),
        optional_points=sum(e.points for e in scored.scores if e.kind != "must"),
        status="graded",
        message=message + (f"; {', '.join(wrong)}" if wrong else ""),
        notes=[one_line(note) for note in (*one.notes, *one.copy.notes, *scored.notes)],
        flags=sorted({*one.copy.flags, *scored.flags}),
        exercises=[asdict(e) for e in scored.scores],
        seconds=scored.seconds,
        network_cut_off=scored.facts.get("cut_off") is True,
        memory_limited=scored.facts.get("memory_limited") is True,
        processes_limited=scored.facts.get("processes_limited") is True,
    )
    by_name = {grade_id(cell): text_of(cell) for cell in one.copy.notebook["cells"]}
    sources = {e.id: by_name[e.answer] for e in assignment.exercises if e.answer in by_name}
    return Graded(row, page_of(row, one.copy.notebook, scored.outputs), sources)


def execute(
    copy: CleanCopy,
    assignment: Assignment,
    site: Path,
    isolation: Isolation,
    limits: Limits,
    salt: str,
) -> Scored:
    """Score a clean copy; the scores are checked.

    Raises:
        ScoreError: a score is none.
    """
    with scratch_folder("grading-") as folder:
        own_site = site
        if not isolation.jailed:  # there it could be written to
            own_site = folder / "site"
            shutil.copytree(site, own_site)
        scored = score_submission(copy.notebook, assignment, own_site, isolation, limits, salt)
    check_scores(scored.scores, assignment)
    for score in scored.scores:
        score.message = writable(score.message)[:LONGEST_MESSAGE]
    return scored


def check_scores(scores: Sequence[Score], assignment: Assignment) -> None:
    """Refuse points of another type than a plain number, or out of range.

    Raises:
        ScoreError: the text names the exercise and its points.
    """
    most = {one.id: one.points for one in assignment.exercises}
    if [score.id for score in scores] != list(most):
        raise ScoreError("the scores are not those of the exercises of the assignment")
    for score in scores:
        for points in (score.points, score.max_points):
            if type(points) is not float or not math.isfinite(points):
                raise ScoreError(f"{score.id} earned {points!r}, which is no number of points")
        if score.max_points != most[score.id] or not 0 <= score.points <= score.max_points:
            raise ScoreError(
                f"{score.id} earned {score.points:g} of {score.max_points:g} points; "
                f"expected 0 to {most[score.id]:g}"
            )


def failed(one: Submission, assignment: Assignment | None, why: str) -> Graded:
    """The row and page of a submission for which the grader failed."""
    message = one_line(f"the grader failed: {why}; grade it by hand")
    row = row_of(one, assignment, status="error", message=message, flags=["grader_failed"])
    return Graded(row, page_of(row, one.copy.notebook if one.copy else None), {})


def page_of(
    row: dict[str, Any],
    notebook: dict[str, Any] | None = None,
    outputs: dict[int, list[dict[str, Any]]] | None = None,
) -> str:
    """The feedback page; one without colours and formulas if what is in it takes too long."""
    try:
        with time_limit(PAGE_SECONDS):
            page = feedback_page(row, notebook, outputs)
    except (Exception, OverTimeError) as error:
        page = plain_page(row, notebook, told(error))
    return writable(page)
