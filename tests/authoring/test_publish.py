"""Publishing keeps what a reader needs and removes what differs from run to run.

A real kernel runs a small notebook, with a live figure, a widget, output on stderr and a bar.
"""

from __future__ import annotations

import base64
import io
import json
import time
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_output
from PIL import Image

from nemotron_lite.authoring import lint_cells, publish
from nemotron_lite.course.display import PLOTLY, WIDGET
from tests.authoring.samples import ALT, FIGURE, runnable
from tests.browser import chromium

PIXEL = b"not really a picture"

LIVE = f"""
import plotly.graph_objects as go
from nemotron_lite.course import show
from nemotron_lite.course.plotting import described, explore, slider
figure = described(go.Figure(go.Scatter(y=[1, 2, 4])), {ALT!r})
view = explore(figure, lambda fig, n: fig.data[0].update(y=[n, 2, 4]), n=slider("n", 1, 5))
show(view, figure)
"""
NOISE = """
import os, sys
print("one"); sys.stdout.flush(); print("two")
print("warning", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> NotebookNode:
    """A notebook right after its execution."""
    return publish.execute(runnable(LIVE, NOISE, "2 + 2"), tmp_path_factory.mktemp("run"))


def pictures(notebook: NotebookNode) -> int:
    return publish.add_pictures(notebook, lambda figure: PIXEL)


def test_the_kernel_leaves_what_must_not_be_committed(executed: NotebookNode) -> None:
    """Otherwise the next test would show nothing."""
    text = nbformat.writes(executed)
    assert len(text) > 4_000_000
    assert "widgets" in executed.metadata
    assert WIDGET in text
    assert '"stderr"' in text
    assert "execution" in executed.cells[0].metadata


def test_clean_keeps_words_figure_and_results(executed: NotebookNode) -> None:
    notebook = publish.clean(executed)
    pictures(notebook)
    assert lint_cells.volatile_content(notebook) == lint_cells.not_executed(notebook) == []
    assert lint_cells.figures_without_text(notebook) == []
    assert lint_cells.figures_without_picture(notebook) == []
    show, noise, last = (cell.outputs for cell in notebook.cells)
    live, figure, words = show
    assert set(live.data) == {"text/plain"}, "the live view ends with its kernel"
    assert set(figure.data) == {PLOTLY, "text/plain", "image/png"}
    assert figure.data["text/plain"] == ALT
    assert base64.b64decode(figure.data["image/png"]) == PIXEL
    assert ALT in words.data["text/html"]
    assert [(o.output_type, o.text) for o in noise] == [("stream", "one\ntwo\n")]
    assert last[0].data["text/plain"] == "4"
    assert len(nbformat.writes(notebook)) < 20_000
    assert "widgets" in executed.metadata, "clean works on a copy"


def test_cleaning_twice_changes_nothing(executed: NotebookNode) -> None:
    once = publish.clean(executed)
    assert nbformat.writes(publish.clean(once)) == nbformat.writes(once)
    pictures(once)
    assert nbformat.writes(publish.clean(once)) == nbformat.writes(once)


def test_a_second_run_gives_the_same_file(executed: NotebookNode, tmp_path: Path) -> None:
    again = publish.execute(runnable(LIVE, NOISE, "2 + 2"), tmp_path)
    assert nbformat.writes(publish.clean(again)) == nbformat.writes(publish.clean(executed))


def test_what_the_course_wrote_into_metadata_stays() -> None:
    notebook = runnable("1")
    notebook.metadata.update(nl_chapter="01", papermill={"start": "now"})
    notebook.metadata.kernelspec.update(name="my-env", display_name="Mine")
    notebook.cells[0].metadata.update(tags=["nl:demo"], nl_exercise="01.x", collapsed=True)
    tidy = publish.clean(notebook)
    assert set(tidy.metadata) == {"nl_chapter", "kernelspec", "language_info"}
    assert tidy.metadata.kernelspec.name == "python3"
    assert tidy.cells[0].metadata == {"tags": ["nl:demo"], "nl_exercise": "01.x"}
    assert tidy.cells[0].execution_count is None, "clean does not pretend that a cell was run"


def test_a_trace_carries_no_name_of_its_run() -> None:
    notebook = runnable("1")
    figure = json.loads(json.dumps(FIGURE))
    figure["data"][0]["uid"] = "0e1"
    figure["config"] = {"plotlyServerURL": "https://plot.ly"}
    notebook.cells[0].outputs = [new_output("display_data", data={PLOTLY: figure})]
    (output,) = publish.clean(notebook).cells[0].outputs
    assert output.data[PLOTLY] == {**FIGURE, "config": {}}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\nraise ValueError('no such thing')", "ValueError: no such thing"),
        ("import os\nos._exit(1)", "[Kk]ernel died"),
    ],
)
def test_a_cell_that_fails_is_refused_and_the_file_stays(
    source: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "01_bad.ipynb"
    nbformat.write(runnable("1", source, "2"), path)
    before = path.read_bytes()
    with pytest.raises(publish.PublishError, match=message) as error:
        publish.publish(path, lambda figure: PIXEL)
    assert "01_bad.ipynb was not written" in str(error.value)
    assert "\x1b" not in str(error.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_expected_error_is_refused_too(tmp_path: Path) -> None:
    notebook = runnable("1 / 0")
    notebook.cells[0].metadata["tags"] = ["raises-exception"]
    with pytest.raises(publish.PublishError, match="ZeroDivisionError"):
        publish.execute(notebook, tmp_path)


@pytest.mark.timing
def test_a_cell_that_never_ends_is_stopped(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(publish.PublishError, match="ran longer than 2 s"):
        publish.execute(runnable("while True: pass"), tmp_path, seconds=2)
    assert time.monotonic() - start < 60


def test_a_killed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "01_sample.ipynb"
    publish.write_notebook(runnable("1"), path)
    before = path.read_bytes()

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        publish.write_notebook(runnable("2"), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_chapters_are_found_by_number_and_name(tmp_path: Path) -> None:
    for name in ("00_a.ipynb", "01_b.ipynb", "10_c.ipynb", "draft.ipynb"):
        nbformat.write(runnable("1"), tmp_path / name)
    names = lambda *chosen: [p.stem for p in publish.chapters(chosen, tmp_path)]  # noqa: E731
    assert names() == ["00_a", "01_b", "10_c"]
    assert names("10", "notebooks/01_b.ipynb") == ["10_c", "01_b"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(publish.PublishError, match=r"empty has no chapters.*--folder"):
        publish.chapters((), tmp_path / "empty")
    with pytest.raises(publish.PublishError, match=r"no chapter '2' in .*there are: 00_a, 01_b"):
        names("2")


def test_the_command_publishes_and_says_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoBrowser:
        def __enter__(self) -> publish.Render:
            return lambda figure: PIXEL

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(publish, "FigureRenderer", NoBrowser)
    nbformat.write(runnable("1 + 1"), tmp_path / "01_sample.ipynb")
    nbformat.write(runnable("1 / 0"), tmp_path / "02_bad.ipynb")
    assert publish.main(["--folder", str(tmp_path)]) == 1
    output_text = capsys.readouterr()
    assert "01_sample.ipynb: ran " in output_text.out
    assert "nl:math is missing" in output_text.out
    assert "02_bad.ipynb was not written" in output_text.err
    assert publish.main(["--folder", str(tmp_path), "07"]) == 2


def test_a_folder_that_cannot_be_written_is_refused_before_a_chapter_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(folder: Path) -> None:
        raise OSError(f"{folder} cannot be written")

    monkeypatch.setattr(publish, "check_writable_folder", refuse)
    nbformat.write(runnable("print('ran')"), tmp_path / "01_sample.ipynb")
    before = (tmp_path / "01_sample.ipynb").read_bytes()
    assert publish.main(["--folder", str(tmp_path)]) == 2
    assert f"{tmp_path} cannot be written" in capsys.readouterr().err
    assert (tmp_path / "01_sample.ipynb").read_bytes() == before


@pytest.mark.timing
def test_a_figure_becomes_a_small_picture() -> None:
    chromium.required()
    with publish.FigureRenderer() as draw:
        first = draw(FIGURE)
        start = time.monotonic()
        second = draw(
            {**FIGURE, "layout": {"width": 300, "height": 200, "paper_bgcolor": "#D55E00"}}
        )
        assert time.monotonic() - start < 10, "one browser draws them all"
    picture = Image.open(io.BytesIO(first))
    width, height = publish.PICTURE_WIDTH, publish.PICTURE_HEIGHT
    assert picture.size == (width, height), "JupyterLab shows it pixel by pixel"
    assert picture.mode == "P"
    assert len(first) < 40_000
    corner = Image.open(io.BytesIO(second)).convert("RGB").getpixel((2, 2))
    assert all(abs(a - b) <= 3 for a, b in zip(corner, (0xD5, 0x5E, 0x00), strict=True))
