"""The chapters, one folder `chNN_name` each. A folder has all of its chapter except the notebook.

    exercises.py   the exercises: task, stub, reference solution, hints
    checks.py      the checks that grade an answer
    quiz.toml      the questions at the end
    figures.py     the chapter's own figures
    lesson.py      a small model or data of the chapter, if it has any

The notebook is `notebooks/NN_name.ipynb`, and the tests are in `tests/course/chapters/chNN_name/`.
"""
