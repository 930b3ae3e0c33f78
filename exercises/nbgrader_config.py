"""nbgrader's settings for this coursework, read by `nbgrader` in this folder and by `make grade`.

One assignment a chapter: source/chapter_NN is made from the exercises of the package, and
release/chapter_NN is what nbgrader makes of it (`python -m nemotron_lite.course.coursework`). What
nbgrader writes while grading (submitted/, autograded/, feedback/, gradebook.db) stays out of git.
"""

import os

c = get_config()  # nbgrader runs this file with get_config among its names

c.CourseDirectory.course_id = "nemotron-lite"
c.CourseDirectory.root = os.getcwd()

# The release is the stub of the chapter again, letter for letter.
c.ClearSolutions.code_stub = {"python": "raise NotImplementedError"}
c.ClearSolutions.begin_solution_delimeter = "### BEGIN SOLUTION"
c.ClearSolutions.end_solution_delimeter = "### END SOLUTION"

# An endless loop is interrupted; the cells after it still run and are graded.
c.Execute.timeout = 60
c.Execute.interrupt_on_timeout = True

# A deleted test cell comes back. (`make grade` also repairs cells that lost their metadata.)
c.OverwriteCells.add_missing_cells = True

# Feedback shows what a learner's code displayed. Without this, a script in it would run in the
# browser of whoever opens the page.
c.HTMLExporter.sanitize_html = True
