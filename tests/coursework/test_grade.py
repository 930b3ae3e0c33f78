"""`make grade` from a folder of submissions to scores and feedback, and each of its safeguards.

One test runs all of it, with nbgrader and real kernels, on submissions of the kinds that learners
hand in: an answer, the untouched notebook, an endless loop, a renamed function, an edited test
cell, a file that was cut off. The other tests check one part each, and need no kernel.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from nemotron_lite.coursework import grade, nbgrader_worker
from nemotron_lite.coursework.grade import (
    Limits,
    feedback_page,
    find_isolation,
    grade_folder,
    run_limited,
)
from nemotron_lite.coursework.submissions import SubmissionError
from tests.coursework.conftest import Fresh

SECRET = "SECRET_OF_THE_INSTRUCTOR"
PATIENCE = 20  # seconds for a cell; importing torch is the longest that is not stopped

SPY = """
import os, socket
try:
    socket.create_connection(("192.0.2.1", 9), timeout=2)
    print("network:", "open")
except OSError as error:
    print("network:", type(error).__name__)
print("secret:", os.environ.get("SECRET_OF_THE_INSTRUCTOR", "not here"))
from IPython.display import HTML, display
display(HTML("<script>stolen()</script><i id='kept' onclick='stolen()'>shown</i>"))
import warnings; warnings.warn("a library that warns costs nothing")
"""


def cell(book: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [c for c in book["cells"] if c["id"] == name]
    return found


def put(path: Path, book: dict[str, Any] | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(book if isinstance(book, str) else json.dumps(book))


def hand_in(folder: Path, source: str, released: str) -> None:
    """Five submissions of chapter 00."""
    put(folder / "alice" / "chapter_00" / "chapter_00.ipynb", json.loads(source))
    put(folder / "bob.ipynb", json.loads(released))

    carl = json.loads(source)
    # An endless loop that leaves the processor to the other tests.
    loop = "import time\ndef read_pattern(*a, **k):\n    while True:\n        time.sleep(0.01)"
    cell(carl, "00-read_pattern")["source"] = loop
    cell(carl, "00-kv_bytes")["source"] = "def kv_bytes_per_token(config:\n    return 1"
    put(folder / "carl_chapter_00.ipynb", carl)

    dora = json.loads(source)
    answer = "".join(cell(dora, "00-read_pattern")["source"])
    cell(dora, "00-read_pattern")["source"] = answer.replace("def read_pattern", "def mine")
    cell(dora, "00-moe_parameters-check")["source"] = "5"
    cell(dora, "00-moe_parameters")["source"] = "def moe_parameters(*a, **k):\n    return 1"
    dora["cells"] = [c for c in dora["cells"] if c["id"] != "00-kv_bytes-check"]
    spy = {"cell_type": "code", "id": "spy", "metadata": {}, "source": SPY, "outputs": []}
    dora["cells"].insert(1, {**spy, "execution_count": None})
    put(folder / "dora" / "chapter_00" / "anything.ipynb", dora)

    put(folder / "eve" / "chapter_00" / "chapter_00.ipynb", source[: len(source) // 2])


@pytest.mark.xdist_group("nbgrader")
def test_a_folder_of_submissions_is_graded(
    fresh: Fresh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECRET, "hunter2")
    course, folder, out = tmp_path / "course", tmp_path / "handed in", tmp_path / "results"
    shutil.copytree(fresh.root / "source" / "chapter_00", course / "source" / "chapter_00")
    name = "chapter_00/chapter_00.ipynb"
    hand_in(folder, fresh.texts[f"source/{name}"], fresh.texts[f"release/{name}"])
    before = {p: p.read_bytes() for p in folder.rglob("*.ipynb")}

    summary = grade_folder(
        folder, out, limits=Limits(cell_seconds=PATIENCE), jobs=2, source=course / "source"
    )

    assert {p: p.read_bytes() for p in folder.rglob("*.ipynb")} == before
    assert summary["submissions_unchanged"] is True
    assert json.loads((out / "scores.json").read_text()) == summary
    found = {one["student"]: one for one in summary["submissions"]}
    max_points = found["alice"]["max_points"]
    points = {s: {e["id"]: e["points"] for e in one["exercises"]} for s, one in found.items()}
    status = {s: {e["id"]: e["status"] for e in one["exercises"]} for s, one in found.items()}
    messages = {s: {e["id"]: e["message"] for e in one["exercises"]} for s, one in found.items()}

    alice, bob = found["alice"], found["bob"]
    assert (alice["status"], alice["points"]) == ("graded", max_points)
    assert max_points > 0
    assert (bob["status"], bob["points"]) == ("graded", 0)
    assert set(status["bob"].values()) == {"failed"}
    assert all("not done yet" in line for line in messages["bob"].values())

    assert status["carl"]["00.read_pattern"] == "stopped"
    assert "an endless loop?" in messages["carl"]["00.read_pattern"]
    assert status["carl"]["00.kv_bytes"] == "error"
    assert "its cell ended in SyntaxError" in messages["carl"]["00.kv_bytes"]
    lost = sum(points["alice"][e] for e in ("00.read_pattern", "00.kv_bytes"))
    assert found["carl"]["points"] == max_points - lost

    assert "was it renamed" in messages["dora"]["00.read_pattern"]
    assert status["dora"]["00.moe_parameters"] == "failed"
    assert status["dora"]["00.kv_bytes"] == "passed"
    assert any(
        "00.moe_parameters: the test cell had been changed" in n for n in found["dora"]["notes"]
    )
    assert any("00.kv_bytes: the test cell was missing" in n for n in found["dora"]["notes"])

    assert (found["eve"]["status"], found["eve"]["points"]) == ("unreadable", 0)
    assert found["eve"]["max_points"] is None or found["eve"]["max_points"] == max_points
    assert "is not a notebook: line" in found["eve"]["message"]

    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["student"], float(r["points"])) for r in rows] == [
        (s["student"], s["points"]) for s in summary["submissions"]
    ]
    pages = {s: (out / one["feedback"]).read_text() for s, one in found.items()}
    assert f"chapter_00: {max_points:g} of {max_points:g} points" in pages["alice"]
    assert "00.read_pattern" in pages["alice"]
    assert "is not a notebook" in pages["eve"]
    assert "&lt;br" not in "".join(pages.values()), "lines of a check stand below each other"
    assert ".panel-footer p { white-space: pre-line; }" in pages["alice"]
    assert "stopped because its time was over" in pages["carl"]
    assert "shown</i>" in pages["dora"]
    assert "<script>stolen" not in pages["dora"]
    assert "onclick='stolen()'>shown" not in pages["dora"].replace('"', "'")
    assert "secret: not here" in pages["dora"]
    assert "hunter2" not in pages["dora"]
    assert "network: open" not in pages["dora"]
    if summary["network"] == "off":
        assert "network: OSError" in pages["dora"]
        assert all(one["network_cut_off"] for one in found.values() if one["exercises"])
    else:
        assert summary["network"].startswith("NOT cut off: ")


def test_the_isolation_is_what_it_says() -> None:
    """If the network is messages to be off, a program cannot reach a server of this process."""
    isolation = find_isolation()
    assert isolation.network == "off" or isolation.network.startswith("NOT cut off: ")
    assert bool(isolation.command) == (isolation.network == "off")
    with socket.create_server(("127.0.0.1", 0)) as ours:
        port = ours.getsockname()[1]
        probe = f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=5)"
        reached = os.spawnvp(
            os.P_WAIT,
            (isolation.command or (sys.executable,))[0],
            [*isolation.command, sys.executable, "-c", f"try:\n {probe}\nexcept OSError: exit(7)"],
        )
    assert reached == (7 if isolation.network == "off" else 0)


def test_this_process_is_not_called_cut_off() -> None:
    """Compared with the routes that Linux lists; skipped on a machine without a network."""
    routes = Path("/proc/net/route")
    if not routes.is_file() or len(routes.read_text().splitlines()) < 2:
        pytest.skip("this machine has no route to anywhere, or does not list them")
    assert not nbgrader_worker.cut_off()


def test_without_unshare_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grade.shutil, "which", lambda name: None)
    isolation = find_isolation()
    assert isolation.command == ()
    assert isolation.network == "NOT cut off: unshare is not installed"


def test_a_system_that_refuses_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refusing = tmp_path / "unshare"
    refusing.write_text("#!/bin/sh\necho 'unshare: Operation not permitted' >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(grade.shutil, "which", lambda name: str(refusing))
    assert find_isolation().network == "NOT cut off: unshare: Operation not permitted"


@pytest.mark.parametrize("isolated", [False, True])
def test_when_time_is_over_everything_that_was_started_ends(tmp_path: Path, isolated: bool) -> None:
    command = find_isolation().command if isolated else ()
    if isolated and not command:
        pytest.skip("this system has no namespaces for its users")
    script = (
        "import subprocess, sys, time\n"
        'code = \'import time\\nwhile True:\\n open("alive", "a").write("."); time.sleep(.05)\'\n'
        "subprocess.Popen([sys.executable, '-c', code], start_new_session=True)\n"
        "time.sleep(600)\n"
    )
    reason = run_limited([*command, sys.executable, "-c", script], {}, tmp_path, 3)
    assert reason == "stopped after 3 s, the limit for a whole submission"
    written = (tmp_path / "alive").stat().st_size
    assert written > 0
    time.sleep(0.5)
    assert (tmp_path / "alive").stat().st_size == written, "the grandchild is still running"


def test_a_worker_that_fails_is_explained(tmp_path: Path) -> None:
    def run(code: str) -> str:
        return run_limited([sys.executable, "-c", code], {"job": 1}, tmp_path, 60)

    assert run("import json, sys; assert json.load(sys.stdin) == {'job': 1}") == ""
    assert run("raise SystemExit('nbclient.exceptions.DeadKernelError: Kernel died')") == (
        "its Python process died (out of memory, or ended by the code)"
    )
    assert run("raise SystemExit('first\\n\\nthe last word')") == "nbgrader failed: the last word"


def test_results_never_go_among_the_submissions(tmp_path: Path) -> None:
    (tmp_path / "subs").mkdir()
    with pytest.raises(SubmissionError, match="among the submissions"):
        grade_folder(tmp_path / "subs", tmp_path / "subs" / "results")


def test_a_missing_folder_is_reported_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grade.main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    messages = capsys.readouterr().err
    assert messages.startswith("Nothing was graded: ")
    assert "is not a folder" in messages
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", [".", "..", "file", "file/results"])
def test_a_wrong_out_is_reported_before_anything_runs(
    tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put(tmp_path / "subs" / "ann" / "x.ipynb", "{}")
    put(tmp_path / "here" / "file", "mine")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(grade, "write_source", lambda course: pytest.fail("the grading began"))
    assert grade.main([str(tmp_path / "subs"), "--out", out]) == 2
    messages = capsys.readouterr().err
    assert messages.startswith("Nothing was graded: the results cannot be written into --out ")
    assert (tmp_path / "here" / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["here", "subs"]


def test_a_page_shows_names_and_messages_as_text() -> None:
    result = {
        "student": "<b>Ann</b>", "assignment": "", "points": 0.0, "max_points": None,
        "status": "unreadable", "message": "<script>x()</script>", "notes": ["a & b"],
        "exercises": [],
    }  # fmt: skip
    page = feedback_page(result, "")
    assert "<script>" not in page
    assert "<b>Ann" not in page
    assert "a &amp; b" in page
    assert "0 of ? points" in page
    inside = feedback_page(result, "<html><head></head><body><p>notebook</p></body></html>")
    assert inside.index("unreadable") < inside.index("<p>notebook</p>")


# How the worker reads the points off a test cell.

EXERCISE = {"id": "01.f", "function": "f"}


def value(text: str) -> dict[str, Any]:
    return {"output_type": "execute_result", "data": {"text/plain": text}}


def error(name: str, text: str = "") -> dict[str, Any]:
    return {"output_type": "error", "ename": name, "evalue": text, "traceback": []}


def ran(*outputs: dict[str, Any], points: int = 4) -> dict[str, Any]:
    return {"metadata": {"nbgrader": {"points": points}}, "outputs": list(outputs)}


WARNING = {"output_type": "stream", "name": "stderr", "text": "UserWarning: slow"}
LINE = {"output_type": "display_data", "data": {"text/plain": "01.f: not right yet."}}


@pytest.mark.parametrize(
    ("outputs", "points", "status", "says"),
    [
        ([LINE, value("4")], 4.0, "passed", "01.f: not right yet."),
        ([WARNING, LINE, value("2.5")], 2.5, "partial", "not right yet"),
        ([LINE, value("0")], 0.0, "failed", "not right yet"),
        ([], 0.0, "error", "no number of points"),
        ([value("5")], 0.0, "error", "tampered"),
        ([value("-1")], 0.0, "error", "tampered"),
        ([value("nan")], 0.0, "error", "tampered"),
        ([value("'4'")], 0.0, "error", "tampered"),
        ([value("4"), value("4")], 0.0, "error", "tampered"),
        ([value("4"), error("CellTimeoutError")], 0.0, "stopped", "endless loop"),
        ([error("KeyboardInterrupt")], 0.0, "stopped", "endless loop"),
        ([error("NameError", "name 'f' is not defined")], 0.0, "error", "was it renamed"),
        ([error("NameError", "name 'g' is not defined")], 0.0, "error", "NameError: name 'g'"),
        ([error("TypeError", "pass f itself\nmore")], 0.0, "error", "TypeError: pass f itself"),
    ],
)  # fmt: skip
def test_a_test_cell_earns_its_value_and_nothing_else(
    outputs: list[dict[str, Any]], points: float, status: str, says: str
) -> None:
    found = nbgrader_worker.score_exercise(EXERCISE, ran(*outputs), ran())
    assert (found["points"], found["max_points"], found["status"]) == (points, 4.0, status)
    assert says in found["message"]


def test_an_answer_cell_that_broke_is_named_as_the_cause() -> None:
    broken = ran(error("SyntaxError", "invalid syntax"))
    gone = ran(error("NameError", "name 'f' is not defined"))
    messages = nbgrader_worker.score_exercise(EXERCISE, gone, broken)["message"]
    assert messages == "there is no function f: its cell ended in SyntaxError: invalid syntax"
    stale = nbgrader_worker.score_exercise(EXERCISE, ran(LINE, value("0")), broken)["message"]
    assert stale == "the answer cell ended in SyntaxError: invalid syntax. 01.f: not right yet."
