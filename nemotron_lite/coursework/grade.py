"""Grade a folder of submissions: `make grade SUBMISSIONS=folder`.

    scores.csv       a row for each learner and assignment
    scores.json      the same with each exercise, notes, limits, versions and isolation
    feedback/<student>/<assignment>.html      the executed notebook with points and comments

The steps:

    1. make the assignments and nbgrader's gradebook from the exercises of the package,
    2. find the submitted notebooks (`submissions`),
    3. copy each one, cleaned, into its own temporary folder and run it in its own process,
    4. read the points off its test cells,
    5. write all results into a new folder, which then replaces the old one in one step. It is
       created before step 1, so that a wrong --out is reported before any submission runs.

A submission that cannot be read, or whose process had to be stopped, gets a result that says so.
The other submissions are graded all the same.

The code of a learner cannot use the network or see other processes, if this Linux lets ordinary
users make namespaces with `unshare`. It does not get your environment variables. It has a limit of
time for each cell and for the whole, and on Linux a limit of memory. Files are not protected: the
code runs as you, and can read and write what you can. The result says which limits were in force.

Left out: a container for each submission, and protection from a learner who studies the grader in
order to fool it. `exercises/README.md` says what an instructor can do about both.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import html
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from nemotron_lite.coursework.make import (
    WORKER,
    CourseworkError,
    assignment_path,
    write_release,
    write_source,
)
from nemotron_lite.coursework.submissions import (
    Assignment,
    Submission,
    SubmissionError,
    clean_copy,
    find_submissions,
    read_notebook,
    read_release,
)
from nemotron_lite.files import atomic_folder

RESULTS = ("scores.csv", "scores.json", "feedback")
COLUMNS = ("student", "assignment", "points", "max_points", "status", "message", "file")
# nbgrader's page shows the lines of a comment as one line; with this they stay apart.
COMMENT_STYLE = "<style>.panel-footer p { white-space: pre-line; }</style>"
KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET")
NAMESPACES = (
    ("--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
    ("--map-root-user", "--net"),
)


@dataclass(frozen=True)
class Limits:
    """Limits of one submission: seconds per cell, seconds in all, GiB of memory (0: no limit)."""

    cell_seconds: int = 60
    seconds: int = 600
    memory_gib: float = 4.0


@dataclass(frozen=True)
class Isolation:
    """How a submission is separated from the machine, and the command that starts it that way."""

    command: tuple[str, ...]
    network: str
    processes: str


def worker_command(*arguments: str) -> list[str]:
    """The command that runs nbgrader_worker.py."""
    return [sys.executable, str(WORKER), *arguments]


def find_isolation() -> Isolation:
    """The strongest isolation that this system allows; each kind is tried by running the worker."""
    reason = "unshare is not installed"
    unshare = shutil.which("unshare")
    for options in NAMESPACES if unshare else ():
        command = (str(unshare), *options)
        run = subprocess.run(
            [*command, *worker_command("probe")],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if run.returncode == 0 and json.loads(run.stdout)["cut_off"]:
            own = json.loads(run.stdout)["own_processes"]
            return Isolation(command, "off", "its own" if own else "yours are visible")
        reason = (run.stderr.strip().splitlines() or ["unshare failed"])[-1]
    return Isolation((), f"NOT cut off: {reason}", "yours are visible")


def submission_environment(home: Path) -> dict[str, str]:
    """Environment variables of a submission: of yours only those that find Python and packages."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    folders = ("HOME", "TMPDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {**kept, **dict.fromkeys(folders, str(home)), "OMP_NUM_THREADS": threads}


