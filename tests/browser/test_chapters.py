"""The chapters in the learner's JupyterLab: stored outputs, Run All, controls, and reopening.

Every chapter is opened in one page and looked at, one of them also in the dark theme. The tests of
the notebooks run every cell of every chapter; here one chapter runs, with its sliders dragged, its
buttons pressed and its guesses typed, and is saved and opened again. So does a small notebook with
everything that a chapter shows with a widget. Two more show that the tests find a slider that
changes nothing, an error, and a request to another address.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from nemotron_lite.course.display import PLOTLY, WIDGET
from nemotron_lite.course.plotting.widgets import BUDGET
from tests.browser.conftest import CHAPTERS
from tests.course.lab.serving import Server

RUN = "00_the_blueprint.ipynb"  # the chapter that runs here; it has all kinds of controls
QUIET = 0.1  # the part of the time in which a process waits for a processor
LIGHT, DARK = "JupyterLab Light", "JupyterLab Dark"


@pytest.mark.parametrize("name", [path.name for path in CHAPTERS])
def test_a_chapter_at_rest_shows_its_figures(lab: Any, name: str) -> None:
    from tests.browser.lab import look, notebook

    before = len(lab.outside)
    with notebook(lab.page, f"work/{name}"):
        for theme in (DARK, LIGHT) if name == RUN else (LIGHT,):
            seen = look(lab.page, theme)
            assert (seen.broken, seen.cut) == ([], []), theme
            assert seen.figures == seen.stored > 0, theme
            if theme == DARK:
                assert all(brightness < 100 for brightness in seen.brightness), seen
    assert lab.outside[before:] == []


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.name)
def test_a_folded_output_is_announced_in_words(path: Path) -> None:
    """JupyterLab shows the first output of a folded cell in one line, and HTML as its source."""
    cells = nbformat.read(path, as_version=4).cells
    folded = [cell for cell in cells if cell.metadata.get("jupyter", {}).get("outputs_hidden")]
    raw = [cell.id for cell in folded if "text/html" in cell.outputs[0].get("data", {})]
    assert raw == [], "print a line of words first in these cells"


def test_nothing_of_nbgrader_is_in_the_page(lab: Any) -> None:
    page = lab.page
    assert page.get_by_text("Nbgrader", exact=False).count() == 0
    assert page.get_by_text("Validate", exact=True).count() == 0
    assert (
        page.evaluate("() => jupyterapp.commands.hasCommand('nbgrader:open-formgrader')") is False
    )


@pytest.fixture(scope="module")
def ran(lab: Any) -> Any:
    """One visit to the chapter that runs, which the tests below use."""
    from tests.browser.lab import visit

    return visit(lab, f"work/{RUN}")


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


def test_half_of_the_sliders_answer_in_a_fifth_of_a_second(ran: Any) -> None:
    """From the key to the picture, kernel and browser included.

    That is what a quiet machine does. Beside other work, such as a second worker's tests, they
    answer within a second.
    """
    assert all(seconds > 0 for seconds in ran.answers.values()), ran.answers
    limit = BUDGET if ran.waited < QUIET else 5 * BUDGET
    assert statistics.median(ran.answers.values()) < limit, (ran.answers, ran.waited)


def test_nothing_is_fetched_from_outside(ran: Any) -> None:
    assert ran.outside == []


def test_the_chapter_that_ran_can_be_opened_again(ran: Any, lab: Any) -> None:
    from tests.browser.lab import look, notebook

    with notebook(lab.page, f"work/{RUN}"):
        seen = look(lab.page, LIGHT)
        assert (seen.broken, seen.cut) == ([], [])
        assert seen.figures == seen.stored > 0


def test_everything_with_a_widget_can_be_opened_again(lab: Any) -> None:
    """Run, used, saved, closed and opened: each figure is there, and texts for the rest."""
    from tests.browser.lab import look, notebook, visit

    seen = visit(lab, "work/everything.ipynb")
    assert (seen.errors, seen.not_run, seen.idle_sliders) == ([], [], [])
    assert (seen.sliders, seen.moved_figures) == (2, 2)
    assert (seen.steppers, seen.idle_steppers) == (1, [])
    assert (seen.guesses, seen.lost_guesses) == (1, [])
    with notebook(lab.page, "work/everything.ipynb"):
        dark, light = look(lab.page, DARK), look(lab.page, LIGHT)
        text = lab.page.locator(".jp-Notebook").last.inner_text()
    for look_at in (dark, light):
        assert (look_at.broken, look_at.cut, look_at.figures) == ([], [], 3)
    assert all(brightness < 100 for brightness in dark.brightness), dark
    assert all(brightness > 155 for brightness in light.brightness), light
    for words in ("How many?", "What does a large dt do?", "training", "The figure in words"):
        assert words in text


def test_a_figure_that_is_replaced_while_a_cell_runs_shows_the_last_one(lab: Any) -> None:
    """JupyterLab's renderer of plotly figures keeps the first one that it has drawn."""
    from tests.browser.lab import drawn, look, notebook, run_all, save

    with notebook(lab.page, "work/updating.ipynb"):
        assert run_all(lab.page) == []
        assert drawn(lab.page, "[[7,7,7]]")
        save(lab.page)
    with notebook(lab.page, "work/updating.ipynb"):
        seen = look(lab.page, LIGHT)
        stored = lab.page.evaluate("() => jupyterapp.shell.currentWidget.content.model.toJSON()")
    assert (seen.broken, seen.figures, seen.stored) == ([], 1, 1)
    (figure,) = (
        output["data"][PLOTLY]["data"][0]
        for output in stored["cells"][1]["outputs"]
        if PLOTLY in output["data"]
    )
    assert figure["y"] == [7, 7, 7]


def test_without_the_save_hook_a_reopened_widget_is_an_error(server: Server, lab: Any) -> None:
    """What the test above would see: a stored link to a widget whose kernel has ended."""
    from tests.browser.lab import look, notebook

    view = new_output("display_data", data={WIDGET: dict(model_id="gone"), "text/plain": "text"})
    cell = new_code_cell("", outputs=[view], execution_count=1)
    kernel = dict(name="python3", display_name="Python 3")
    text = nbformat.writes(new_notebook(cells=[cell], metadata=dict(kernelspec=kernel)))
    # As a text file it passes by the hook. JupyterLab shows a widget only if it is trusted.
    file = "api/contents/work/gone.ipynb"
    server.ask(file, dict(type="file", format="text", content=text), "PUT")
    server.ask(f"{file}/trust", method="POST")
    with notebook(lab.page, "work/gone.ipynb"):
        assert look(lab.page).broken != []


def test_a_visit_to_a_good_notebook(lab: Any) -> None:
    from tests.browser.lab import Visit, visit

    assert visit(lab, "work/good.ipynb") == Visit(sliders=1, moved_figures=1)


def test_a_visit_to_a_bad_notebook(lab: Any) -> None:
    from tests.browser.lab import visit

    seen = visit(lab, "work/bad.ipynb")
    assert seen.errors == ["cell 3: ZeroDivisionError: division by zero"]
    assert seen.not_run == [4]
    assert (seen.sliders, seen.moved_figures) == (1, 0)
    assert len(seen.idle_sliders) == 1
    assert "stands still" in seen.idle_sliders[0]
    assert seen.outside == ["https://example.org/a.png"]
