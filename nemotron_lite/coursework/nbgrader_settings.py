"""nbgrader's settings for this coursework.

`exercises/nbgrader_config.py` uses them when somebody runs `nbgrader` in that folder, and the
worker of `make grade` uses them too.
"""

from __future__ import annotations

from typing import Any


def apply(c: Any) -> None:
    """Set everything that does not depend on the folder of the course.

    Args:
        c: a traitlets `Config`.
    """
    c.CourseDirectory.course_id = "nemotron-lite"

    # The cell of the release equals the stub in the chapter, letter for letter.
    c.ClearSolutions.code_stub = {"python": "raise NotImplementedError"}
    c.ClearSolutions.begin_solution_delimeter = "### BEGIN SOLUTION"
    c.ClearSolutions.end_solution_delimeter = "### END SOLUTION"

    # An endless loop is interrupted; the cells after it are still run and graded.
    c.Execute.timeout = 60
    c.Execute.interrupt_on_timeout = True

    # A deleted test cell is added again. (`make grade` also repairs cells that
    # lost their metadata.)
    c.OverwriteCells.add_missing_cells = True

    # Feedback shows what a learner's code displayed. Without this, a script in that output would
    # run in the browser of whoever opens the page.
    c.HTMLExporter.sanitize_html = True
