"""The chapters: one folder each, `chNN_name`, with everything of that chapter but its notebook.

    exercises.py   the exercises: task, stub, reference solution, hints
    checks.py      what an answer is checked for
    quiz.toml      the questions at the end
    figures.py     the chapter's own figures
    lesson.py      where the chapter has a small model or task of its own

The notebook is `notebooks/NN_name.ipynb`, and the tests are in `tests/course/chapters/chNN_name/`.
"""
