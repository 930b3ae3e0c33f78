"""Each chapter in JupyterLab: its stored outputs, Run All, and every slider dragged.

Chapters are found by their names, so a new one is tested too. Two small notebooks show that the
tests find a slider that changes nothing, an error, and a request to another address.
"""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from nemotron_lite.course.plotting.widgets import BUDGET
from tests.browser.conftest import CHAPTERS


@pytest.fixture(scope="module", params=[path.name for path in CHAPTERS])
def seen(request: pytest.FixtureRequest, lab: str, browser: Any) -> Any:
    """One visit to a chapter, which all tests below use."""
    from tests.browser.lab import visit

    return visit(browser, lab, request.param)


def test_at_rest_it_shows_its_figures(seen: Any) -> None:
    assert seen.broken_at_rest == []
    assert seen.figures_at_rest > 0
    assert seen.cut_at_rest == []


def test_run_all_ends_without_an_error(seen: Any) -> None:
    assert seen.errors == []
    assert seen.not_run == []


def test_every_slider_does_something_and_one_moves_a_figure(seen: Any) -> None:
    assert seen.sliders > 0
    assert seen.idle_sliders == []
    assert seen.moved_figures > 0


def test_half_of_the_sliders_answer_in_a_fifth_of_a_second(seen: Any) -> None:
    """From the key to the picture, kernel and browser included; all of them on a quiet machine."""
    assert all(seconds > 0 for seconds in seen.answers.values()), seen.answers
    assert statistics.median(seen.answers.values()) < BUDGET, seen.answers


def test_nothing_is_fetched_from_outside(seen: Any) -> None:
    assert seen.outside == []


def test_a_visit_to_a_good_notebook(lab: str, browser: Any) -> None:
    from tests.browser.lab import Visit, visit

    assert visit(browser, lab, "good.ipynb") == Visit(sliders=1, moved_figures=1)


def test_a_visit_to_a_bad_notebook(lab: str, browser: Any) -> None:
    from tests.browser.lab import visit

    seen = visit(browser, lab, "bad.ipynb")
    assert seen.errors == ["cell 3: ZeroDivisionError: division by zero"]
    assert seen.not_run == [4]
    assert (seen.sliders, seen.moved_figures) == (1, 0)
    assert len(seen.idle_sliders) == 1
    assert "stands still" in seen.idle_sliders[0]
    assert seen.outside == ["https://example.org/a.png"]
