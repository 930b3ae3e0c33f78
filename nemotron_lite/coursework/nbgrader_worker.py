"""The part of `make grade` that imports nbgrader and runs learners' code: one process a submission.

    python nbgrader_worker.py probe                  test the network: loopback, other interfaces
    python nbgrader_worker.py release < job.json     make release/ and gradebook.db from source/
    python nbgrader_worker.py grade < job.json       run one submission; result.json, feedback

`nemotron_lite.coursework.grade` starts it without network access, if the system allows that, and
kills it with all its child processes when its time is over. This script brings up the loopback
interface (a kernel speaks TCP with its client, and a new network namespace starts with the
interface down), limits memory, lets nbgrader execute the notebook, and reads the points off the
test cells.

nbgrader gives full points to a test cell that printed nothing, and zero to one in which a library
printed a warning on stderr. So points are read again here (`score_exercise`): a test cell earns
exactly the number that is its value, and nothing if it ended in an error. The gradebook gets the
same points before the feedback is written.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import logging
import os
import re
import resource
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

LEARNER = "learner"  # instead of the learner's name, because nbgrader uses it in file patterns
GIB = 2**30
UP = 0x1  # IFF_UP
# How a cell ends when its time is over: the kernel's error, or nbgrader's if it did not react.
INTERRUPTED = ("KeyboardInterrupt", "CellTimeoutError")


def _flags(handle: socket.socket, name: str, new: int | None = None) -> int:
    """Read the flags of a network interface, after setting them if `new` is given."""
    get_flags, set_flags = 0x8913, 0x8914  # SIOCGIFFLAGS, SIOCSIFFLAGS of Linux
    if new is not None:
        fcntl.ioctl(handle, set_flags, struct.pack("16sh14x", name.encode(), new))
    found = fcntl.ioctl(handle, get_flags, struct.pack("16sh14x", name.encode(), 0))
    return int(struct.unpack("16sh14x", found)[1])


def loopback_up() -> None:
    """Bring the interface lo up, as `ip link set lo up` does where iproute2 is installed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        _flags(handle, "lo", _flags(handle, "lo") | UP)


def cut_off() -> bool:
    """Whether this process has no network: every interface except loopback is down.

    Interfaces may exist: a new namespace can start with tunnels that are down.
    """
    if sys.platform != "linux":
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        names = {name for _, name in socket.if_nameindex()} - {"lo"}
        return not any(_flags(handle, name) & UP for name in names)


def probe() -> dict[str, Any]:
    """Test what a kernel needs: a connection to itself over 127.0.0.1."""
    if cut_off():
        loopback_up()
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    return {"cut_off": cut_off(), "own_processes": os.getpid() == 1}


def limit_memory(gib: float) -> bool:
    """Limit the memory of this process and of each child; False if the system cannot."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != "linux" or not gib:
        return False
    amount = int(gib * GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (amount, amount))
    return True


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL


def course_config(root: Path, **execute: Any) -> Any:
    """nbgrader's settings for the course in the folder `root`."""
    from traitlets.config import Config

    from nemotron_lite.coursework.nbgrader_settings import apply

    config = Config()
    apply(config)
    config.CourseDirectory.root = str(root)
    config.CourseDirectory.db_url = f"sqlite:///{root / 'gradebook.db'}"
    for name, value in execute.items():
        config.Execute[name] = value
    return config


def run_converter(converter: type, config: Any, **directory: str) -> None:
    """Run one of nbgrader's converters; its log goes to stderr."""
    from nbgrader.coursedir import CourseDirectory

    place = CourseDirectory(config=config, **directory)
    converter(coursedir=place, config=config).start()


def release(job: dict[str, Any]) -> None:
    """Make release/ and the gradebook of the assignments named in the job."""
    from nbgrader.converters import GenerateAssignment

    config = course_config(Path(job["root"]))
    for assignment in job["assignments"]:
        run_converter(GenerateAssignment, config, assignment_id=assignment)


