"""A small chapter that keeps every rule; the tests break one rule at a time.

It is not executed: the tests of the rules need only the stored form. `runnable` makes a
notebook that can be executed, for the tests of publishing and of the notebook test itself.
"""

from __future__ import annotations

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from nemotron_lite.authoring.lint_cells import CODE_SECTIONS, SECTIONS
from nemotron_lite.course.display import PLOTLY
from nemotron_lite.course.exercises import Check, Exercise

ALT = "One line that rises from left to right, steeply at first and then ever more slowly."
ANSWER = """    weights = torch.softmax(x @ x.mT / x.shape[-1] ** 0.5, dim=-1)
    summed = torch.einsum("ij,jd->id", weights, x) + weights.sum(-1, keepdim=True)
    return torch.nn.functional.silu(summed * weights.mean()) - x.cumsum(0)
"""
NAMES = ("discretise", "memorise", "summarise", "recognise")
EXERCISES = tuple(
    Exercise(
        id=f"01.{name}",
        title=name.title(),
        objective=f"O{number}: {name} a number.",
        minutes=5,
        difficulty=1,
        points=1,
        task=f"Return x, {name}d.",
        stub=f'def {name}(x):\n    """Return x, {name}d."""\n    raise NotImplementedError\n',
        solution=f"def {name}(x):\n" + (ANSWER if name == "summarise" else "    return x\n"),
        hints=("one", "two", "three"),
        checks=(Check("a number", lambda function: None),),
        kind="stretch" if name == "recognise" else "must",
    )
    for number, name in enumerate(NAMES, 1)
)
OBJECTIVES = "\n".join(f"- **O{i}** {name.title()}." for i, name in enumerate(NAMES, 1))
OBJECTIVES += "\n- **O5** Say why."
HEADER = (
    "| | |\n|---|---|\n| **Time** | 2 minutes to read, 15 for the exercises |\n"
    "| **Machine** | any |\n| **You know** | numbers |"
)
QUIZ_OBJECTIVES = ("O1", "O2", "O3", "O2", "O4", "O5")
KEYS = ("ratio", "share", "bytes")
FIGURE = {"data": [{"type": "scatter", "y": [1, 2]}], "layout": {"meta": {"alt": ALT}}}


def figure_output() -> NotebookNode:
    """What `show` leaves of a figure, once published."""
    data = {PLOTLY: FIGURE, "text/plain": ALT, "image/png": "iVBORw0KGgo=\n"}
    return new_output("display_data", data=data)


def chapter() -> NotebookNode:
    """Every section of the template, four exercises, three measured predictions, a figure."""
    cells = []
    for section in SECTIONS:
        tags = dict(tags=[f"nl:{section}"])
        if section in CODE_SECTIONS:
            source = {"setup": 'session = setup("01")', "quiz": 'quiz("01")'}
            cells.append(new_code_cell(source.get(section, 'quiz("01", "opening")'), metadata=tags))
            continue
        title = "# 01 Sample" if section == "header" else f"## The section {section}"
        body = OBJECTIVES if section in ("objectives", "recap") else "Some words."
        body = HEADER if section == "header" else body
        cells.append(new_markdown_cell(f"{title}\n\n{body}", metadata=tags))
        if section == "stepper":
            cells.append(new_code_cell("show(curve())", outputs=[figure_output()]))
        elif section == "math":
            for defined in EXERCISES:
                cells += exercise(defined)
            for key in KEYS:
                cells += prediction(key)
            for tag in ("measure", "without"):
                cells.append(new_markdown_cell(f"## {tag}", metadata=dict(tags=[f"nl:{tag}"])))
    numbered(cells)
    metadata = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    notebook = new_notebook(cells=cells, metadata=metadata)
    nbformat.validate(notebook)
    return notebook


def prediction(key: str) -> list[NotebookNode]:
    """The two cells of a prediction: the question, and the folded measurement."""
    folded = dict(jupyter=dict(outputs_hidden=True))
    return [
        new_code_cell(f'predict("{key}")', metadata=dict(tags=["nl:predict"])),
        new_code_cell(f'measured("{key}", run())', metadata=folded),
    ]


def exercise(defined: Exercise) -> list[NotebookNode]:
    """Three cells: the task of an exercise, its untouched stub, and the use of the answer."""
    task = dict(tags=["nl:exercise"], nl_exercise=defined.id)
    name = defined.function_name
    return [
        new_markdown_cell(f"Now it is your turn.\n\n{defined.text}", metadata=task),
        new_code_cell(defined.cell),
        new_code_cell(f'{name} = own("{defined.id}", {name})'),
    ]


def numbered(cells: list[NotebookNode]) -> None:
    """Execution counts 1 to n."""
    code = [cell for cell in cells if cell.cell_type == "code"]
    for count, cell in enumerate(code, start=1):
        cell.execution_count = count


def tagged(notebook: NotebookNode, section: str) -> NotebookNode:
    """The first cell of a section."""
    return next(c for c in notebook.cells if f"nl:{section}" in c.metadata.get("tags", ()))


def code(notebook: NotebookNode, part: str) -> NotebookNode:
    """The first code cell whose source holds `part`."""
    return next(c for c in notebook.cells if c.cell_type == "code" and part in c.source)


def runnable(*sources: str) -> NotebookNode:
    """Cells that have not been run."""
    cells = [new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    kernel = dict(name="python3", display_name="Python 3", language="python")
    return new_notebook(cells=cells, metadata=dict(kernelspec=kernel))
