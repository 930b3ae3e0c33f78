"""`make lab`: JupyterLab over a copy of the chapters, which keeps what a learner wrote.

    make lab                                         copy or update the chapters, then open them
    make lab ARGS="--port 8899"                      arguments for JupyterLab
    python -m nemotron_lite.course.lab               the same without make, such as under conda
    python -m nemotron_lite.course.lab --update-only copy or update the chapters, and stop

A learner writes answers into a chapter. The chapters in `notebooks/` belong to the repository: git
would refuse to update them, and `make notebooks` would overwrite the answers. So the learner works
in `work/`, which git ignores, beside `notebooks/`, so that links such as `../docs/glossary.md` lead
to the same file from both.

    merge     one notebook: the chapter as it was copied, as the learner left it, and as it is now
    copies    the files of work/: what is copied, merged, left alone and backed up
    server    JupyterLab for learners: its settings, its environment, what it saves

This needs the `lab` extra and a checkout of the repository, because the chapters are not part of
the installed package.
"""
