"""The JupyterLab of `make lab` and one browser for all tests of this folder, over copies."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.authoring.samples import runnable
from tests.browser import chromium
from tests.course.lab.serving import Server, serve

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "work/empty"  # a folder of the learner without .course: what is done there is not stored
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))

FIGURE = """
import plotly.graph_objects as go
from nemotron_lite.course import *
from nemotron_lite.course.plotting import described, explore, slider, stepper
words = "A line of three points whose first one follows the slider above it, up and down."
figure = described(go.Figure(go.Scatter(y=[1, 2, 4])), words)
move = lambda fig, n: fig.data[0].update(y=[n, 2, 4])
still = lambda fig, n: None
"""
GOOD = (FIGURE, "show(explore(figure, move, n=slider('moves', 1, 9)), figure)")
BAD = (
    FIGURE,
    "show(explore(figure, still, n=slider('stands still', 1, 9)), figure)",
    'from IPython.display import HTML\nHTML(\'<img src="https://example.org/a.png" alt="a">\')',
    "1 / 0",
    "print('after the error')",
)
UPDATING = (
    FIGURE,
    """import time
from nemotron_lite.course.display import show_updating
replace = show_updating(figure)
for n in (5, 6, 7):
    time.sleep(0.5)
    replace(described(go.Figure(go.Scatter(y=[n, n, n])), words))""",
)
# Everything that a chapter shows with a widget, once.
EVERYTHING = (
    FIGURE,
    """from nemotron_lite.course import predictions, quizzes
asked = predictions.Prediction("n", "How many?", low=4)
predictions.load_predictions = lambda chapter: {"n": asked}
option = quizzes.Option("It forgets faster.", True, "Because exp(dt A) shrinks.")
other = quizzes.Option("It forgets more slowly.", False, "The other way round.")
question = quizzes.Question("O1", "What does a large dt do?", (option, other))
quizzes.load_quiz = lambda chapter, part="questions": (question,)
setup("01", threads=1)""",
    "show(figure)",
    "show(explore(figure, move, n=slider('moves', 1, 9)), figure)",
    "go_on = lambda fig, step: fig.data[0].update(y=[step, 2, 4])\n"
    "show(stepper(figure, go_on, steps=9, label='token', start=4), figure)",
    'predict("n")',
    'measured("n", 4.5)',
    "total = sum(progress(range(300), 'training'))",
    "quiz('01')",
)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The learner's JupyterLab; work/ has the chapters and three small notebooks."""
    chromium.required()
    folder = tmp_path_factory.mktemp("lab")
    for name in ("notebooks", "work", FOLDER):
        (folder / name).mkdir()
    for path in CHAPTERS:
        shutil.copy(path, folder / "notebooks")
    samples = {"good": GOOD, "bad": BAD, "updating": UPDATING, "everything": EVERYTHING}
    for name, cells in samples.items():
        nbformat.write(runnable(*cells), folder / "work" / f"{name}.ipynb")
    with serve(folder, folder / "home") as running:
        yield running


@pytest.fixture(scope="session")
def browser(playwright_driver: Any) -> Iterator[object]:
    """Debian's chromium, driven by playwright."""
    path = chromium.required()
    running = playwright_driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
    yield running
    running.close()


@pytest.fixture(scope="session")
def lab(server: Server, browser: Any) -> Iterator[Any]:
    """The one page, an `OpenLab`."""
    from tests.browser.lab import opened

    with opened(browser, server.address) as page:
        yield page
