"""Real kernels: what a chapter's cells leave in the file, and what a restarted kernel finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from nemotron_lite.course.display import PLOTLY, WIDGET
from tests.course.sample_exercises import ADD, FADE, GATE_HEAD, GATE_OUT, GATE_STEP
from tests.course.test_quizzes import TEXT

ROOT = Path(__file__).resolve().parents[2]
CELLS = {
    "setup": """
from nemotron_lite import ops
from nemotron_lite.course import *
from nemotron_lite.course import quizzes
setup("01", threads=1)""",
    "source": "show_source(ops.selective_scan)",
    "predict": """
from nemotron_lite.course import predictions
asked = predictions.Prediction("n", "How many?", low=4)
predictions.load_predictions = lambda chapter: {"n": asked}
predict('n')
measured('n', 4.5)
predictions.keep_guess("01", asked, 9)""",
    "figure": """
import ipywidgets, plotly.graph_objects as go
live = go.FigureWidget(go.Scatter(y=[1, 2]))
live.layout.meta = {"alt": "A line that rises from 1 to 2 over two points of the axis."}
show(ipywidgets.VBox([ipywidgets.IntSlider(), live]), live)""",
    "progress": "total = sum(progress(range(300), 'training'))",
    "hook": "on_step = progress_hook(total=2)\non_step({'ce': 1.0})\non_step({'ce': 0.5})",
    "short": "on_step = progress_hook('tuning', total=9)\non_step({'ce': 1.0})",
    "quiz": f"quizzes.load_quiz = lambda chapter, part: quizzes.parse_quiz({TEXT!r})\nquiz('01')",
    "tell": "tell('{super.layers} layers.')\nfacts_table('super.layers')",
    "check": """
from nemotron_lite.course import exercises
def run(f):
    exercises.close(f(2), 4, what="twice 2")
twice = exercises.Exercise(
    id="99.twice", title="", objective="O1: double.", minutes=1, difficulty=1,
    points=1, task="", stub="def twice(x):\\n    raise NotImplementedError\\n",
    solution="def twice(x):\\n    return 2 * x\\n", hints=("a", "b", "c"),
    checks=(Check("by hand", run),))
exercises.exercises = lambda chapter: (twice,)
def mine(x):
    raise NotImplementedError

check("99.twice", mine)""",
    "wrong": "def mine(x):\n    return x ** 3\n\ncheck('99.twice', mine)",
    "broken": "def mine(x):\n    return x[0]\n\nresult = check('99.twice', mine)",
    "later": "result",
}


# A learner's cells: a helper of another cell, a magic, a class that uses the function, a kernel.
BUILT = {
    "setup": f"""
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, {str(ROOT)!r})
import torch
import torch.nn.functional as F
from torch import nn
from nemotron_lite.course import *
from nemotron_lite.course import exercises
from tests.course.sample_exercises import ADD, CHAPTER, GATE_HEAD, GATE_OUT, GATE_STEP
exercises.exercises = lambda chapter: CHAPTER
setup("01")""",
    "helper": "SIGN = 1\ndef product(a, b):\n    return SIGN * a * b\nhint('99.gate')",
    "fade": """
%time started = True
def fade(dt, A):
    # mine
    return product(dt, A).exp()

check("99.fade", fade)""",
    "own fade": 'fade = own("99.fade", fade)',
    "gate": GATE_HEAD + GATE_OUT + GATE_STEP + '\n\ncheck("99.gate", Gate)',
    "own gate": 'Gate = own("99.gate", Gate)',
    "add": ADD.solution + '\n\ncheck("99.add", add)',
    "own add": 'add = own("99.add", add)',
}
FOUND = {
    "setup": BUILT["setup"],
    "fade": 'fade = own("99.fade")',
    "stub": FADE.stub + '\n\nfade = own("99.fade", fade)',
    "gate": 'Gate = own("99.gate")',
    "add": 'add = own("99.add")',
    "hint": 'hint("99.gate")',
    "solution": 'solution("99.fade")',
    "page": "progress_page()",
    "values": """
