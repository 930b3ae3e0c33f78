"""What a chapter uses: predict before you measure, read the live source, have your answer graded.

A chapter opens with two lines and then speaks in these verbs:

    from nemotron_lite.course import check, facts_table, measured, predict, setup, show, show_source

    session = setup("01")                             # seeds, threads, device, plot theme
    predict("crossover", "From which length on is the scan faster?", guess=None, unit="tokens")
    measured("crossover", 740, low=16, high=65_536)   # the guess and the measurement, side by side
    show_source(ops.scan.selective_scan)              # the package's own code, never a copy
    show(slider_box, figure)                          # live widget; picture and words at rest
    check("01.discretise", discretise)                # grades the function that is passed in
    hint("01.discretise")                             # one step of a ladder of three
    quiz("01")                                        # answers, right and wrong, get a reason
    tell("Super has {super.layers} layers.")          # figures from facts.toml, with their source

Why a room of its own: notebooks are read far more often than they are run. Each verb therefore
leaves two things behind. What a live reader sees may hold times and widgets; what stays in the
committed file (`text/plain`) is the same on every machine, so that the stored output can be
compared when the chapters are tested. A measured value appears in the first and never in the
second.

The rooms:

    session      setup: seeds, threads, device, versions
    predictions  predict, measured
    sources      show_source
    display      show, progress, progress_hook
    factsheet    facts, tell, facts_table, over facts.toml
    quizzes      quiz, over the quiz.toml of a chapter
    exercises    Exercise, Check, check, hint, over the exercises.py of a chapter
    compare      what a check says when two results differ

Names are imported when they are first used. plotly, ipywidgets and IPython belong to the `lab`
extra: importing this package needs none of them, and the verb that does says so.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemotron_lite.course.display import progress, progress_hook, show
    from nemotron_lite.course.exercises import Check, CheckResult, Exercise, check, hint
    from nemotron_lite.course.factsheet import Fact, FactError, facts, facts_table, tell
    from nemotron_lite.course.predictions import measured, predict
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
    "predict",
    "progress",
    "progress_hook",
    "quiz",
    "setup",
    "show",
    "show_source",
    "tell",
]

_ROOM_OF = {
    "Check": "exercises",
    "CheckResult": "exercises",
    "Exercise": "exercises",
    "Fact": "factsheet",
    "FactError": "factsheet",
    "Session": "session",
    "check": "exercises",
    "facts": "factsheet",
    "facts_table": "factsheet",
    "hint": "exercises",
    "measured": "predictions",
    "predict": "predictions",
    "progress": "display",
    "progress_hook": "display",
    "quiz": "quizzes",
    "setup": "session",
    "show": "display",
    "show_source": "sources",
    "tell": "factsheet",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use; afterwards it is an ordinary attribute."""
    if name in _ROOM_OF:
        value = getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"nemotron_lite.course has no {name!r}; its public names are {__all__}.")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