def _kill_with_children(pid: int) -> None:
    """Kill a process and all its descendants."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def run_limited(command: Sequence[str], job: dict[str, Any], home: Path, seconds: int) -> str:
    """Run a worker on a job; returns "" if it succeeded, otherwise the reason.

    After `seconds` the worker is killed together with every process it started: a kernel in an
    endless loop has its own process group, and would otherwise go on running.
    """
    with (home / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            cwd=home,
            env=submission_environment(home),
            start_new_session=True,
        )
        try:
            process.communicate(json.dumps(job), timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds} s, the limit for a whole submission"
        finally:
            if process.poll() is None:
                _kill_with_children(process.pid)
                process.wait()
    return "" if process.returncode == 0 else _reason((home / "log.txt").read_text("utf-8"))


def _reason(log: str) -> str:
    """Why nbgrader failed, from its log."""
    for name, text in {
        "DeadKernelError": "its Python process died (out of memory, or ended by the code)",
        "ModuleNotFoundError: No module named 'nbgrader'": "nbgrader is not installed here",
    }.items():
        if name in log:
            return text
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"nbgrader failed: {lines[-1][:300] if lines else 'its log is empty'}"


def _ungraded(
    one: Submission, status: str, message: str, max_points: float | None
) -> dict[str, Any]:
    return {
        "student": one.student,
        "assignment": one.assignment,
        "points": 0.0,
        "max_points": max_points,
        "status": status,
        "message": message,
        "notes": list(one.notes),
        "exercises": [],
    }


def grade_one(
    one: Submission,
    handed_out: Assignment | None,
    course: Path,
    isolation: Isolation,
    limits: Limits,
) -> tuple[dict[str, Any], str]:
    """Run one submission; returns its result and its feedback as HTML ("" if it did not run).

    `course` holds the gradebook.db of the assignments. Each submission gets a copy, so that several
    can run at the same time and none sees the points of another.
    """
    max_points = sum(e.points for e in handed_out.exercises) if handed_out else None
    if one.problem or handed_out is None:
        return _ungraded(one, "unreadable", one.problem, max_points), ""
    try:
        notebook, notes = clean_copy(read_notebook(one.path), handed_out)
    except (SubmissionError, OSError) as error:
        return _ungraded(one, "unreadable", str(error), max_points), ""
    name = handed_out.name
    with tempfile.TemporaryDirectory(prefix="grading-") as folder:
        home = Path(folder).resolve()
        shutil.copy(course / "gradebook.db", home)
        inside = home / "submitted" / "learner" / name / f"{name}.ipynb"
        inside.parent.mkdir(parents=True)
        inside.write_text(json.dumps(notebook), encoding="utf-8")
        job = {
            "root": str(home), "assignment": name, "cell_seconds": limits.cell_seconds,
            "memory_gib": limits.memory_gib, "exercises": [asdict(e) for e in handed_out.exercises],
        }  # fmt: skip
        reason = run_limited(
            [*isolation.command, *worker_command("grade")], job, home, limits.seconds
        )
        if reason or not (home / "result.json").is_file():
            status = "stopped" if reason.startswith("stopped") else "died"
            result = _ungraded(one, status, reason or "it wrote no result", max_points)
            return {**result, "notes": [*one.notes, *notes]}, ""
        ran = json.loads((home / "result.json").read_text(encoding="utf-8"))
        page = home / "feedback" / "learner" / name / f"{name}.html"
        feedback = page.read_text(encoding="utf-8")
    exercises = [{"id": i, **of} for i, of in ran["exercises"].items()]
    right = sum(e["status"] == "passed" for e in exercises)
    wrong = [f"{e['id']} {e['status']}" for e in exercises if e["status"] != "passed"]
    message = f"{right} of {len(exercises)} exercises right"
    return {
        "student": one.student, "assignment": name,
        "points": sum(e["points"] for e in exercises), "max_points": max_points, "status": "graded",
        "message": message + (f"; {', '.join(wrong)}" if wrong else ""),
        "notes": [*one.notes, *notes], "exercises": exercises,
        "seconds": round(ran["seconds"], 1), "network_cut_off": ran["cut_off"],
        "memory_limited": ran["memory_limit"],
    }, feedback  # fmt: skip


def feedback_page(result: dict[str, Any], feedback: str) -> str:
    """The feedback with a summary at the top; only the summary if the notebook did not run."""
    max_points = "?" if result["max_points"] is None else f"{result['max_points']:g}"
    lines = [f"{result['status']}: {result['message']}", *result["notes"]]
    lines += [
        f"{e['id']}: {e['points']:g} of {e['max_points']:g}, {e['status']}"
        for e in result["exercises"]
    ]
    title = f"{result['student']} · {result['assignment'] or 'no assignment'}"
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    score = f"{result['points']:g} of {max_points} points"
    summary = f"<h3>{html.escape(title)}: {score}</h3><ul>{items}</ul>"
    head, tag, rest = feedback.partition("<body>")
    if not tag:
        return (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{html.escape(title)}</title></head><body>{summary}</body></html>"
        )
    head = head.replace("</head>", f"{COMMENT_STYLE}</head>", 1)
    return f'{head}{tag}<div class="container">{summary}</div>{rest}'


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("nbgrader", "nemotron-lite", "torch"):
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
    source: Path | None = None,
) -> dict[str, Any]:
    """Grade every submission below `folder` and write the results into `out`.

    Args:
        folder: the submissions; it is only read.
        out: the folder for the results.
        limits: of each submission.
        jobs: submissions at the same time.
        source: a folder of source notebooks, such as exercises/source; None makes them from the
            exercises of the package, for all chapters.

    Returns:
        What scores.json holds.

    Raises:
        SubmissionError: no such folder, nothing in it, `out` lies inside it, or `out` cannot be
            written. No submission has run then.
        CourseworkError: nbgrader could not make the assignments.
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
        return _grade_into(fresh, folder, limits, jobs, source)