gate = Gate(1.0)
gate.step()
assert gate.step.__globals__["fade"].__globals__["SIGN"] == 1
show_source(add)
tell(f"{float(gate.gain):.3f} {add(torch.ones(2), torch.ones(2)).tolist()}")""",
}


def run_cells(
    cells: dict[str, str], folder: Path, streams: tuple[str, ...] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Cell name → bundles it left; anything but displayed data would be an error or a stream."""
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source.strip()) for source in cells.values()]
    )
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    found = {}
    for name, cell in zip(cells, notebook.cells, strict=True):
        if name in streams:
            cell.outputs = [one for one in cell.outputs if one.output_type != "stream"]
        kinds = {output.output_type for output in cell.outputs}
        assert kinds == {"display_data"}, (name, cell.outputs)
        found[name] = [dict(output.data) for output in cell.outputs]
    return found


def test_what_a_chapter_leaves_in_its_file() -> None:
    """One test, because one kernel takes as long as all the others of this folder."""
    outputs = run_cells(CELLS, ROOT)
    once = set(CELLS) - {"predict", "tell", "figure", "quiz"}
    assert {name for name, bundles in outputs.items() if len(bundles) == 1} == once

    text = {name: bundles[-1]["text/plain"] for name, bundles in outputs.items()}
    assert text["setup"] == "Chapter 01 · ready"
    assert text["predict"] == "measured: n"
    assert "2 × below your guess" in outputs["predict"][-1]["text/html"]
    assert text["figure"] == "The figure in words"
    assert outputs["figure"][1]["text/plain"].startswith("A line that rises")
    assert "A line that rises" in outputs["figure"][2]["text/html"]
    assert text["progress"] == "training: 300 steps"
    assert text["hook"] == "training: 2 steps"
    assert text["check"].startswith("99.twice: not done yet. Fill in twice")
    assert "by hand: twice 2 is 8; expected 4." in text["wrong"]
    assert "it raised TypeError: 'int' object is not subscriptable." in text["broken"]
    assert "Your line: return x[0]" in text["broken"]
    assert text["later"] == text["broken"]
    assert "a) It forgets *faster*." in text["quiz"]

    for name in ("predict", "figure", "quiz"):
        assert WIDGET in outputs[name][0], f"{name} has no live form"
        assert WIDGET not in outputs[name][1], f"{name} has no form at rest"
    assert outputs["figure"][1][PLOTLY]["data"][0]["y"]
    assert 'value="300" max="300"' in outputs["progress"][0]["text/html"]
    assert "loss 0.500" in outputs["hook"][0]["text/html"]
    assert text["short"] == "tuning: 9 steps"
    assert "Cut short after 1 of 9 steps." in outputs["short"][0]["text/html"]


def test_a_restarted_kernel_finds_what_was_built(tmp_path: Path) -> None:
    course = tmp_path / ".course"
    course.mkdir()
    outputs = run_cells(BUILT, tmp_path, streams=("fade",))
    text = {name: bundles[-1]["text/plain"] for name, bundles in outputs.items()}
    assert "Later chapters" not in "".join(text.values())
    assert text["fade"].startswith("99.fade: right. 3 of 3 checks")
    assert text["own fade"] == "99.fade: your function runs."
    assert text["own gate"] == "99.gate: your class runs."
    assert text["own add"] == "99.add: your function runs."
    fade = (course / "answers" / "99.fade.py").read_text()
    assert "SIGN = 1\n" in fade
    assert "    # mine\n" in fade
    assert "started" not in fade

    outputs = run_cells(FOUND, tmp_path)
    text = {name: bundles[-1]["text/plain"] for name, bundles in outputs.items()}
    assert text["fade"] == "99.fade: your function of an earlier session runs."
    assert text["stub"] == "99.fade: your earlier function runs, because this one is not done yet."
    assert text["gate"] == "99.gate: your class of an earlier session runs."
    assert text["add"] == "99.add: your function of an earlier session runs."
    assert text["hint"].startswith("Hint 2 of 3")
    assert text["solution"].startswith("Solution · 99.fade")
    assert "01_selective_scan" in text["page"]
    assert text["page"].endswith(f"Kept in {course}.")
    assert text["values"] == "0.368 [2.0, 2.0]"
