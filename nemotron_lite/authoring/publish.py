"""Execute the chapters and prepare them to be committed: `make notebooks`.

    make notebooks                  every chapter
    make notebooks ARGS="01 03"     these two

A chapter is committed executed, because most people read it without running it, and because the
tests compare the output of a fresh run with the stored output. Three steps make a chapter:

    execute  runs every cell in a fresh kernel, in the chapter's folder. If a cell fails, the file
             is not changed.
    clean    removes the state of the widgets (5 MB of plotly's JavaScript), links to widgets
             (JupyterLab would show an error, because the kernel has ended), stderr, execution
             times, and everything else that differs from run to run.
    draw     adds a PNG to each plotly figure, for viewers that show neither widgets nor plotly.
             JupyterLab shows it too, until the cell is run. It shows one pixel of the picture as
             one pixel of the page and ignores the metadata, so the picture is no wider than an
             output beside an open side bar. A palette of 64 colors keeps the file small.

Cleaning a notebook twice changes nothing, and a file is replaced in one step. At the end `lint`
checks each chapter, and the problems are printed.

This runs in a checkout. `--folder` names another folder with chapters.
"""

from __future__ import annotations

import argparse
import base64
import copy
import io
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nbformat
from nbformat import NotebookNode

from nemotron_lite.authoring import lint, lint_cells
from nemotron_lite.course.display import PLOTLY, WIDGET
from nemotron_lite.files import atomic_file, check_writable_folder

CHAPTERS = Path("notebooks")
CELL_SECONDS = 180  # no cell may take longer than a whole chapter is allowed
PICTURE_WIDTH, PICTURE_HEIGHT = 820, 380
COLORS = 64

# Everything else (execution times, scrolling, notes of an editor) differs from run to run.
KEPT_CELL_METADATA = {"tags", "editable", "deletable", "jupyter", "slideshow"}
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
LANGUAGE = {
    "name": "python", "file_extension": ".py", "mimetype": "text/x-python",
    "pygments_lexer": "ipython3",
}  # fmt: skip

Render = Callable[[dict[str, Any]], bytes]


class PublishError(RuntimeError):
    """A chapter that cannot be published. The message names the chapter, the cell and the error."""


def chapters(names: Iterable[str] = (), folder: Path = CHAPTERS) -> list[Path]:
    """The chapters in `folder`: all of them, or those named.

    Args:
        names: "01", "01_selective_scan", or a path.
        folder: the folder of the notebooks.

    Raises:
        PublishError: there is no chapter, or none with a given name.
    """
    every = sorted(folder.glob("[0-9]*.ipynb"))
    if not every:
        raise PublishError(
            f"{folder.resolve()} has no chapters. Run this in the root of a checkout, or name the "
            "folder of the chapters with --folder."
        )
    chosen = []
    for name in names:
        stem = Path(name).name.removesuffix(".ipynb")
        found = [path for path in every if path.stem == stem or path.stem.startswith(f"{stem}_")]
        if not found:
            known = ", ".join(path.stem for path in every)
            raise PublishError(f"no chapter {name!r} in {folder}; there are: {known}.")
        chosen += found
    return chosen or every


def execute(
    notebook: NotebookNode, folder: Path, *, seconds: float | int = CELL_SECONDS
) -> NotebookNode:
    """Run every cell in a fresh kernel; returns an executed copy.

    Raises:
        PublishError: a cell raised, ran longer than `seconds`, or killed the kernel.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    fresh = copy.deepcopy(notebook)
    fresh.metadata["kernelspec"] = dict(KERNEL)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    client = NotebookClient(
        fresh,
        timeout=seconds,
        kernel_name="python3",
        allow_errors=False,
        resources={"metadata": {"path": str(folder)}},
    )
    try:
        client.execute()
    except CellTimeoutError as error:
        raise PublishError(f"a cell ran longer than {seconds:g} s: {error}") from error
    except (CellExecutionError, DeadKernelError) as error:
        raise PublishError(re.sub(r"\x1b\[[\d;]*m", "", str(error))) from error
    if found := lint_cells.stored_errors(fresh):
        raise PublishError(f"{found[0]} A chapter shows an error by catching and printing it.")
    return fresh


def clean(notebook: NotebookNode) -> NotebookNode:
    """A copy without what differs from run to run and what a reader cannot use."""
    tidy = copy.deepcopy(notebook)
    tidy.metadata = NotebookNode(
        {k: v for k, v in sorted(tidy.metadata.items()) if k.startswith("nl")},
        kernelspec=NotebookNode(KERNEL),
        language_info=NotebookNode(LANGUAGE),
    )
    tidy.nbformat, tidy.nbformat_minor = 4, 5
    ran = 0
    for position, cell in enumerate(tidy.cells):
        cell.id = cell.get("id") or f"cell-{position}"
        cell.metadata = NotebookNode(
            {
                k: v
                for k, v in cell.metadata.items()
                if k in KEPT_CELL_METADATA or k.startswith("nl")
            }
        )
        if cell.cell_type != "code":
            continue
        cell.outputs = _merged([o for o in map(_clean_output, cell.outputs) if o is not None])
        if cell.execution_count is not None:
            ran += 1
            cell.execution_count = ran
            for output in cell.outputs:
                if "execution_count" in output:
                    output.execution_count = ran
    return tidy


def _clean_output(output: NotebookNode) -> NotebookNode | None:
    if output.output_type == "stream":
        return None if output.name == "stderr" else output
    if output.output_type == "error":
        return output
    output.metadata = NotebookNode()
    output.data.pop(WIDGET, None)
    figure = output.data.get(PLOTLY)
    if isinstance(figure, dict):
        figure.get("config", {}).pop("plotlyServerURL", None)
        for trace in figure.get("data", ()):
            trace.pop("uid", None)
    return output if output.data else None


def _merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Consecutive pieces of stdout as one: where a kernel flushes differs from run to run."""
    merged: list[NotebookNode] = []
    for output in outputs:
        if merged and output.output_type == "stream" == merged[-1].output_type:
            merged[-1].text += output.text
        else:
            merged.append(output)
    return merged


