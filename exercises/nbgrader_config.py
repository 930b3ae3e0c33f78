"""nbgrader's settings for this coursework; `nbgrader` reads them when it runs in this folder.

There is one assignment for each chapter. `python -m nemotron_lite.coursework.make` makes
source/chapter_NN from the exercises of the package, and nbgrader makes release/chapter_NN from it.
What nbgrader writes while grading (submitted/, autograded/, feedback/, gradebook.db) is not in git.
"""

import os

from nemotron_lite.coursework.nbgrader_settings import apply

c = get_config()  # nbgrader runs this file with get_config among its names
c.CourseDirectory.root = os.getcwd()
apply(c)
