"""How notebooks are tested: what is compared, what is refused, and which process runs a cell.

pytest runs on small notebooks in a temporary folder, with the options of pyproject.toml and with
the conftest.py and sanitize.cfg of the chapters.
"""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

from nemotron_lite.authoring import publish
from nemotron_lite.course.display import PLOTLY
from tests.authoring.samples import runnable

ROOT = Path(__file__).resolve().parents[2]
DISPLAY = f"""
from IPython.display import display
figure = {{"data": [{{"y": [1]}}]}}
display({{"text/plain": "a figure", "text/html": "0.1 s", "{PLOTLY}": figure}}, raw=True)
"""
SOURCES = ("x = 3", "print('x is', x)", DISPLAY, "import sys; print('note', file=sys.stderr)", "x")


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """A small chapter, published."""
    return publish.clean(publish.execute(runnable(*SOURCES), tmp_path_factory.mktemp("run")))


def prepared(folder: Path) -> Path:
    """A folder with conftest.py and sanitize.cfg of the chapters, and no notebook yet."""
    for name in ("notebooks/conftest.py", "notebooks/sanitize.cfg"):
        shutil.copy(ROOT / name, folder)
    return folder


def run(folder: Path, *options: str) -> tuple[dict[str, list[str]], str]:
    """Run pytest as the project does; returns file → outcomes of its tests, and the output."""
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-rA"]
    command += [f"--rootdir={folder}", "-p", "no:cacheprovider", *options, str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    outcomes: dict[str, list[str]] = {}
    for outcome, file in re.findall(
        r"^(PASSED|FAILED|ERROR|XFAIL|XPASS) (\S+?)::", done.stdout, re.M
    ):
        outcomes.setdefault(file, []).append(outcome)
    assert outcomes, done.stdout + done.stderr
    return outcomes, done.stdout


# A change to the stored notebook, and what the notebook test must say about it.
SPOILT: dict[str, tuple[Callable[[NotebookNode], object], str]] = {
    "stdout": (lambda n: n.cells[1].outputs[0].update(text="x is four\n"), "x is four"),
    "text": (lambda n: n.cells[2].outputs[0].data.update({"text/plain": "a map"}), "a map"),
    "result": (lambda n: n.cells[4].outputs[0].data.update({"text/plain": "55"}), "55"),
    "gone": (lambda n: n.cells[4].update(outputs=[]), "Unexpected output fields"),
    "source": (lambda n: n.cells[0].update(source="x = 17"), "x is 17"),
    "error": (lambda n: n.cells[0].update(source="x = 1 / 0"), "ZeroDivisionError"),
    "unrun": (
        lambda n: [c.update(execution_count=None, outputs=[]) for c in n.cells],
        "never run; run `make notebooks`",
    ),
}


@pytest.fixture(scope="module")
def judged(
    committed: NotebookNode, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, list[str]], str]:
    """One run over the small chapter, over one that differs where it may, and the spoilt ones."""
    folder = prepared(tmp_path_factory.mktemp("chapters"))
    nbformat.write(committed, folder / "same.ipynb")
    other = copy.deepcopy(committed)
    data = other.cells[2].outputs[0].data
    data.update({"text/html": "0.7 s", "image/png": "aGk=", PLOTLY: {"data": [{"y": [2]}]}})
    nbformat.write(other, folder / "other_machine.ipynb")
    for name, (spoil, _) in SPOILT.items():
        spoilt = copy.deepcopy(committed)
        spoil(spoilt)
        nbformat.write(spoilt, folder / f"{name}.ipynb")
    return run(folder)


@pytest.mark.parametrize("name", ["same", "other_machine"])
def test_a_chapter_that_says_the_same_passes(
    name: str, judged: tuple[dict[str, list[str]], str]
) -> None:
    assert judged[0][f"{name}.ipynb"] == ["PASSED"] * len(SOURCES)


@pytest.mark.parametrize("name", SPOILT)
def test_a_chapter_that_says_something_else_fails(
    name: str, judged: tuple[dict[str, list[str]], str]
) -> None:
    outcomes, output_text = judged
    assert "FAILED" in outcomes[f"{name}.ipynb"]
    assert SPOILT[name][1] in output_text


def test_a_chapter_that_was_never_run_has_no_cell_that_passes(
    judged: tuple[dict[str, list[str]], str],
) -> None:
    assert judged[0]["unrun.ipynb"] == ["FAILED"] * len(SOURCES)


# Each test waits, at most 30 seconds, until a second worker has run a test of this file: which
# worker is free first is random, and nothing else decides where single tests run.
MEETING = """
import os, pathlib, time, pytest

HERE = pathlib.Path(__file__).with_name("came")

@pytest.mark.parametrize("n", range(12))
def test_one(n):
    HERE.mkdir(exist_ok=True)
    (HERE / os.environ["PYTEST_XDIST_WORKER"]).touch()
    end = time.monotonic() + 30
    while len(list(HERE.iterdir())) < 2 and time.monotonic() < end:
        time.sleep(0.05)
"""


def test_a_chapter_stays_in_one_process_and_other_tests_spread(
    committed: NotebookNode, tmp_path: Path
) -> None:
    """Otherwise half of its cells would run in a kernel that never saw the first."""
    folder = tmp_path / "notebooks"
    folder.mkdir()
    prepared(folder)
    shutil.copy(ROOT / "conftest.py", tmp_path)
    for name in ("00_a.ipynb", "01_b.ipynb"):
        nbformat.write(committed, folder / name)
    (tmp_path / "tests" / "browser").mkdir(parents=True)
    many = "import pytest\n\n@pytest.mark.parametrize('n', range(12))\ndef test_one(n): ...\n"
    (tmp_path / "tests" / "test_others.py").write_text(MEETING)
    (tmp_path / "tests" / "browser" / "test_a.py").write_text(many)
    (tmp_path / "tests" / "browser" / "test_b.py").write_text(many)
    _, output_text = run(tmp_path, "-n", "2", "-v")
    assert re.search(r"^=+ 46 passed in", output_text, re.M), output_text
    workers: dict[str, set[str]] = {}
    for worker, file in re.findall(
        r"^\[(gw\d)\].* PASSED (\S+?)::(?:ipynb::)?\w", output_text, re.M
    ):
        workers.setdefault(Path(file).name, set()).add(worker)
    assert len(workers["00_a"]) == len(workers["01_b"]) == 1
    assert len(workers["test_a.py"] | workers["test_b.py"]) == 1
    assert workers["test_others.py"] == {"gw0", "gw1"}


def test_addresses_are_not_compared_and_times_are() -> None:
    text = (ROOT / "notebooks" / "sanitize.cfg").read_text()
    pairs = re.findall(r"^regex: (.*)\nreplace: (.*)$", text, re.M)
    assert len(pairs) == text.count("\n[") == 2

    def sanitized(output_text: str) -> str:
        for pattern, replacement in pairs:
            output_text = re.sub(pattern, replacement, output_text)
        return output_text

    assert sanitized("<A at 0x7f3a2b1c9d10>") == sanitized("<A at 0x7f0000000010>")
    assert sanitized("1.25 s, 0xFF") == "1.25 s, 0xFF"
