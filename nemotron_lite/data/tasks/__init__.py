"""Synthetic tasks: rows of tokens that ask for one skill each, small enough to learn in a minute.

    selective_copy   keep what matters, drop the rest, repeat it in order (chapter 01)
    recall           look up the value of a key (chapter 03)

Each is a `BatchSource`: `nemotron_lite.train` and a chapter's own loop read it alike. Import them
by name.
"""
