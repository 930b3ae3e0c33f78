"""Rules about what a chapter stores: executed cells, pictures with alt text, sections, sizes.

The reasons: nbval compares nothing in a cell that was never run, so a chapter that was not run
would pass. The saved state of a widget has 5 MB and shows an error when no kernel runs. Screen
readers and tests need the alt text of a figure. A path of the author's machine is useless to the
reader.

Each function takes a notebook and returns problems, one sentence each. Cells are counted from 0, as
in nbformat and jq.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import nbformat
from nbformat import NotebookNode

from nemotron_lite.course.display import PLOTLY, SHORTEST_ALT, WIDGET

MOST_BYTES = 500_000
MOST_CELLS, MOST_WORDS = 45, 2300  # of a chapter
MOST_CELLS_DEEPER, MOST_WORDS_DEEPER = 25, 1300  # of the notebook beside it
MOST_LINES = 15  # of code in one cell; a stub and a hidden cell may be longer
MOST_IGNORED = 2  # cells whose output is not compared
CHAPTER_SECONDS = 75  # alone on two quiet cores; the tests run each chapter twice

# The sections of a chapter, in order. Those in REPEATED may come again later; an exercise can be
# anywhere after the intuition.
SECTIONS = (
    "header", "setup", "opening", "objectives", "map", "demo", "intuition", "stepper", "math",
    "kernel", "break", "integrate", "fullscale", "recap", "quiz", "more",
)  # fmt: skip
ANYWHERE = ("exercise", "predict", "measure", "without")  # after the opening, as often as needed
CODE_SECTIONS = {"setup", "opening", "quiz", "predict"}
REPEATED = {"stepper"}
LEAST_EXERCISES = 4

_VOLATILE = {"execution", "ExecuteTime", "scrolled", "collapsed", "vscode", "colab"}
_IGNORING = re.compile(r"NBVAL_(?:IGNORE_OUTPUT|SKIP|RAISES_EXCEPTION)")
_IGNORING_TAGS = {
    "nbval-ignore-output", "nbval-skip", "nbval-raises-exception", "raises-exception"
}  # fmt: skip
_LOCAL_PATH = re.compile(r"(?<![\w.:/])/(?:work|root|home|Users|tmp|var/folders)/[\w.-]+")
_FETCH = re.compile(
    r"""(?:<(?:script|img|link|iframe)\b[^>]*?(?:src|href)\s*=\s*["']?|!\[[^\]]*\]\(|@import\s+["']|"""
    r"""url\(["']?)\s*(https?:)?//[^\s"')>]+"""
)


def code_cells(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """Index and cell of each code cell that is not empty."""
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and cell.source.strip():
            yield index, cell


def markdown_cells(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """Index and cell of each markdown cell."""
    for index, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            yield index, cell


def outputs(notebook: NotebookNode) -> Iterator[tuple[int, NotebookNode]]:
    """Index of the cell and output, for each output."""
    for index, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", ()):
            yield index, output


def tags(cell: NotebookNode) -> list[str]:
    """The section tags of a cell, without `nl:`."""
    return [t.removeprefix("nl:") for t in cell.metadata.get("tags", ()) if t.startswith("nl:")]


def not_executed(notebook: NotebookNode) -> list[str]:
    """Cells that were not executed exactly once, from the first to the last."""
    counts = [(index, cell.execution_count) for index, cell in code_cells(notebook)]
    for expected, (index, count) in enumerate(counts, start=1):
        if count is None:
            return [f"cell {index} was never run; run `make notebooks`."]
        if count != expected:
            return [f"cell {index} has count {count}, expected {expected}: cells were run out of "
                    "order; run `make notebooks`."]  # fmt: skip
    if not counts:
        return ["there is no code cell; a chapter has some."]
    empty = [i for i, c in enumerate(notebook.cells) if not c.source.strip()]
    return [f"cell {index} is empty; delete it." for index in empty]


def stored_errors(notebook: NotebookNode) -> list[str]:
    """Cells with a stored traceback."""
    return [
        f"cell {index} ended in {output.ename}: {output.evalue}."
        for index, output in outputs(notebook)
        if output.output_type == "error"
    ]


def figures_without_text(notebook: NotebookNode) -> list[str]:
    """Figures and images without a text for readers who cannot see them."""
    found = []
    for index, output in outputs(notebook):
        data = output.get("data", {})
        plain = "".join(data.get("text/plain", ""))
        if PLOTLY in data:
            alt = _alt(data[PLOTLY])
            if len(alt) < SHORTEST_ALT:
                found.append(
                    f"cell {index} shows a figure without alt text; end its function with "
                    "described(fig, …) and display it with show(fig)."
                )
            elif alt not in " ".join(plain.split()):
                found.append(f"cell {index} shows a figure whose text/plain is not its alt text.")
        elif any(kind.startswith("image/") for kind in data) and (
            len(plain) < SHORTEST_ALT or plain.startswith("<")
        ):
            found.append(f"cell {index} shows an image described as {plain!r}.")
        markup = "".join(data.get("text/html", ""))
        for tag in re.findall(r"<img\b[^>]*>", markup):
            if not re.search(r"alt\s*=\s*([\"'])(?!\1)", tag):
                found.append(f"cell {index} has {tag[:60]} without alt.")
        for tag in re.findall(r"<svg\b.*?</svg>", markup, re.S):
            if "<title" not in tag and "aria-label" not in tag:
                found.append(f"cell {index} has an <svg> without a title.")
    for index, cell in markdown_cells(notebook):
        for alt, target in re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", cell.source):
            if len(alt) < SHORTEST_ALT:
                found.append(f"cell {index} has the image {target} described as {alt!r}.")
    return found


def _alt(figure: dict[str, Any]) -> str:
    meta = figure.get("layout", {}).get("meta")
    return str(meta.get("alt", "")) if isinstance(meta, dict) else ""


def figures_without_picture(notebook: NotebookNode) -> list[str]:
    """Figures without a picture for viewers that cannot draw plotly figures."""
    return [
        f"cell {index} has a figure without its PNG; run `make notebooks`."
        for index, output in outputs(notebook)
        if PLOTLY in output.get("data", {}) and "image/png" not in output.data
    ]


def section_problems(notebook: NotebookNode, chapter: str) -> list[str]:
    """Sections that are missing, out of order, repeated, unknown, or in the wrong kind of cell."""
    places: dict[str, list[int]] = {}
    found = []
    for index, cell in enumerate(notebook.cells):
        for tag in tags(cell):
            places.setdefault(tag, []).append(index)
            if tag not in {*SECTIONS, *ANYWHERE}:
                found.append(f"cell {index} has the unknown tag nl:{tag}.")
            elif cell.cell_type != ("code" if tag in CODE_SECTIONS else "markdown"):
                found.append(f"cell {index} with nl:{tag} is a {cell.cell_type} cell.")
    found += [f"nl:{tag} is missing." for tag in (*SECTIONS, *ANYWHERE) if tag not in places]
    for tag, at in places.items():
        if len(at) > 1 and tag in set(SECTIONS) - REPEATED:
            found.append(f"nl:{tag} is there {len(at)} times, in cells {at}.")
    present = [tag for tag in SECTIONS if tag in places]
    for before, after in pairwise(present):
        if places[before][0] >= places[after][0]:
            found.append(
                f"nl:{after} (cell {places[after][0]}) comes before nl:{before} "
                f"(cell {places[before][0]})."
            )
    exercises = places.get("exercise", [])
    if len(exercises) < LEAST_EXERCISES:
        found.append(f"{len(exercises)} exercises; expected at least {LEAST_EXERCISES}.")
    for tag in ANYWHERE:
        if tag in places and places[tag][0] < places.get("opening", [0])[0]:
            found.append(f"nl:{tag} (cell {places[tag][0]}) comes before nl:opening.")
    return found + _opening(notebook, chapter, places)


def _opening(notebook: NotebookNode, chapter: str, places: dict[str, list[int]]) -> list[str]:
    found = []
    first = notebook.cells[0] if notebook.cells else None
    if first is None or "header" not in tags(first) or not first.source.startswith("# "):
        found.append("the first cell is not an nl:header that begins with `# title`.")
    for index in places.get("setup", ()):
        if not re.search(rf"""\bsetup\(\s*["']{chapter}["']""", notebook.cells[index].source):
            found.append(f'cell {index} with nl:setup does not call setup("{chapter}").')
    return found


def volatile_content(notebook: NotebookNode) -> list[str]:
    """Widget state, stderr, and metadata that change from run to run."""
    found = [] if "widgets" not in notebook.metadata else ["metadata.widgets is stored."]
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not named python3.")
    for index, cell in enumerate(notebook.cells):
        for key in sorted(_VOLATILE & set(cell.metadata)):
            found.append(f"cell {index} has metadata.{key}.")
    for index, output in outputs(notebook):
        if WIDGET in output.get("data", {}):
            found.append(
                f"cell {index} still links to a widget, which does not exist without its kernel."
            )
        if output.output_type == "stream" and output.name == "stderr":
            found.append(f"cell {index} has stderr in its output.")
    return [f"{problem} Run `make notebooks`." for problem in found]


def too_long(notebook: NotebookNode, *, deeper: bool = False) -> list[str]:
    """Too many cells or words, or too many lines in an open cell that is no stub."""
    most_cells = MOST_CELLS_DEEPER if deeper else MOST_CELLS
    most_words = MOST_WORDS_DEEPER if deeper else MOST_WORDS
    found = []
    if len(notebook.cells) > most_cells:
        found.append(f"{len(notebook.cells)} cells; at most {most_cells}.")
    if (words := count_words(notebook)) > most_words:
        found.append(f"{words} words of text; at most {most_words}.")
    stubs = {index for _, index, _ in exercise_cells(notebook)}
    for index, cell in code_cells(notebook):
        lines = sum(1 for line in cell.source.splitlines() if line.strip())
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden")
        if lines > MOST_LINES and index not in stubs and not hidden:
            found.append(f"cell {index} has {lines} lines of code; at most {MOST_LINES}.")
    return found


def count_words(notebook: NotebookNode) -> int:
    """Words of the markdown cells."""
    return sum(len(cell.source.split()) for _, cell in markdown_cells(notebook))


def exercise_cells(notebook: NotebookNode) -> Iterator[tuple[int, int, str]]:
    """For each exercise: index of its task, index of its stub (the next code cell), and its id."""
    for index, cell in enumerate(notebook.cells):
        if "exercise" not in tags(cell):
            continue
        later = range(index + 1, len(notebook.cells))
        at = next((i for i in later if notebook.cells[i].cell_type == "code"), None)
        yield index, (index if at is None else at), cell.metadata.get("nl_exercise", "")


def too_large(notebook: NotebookNode) -> list[str]:
    """A file that is too large to load quickly."""
    size = len(nbformat.writes(notebook).encode())
    if size <= MOST_BYTES:
        return []
    weights = [
        (len(nbformat.writes(nbformat.v4.new_notebook(cells=[cell]))), index)
        for index, cell in enumerate(notebook.cells)
    ]
    heavy = ", ".join(f"cell {i}: {w // 1000} kB" for w, i in sorted(weights, reverse=True)[:3])
    return [f"{size // 1000} kB; at most {MOST_BYTES // 1000} kB ({heavy})."]


def uncompared_cells(notebook: NotebookNode) -> list[str]:
    """Cells that the notebook test skips, or too many cells whose output it ignores."""
    ignored, found = [], []
    for index, cell in code_cells(notebook):
        marks = set(_IGNORING.findall(cell.source)) | _IGNORING_TAGS & set(
            cell.metadata.get("tags", ())
        )
        ignored += [index] * bool(marks)
        if marks - {"NBVAL_IGNORE_OUTPUT", "nbval-ignore-output"}:
            found.append(
                f"cell {index} is marked {sorted(marks)}; every cell of a chapter must run."
            )
    if len(ignored) > MOST_IGNORED:
        found.append(f"cells {ignored} are not compared; at most {MOST_IGNORED} may be.")
    return found


def outside_references(notebook: NotebookNode) -> list[str]:
    """Paths of the author's machine, and content that would be loaded from the internet."""
    found = []
    for index, text in _texts(notebook):
        for place in dict.fromkeys(_LOCAL_PATH.findall(text)):
            found.append(f"cell {index} has the path {place} of one machine.")
        for match in _FETCH.finditer(text):
            found.append(f"cell {index} loads {match[0][-60:]!r} from the internet.")
    return found


def _texts(notebook: NotebookNode) -> Iterator[tuple[int, str]]:
    for index, cell in enumerate(notebook.cells):
        yield index, cell.source
    for index, output in outputs(notebook):
        yield index, "".join(output.get("text", ""))
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield index, "".join(value)