def score_exercise(
    exercise: dict[str, str], test: dict[str, Any], answer: dict[str, Any] | None
) -> dict[str, Any]:
    """Points, status and a message about an exercise, from the outputs of its executed cells.

    `status` is passed, partial, failed, error (the cell raised) or stopped (it ran too long).
    """
    function, max_points = exercise["function"], float(test["metadata"]["nbgrader"]["points"])
    zero = {"points": 0.0, "max_points": max_points}
    broken = _error(answer)
    if (error := _error(test)) is not None:
        status = "stopped" if error["ename"] in INTERRUPTED else "error"
        return {**zero, "status": status, "message": _line(error, broken, function)}
    values = [o for o in test["outputs"] if o["output_type"] == "execute_result"]
    points = _number("".join(values[0]["data"].get("text/plain", ""))) if len(values) == 1 else None
    shown = ["".join(o.get("data", {}).get("text/plain", "")) for o in test["outputs"]]
    message = next((text for text in shown if text.startswith(f"{exercise['id']}:")), "")
    if points is None or not 0 <= points <= max_points:
        text = (
            "the test cell returned no number of points; was `check` or the kernel tampered with?"
        )
        return {**zero, "status": "error", "message": text}
    status = "passed" if points == max_points else "partial" if points else "failed"
    if broken is not None and not points:
        message = f"the answer cell ended in {_line(broken, None, function)}. {message}"
    return {"points": points, "max_points": max_points, "status": status, "message": message}


def _error(cell: dict[str, Any] | None) -> dict[str, Any] | None:
    found = [o for o in (cell or {}).get("outputs", []) if o["output_type"] == "error"]
    return found[0] if found else None


def _number(text: str) -> float | None:
    plain = re.fullmatch(r"\d+(\.\d+)?", text.strip())
    return float(plain[0]) if plain else None


def _line(error: dict[str, Any], broken: dict[str, Any] | None, function: str) -> str:
    """An error in words for the learner."""
    name, text = error["ename"], error["evalue"]
    if name in INTERRUPTED:
        return "stopped because its time was over: an endless loop?"
    if name == "NameError" and f"'{function}'" in text:
        if broken is not None:
            return f"there is no function {function}: its cell ended in {_line(broken, None, '')}"
        return f"there is no function {function}; was it renamed, or its cell deleted?"
    return f"{name}: {text}".strip().splitlines()[0][:300]


def grade(job: dict[str, Any]) -> dict[str, Any]:
    """Execute the submission in the job's folder and return what each exercise earned."""
    root, name = Path(job["root"]), job["assignment"]
    isolated = cut_off()
    if isolated:
        loopback_up()
    limited = limit_memory(job["memory_gib"])

    from nbgrader.converters import Autograde, GenerateFeedback

    config = course_config(root, timeout=job["cell_seconds"])
    started = time.monotonic()
    run_converter(Autograde, config, assignment_id=name, student_id=LEARNER)
    seconds = time.monotonic() - started
    path = root / "autograded" / LEARNER / name / f"{name}.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = {c["metadata"].get("nbgrader", {}).get("grade_id"): c for c in notebook["cells"]}
    marks = {
        e["id"]: score_exercise(e, cells[e["test"]], cells.get(e["answer"]))
        for e in job["exercises"]
    }
    _save_points(root, job, marks)
    run_converter(GenerateFeedback, config, assignment_id=name, student_id=LEARNER)
    return {"cut_off": isolated, "memory_limit": limited, "seconds": seconds, "exercises": marks}


def _save_points(root: Path, job: dict[str, Any], marks: dict[str, dict[str, Any]]) -> None:
    """Write points into the gradebook, and messages into the comments that feedback shows."""
    from nbgrader.api import Gradebook, MissingEntry

    with Gradebook(f"sqlite:///{root / 'gradebook.db'}") as book:
        for exercise in job["exercises"]:
            mine = marks[exercise["id"]]
            where = job["assignment"], job["assignment"], LEARNER
            grade = book.find_grade(exercise["test"], *where)
            grade.auto_score, grade.needs_manual_grade = mine["points"], False
            try:
                comment = book.find_comment(exercise["answer"], *where)
            except MissingEntry:
                continue  # the answer cell was deleted
            message = mine["message"].removeprefix(f"{exercise['id']}: ")
            comment.manual_comment = f"{exercise['id']}: {message}"
        book.db.commit()


def main() -> int:
    """Run one of the three commands; jobs come on stdin, so no learner's name is an argument."""
    die_with_parent()
    # nbgrader runs alembic by name, which PATH may lack if the environment is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # jsonschema builds this grammar of web addresses at import, which takes longer than grading an
    # exercise, and nothing here checks an address. None in sys.modules makes the import fail.
    sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    command = sys.argv[1]
    if command == "probe":
        json.dump(probe(), sys.stdout)
        return 0
    job = json.load(sys.stdin)
    if command == "release":
        release(job)
        return 0
    result = grade(job)
    temporary = Path(job["root"]) / "result.tmp"
    temporary.write_text(json.dumps(result), encoding="utf-8")
    temporary.replace(Path(job["root"]) / "result.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
