"""Each rule finds the chapter that breaks it, and accepts one that keeps it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_output

from nemotron_lite.authoring import lint, lint_text
from nemotron_lite.course.display import PLOTLY, WIDGET
from tests.authoring.samples import (
    ALT,
    ANSWER,
    EXERCISES,
    FIGURE,
    QUIZ_OBJECTIVES,
    chapter,
    code,
    figure_output,
    numbered,
    prediction,
    tagged,
)

RECORD = "benchmarks/records/ssd_operator.json"
PUBLIC = {"generate": "nemotron_lite.generation.generate", "ssd": "nemotron_lite.ops"}
FACTS = {
    "super.parameters_total": lint_text.spellings(120_668_707_840, "parameters"),
    "super.layers": lint_text.spellings(88, "layers"),
    "super.latent_width": lint_text.spellings(1024, "channels"),
}
RENAMED = ANSWER.replace("weights", "w").replace("summed", "s").replace("x", "q")
RENAMED = RENAMED.replace("softmaq", "softmax")
CONTEXT = lint.LintContext(PUBLIC, FACTS, EXERCISES, QUIZ_OBJECTIVES)


def problems(notebook: NotebookNode) -> list[str]:
    return lint.lint_notebook(notebook, "01", CONTEXT)


def say(notebook: NotebookNode, text: str) -> None:
    tagged(notebook, "intuition").source += f"\n\n{text}"


def write(notebook: NotebookNode, source: str) -> None:
    code(notebook, "predict(").source += f"\n{source}"


def output(notebook: NotebookNode, **data: object) -> None:
    bundle = {kind.replace("_", "/", 1): value for kind, value in data.items()}
    code(notebook, "show(").outputs = [new_output("display_data", data=bundle)]


def figure(notebook: NotebookNode) -> NotebookNode:
    return code(notebook, "show(").outputs[0].data


def change(notebook: NotebookNode, section: str, old: str, new: str) -> None:
    cell = tagged(notebook, section)
    assert old in cell.source
    cell.source = cell.source.replace(old, new)


def moved(notebook: NotebookNode, section: str, before: str) -> None:
    cell = tagged(notebook, section)
    notebook.cells.remove(cell)
    notebook.cells.insert(notebook.cells.index(tagged(notebook, before)), cell)


def untagged(notebook: NotebookNode, section: str) -> None:
    tagged(notebook, section).metadata.tags = []


def append(notebook: NotebookNode, *cells: NotebookNode) -> None:
    last = max(c.execution_count or 0 for c in notebook.cells if c.cell_type == "code")
    for cell in cells:
        if cell.cell_type == "code":
            cell.execution_count = last = last + 1
    notebook.cells += cells


def stderr(notebook: NotebookNode) -> None:
    code(notebook, "run()").outputs = [new_output("stream", name="stderr", text="warning")]


def raised(notebook: NotebookNode) -> None:
    code(notebook, "run()").outputs = [
        new_output("error", ename="ValueError", evalue="no such thing", traceback=[])
    ]


def folded(source: str) -> NotebookNode:
    return new_code_cell(source, metadata=dict(jupyter=dict(outputs_hidden=True)))


def closed(source: str) -> NotebookNode:
    return new_code_cell(source, metadata=dict(jupyter=dict(source_hidden=True)))


def set_tag(notebook: NotebookNode, section: str, tag: str) -> None:
    tagged(notebook, section).metadata.tags.append(tag)


BAD: dict[str, tuple[Callable[[NotebookNode], object], str]] = {
    # executed
    "not run": (lambda n: code(n, "run()").update(execution_count=None), "never run"),
    "out of order": (lambda n: code(n, "run()").update(execution_count=9), "count 9, expected"),
    "empty cell": (lambda n: append(n, new_code_cell("")), r"cell \d+ is empty"),
    "traceback": (raised, "ended in ValueError: no such thing"),
    # figures
    "no alt": (lambda n: figure(n).update({PLOTLY: {"layout": {}}}), "figure without alt text"),
    "short alt": (
        lambda n: figure(n).update({PLOTLY: {"layout": {"meta": {"alt": "a plot"}}}}),
        "figure without alt text",
    ),
    "alt not shown": (
        lambda n: figure(n).update({"text/plain": "Figure({...})"}),
        "is not its alt",
    ),
    "no picture": (lambda n: figure(n).pop("image/png"), "without its PNG"),
    "bare image": (
        lambda n: output(
            n, image_png="iVBORw0KGgo=", text_plain="<Figure size 640x480 with 1 Axes>"
        ),
        "image described as '<Figure",
    ),
    "img": (lambda n: output(n, text_html='<img src="a.png" alt="">'), "without alt"),
    "svg": (lambda n: output(n, text_html="<svg><path/></svg>"), "<svg> without a title"),
    "markdown image": (lambda n: say(n, "![plot](plot.png)"), "plot.png described as 'plot'"),
    # sections
    "missing": (lambda n: untagged(n, "break"), "nl:break is missing"),
    "misordered": (lambda n: moved(n, "math", before="stepper"), "nl:math"),
    "twice": (lambda n: set_tag(n, "more", "nl:recap"), "nl:recap is there 2 times"),
    "unknown": (lambda n: set_tag(n, "more", "nl:bonus"), "unknown tag nl:bonus"),
    "wrong kind": (lambda n: code(n, "run()").metadata.update(tags=["nl:measure"]), "a code cell"),
    "no title": (lambda n: tagged(n, "header").update(source="Sample"), "begins with `# title`"),
    "other chapter": (
        lambda n: tagged(n, "setup").update(source='setup("02")'),
        r'call setup\("01"',
    ),
    "few exercises": (lambda n: untagged(n, "exercise"), "3 exercises; expected at least 4"),
    "early exercise": (
        lambda n: moved(n, "exercise", before="opening"),
        "exercise .* comes before nl:opening",
    ),
    # volatile content
    "widget state": (lambda n: n.metadata.update(widgets={"x": 1}), "metadata.widgets"),
    "widget link": (lambda n: figure(n).update({WIDGET: {"model_id": "0"}}), "links to a widget"),
    "stderr": (stderr, "has stderr"),
    "times": (lambda n: code(n, "run()").metadata.update(execution={"t": 1}), "metadata.execution"),
    "kernel": (lambda n: n.metadata.kernelspec.update(name="my-env"), "not named python3"),
    # sizes
    "long cell": (lambda n: write(n, "x = 1\n" * 15), "has 16 lines of code; at most 15"),
    "many cells": (
        lambda n: append(n, *[new_markdown_cell("a") for _ in range(40)]),
        "cells; at most 45",
    ),
    "large": (lambda n: output(n, text_plain="x" * 600_000), r"at most 500 kB .cell \d+: 600 kB"),
    # comparison
    "ignored": (
        lambda n: append(n, *[new_code_cell(f"# NBVAL_IGNORE_OUTPUT\n{i}") for i in range(3)]),
        "are not compared; at most 2",
    ),
    "skipped": (
        lambda n: write(n, "# NBVAL_SKIP"),
        "NBVAL_SKIP'.; every cell .* must run",
    ),
    "expects an error": (lambda n: set_tag(n, "setup", "raises-exception"), "raises-exception"),
    # outside references
    "place": (
        lambda n: output(n, text_plain="saved in /ho" + "me/me/runs"),
        "has the path /ho" + "me/me",
    ),
    "script": (
        lambda n: output(n, text_html='<script src="https://cdn.x.y/plotly.js"></script>'),
        "loads .* from the internet",
    ),
    "remote image": (
        lambda n: say(n, f"![{ALT}](https://x.y/z.png)"),
        "loads .* from the internet",
    ),
    # names of the package
    "function": (lambda n: write(n, "def ssd(x):\n    return x"), "redefines ssd; import it from"),
    "class": (lambda n: write(n, "class generate: ..."), "redefines generate"),
    "lambda": (lambda n: write(n, "ssd = lambda x: x"), "redefines ssd"),
    "inside": (lambda n: write(n, "if 1:\n    def ssd(): ..."), "redefines ssd"),
    # numbers by hand
    "fact": (
        lambda n: say(n, "It has 120,668,707,840 of them."),
        "the fact super.parameters_total",
    ),
    "plain fact": (lambda n: say(n, "It has 120668707840."), "the fact super.parameters_total"),
    "fact and unit": (lambda n: say(n, "All 88 layers."), "the fact super.layers"),
    "power of two": (lambda n: say(n, "1024 channels."), "the fact super.latent_width"),
    "times faster": (lambda n: say(n, "It is 3.2 times faster."), "says '3.2 times faster'"),
    "times as fast": (lambda n: say(n, "It is 3 times as fast."), "says '3 times as fast'"),
    "x": (lambda n: say(n, "About 3x faster."), "says '3x faster'"),
    "cross": (lambda n: say(n, "Roughly 3.2×."), "says '3.2×'"),
    "speed": (lambda n: say(n, "We saw 1,200 tok/s here."), "says '1,200 tok/s'"),
    "memory": (lambda n: say(n, "It needs 4 GB."), "says '4 GB'"),
    "share": (lambda n: say(n, "That saves 38 % of it."), "says '38 %'"),
    "elsewhere": (
        lambda n: say(n, f"It is 3 times faster.\n\n[record](../{RECORD})"),
        "says '3 times faster'",
    ),
    "no record": (
        lambda n: say(n, "3 times faster, [record](../benchmarks/records/none.json)."),
        "none.json, which does not exist",
    ),
    "thin reason": (
        lambda n: [
            say(n, "It needs 4 GB."),
            tagged(n, "intuition").metadata.update(nl_figures="x"),
        ],
        "says '4 GB'",
    ),
    # predictions
    "late": (
        lambda n: [
            code(n, "predict(").update(source="1"),
            append(n, new_code_cell('predict("ratio")')),
        ],
        "measures 'ratio' before it was predicted",
    ),
    "other key": (
        lambda n: code(n, "run()").update(source='measured("size", 1)'),
        "asks to predict 'ratio', which is never measured",
    ),
    "key in a name": (lambda n: write(n, "predict(key)"), "key of predict.* not a literal"),
    "too few": (
        lambda n: [code(n, s).update(source="1") for s in ("predict(", "run()")],
        "2 predictions; expected 3 to 4",
    ),
    "far from its measurement": (
        lambda n: [
            code(n, 'measured("ratio"').update(source="1"),
            append(n, folded('measured("ratio", 1)')),
        ],
        "asks to predict 'ratio'; the next code cell must measure it",
    ),
    "bounds in sight": (
        lambda n: code(n, "run()").update(source='measured("ratio", run(), low=1)'),
        "shows the bounds of a prediction",
    ),
    "answer in sight": (
        lambda n: code(n, "run()").metadata.pop("jupyter"),
        "its output is open at rest",
    ),
    # what the learner builds
    "answer shown above": (
        lambda n: tagged(n, "demo").update(source=f"```python\ndef other(y):\n{ANSWER}```"),
        "shows 3 of 3 statements of the answer to 01.summarise",
    ),
    "answer with other variables, in an output": (
        lambda n: output(n, text_markdown=f"`a.py`\n\n```python\ndef g(q):\n{RENAMED}```"),
        "shows 3 of 3 statements of the answer to 01.summarise",
    ),
    "answer in an earlier cell": (
        lambda n: tagged(n, "setup").update(source=f'setup("01")\ndef g(q):\n{RENAMED}'),
        "cell 1 shows 3 of 3 statements",
    ),
    "answer not used": (
        lambda n: code(n, "own(").update(source="1"),
        "01.discretise is not used",
    ),
    "used too early": (
        lambda n: tagged(n, "setup").update(source='setup("01")\nown("01.memorise", f)'),
        r'cell 1 calls own\("01.memorise"\) above its exercise',
    ),
    "a comment for a tool": (lambda n: write(n, "x = 1  # noqa: B023"), "comment '# noqa' for a"),
    "prose in an open cell": (lambda n: write(n, 'tell("words")'), "its input is open"),
    "dead link": (lambda n: say(n, "[map](../docs/no.md)"), "../docs/no.md, which does not exist"),
    "dead heading": (
        lambda n: say(n, "[layout](../CONTRIBUTING.md#no-such-thing)"),
        "CONTRIBUTING.md has no such heading",
    ),
    "many words": (lambda n: say(n, "word " * 2400), r"words of text; at most 2300"),
    # exercises
    "solved": (
        lambda n: code(n, "discretise").update(
            source='def discretise(x):\n    return x\n\n\ncheck("01.discretise", discretise)'
        ),
        "not the untouched stub of 01.discretise",
    ),
    "not checked": (
        lambda n: code(n, "discretise").update(source=EXERCISES[0].stub),
        "untouched stub",
    ),
    "unknown exercise": (
        lambda n: tagged(n, "exercise").metadata.update(nl_exercise="01.other"),
        "nl_exercise '01.other'",
    ),
    "other minutes": (
        lambda n: change(n, "exercise", "about 5 minutes", "about 50 minutes"),
        "does not end in the text of 01.discretise",
    ),
    "other task": (
        lambda n: change(n, "exercise", "Return x, discretised.", "Return x."),
        "does not end in the text of 01.discretise",
    ),
    # header
    "no row": (lambda n: change(n, "header", "**You know**", "Before"), r"no row \*\*You know"),
    "no times": (
        lambda n: change(n, "header", "2 minutes", "some time"),
        "have the text … minutes",
    ),
    "too little time": (
        lambda n: change(n, "header", "15 for", "7 for"),
        "says 7 minutes for the exercises that are a must; counted are 15",
    ),
    "too little to read": (
        lambda n: say(n, "word " * 1800),
        "says 2 minutes to read; counted are 1[12]",
    ),
    # objectives
    "no objectives": (
        lambda n: change(n, "objectives", "- **O", "- O"),
        r"nl:objectives lists \[\]",
    ),
    "objectives out of order": (
        lambda n: change(n, "objectives", "**O3**", "**O9**"),
        r"nl:objectives lists \['O1', 'O2', 'O9'",
    ),
    "recap forgets one": (
        lambda n: change(n, "recap", "- **O2**", "- Also,"),
        r"nl:recap has \['O1', 'O3', 'O4', 'O5'\]",
    ),
    "nobody is asked for one": (
        lambda n: [
            change(n, section, "- **O5** Say why.", "- **O5** Say why.\n- **O6** Say how.")
            for section in ("objectives", "recap")
        ],
        r"the quiz has questions for \['O1', 'O2', 'O3', 'O4', 'O5'\]",
    ),
    "an exercise serves none": (
        lambda n: change(n, "objectives", "- **O2** Memorise.\n", ""),
        "exercise 01.memorise serves O2, which is not an objective",
    ),
}

GOOD: dict[str, Callable[[NotebookNode], object]] = {
    "as it is": lambda n: None,
    "a record in the paragraph": lambda n: say(n, f"3 times as fast ([record](../{RECORD}))."),
    "a reason": lambda n: [
        say(n, "Half of them: 50 %."),
        tagged(n, "intuition").metadata.update(nl_figures="the share is chosen in the next cell"),
    ],
    "numbers in code and formulas": lambda n: say(
        n, "`x = 50 %`, $3\\times 4$ GB$^{-1}$ of $88 layers$.\n\n```python\ny = 120668707840\n```"
    ),
    "everyday numbers": lambda n: say(n, "Rows of 1024 tokens, 3 heads, 2 layers, 16 states."),
    "a number that only holds a fact": lambda n: say(
        n, "88 layersets, 1,88 layers, 120668707840.5"
    ),
    "values under a public name": lambda n: write(n, "ssd = run(1)\nfrom nemotron_lite import ops"),
    "magics": lambda n: write(n, "%matplotlib inline\n!ls"),
    "two ignored cells": lambda n: append(
        n, *[new_code_cell(f"# NBVAL_IGNORE_OUTPUT\n{i}") for i in range(2)]
    ),
    "predict again": lambda n: append(
        n,
        *prediction("size"),
    ),
    "an image with words": lambda n: output(n, image_png="iVBORw0KGgo=", text_plain=ALT),
    "alt over two lines": lambda n: figure(n).update({"text/plain": ALT.replace(" and", "\nand")}),
    "an svg with a title": lambda n: output(n, text_html="<svg><title>A map</title></svg>"),
    "prose in a closed cell": lambda n: append(n, closed('tell("words")')),
    "a link to a heading": lambda n: say(n, "[rules](../CONTRIBUTING.md)"),
    "another function": lambda n: say(n, "```python\ny = torch.softmax(q @ k.mT, dim=-1)\n```"),
    "links": lambda n: say(n, "[paper](https://arxiv.org/abs/2405.21060), [code](../Makefile)"),
}


def test_the_sample_keeps_every_rule() -> None:
    assert problems(chapter()) == []
    assert figure_output().data[PLOTLY] == FIGURE


@pytest.mark.parametrize("name", BAD)
def test_a_bad_chapter_is_found(name: str) -> None:
    spoil, message = BAD[name]
    notebook = chapter()
    spoil(notebook)
    found = "\n".join(problems(notebook))
    assert re.search(message, found), found or "nothing was found"


@pytest.mark.parametrize("name", GOOD)
def test_a_good_chapter_is_left_alone(name: str) -> None:
    notebook = chapter()
    GOOD[name](notebook)
    assert problems(notebook) == []


def test_spellings_are_only_the_unambiguous_ones() -> None:
    ways = lint_text.spellings
    assert ways(120_668_707_840, "parameters")[:2] == (
        "120,668,707,840",
        "120,668,707,840 parameters",
    )
    assert ways(88, "layers") == ("88 layers",)
    assert ways(1024, "channels") == ("1,024 channels", "1024 channels")
    assert ways(8, "layers") == ("8 layers",)
    assert ways(4.0, "") == ways(True, "") == ways("NVFP4", "bits") == ways(7, "times") == ()
    assert ways(12.75, "%") == ("12.75",)


def test_what_a_chapter_is_compared_with_is_read_from_the_package() -> None:
    public = lint.public_names()
    assert public["ssd"] == "nemotron_lite.ops"
    assert public["generate"] == "nemotron_lite"
    assert public["NemotronConfig"] == "nemotron_lite"
    assert public["described"] == "nemotron_lite.course.plotting"
    assert public["selective_scan"] == "nemotron_lite.ops"
    assert not any(name.startswith("_") for name in public)
    assert "main" not in public
    facts = lint.fact_spellings()
    assert any(key.startswith("super.") for key in facts)
    assert all(facts.values())


def test_lint_file_reads_a_chapter_from_disk(tmp_path: Path) -> None:
    import nbformat

    path = tmp_path / "01_sample.ipynb"
    notebook = chapter()
    notebook.cells = notebook.cells[:3]
    nbformat.write(notebook, path)
    assert "nl:math is missing." in lint.lint_file(path)
    found = lint.lint_chapter([path])
    assert any("exercise 01." in problem and "has no cell" in problem for problem in found)


def test_an_exercise_may_stand_in_either_notebook_but_not_in_both() -> None:
    core, deeper = chapter(), chapter()
    assert lint_text.missing_exercises([core], EXERCISES) == []
    deeper.cells = [c for c in deeper.cells if c.metadata.get("nl_exercise") == "01.memorise"]
    both = lint_text.missing_exercises([core, deeper], EXERCISES)
    assert both == ["exercise 01.memorise is there twice."]
    untagged(core, "exercise")
    assert lint_text.missing_exercises([core], EXERCISES) == ["exercise 01.discretise has no cell."]


def test_a_deeper_notebook_needs_no_sections_and_is_shorter() -> None:
    notebook = chapter()
    notebook.cells = notebook.cells[1:]
    numbered(notebook.cells)
    for cell in notebook.cells:
        cell.metadata["tags"] = [t for t in cell.metadata.get("tags", ()) if t == "nl:exercise"]
    found = lint.lint_notebook(notebook, "01", CONTEXT, deeper=True)
    assert [p for p in found if "at most" not in p] == []
    append(notebook, *[new_markdown_cell("a") for _ in range(30)])
    write(notebook, "def ssd(x):\n    return x")
    found = lint.lint_notebook(notebook, "01", CONTEXT, deeper=True)
    assert any("cells; at most 25" in p for p in found)
    assert any("redefines ssd" in p for p in found)
