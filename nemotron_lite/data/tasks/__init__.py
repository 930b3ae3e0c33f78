"""Synthetic tasks: rows of tokens that test one skill each, small enough to learn in a minute.

    selective_copy   remember the letters, ignore the rest, repeat them in order (chapter 01)
    recall           look up the value of a key (chapter 03)

Each task is a `BatchSource`, so `nemotron_lite.train` and a chapter's own loop can both read it.
Import a task from its module.
"""
