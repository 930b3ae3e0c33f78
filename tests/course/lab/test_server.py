"""JupyterLab for learners: its settings, the environment of its kernels, and what it saves."""

from __future__ import annotations

import copy
import json
import os
import re
import time
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from nemotron_lite.course.display import PLOTLY, WIDGET
from nemotron_lite.course.lab import server as lab
from tests.course.lab.serving import Server, serve

LINK = dict(version_major=2, version_minor=0, model_id="0123456789abcdef")
FIGURE = dict(data=[dict(type="scatter", y=[1, 2])], layout={})


def shown(**data: Any) -> Any:
    names = dict(widget=WIDGET, plotly=PLOTLY, text="text/plain", html="text/html")
    return new_output("display_data", data={names[k]: v for k, v in data.items()})


def saved_by(*outputs: Any) -> dict[str, Any]:
    """A notebook as a page sends it to be saved: a widget in each output, and their state."""
    cell = new_code_cell("show(…)", outputs=list(outputs), execution_count=1)
    notebook = new_notebook(cells=[cell], metadata={"widgets": {lab.WIDGET_STATE: dict(state={})}})
    return dict(type="notebook", content=json.loads(nbformat.writes(notebook)))


def outputs_after(model: dict[str, Any]) -> list[Any]:
    lab.without_widgets(model=model, path="work/01.ipynb", contents_manager=None)
    nbformat.validate(nbformat.from_dict(model["content"]))
    return [output.get("data") for output in model["content"]["cells"][0]["outputs"]]


def test_a_widget_leaves_its_figure_and_its_text() -> None:
    model = saved_by(
        shown(widget=LINK, plotly=FIGURE, text="A line."),
        shown(html="<p>", text="words"),
        shown(widget=LINK, text="Question 1"),
    )
    figure, words, question = outputs_after(model)
    assert set(figure) == {PLOTLY, "text/plain"}
    assert set(words) == {"text/html", "text/plain"}
    assert set(question) == {"text/plain"}
    assert "widgets" not in model["content"]["metadata"]


def test_an_output_that_is_nothing_but_a_widget_goes() -> None:
    assert outputs_after(saved_by(shown(widget=LINK), shown(text="words"))) == [
        {"text/plain": ["words"]}
    ]


def test_streams_errors_and_text_cells_stay() -> None:
    stream = new_output("stream", name="stdout", text="1\n")
    error = new_output("error", ename="E", evalue="e", traceback=[])
    model = saved_by(stream, error)
    model["content"]["cells"].append(dict(cell_type="markdown", id="m", metadata={}, source="t"))
    before = copy.deepcopy(model["content"]["cells"])
    outputs_after(model)
    assert model["content"]["cells"] == before


@pytest.mark.parametrize(
    "model",
    [
        dict(type="file", content="text", format="text"),
        dict(type="directory", content=None),
        dict(type="notebook"),  # a rename
        dict(type="notebook", content=dict(cells=[], metadata={})),
    ],
)
def test_other_files_are_saved_as_they_are(model: dict[str, Any]) -> None:
    before = copy.deepcopy(model)
    lab.without_widgets(model=model)
    assert model == before


def test_what_the_user_set_stays(tmp_path: Path) -> None:
    environment = {"JUPYTER_CONFIG_PATH": "/etc/mine", "OTHER": "1"}
    lab.prepare_environment(environment, tmp_path)
    assert environment["JUPYTER_CONFIG_PATH"].split(os.pathsep) == [str(tmp_path), "/etc/mine"]
    assert environment["OTHER"] == "1"


def test_arguments_of_the_user_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("jupyterlab.labapp.main", called.append)
    monkeypatch.setattr(os, "environ", {})
    lab.start(tmp_path, tmp_path / "work", ["--port", "8899"])
    (arguments,) = called
    assert arguments[-2:] == ["--port", "8899"]
    assert f"--ServerApp.root_dir={tmp_path}" in arguments
    assert "--LabApp.default_url=/lab/tree/work" in arguments
    assert "GOMP_SPINCOUNT" not in os.environ, "openmp.py decides in the kernel"


