"""nbgrader's settings for this coursework, read by `nbgrader` in this folder.

One assignment a chapter: source/chapter_NN is made from the exercises of the package, and
release/chapter_NN is what nbgrader makes of it (`python -m nemotron_lite.coursework.make`). What
nbgrader writes while grading (submitted/, autograded/, feedback/, gradebook.db) stays out of git.
"""

import os

from nemotron_lite.coursework.nbgrader_settings import apply

c = get_config()  # nbgrader runs this file with get_config among its names
c.CourseDirectory.root = os.getcwd()
apply(c)
