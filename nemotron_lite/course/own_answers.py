"""`own`: go on with what the learner built, or with the package's answer where it is not done.

A chapter builds its component in steps, and each step is used by the cells below it and by later
chapters. So after an exercise the notebook says

    selective_recurrence = own("01.selective_recurrence", selective_recurrence)

and gets the learner's function if it passes its checks. Otherwise it gets the answer that passed in
an earlier session, or the package's reference solution, so that the chapter can be read and run
before every exercise is done. One line says which of them runs.

    mamba = own("02.mamba2")     # a later chapter: no function to pass in

An answer that passed is kept as source code (`learner_code.answer_source`, `progress_store`).
Before it is used it is built again and has to pass today's checks: the exercise may have changed.

What an answer needs is resolved in the same way: the package's `Mamba2` is built with the learner's
own scan, where that passes. Should the package's answer fail with the learner's part, it is built
with the package's parts.

Left out: protection. The code of a stored answer is run like a cell of the notebook; who can write
into `work/` can run code there anyway.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemotron_lite.course import learner_code, output, progress_store
from nemotron_lite.course.exercises import CheckResult, Exercise, exercise, grade

HEADER = "# Your answer to {id}. It passed its checks; later chapters use it.\n"


@dataclass(frozen=True)
class Answer:
    """An object that passes the checks of an exercise, and whose it is."""

    thing: Any
    of: str  # "yours", "stored" or "package"


# The learner's object that passed last, in this kernel, by exercise.
_PASSED: dict[str, Any] = {}
# Objects that `own` made, by id() and kept alive: how an object that is passed in is recognized.
_MADE: dict[int, Answer] = {}
# What `own` built, by exercise, source and the answers it needs: built and graded once a kernel.
_BUILT: dict[tuple[Any, ...], tuple[Any, str]] = {}
# Why the learner's object of this kernel was not taken, by exercise.
_REFUSED: dict[str, str] = {}


def own(exercise_id: str, function: Any = None) -> Any:
    """The learner's answer to an exercise if it passes, else the package's; a line says which.

    Args:
        exercise_id: such as "01.selective_recurrence".
        function: the learner's function or class. None: the answer that passed in this kernel or in
            an earlier session.

    Returns:
        A function or class that passes the checks.

    Raises:
        ExerciseError: there is no such exercise.
        TypeError: `function` cannot be called.
    """
    found = exercise(exercise_id)
    note = ""
    # In a cell that is run again, the name holds what `own` returned before: nothing new to grade.
    known = (None, _PASSED.get(exercise_id))
    if all(function is not one for one in known) and id(function) not in _MADE:
        result = grade(found, function)
        note = remember(found, function, result)
        if not result.passed:
            _REFUSED[exercise_id] = "does not pass yet" if result.failed else "is not done yet"
    runs = function is not None and _PASSED.get(exercise_id) is function
    refused = "" if runs else _REFUSED.get(exercise_id, "")
    answer, problem = _resolve(found)
    kind = "class" if isinstance(answer.thing, type) else "function"
    if answer.of == "package":
        why = problem or (f"yours {refused}" if refused else "there is none of yours yet")
        text = f"the package's {kind} runs, because {why}."
    elif refused and function is not None:
        text = f"your earlier {kind} runs, because this one {refused}."
    else:
        text = f"your {kind}{' of an earlier session' if answer.of == 'stored' else ''} runs."
    _say(f"{exercise_id}: {text}{f' {note}' if note else ''}")
    return answer.thing


def remember(found: Exercise, function: Any, result: CheckResult) -> str:
    """Keep the result of a check and, if it passed, the source of the answer.

    A later check that fails does not undo a pass.

    Returns:
        A sentence if later sessions will not find the answer, else "".
    """
    key = f"checks/{found.id}"
    before = progress_store.get(key)
    passed_before = isinstance(before, dict) and before.get("passed") is True
    now = {"passed": result.passed, "points": result.points, "max_points": result.max_points}
    if result.passed or (result.failed and not passed_before):
        progress_store.put(key, now)
    if not result.passed:
        return ""
    _PASSED[found.id] = function
    _REFUSED.pop(found.id, None)
    source, problem = learner_code.answer_source(function, found.function_name, found.provided)
    if progress_store.folder() and not problem:
        # What is stored must work in a new kernel. If it does not, an earlier answer stays.
        needs = {needed: _resolve(exercise(needed))[0] for needed in found.needs}
        if wrong := _built(found, HEADER.format(id=found.id) + source, needs)[1]:
            problem = (
                f"built again from its source alone, it {wrong}; put all it needs into its cell"
            )
    if problem:
        lost = f"Later chapters cannot use your answer: {problem}."
        return lost if progress_store.folder() else ""
    progress_store.put(f"answers/{found.id}.py", HEADER.format(id=found.id) + source)
    return ""


def is_package_answer(function: Any) -> bool:
    """Whether the object is the package's answer to an exercise, as `own` returned it."""
    made = _MADE.get(id(function))
    return made is not None and made.of == "package"


def forget() -> None:
    """Forget the answers of this kernel; those on disk stay."""
    for memory in (_PASSED, _MADE, _BUILT, _REFUSED):
        memory.clear()


def _resolve(found: Exercise) -> tuple[Answer, str]:
    """The best answer there is, and why a stored one is not used ("" if there is none)."""
    if found.id in _PASSED:
        return Answer(_PASSED[found.id], "yours"), ""
    needs = {needed: _resolve(exercise(needed))[0] for needed in found.needs}
    source, note = progress_store.get(f"answers/{found.id}.py"), ""
    if isinstance(source, str):
        thing, problem = _built(found, source, needs)
        if not problem:
            return Answer(thing, "stored"), ""
        note = f"your stored answer {problem}"
    thing, problem = _built(found, None, needs)
    if problem:  # with a part of the learner's
        thing, _ = _built(found, None, {})
    return Answer(thing, "package"), note


def _built(found: Exercise, source: str | None, needs: Mapping[str, Answer]) -> tuple[Any, str]:
    """An answer, built and graded, and what is wrong with it ("" if it passes).

    The package's answer is graded only where it is built with a part of the learner's.
    """
    key = (found.id, source, *(id(answer.thing) for answer in needs.values()))
    if key not in _BUILT:
        things = {needed: answer.thing for needed, answer in needs.items()}
        trusted = source is None and all(answer.of == "package" for answer in needs.values())
        thing, problem = None, ""
        try:
            thing = found.build(source, own=things)
            if not trusted and not grade(found, thing).passed:
                problem = "does not pass its checks today"
        except (Exception, SystemExit) as error:
            if trusted:
                raise
            problem = f"cannot be run ({type(error).__name__})"
        if thing is not None:
            _MADE[id(thing)] = Answer(thing, "package" if source is None else "stored")
        _BUILT[key] = thing, problem
    return _BUILT[key]


def _say(text: str) -> None:
    safe = output.inline_html(text)
    output.show_output(text, f'<span style="color: {output.FAINT}">{safe}</span>')
