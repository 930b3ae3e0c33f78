"""The feedback page: complete, without network, and harmless to whoever opens it."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest

from nemotron_lite.course import exercises
from nemotron_lite.coursework import make
from nemotron_lite.coursework.clean_copy import text_of
from nemotron_lite.coursework.feedback import (
    feedback_page,
    formula,
    harmless,
    markdown,
    output_html,
)

TASKS = [
    pytest.param("".join(cell["source"]), id=cell["id"])
    for chapter in make.chapters()
    for cell in make.release_notebook(chapter, exercises.exercises(chapter))["cells"]
    if cell["cell_type"] == "markdown"
]
RESULT: dict[str, Any] = {
    "student": "<b>Ann</b>", "assignment": "chapter_99", "points": 2.0, "max_points": 3.0,
    "optional_points": 1.0, "max_optional_points": 4.0, "status": "graded",
    "message": "<script>x()</script>", "notes": ["a & b"], "flags": [],
    "exercises": [
        {"id": "99.one", "kind": "must", "points": 2.0, "max_points": 3.0, "status": "partial",
         "message": "not right yet.\n  ✓ values\n  ✗ strides\nstrides: <i>wrong</i>",
         "checks": [("values", True), ("strides", False)]},
    ],
}  # fmt: skip


def cell(name: str, source: str, kind: str = "code", grade_id: str = "") -> dict[str, Any]:
    marks = {"nbgrader": {"grade_id": grade_id}} if grade_id else {}
    return {"id": name, "cell_type": kind, "source": source, "metadata": marks}


@pytest.mark.parametrize("text", TASKS)
def test_every_formula_of_the_tasks_is_drawn(text: str) -> None:
    made = markdown(text)
    assert "$" not in re.sub(r"<code>.*?</code>", "", made, flags=re.S)
    assert not re.search(r"<code>[^<]*\[a-z]+", made), "a formula was left as LaTeX"


def test_a_formula_is_mathml_that_holds_what_was_written() -> None:
    made = formula(r"S_t = e^{dt\,A} \otimes \mathrm{fade}")
    assert made.startswith("<math")
    assert "<mtext>fade</mtext>" in made
    assert "⊗" in made
    assert "<msub>" in made
    assert 'display="block"' in formula("x", block=True)


@pytest.mark.parametrize(
    "latex",
    [r"\frac{1}", "<script>x()</script>", r"\text{<script>x()</script>}", "a & b", "{" * 400,
     r"\href{javascript:x()}{y}", r"\begin{nowhere}x"],
)  # fmt: skip
def test_what_is_no_formula_becomes_no_markup(latex: str) -> None:
    made = formula(latex)
    assert "<script" not in made
    assert "href" not in made.replace(r"\href", "")
    assert made.startswith(("<math", "<code>"))


def test_markdown_shows_html_as_text_and_keeps_code() -> None:
    made = markdown("See <script>x()</script> *so* `$not$` and $x$ costs 5$ [l](javascript:x())")
    assert "<script>" not in made
    assert "<em>so</em>" in made
    assert "<code>$not$</code>" in made
    assert made.count("<math") == 1
    assert "javascript:" not in made


@pytest.mark.parametrize(
    "bad",
    ["<script>x()</script>", "<img src=x onerror=x()>", "<a href='javascript:x()'>l</a>",
     "<svg onload=x()>", "<iframe src='http://e'></iframe>", "<style>*{}</style>",
     "<b onclick=x()>t</b>", "<form action='http://e'><input></form>", "<!--<script>-->",
     "<math><mtext><script>x()</script></mtext></math>", "<scr<script></script>ipt>x()</script>"],
)  # fmt: skip
def test_html_of_a_learner_is_made_harmless(bad: str) -> None:
    made = output_html({"output_type": "display_data", "data": {"text/html": f"{bad}<b>kept</b>"}})
    assert "<b>kept</b>" in made
    assert not re.search(r"<(?!/?(b|a|div)\b)", made)
    assert not re.search(r"<[^>]*(on\w+=|javascript:|style=|src=)", made)


def test_tables_survive() -> None:
    table = "<table><tr><td colspan='2'>1</td></tr></table>"
    assert '<td colspan="2">1</td>' in harmless(table)


def test_pictures_are_part_of_the_page_and_run_nothing() -> None:
    svg = "<svg xmlns='http://www.w3.org/2000/svg'><script>x()</script></svg>"
    made = output_html({"output_type": "display_data", "data": {"image/svg+xml": svg}})
    assert "<script" not in made
    assert base64.b64encode(svg.encode()).decode() in made
    bad = output_html({"output_type": "display_data", "data": {"image/png": '"><script>'}})
    assert "<script" not in bad
    png = base64.b64encode(b"png").decode()
    good = output_html({"output_type": "display_data", "data": {"image/png": png + "\n"}})
    assert f'src="data:image/png;base64,{png}"' in good


def test_the_page_has_points_checks_outputs_and_comments() -> None:
    cells = [
        cell("title", "# Work on $x$", "markdown"),
        cell("99-one", "def one(x):\n    return '<b>'", grade_id="99-one"),
        cell("99-one-check", "check(…)", grade_id="99-one-check"),
        cell("raw", "<i>raw</i>", "raw"),
    ]
    outputs = {1: [
        {"output_type": "stream", "name": "stdout", "text": "\x1b[31mred\x1b[0m <u>"},
        {"output_type": "error", "ename": "E", "evalue": "<no>", "traceback": ["one, line 2: <x>"]},
    ]}  # fmt: skip
    page = feedback_page(RESULT, {"cells": cells}, outputs)
    assert text_of(cells[2]) not in page, "the result stands in the place of a test cell"
    for text in (
        "&lt;b&gt;Ann&lt;/b&gt; · chapter_99: 2 of 3 points, and 1 of 4 optional points",
        "99.one: 2 of 3 points", "<li>✓ values</li>", "<li>✗ strides</li>",
        "strides: &lt;i&gt;wrong&lt;/i&gt;", "a &amp; b", "red &lt;u&gt;", "E: &lt;no&gt;",
        "one, line 2: &lt;x&gt;", "<math", "&lt;i&gt;raw&lt;/i&gt;",
    ):  # fmt: skip
        assert text in page
    assert page.count("values") == 1, "a check is listed once"
    assert "<script" not in page
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org/\S*", "", page), "no network"
    assert "default-src 'none'" in page


def test_a_page_without_a_notebook_says_why() -> None:
    result = {**RESULT, "max_points": None, "max_optional_points": None, "exercises": [],
              "assignment": "", "status": "unreadable", "points": 0.0}  # fmt: skip
    page = feedback_page(result)
    assert "no assignment: 0 of ? points" in page
    assert "unreadable: &lt;script&gt;" in page
