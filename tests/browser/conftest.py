"""One JupyterLab and one browser for all tests of this folder, over copies of the chapters."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest

from tests.authoring.samples import runnable
from tests.browser import chromium

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))

SLIDER = """
import plotly.graph_objects as go
from nemotron_lite.course import show
from nemotron_lite.course.plotting import described, explore, slider
words = "A line of three points whose first one follows the slider above it, up and down."
figure = described(go.Figure(go.Scatter(y=[1, 2, 4])), words)
move = lambda fig, n: fig.data[0].update(y=[n, 2, 4])
still = lambda fig, n: None
"""
GOOD = (SLIDER, "show(explore(figure, move, n=slider('moves', 1, 9)), figure)")
BAD = (
    SLIDER,
    "show(explore(figure, still, n=slider('stands still', 1, 9)), figure)",
    'from IPython.display import HTML\nHTML(\'<img src="https://example.org/a.png" alt="a">\')',
    "1 / 0",
    "print('after the error')",
)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a JupyterLab that shows copies of the chapters and two small notebooks."""
    chromium.required()
    from tests.browser.lab import serve

    folder = tmp_path_factory.mktemp("lab")
    root = folder / "notebooks"
    root.mkdir()
    for path in CHAPTERS:
        shutil.copy(path, root)
    nbformat.write(runnable(*GOOD), root / "good.ipynb")
    nbformat.write(runnable(*BAD), root / "bad.ipynb")
    with serve(root, folder / "home") as address:
        yield address


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """Debian's chromium, driven by playwright."""
    path = chromium.required()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()
