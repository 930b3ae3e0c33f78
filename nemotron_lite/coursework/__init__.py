"""Tools of the instructor: make the coursework, read what was handed in, and grade it.

make         write the notebooks under exercises/ from the exercises of the chapters
submissions  find and read what learners handed in
grade        run it, isolated, and write scores and feedback

`grade` needs no checkout: it makes the assignments from the installed package. `make` writes into
the exercises/ of a checkout, or into the folder after `--folder`.
"""
