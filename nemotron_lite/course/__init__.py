"""What a chapter calls: predict before you measure, read the source, have your answer graded.

A chapter begins with the first two lines below, and then calls these functions:

    from nemotron_lite.course import check, facts_table, measured, predict, setup, show, show_source

    session = setup("01")                             # seeds, threads, device, plot theme
    quiz("01", "opening")                             # three questions from earlier chapters
    predict("crossover")                              # asks for a guess, from predictions.toml
    measured("crossover", 740)                        # the guess and the measurement, side by side
    show_source(ops.selective_scan, folded="Compare with yours")    # the package's own code
    show(slider_box, figure)                          # live widget; later a picture and its text
    check("01.discretise", discretise)                # grades the function that is passed in
    hint("01.discretise")                             # the next of three hints
    discretise = own("01.discretise", discretise)     # yours if it passes, else the package's
    solution("01.discretise")                         # the reference, after the hints or a pass
    quiz("01")                                        # every answer gets a reason
    tell("Super has {super.layers} layers.")          # numbers from facts.toml, with their source

Most people read a notebook without running it. So each function writes two outputs. The live one
may have measured times and widgets. The plain text (`text/plain`) is the same on every machine, so
that the tests of the chapters can compare it; it never contains a measured value.

The modules:

    session      setup: seeds, threads, device, versions
    predictions  predict, measured, over the predictions.toml of a chapter
    sources      show_source
    display      show, progress, progress_hook
    factsheet    facts, tell, facts_table, over facts.toml
    quizzes      quiz, over the quiz.toml of a chapter
    exercises    Exercise, Check, over the exercises.py of a chapter
    checking     check, hint, solution
    own_answers  own: the learner's answer in later cells and chapters
    progress_store  what a learner has done, kept in files
    progress_report  progress_page: the same as a table
    compare      comparisons for the checks, with messages that help
    plotting     the theme, figures with alt text, sliders, steppers
    style        how JupyterLab shows the outputs, in its light and its dark theme
    chapters     one folder for each chapter

Names are imported when they are first used. plotly, ipywidgets and IPython belong to the `lab`
extra. Importing this package needs none of them; a function that does says so if they are missing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotron_lite.course.checking import check, hint, solution
    from nemotron_lite.course.display import progress, progress_hook, show
    from nemotron_lite.course.exercises import Check, CheckResult, Exercise
    from nemotron_lite.course.factsheet import Fact, FactError, facts, facts_table, tell
    from nemotron_lite.course.own_answers import own
    from nemotron_lite.course.predictions import measured, predict
    from nemotron_lite.course.progress_report import progress_page
    from nemotron_lite.course.quizzes import quiz
    from nemotron_lite.course.session import Session, setup
    from nemotron_lite.course.sources import show_source

__all__ = [
    "Check",
    "CheckResult",
    "Exercise",
    "Fact",
    "FactError",
    "Session",
    "check",
    "facts",
    "facts_table",
    "hint",
    "measured",
    "own",
    "predict",
    "progress",
    "progress_hook",
    "progress_page",
    "quiz",
    "setup",
    "show",
    "show_source",
    "solution",
    "tell",
]

_MODULE_OF = {
    "Check": "exercises",
    "CheckResult": "exercises",
    "Exercise": "exercises",
    "Fact": "factsheet",
    "FactError": "factsheet",
    "Session": "session",
    "check": "checking",
    "facts": "factsheet",
    "facts_table": "factsheet",
    "hint": "checking",
    "measured": "predictions",
    "own": "own_answers",
    "predict": "predictions",
    "progress": "display",
    "progress_hook": "display",
    "progress_page": "progress_report",
    "quiz": "quizzes",
    "setup": "session",
    "show": "display",
    "show_source": "sources",
    "solution": "checking",
    "tell": "factsheet",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use; afterwards it is an ordinary attribute."""
    if name in _MODULE_OF:
        value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"nemotron_lite.course has no {name!r}; its public names are {__all__}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
