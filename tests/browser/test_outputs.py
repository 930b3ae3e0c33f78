"""Outputs of the course in JupyterLab: folds, what hides below a live view, keys, both themes.

One notebook is run in a page, and used with the keyboard. A copy of it that is not trusted, as a
stranger's file would be, shows what is left then: JupyterLab removes styles and live views from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from nemotron_lite.course.plotting import theme as colours
from tests.browser.conftest import EVERYTHING, FOLDER

THEMES = ("JupyterLab Dark", "JupyterLab Light")
STEPPER = """def go_on(fig, step):
    fig.data[0].y = [step, 2, 4]
    return f"step {step}"

show(stepper(figure, go_on, steps=9, label="token", start=4), figure)"""
CELLS = (
    *(STEPPER if "stepper(figure" in cell else cell for cell in EVERYTHING),
    "from nemotron_lite import ops\nshow_source(ops.selective_scan, folded='Compare with yours')",
)
PLAIN = {"metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
         "nbformat": 4, "nbformat_minor": 5}  # fmt: skip
_WRITE = """([path, content]) => jupyterapp.serviceManager.contents.save(
  path, {type: 'file', format: 'text', content})"""
# The colours of the text of live views and of our HTML, and of what stands behind it.
_INKS = """() => {
  const solid = c => c && !/^rgba\\(.*, 0\\)$|transparent/.test(c);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor; if (solid(c)) return c; } return 'white'; };
  const texts = document.querySelectorAll('.nl-live *, .jp-RenderedHTML *');
  const seen = e => e.offsetHeight && e.checkVisibility({visibilityProperty: true});
  return [...texts].filter(e => !e.closest('.js-plotly-plot') && seen(e) &&
    [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())
  ).map(e => [e.innerText.slice(0, 40), getComputedStyle(e).color, behind(e)]);
}"""


@pytest.fixture(scope="module")
def page(lab: Any) -> Iterator[Any]:
    """The page with the notebook above in front, run. In its folder, no guess is stored yet."""
    from tests.browser.lab import notebook, run_all

    page = lab.page
    write(page, f"{FOLDER}/outputs.ipynb", [code_cell(source) for source in CELLS])
    with notebook(page, f"{FOLDER}/outputs.ipynb"):
        assert run_all(page) == []
        page.wait_for_timeout(500)  # the last widgets draw after the last cell has ended
        yield page


def code_cell(source: str) -> dict[str, Any]:
    return {"cell_type": "code", "source": source, "metadata": {}, "outputs": [],
            "execution_count": None}  # fmt: skip


def write(page: Any, path: str, cells: list[dict[str, Any]]) -> None:
    """Write a notebook as a plain file, so that nothing is removed from it and nobody signs it."""
    named = [{**cell, "id": f"c{number}"} for number, cell in enumerate(cells)]
    page.evaluate(_WRITE, [path, json.dumps({**PLAIN, "cells": named})])


def shown(page: Any) -> Any:
    """The notebook in front."""
    return page.locator(".jp-NotebookPanel:not(.lm-mod-hidden)")


def unfold(page: Any) -> None:
    """The folded source is hidden, a click shows it, and it is coloured as in a cell."""
    fold = shown(page).locator("details", has_text="Compare with yours")
    code = fold.locator("pre")
    assert not code.is_visible()
    fold.locator("summary").click()
    assert code.is_visible()
    inks = code.evaluate("e => [...e.querySelectorAll('span')].map(s => getComputedStyle(s).color)")
    assert len(set(inks)) >= 4, "keywords, names, comments and text look the same"
    assert "def selective_scan(" in code.inner_text()
    fold.locator("summary").click()


def test_a_folded_source_opens_and_is_coloured(page: Any) -> None:
    unfold(page)


def test_what_is_for_reopening_is_hidden_below_a_live_view(page: Any) -> None:
    figures = shown(page).locator(".jp-RenderedPlotly")
    assert [figure.is_visible() for figure in figures.all()] == [True, False, False]
    assert shown(page).locator(".nl-live .js-plotly-plot").count() == 2
    outputs = shown(page).locator(".jp-OutputArea-output")
    for text in ("Predict. How many?", "What does a large dt do?"):
        places = outputs.filter(has_text=text)
        assert [place.is_visible() for place in places.all()] == [True, False], text


def test_a_guess_is_kept_with_the_keyboard_and_opens_the_answer(page: Any) -> None:
    form = shown(page).locator(".nl-live", has=page.locator(".widget-text"))
    box = form.locator("input")
    answer = shown(page).locator("details", has_text="Answer:")
    assert not answer.locator("table").is_visible()
    box.focus()
    page.keyboard.type("many")
    page.keyboard.press("Enter")
    form.get_by_text("“many” is not a number.").wait_for(timeout=8_000)
    page.keyboard.press("Control+A")
    page.keyboard.type("9")
    page.keyboard.press("Enter")
    form.get_by_text("Saved: 9").wait_for(timeout=8_000)
    answer.locator("table").wait_for(timeout=8_000)
    assert "2 × below your guess" in answer.inner_text()
    page.keyboard.press("Tab")
    assert page.evaluate("() => document.activeElement.innerText") == "Save"


def test_a_stepper_plays_to_its_end_with_the_keyboard(page: Any) -> None:
    stepper = shown(page).locator(".nl-live", has=page.get_by_role("button", name="Next"))
    steps = stepper.locator(".widget-readout")
    assert steps.inner_text() == "4"
    stepper.get_by_role("button", name="Back").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("e => e.innerText == '3'", arg=steps.element_handle(), timeout=8_000)
    stepper.get_by_role("button", name="Play").focus()
    page.keyboard.press("Space")
    stepper.get_by_role("button", name="Pause").wait_for(timeout=8_000)
    page.wait_for_function("e => e.innerText == '8'", arg=steps.element_handle(), timeout=20_000)
    stepper.get_by_role("button", name="Play").wait_for(timeout=8_000)
    stepper.locator("[aria-live=polite]", has_text="step 8").wait_for(timeout=8_000)


@pytest.mark.parametrize("theme", THEMES)
def test_text_can_be_read_in_both_themes(page: Any, theme: str) -> None:
    from tests.browser.lab import look

    seen = look(page, theme)
    assert all((bright < 100) == (theme == THEMES[0]) for bright in seen.brightness), seen
    inks = page.evaluate(_INKS)
    assert len(inks) > 20
    weak = [
        (text, ink, ground)
        for text, ink, ground in inks
        if colours.contrast(as_hex(ink), as_hex(ground)) < 4.5
    ]
    assert weak == []


def as_hex(colour: str) -> str:
    """`rgb(17, 17, 17)` as `#111111`; transparency is not looked at."""
    if colour == "white":
        return "#FFFFFF"
    inside = colour[colour.index("(") + 1 : colour.index(")")]
    return "#" + "".join(f"{int(float(part)):02X}" for part in inside.split(",")[:3])


def test_a_copy_that_is_not_trusted_shows_everything_at_rest(page: Any) -> None:
    """Its widgets are links to nothing, and it has no style of ours but that of the server."""
    from tests.browser.lab import look, notebook

    cells = page.evaluate(
        "() => jupyterapp.shell.currentWidget.content.model.sharedModel.toJSON().cells"
    )
    for cell in cells:
        cell["metadata"].pop("trusted", None)
        cell["source"] += "  # not as it was signed"
    write(page, f"{FOLDER}/copy.ipynb", cells)
    with notebook(page, f"{FOLDER}/copy.ipynb"):
        dark = look(page, THEMES[0])
        assert dark.figures == 3
        assert all(bright < 100 for bright in dark.brightness)
        text = shown(page).inner_text()
        for words in ("Predict. How many?", "What does a large dt do?", "It forgets faster.",
                      "training", "300 steps, done", "The figure in words"):  # fmt: skip
            assert words in text
        unfold(page)
