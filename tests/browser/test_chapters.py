"""The chapters in the learner's JupyterLab: stored outputs, Run All, controls, and reopening.

Every chapter is opened in one page and looked at, in the light and in the dark theme. The tests of
the notebooks run every cell of every chapter; here one chapter runs, with its sliders dragged, its
buttons pressed and its guesses typed, and is saved and opened again. So does a small notebook with
everything that a chapter shows with a widget. Two more show that the tests find a slider that
changes nothing, an error, and a request to another address.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from typing import Any

import pytest

from nemotron_lite.course.display import WIDGET
from nemotron_lite.course.plotting.widgets import BUDGET
from tests.browser.conftest import CHAPTERS

RUN = "01_selective_scan.ipynb"  # the chapter that runs here; it has all kinds of controls
LIGHT, DARK = "JupyterLab Light", "JupyterLab Dark"


@pytest.fixture(scope="module")
def outside() -> list[str]:
    """Addresses other than the server that the page of `page` asked for."""
    return []


@pytest.fixture(scope="module")
def page(lab: str, browser: Any, outside: list[str]) -> Iterator[Any]:
    """JupyterLab in a page that stays open, with the page of the progress in front."""
    from tests.browser.lab import Visit, opened

    seen = Visit(outside=outside)
    with opened(browser, lab, "work/progress.ipynb", seen) as page:
        yield page


@pytest.mark.parametrize("name", [path.name for path in CHAPTERS])
def test_a_chapter_at_rest_shows_its_figures(page: Any, outside: list[str], name: str) -> None:
    from tests.browser.lab import look, notebook

    with notebook(page, f"work/{name}"):
        for theme in (DARK, LIGHT):
            seen = look(page, theme)
            assert (seen.broken, seen.cut) == ([], []), theme
            assert seen.figures > 0, theme
    assert outside == []


def test_nothing_of_nbgrader_is_in_the_page(page: Any) -> None:
    assert page.get_by_text("Nbgrader", exact=False).count() == 0
    assert page.get_by_text("Validate", exact=True).count() == 0
    assert (
        page.evaluate("() => jupyterapp.commands.hasCommand('nbgrader:open-formgrader')") is False
    )


@pytest.fixture(scope="module")
def ran(lab: str, browser: Any) -> Any:
    """One visit to the chapter that runs, which the tests below use."""
    from tests.browser.lab import visit

    return visit(browser, lab, f"work/{RUN}")


def test_run_all_ends_without_an_error(ran: Any) -> None:
    assert ran.errors == []
    assert ran.not_run == []


def test_every_slider_does_something_and_one_moves_a_figure(ran: Any) -> None:
    assert ran.sliders > 0
    assert ran.idle_sliders == []
    assert ran.moved_figures > 0


def test_every_button_of_a_stepper_moves_its_figure(ran: Any) -> None:
    assert ran.steppers > 0
    assert ran.idle_steppers == []


def test_every_guess_is_saved(ran: Any) -> None:
    assert ran.guesses > 0
    assert ran.lost_guesses == []


@pytest.mark.timing
def test_half_of_the_sliders_answer_in_a_fifth_of_a_second(ran: Any) -> None:
    """From the key to the picture, kernel and browser included; all of them on a quiet machine."""
    assert all(seconds > 0 for seconds in ran.answers.values()), ran.answers
    assert statistics.median(ran.answers.values()) < BUDGET, ran.answers


def test_nothing_is_fetched_from_outside(ran: Any) -> None:
    assert ran.outside == []


def test_the_chapter_that_ran_can_be_opened_again(ran: Any, page: Any) -> None:
    from tests.browser.lab import look, notebook

    with notebook(page, f"work/{RUN}"):
        for theme in (DARK, LIGHT):
            seen = look(page, theme)
            assert seen.broken == [], theme
            assert seen.figures > 0, theme


def test_everything_with_a_widget_can_be_opened_again(lab: str, browser: Any, page: Any) -> None:
    """Run, used, saved, closed and opened: each figure is there, and texts for the rest."""
    from tests.browser.lab import look, notebook, visit

    seen = visit(browser, lab, "work/everything.ipynb")
    assert (seen.errors, seen.not_run, seen.idle_sliders) == ([], [], [])
    assert (seen.sliders, seen.moved_figures) == (2, 2)
    assert (seen.steppers, seen.idle_steppers) == (1, [])
    assert (seen.guesses, seen.lost_guesses) == (1, [])
    with notebook(page, "work/everything.ipynb"):
        dark, light = look(page, DARK), look(page, LIGHT)
        text = page.locator(".jp-Notebook").last.inner_text()
    for look_at in (dark, light):
        assert (look_at.broken, look_at.cut, look_at.figures) == ([], [], 3)
    assert all(brightness < 100 for brightness in dark.brightness), dark
    assert all(brightness > 155 for brightness in light.brightness), light
    for words in ("How many?", "What does a large dt do?", "training", "The figure in words"):
        assert words in text


def test_without_the_save_hook_a_reopened_widget_is_an_error(lab: str, page: Any) -> None:
    """What the test above would see: a stored link to a widget whose kernel has ended."""
    from tests.browser.lab import look, notebook

    content = {
        "cells": [{
            "cell_type": "code", "id": "a", "source": "", "metadata": {}, "execution_count": 1,
            "outputs": [{"output_type": "display_data", "metadata": {}, "data": {
                WIDGET: {"version_major": 2, "version_minor": 0, "model_id": "gone"},
                "text/plain": "the text",
            }}],
        }],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        "nbformat": 4, "nbformat_minor": 5,
    }  # fmt: skip
    command = "([path, content]) => jupyterapp.serviceManager.contents"
    page.evaluate(
        f"{command}.save(path, {{type: 'file', format: 'text', content}})",
        ["work/gone.ipynb", json.dumps(content)],
    )
    with notebook(page, "work/gone.ipynb"):
        assert look(page).broken != []


def test_a_visit_to_a_good_notebook(lab: str, browser: Any) -> None:
    from tests.browser.lab import Visit, visit

    assert visit(browser, lab, "work/good.ipynb") == Visit(sliders=1, moved_figures=1)


def test_a_visit_to_a_bad_notebook(lab: str, browser: Any) -> None:
    from tests.browser.lab import visit

    seen = visit(browser, lab, "work/bad.ipynb")
    assert seen.errors == ["cell 3: ZeroDivisionError: division by zero"]
    assert seen.not_run == [4]
    assert (seen.sliders, seen.moved_figures) == (1, 0)
    assert len(seen.idle_sliders) == 1
    assert "stands still" in seen.idle_sliders[0]
    assert seen.outside == ["https://example.org/a.png"]
