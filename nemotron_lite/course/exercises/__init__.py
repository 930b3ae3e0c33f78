"""The exercises of each chapter, one module a chapter: `chapter_NN.py` with its `EXERCISES`.

`nemotron_lite.course.grading` says what an exercise is made of and finds them by id.
"""
