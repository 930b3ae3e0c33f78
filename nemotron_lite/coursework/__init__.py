"""Tools of the instructor: make the coursework, read what was handed in, and grade it.

make           write the notebooks under exercises/ from the exercises of the chapters
submissions, clean_copy    find and read what learners handed in
grade          grade a folder of them, and write scores, similar answers and feedback
one_submission, workers    the boundary around each submission
scoring        one submission: execute it, check its answers
session, calls, remote, wire    a learner's function, used from this process
isolation, jail, learner_package, scratch    start a learner's process, and what exists in it
learner_process, learner_limits, learner_shell, learner_answers    run in that process
feedback, pages, tables, similarity    what an instructor and a learner read
texts, time_limit    what of a learner's text is written, and how long that may take

`grade` needs no checkout and no nbgrader. `make` writes into the exercises/ of a checkout, or into
the folder after `--folder`.
"""
