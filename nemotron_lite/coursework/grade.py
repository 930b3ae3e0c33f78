"""Grade a folder of submissions: `make grade SUBMISSIONS=folder`.

    scores.csv       a row for each learner and assignment
    scores.json      the same with each exercise, what was noticed, limits, versions, isolation
    feedback/<student>/<assignment>.html      the notebook as it ran, with points and comments

The steps: find the notebooks (`submissions`), let nbgrader make the gradebook from source/, and for
each submission copy the clean notebook into a folder of its own, run it there in a process of its
own, and read its points. A submission that cannot be read, or whose process had to be stopped, gets
a line that says so; the others do not notice. The results appear as a whole: they are written into
a new folder that takes the old one's name.

What is kept from the learner's code: the network and the other processes, by Linux namespaces,
where `unshare` may be used without being root; the environment variables of whoever grades; time,
for a cell and for the whole; memory, on Linux. What is not: files. The code runs as you, and can
read and write what you can. The result says which of these held.

Left out: a container of its own for each submission, and protection from a learner who studies the
grader in order to fool it. `exercises/README.md` says what an instructor can do about both.
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
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemotron_lite.coursework.make import EXERCISES, WORKER, CourseworkError, assignment_path
from nemotron_lite.coursework.make import write_release as make_release
from nemotron_lite.coursework.submissions import (
    Assignment,
    Submission,
    SubmissionError,
    clean_copy,
    find_submissions,
    read_notebook,
    released,
)
from nemotron_lite.files import atomic_folder

RESULTS = ("scores.csv", "scores.json", "feedback")
COLUMNS = ("student", "assignment", "points", "max_points", "status", "message", "file")
# nbgrader's page runs the lines of a comment together.
COMMENTS = "<style>.panel-footer p { white-space: pre-line; }</style>"
KEPT = ("PATH", "LANG", "LC_ALL", "PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET")
NAMESPACES = (
    ("--map-root-user", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"),
    ("--map-root-user", "--net"),
)


@dataclass(frozen=True)
class Limits:
    """What one submission may use: seconds of a cell, seconds in all, GiB of memory (0: any)."""

    cell_seconds: int = 60
    seconds: int = 600
    memory_gib: float = 4.0


@dataclass(frozen=True)
class Isolation:
    """What separates a submission from the rest of the machine, and the command that does it."""

    command: tuple[str, ...]
    network: str
    processes: str


def worker(*words: str) -> list[str]:
    """The command that runs nbgrader_worker.py."""
    return [sys.executable, str(WORKER), *words]


def isolation() -> Isolation:
    """Try, strongest first, what this system allows, and say what it is."""
    reason = "unshare is not installed"
    unshare = shutil.which("unshare")
    for options in NAMESPACES if unshare else ():
        command = (str(unshare), *options)
        run = subprocess.run(
            [*command, *worker("probe")], capture_output=True, text=True, timeout=60, check=False
        )
        if run.returncode == 0 and json.loads(run.stdout)["cut_off"]:
            own = json.loads(run.stdout)["own_processes"]
            return Isolation(command, "off", "its own" if own else "yours are visible")
        reason = (run.stderr.strip().splitlines() or ["unshare failed"])[-1]
    return Isolation((), f"NOT cut off: {reason}", "yours are visible")


def environment(home: Path) -> dict[str, str]:
    """Environment of a submission: of the grader's, only what finds Python and the package."""
    kept = {name: os.environ[name] for name in KEPT if name in os.environ}
    folders = ("HOME", "TMPDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    return {**kept, **dict.fromkeys(folders, str(home)), "OMP_NUM_THREADS": threads}


def _started_by(pid: int) -> list[int]:
    """A process and everything below it, children last."""
    if (ps := shutil.which("ps")) is None:
        return [pid]
    listed = subprocess.run([ps, "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
    pairs = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()]
    found = [pid]
    for parent in found:
        found += [child for child, above in pairs if above == parent and child not in found]
    return found


def run_limited(command: Sequence[str], job: dict[str, Any], home: Path, seconds: int) -> str:
    """Run a worker on a job; "" when it ended well, otherwise why not.

    When its time is over, it is killed with all that it started: a kernel in an endless loop is in
    a process group of its own and would stay behind.
    """
    with (home / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True, cwd=home,
            env=environment(home), start_new_session=True,
        )  # fmt: skip
        try:
            process.communicate(json.dumps(job), timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"stopped after {seconds} s, the limit for a whole submission"
        finally:
            if process.poll() is None:
                for pid in _started_by(process.pid):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait()
    return "" if process.returncode == 0 else _reason((home / "log.txt").read_text("utf-8"))


def _reason(log: str) -> str:
    """Why nbgrader gave up, from its log."""
    for name, text in {
        "DeadKernelError": "its Python process died (out of memory, or ended by the code)",
        "ModuleNotFoundError: No module named 'nbgrader'": "nbgrader is not installed here",
    }.items():
        if name in log:
            return text
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return f"nbgrader gave up: {lines[-1][:300] if lines else 'without a word'}"


def _unread(one: Submission, status: str, message: str, most: float | None) -> dict[str, Any]:
    return {
        "student": one.student, "assignment": one.assignment, "points": 0.0, "max_points": most,
        "status": status, "message": message, "notes": list(one.notes), "exercises": [],
    }  # fmt: skip


def grade_one(
    one: Submission, handed_out: Assignment | None, course: Path, jail: Isolation, limits: Limits
) -> tuple[dict[str, Any], str]:
    """Run one submission; its result, and its feedback as HTML ("" when it did not run).

    `course` holds the gradebook.db of the assignments. It is copied, so that submissions can run
    side by side and none sees the points of another.
    """
    most = sum(e.points for e in handed_out.exercises) if handed_out else None
    if one.fault or handed_out is None:
        return _unread(one, "unreadable", one.fault, most), ""
    try:
        notebook, notes = clean_copy(read_notebook(one.path), handed_out)
    except (SubmissionError, OSError) as error:
        return _unread(one, "unreadable", str(error), most), ""
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
        trouble = run_limited([*jail.command, *worker("grade")], job, home, limits.seconds)
        if trouble or not (home / "result.json").is_file():
            status = "stopped" if trouble.startswith("stopped") else "died"
            result = _unread(one, status, trouble or "it left no result", most)
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
        "points": sum(e["points"] for e in exercises), "max_points": most, "status": "graded",
        "message": message + (f"; {', '.join(wrong)}" if wrong else ""),
        "notes": [*one.notes, *notes], "exercises": exercises,
        "seconds": round(ran["seconds"], 1), "network_cut_off": ran["cut_off"],
        "memory_limited": ran["memory_limit"],
    }, feedback  # fmt: skip


def page_of(result: dict[str, Any], feedback: str) -> str:
    """The feedback with a summary on top; a page of its own when the notebook did not run."""
    most = "?" if result["max_points"] is None else f"{result['max_points']:g}"
    lines = [f"{result['status']}: {result['message']}", *result["notes"]]
    lines += [
        f"{e['id']}: {e['points']:g} of {e['max_points']:g}, {e['status']}"
        for e in result["exercises"]
    ]
    title = f"{result['student']} · {result['assignment'] or 'no assignment'}"
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    summary = (
        f"<h3>{html.escape(title)}: {result['points']:g} of {most} points</h3><ul>{items}</ul>"
    )
    head, tag, rest = feedback.partition("<body>")
    if not tag:
        return (
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
            f"<title>{html.escape(title)}</title></head><body>{summary}</body></html>"
        )
    head = head.replace("</head>", f"{COMMENTS}</head>", 1)
    return f'{head}{tag}<div class="container">{summary}</div>{rest}'


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("nbgrader", "nemotron-lite", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _fingerprint(folder: Path) -> str:
    """One number for all that lies in a folder, to show that grading changed nothing."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def grade_folder(
    folder: Path, out: Path, *, limits: Limits | None = None, jobs: int = 1,
    exercises: Path = EXERCISES,
) -> dict[str, Any]:  # fmt: skip
    """Grade every submission below `folder` and write the results into `out`.

    Returns:
        What scores.json holds.

    Raises:
        SubmissionError: no such folder, nothing in it, or `out` lies inside it.
        CourseworkError: nbgrader could not read exercises/source.
    """
    folder, out, limits = folder.resolve(), out.resolve(), limits or Limits()
    if out == folder or folder in out.parents:
        raise SubmissionError(f"the results would go into {out}, among the submissions.")
    if not folder.is_dir():
        raise SubmissionError(f"{folder} is no folder; SUBMISSIONS names one with notebooks in it.")
    before = _fingerprint(folder)
    with tempfile.TemporaryDirectory(prefix="course-") as work:
        course = Path(work)
        shutil.copytree(exercises / "source", course / "source")
        names = sorted(path.name for path in (course / "source").iterdir())
        make_release(course, names)
        known = {n: released(assignment_path(course, "release", n)) for n in names}
        found, jail = find_submissions(folder, known), isolation()
        with ThreadPoolExecutor(max(1, jobs)) as pool:
            running = [
                pool.submit(grade_one, one, known.get(one.assignment), course, jail, limits)
                for one in found
            ]
            done = [r.result() for r in tqdm(running, "grading", unit="submission", leave=False)]
    results = []
    with atomic_folder(out, replaces=lambda name: name in RESULTS) as fresh:
        for one, (result, feedback) in zip(found, done, strict=True):
            page = Path("feedback", one.student, f"{one.assignment or one.path.stem}.html")
            (fresh / page).parent.mkdir(parents=True, exist_ok=True)
            (fresh / page).write_text(page_of(result, feedback), encoding="utf-8")
            file = str(one.path.relative_to(folder))
            results.append({**result, "file": file, "feedback": page.as_posix()})
        summary = {
            "submissions": results, "network": jail.network, "processes": jail.processes,
            "limits": asdict(limits), "versions": _versions(),
            "submissions_unchanged": _fingerprint(folder) == before,
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
    usual = Limits()
    parser.add_argument("submissions", type=Path, help="folder of submissions; it is only read")
    parser.add_argument("--out", type=Path, default=EXERCISES / "grades", help="for the results")
    parser.add_argument("--cell-seconds", type=int, default=usual.cell_seconds)
    parser.add_argument("--seconds", type=int, default=usual.seconds, help="for one submission")
    parser.add_argument("--memory-gib", type=float, default=usual.memory_gib, help="0: no limit")
    parser.add_argument("--jobs", type=int, default=1, help="submissions at the same time")
    chosen = parser.parse_args(arguments)
    limits = Limits(chosen.cell_seconds, chosen.seconds, chosen.memory_gib)
    try:
        summary = grade_folder(chosen.submissions, chosen.out, limits=limits, jobs=chosen.jobs)
    except (SubmissionError, CourseworkError, NotADirectoryError) as error:
        print(f"Nothing was graded: {error}", file=sys.stderr)
        return 2
    for one in summary["submissions"]:
        most = "?" if one["max_points"] is None else f"{one['max_points']:g}"
        print(
            f"{one['student']:<16} {one['assignment'] or '-':<12} {one['points']:>5g} of {most:<4} "
            f"{one['status']}: {one['message']}"
        )
        print("".join(f"{'':<16} note: {note}\n" for note in one["notes"]), end="")
    print(f"Network of the submissions: {summary['network']}. Results: {chosen.out}")
    if not summary["submissions_unchanged"]:
        print("WARNING: the folder of submissions changed while it was graded.", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