def test_the_stylesheet_is_there() -> None:
    assert (lab.STYLES / "custom.css").is_file()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server with one chapter, started without a value for OpenMP."""
    root = tmp_path_factory.mktemp("lab")
    (root / "notebooks").mkdir()
    nbformat.write(new_notebook(), root / "notebooks" / "00_zero.ipynb")
    with serve(root, root / "home", {"GOMP_SPINCOUNT": None}) as server:
        yield server, root


def in_a_kernel(server: Server, code: str, seconds: float = 60) -> str:
    """What the code prints in a kernel that the server starts."""
    from jupyter_client.blocking import BlockingKernelClient

    kernel = server.ask("api/kernels", {"name": "python3"})["id"]
    printed: list[str] = []

    def keep(message: dict[str, Any]) -> None:
        printed.append(message["content"].get("text", ""))

    end = time.monotonic() + seconds
    while True:
        file = str(server.runtime / f"kernel-{kernel}.json")
        client = BlockingKernelClient(connection_file=file)
        client.load_connection_file()
        client.start_channels()
        try:
            client.wait_for_ready(timeout=seconds)
            client.execute_interactive(code, timeout=seconds, output_hook=keep)
        except RuntimeError:  # no heartbeat for a second: on a busy machine it is still starting
            if time.monotonic() > end:
                raise
        else:
            return "".join(printed).strip()
        finally:
            client.stop_channels()


ASK = """
import threading
from nemotron_lite.course import setup
setup("01", threads=2)
print("watched:", "openmp-watch" in [thread.name for thread in threading.enumerate()])
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="only Linux counts")
def test_its_kernels_share_the_cores(running: tuple[Server, Path]) -> None:
    assert in_a_kernel(running[0], ASK).splitlines()[-1] == "watched: True"


def test_a_value_of_the_user_reaches_the_kernels(tmp_path: Path) -> None:
    (tmp_path / "notebooks").mkdir()
    nbformat.write(new_notebook(), tmp_path / "notebooks" / "00_zero.ipynb")
    with serve(tmp_path, tmp_path / "home", {"GOMP_SPINCOUNT": "7"}) as server:
        assert in_a_kernel(server, ASK).splitlines()[-1] == "watched: False"


def test_chapters_are_copied_and_opened_in_work(running: tuple[Server, Path]) -> None:
    server, _ = running
    names = {entry["name"] for entry in server.ask("api/contents/work")["content"]}
    # Another test saves a notebook of its own there; the tests run in any order.
    assert names - {"saved.ipynb"} == {"00_zero.ipynb", "progress.ipynb"}


def test_a_fresh_copy_is_trusted_by_the_server(running: tuple[Server, Path]) -> None:
    cells = running[0].ask("api/contents/work/progress.ipynb")["content"]["cells"]
    assert cells[1]["metadata"]["trusted"] is True


def test_nbgrader_is_off_in_the_server_and_in_the_page(running: tuple[Server, Path]) -> None:
    server, _ = running
    page = server.ask("lab")
    assert '"disabledExtensions": ["@jupyter/nbgrader"]' in page
    with pytest.raises(urllib.error.HTTPError, match="404"):
        server.ask("formgrader/api/status")


def test_the_stylesheet_is_served_and_asked_for(running: tuple[Server, Path]) -> None:
    server, _ = running
    assert re.search(r'href="[^"]*custom/custom\.css"', server.ask("lab"))
    assert server.ask("custom/custom.css") == (lab.STYLES / "custom.css").read_text()


def test_a_saved_notebook_holds_no_widget_and_is_still_trusted(
    running: tuple[Server, Path],
) -> None:
    server, root = running
    model = saved_by(shown(widget=LINK, text="A line."))
    model["content"]["cells"][0]["metadata"]["trusted"] = True
    server.ask("api/contents/work/saved.ipynb", model, "PUT")
    (cell,) = json.loads((root / "work" / "saved.ipynb").read_text())["cells"]
    assert [list(output["data"]) for output in cell["outputs"]] == [["text/plain"]]
    (again,) = server.ask("api/contents/work/saved.ipynb")["content"]["cells"]
    assert again["metadata"]["trusted"] is True
