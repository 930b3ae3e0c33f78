"""Tools of the instructor: make the coursework, read what was handed in, and grade it.

make         exercises become the notebooks under exercises/
submissions  find and read what learners handed in
grade        run it, isolated, and write scores and feedback
"""