def add_pictures(notebook: NotebookNode, draw: Render) -> int:
    """Add a PNG to every plotly figure of the notebook itself; returns their number."""
    drawn = 0
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if PLOTLY in output.get("data", {}):
                picture = draw(output.data[PLOTLY])
                output.data["image/png"] = base64.b64encode(picture).decode() + "\n"
                drawn += 1
    return drawn


class FigureRenderer:
    """Draws plotly figures as PNG, all in one browser (kaleido; needs a chromium)."""

    def __enter__(self) -> Render:
        import kaleido

        kaleido.start_sync_server(silence_warnings=True)
        return self.draw

    def __exit__(self, *error: object) -> None:
        import kaleido

        kaleido.stop_sync_server(silence_warnings=True)

    @staticmethod
    def draw(figure: dict[str, Any]) -> bytes:
        """The PNG of a figure's JSON, with few colors."""
        import kaleido

        layout = figure.get("layout", {})
        size = dict(
            width=layout.get("width", PICTURE_WIDTH), height=layout.get("height", PICTURE_HEIGHT)
        )
        content = {"data": figure.get("data", []), "layout": layout}
        opts = dict(format="png", scale=1, **size)
        return reduce_colors(kaleido.calc_fig_sync(content, opts=opts))


def reduce_colors(png: bytes) -> bytes:
    """The same picture with at most 64 colors, without dithering."""
    from PIL import Image

    picture = Image.open(io.BytesIO(png)).convert("RGB")
    small = io.BytesIO()
    picture.quantize(COLORS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        small, "PNG", optimize=True
    )
    return min(small.getvalue(), png, key=len)


def write_notebook(notebook: NotebookNode, path: Path) -> int:
    """Validate a notebook and write it in one step, so that a killed run keeps the old file.

    Returns:
        Its size in bytes.
    """
    nbformat.validate(notebook)
    content = (nbformat.writes(notebook).rstrip("\n") + "\n").encode()
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
    return len(content)


def publish(path: Path, draw: Render) -> str:
    """Execute and clean one chapter, add its pictures and write it; returns a line about it.

    Raises:
        PublishError: a cell failed; the file is not changed.
    """
    start = time.perf_counter()
    try:
        notebook = execute(nbformat.read(path, as_version=4), path.parent)
    except PublishError as error:
        raise PublishError(f"{path.name} was not written.\n{error}") from error
    ran = time.perf_counter() - start
    notebook = clean(notebook)
    figures = add_pictures(notebook, draw)
    size = write_notebook(notebook, path)
    slow = f" (over {lint.CHAPTER_SECONDS} s)" if ran > lint.CHAPTER_SECONDS else ""
    return f"{path.name}: ran {ran:.1f} s{slow}, {figures} figures, {size / 1000:.0f} kB"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 0 if every chapter was published and keeps the rules."""
    parser = argparse.ArgumentParser(prog="make notebooks", description="Publish chapters.")
    parser.add_argument("chapters", nargs="*", help="such as 01 03; none means all")
    parser.add_argument("--folder", type=Path, default=CHAPTERS, help="the folder of the chapters")
    chosen = parser.parse_args(arguments)
    failed = 0
    try:
        paths = chapters(chosen.chapters, chosen.folder)
        check_writable_folder(chosen.folder)  # a chapter takes minutes
    except (PublishError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    with FigureRenderer() as draw:
        for path in paths:
            try:
                print(publish(path, draw), flush=True)
            except PublishError as error:
                print(error, file=sys.stderr)
                failed += 1
                continue
            problems = lint.lint_file(path)
            for problem in problems:
                print(f"  {problem}")
            failed += bool(problems)
        for chapter in sorted({path.name[:2] for path in paths}):
            missing = lint.lint_chapter(sorted(chosen.folder.glob(f"{chapter}_*.ipynb")))
            for problem in missing:
                print(f"{chapter}: {problem}")
            failed += bool(missing)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