def _grade_into(
    fresh: Path, folder: Path, limits: Limits, jobs: int, source: Path | None
) -> dict[str, Any]:
    """Grade every submission below `folder` and write the results into the folder `fresh`."""
    before = _folder_hash(folder)
    with tempfile.TemporaryDirectory(prefix="course-") as work:
        course = Path(work)
        if source is None:
            names = write_source(course)
        else:
            shutil.copytree(source, course / "source")
            names = sorted(path.name for path in (course / "source").iterdir())
        write_release(course, names)
        known = {n: read_release(assignment_path(course, "release", n)) for n in names}
        found, isolation = find_submissions(folder, known), find_isolation()
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            running = [
                pool.submit(grade_one, one, known.get(one.assignment), course, isolation, limits)
                for one in found
            ]
            done = [r.result() for r in tqdm(running, "grading", unit="submission", leave=False)]
    results = []
    for one, (result, feedback) in zip(found, done, strict=True):
        page = Path("feedback", one.student, f"{one.assignment or one.path.stem}.html")
        (fresh / page).parent.mkdir(parents=True, exist_ok=True)
        (fresh / page).write_text(feedback_page(result, feedback), encoding="utf-8")
        file = str(one.path.relative_to(folder))
        results.append({**result, "file": file, "feedback": page.as_posix()})
    summary = {
        "submissions": results, "network": isolation.network, "processes": isolation.processes,
        "limits": asdict(limits), "versions": _versions(),
        "submissions_unchanged": _folder_hash(folder) == before,
        "graded_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip
    (fresh / "scores.json").write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    with (fresh / "scores.csv").open("w", newline="", encoding="utf-8") as table:
        rows = csv.DictWriter(table, COLUMNS, extrasaction="ignore")
        rows.writeheader()
        rows.writerows(results)
    return summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Grade a folder from the command line and print a line for each submission."""
    parser = argparse.ArgumentParser(prog="make grade SUBMISSIONS=folder", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    default = Limits()
    parser.add_argument("submissions", type=Path, help="folder of submissions; it is only read")
    parser.add_argument("--out", type=Path, default=Path("grades"), help="results (./grades)")
    parser.add_argument("--cell-seconds", type=int, default=default.cell_seconds)
    parser.add_argument("--seconds", type=int, default=default.seconds, help="for one submission")
    parser.add_argument("--memory-gib", type=float, default=default.memory_gib, help="0: no limit")
    parser.add_argument("--jobs", type=int, default=1, help="submissions at the same time")
    chosen = parser.parse_args(arguments)
    limits = Limits(chosen.cell_seconds, chosen.seconds, chosen.memory_gib)
    try:
        summary = grade_folder(chosen.submissions, chosen.out, limits=limits, jobs=chosen.jobs)
    except (SubmissionError, CourseworkError) as error:
        print(f"Nothing was graded: {error}", file=sys.stderr)
        return 2
    for one in summary["submissions"]:
        max_points = "?" if one["max_points"] is None else f"{one['max_points']:g}"
        print(
            f"{one['student']:<16} {one['assignment'] or '-':<12} "
            f"{one['points']:>5g} of {max_points:<4} {one['status']}: {one['message']}"
        )
        print("".join(f"{'':<16} note: {note}\n" for note in one["notes"]), end="")
    print(f"Network of the submissions: {summary['network']}. Results: {chosen.out}")
    if not summary["submissions_unchanged"]:
        print("WARNING: the folder of submissions changed while it was graded.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
