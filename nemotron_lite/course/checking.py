"""`check`, `hint` and `solution`: what a chapter calls at an exercise.

    check("01.discretise", discretise)     # every check with ✓ or ✗, and what to do next
    hint("01.discretise")                  # the next of three hints
    solution("01.discretise")              # the reference, after the hints or a pass

What was checked and read is kept (`progress_store`): after a restart of the kernel the hints go on
where they ended, and a solution that was shown once is shown again.
"""

from __future__ import annotations

import html
import re
from dataclasses import replace
from typing import Any

from nemotron_lite.course import output, own_answers, progress_store
from nemotron_lite.course.exercises import CheckResult, exercise, grade


def check(exercise_id: str, function: Any) -> CheckResult:
    """Grade the function that is passed in, show every check, and explain the first that fails.

    Args:
        exercise_id: such as "01.discretise".
        function: the function or class itself, not its name.

    Returns:
        The result; a wrong answer is a result, not an error.

    Raises:
        ExerciseError: there is no such exercise.
        TypeError: `function` cannot be called.
    """
    found = exercise(exercise_id)
    result = grade(found, function)
    if own_answers.is_package_answer(function):
        note = "This is the package's answer, not yours: it is not counted."
    else:
        note = own_answers.remember(found, function, result)
    if note:
        result = replace(result, message=f"{result.message}\n{note}")
    output.show_output(result.message, _result_html(result))
    return result


def hint(exercise_id: str, n: int | None = None) -> None:
    """Show the next hint of an exercise, or the n-th of the three.

    Raises:
        ExerciseError: there is no such exercise.
        ValueError: n is not 1, 2 or 3.
    """
    found = exercise(exercise_id)
    read = hints_read(exercise_id)
    if n is None:
        n = next((number for number in (1, 2, 3) if number not in read), 3)
    if n not in (1, 2, 3):
        raise ValueError(f"n is {n!r}; expected 1, 2 or 3: an exercise has three hints.")
    if n not in read:
        progress_store.put(f"hints/{exercise_id}", sorted({*read, n}))
    text = found.hints[n - 1].strip()
    if len(read | {n}) == 3:
        text += f'\n\nThat was the last hint: `solution("{exercise_id}")` shows the reference.'
    last = " (the last one)" if n == 3 else ""
    title = f"Hint {n} of 3{last} · {exercise_id}"
    output.show_output(f"{title}\n{text}", more={"text/markdown": f"**{title}**\n\n{text}"})


def hints_read(exercise_id: str) -> set[int]:
    """The numbers of the hints that the learner has read, today or in an earlier session."""
    read = progress_store.get(f"hints/{exercise_id}", [])
    return {n for n in (1, 2, 3) if n in read} if isinstance(read, list) else set()


def solution(exercise_id: str) -> None:
    """Show the reference solution, once the three hints were read or the answer has passed.

    Raises:
        ExerciseError: there is no such exercise.
    """
    found = exercise(exercise_id)
    left = 3 - len(hints_read(exercise_id))
    if left and not has_passed(exercise_id):
        hints = f"{left} hints are left" if left > 1 else "One hint is left"
        text = (
            f"{exercise_id}: the solution is shown once you have read the three hints, or your "
            f'answer passes. {hints}: hint("{exercise_id}").'
        )
        output.show_output(text, _text_box(text))
        return
    title = f"Solution · {exercise_id}"
    source = found.solution.strip()
    markdown = f"**{title}**\n\n```python\n{source}\n```"
    output.show_output(f"{title}\n{source}", more={"text/markdown": markdown})


def has_passed(exercise_id: str) -> bool:
    """Whether an answer of the learner has passed, today or in an earlier session."""
    stored = progress_store.get(f"checks/{exercise_id}")
    return isinstance(stored, dict) and stored.get("passed") is True


def _result_html(result: CheckResult) -> str:
    edge = output.RIGHT if result.passed else output.WRONG if result.failed else output.ACCENT
    return _text_box(result.message, edge)


def _text_box(message: str, edge: str = output.ACCENT) -> str:
    """The message in a box, its first line in bold and its code in a code font.

    Each line is a `div`, because nbgrader's feedback pages print `<br>` as text.
    """
    head, *rest = html.escape(message, quote=False).splitlines()
    lines = [f"<b>{head}</b>", *(line.replace("  ", "&emsp;", 1) for line in rest)]
    text = "".join(f"<div>{line}</div>" for line in lines)
    text = re.sub(r'hint\("[^)]*\)', r"<code>\g<0></code>", text)
    text = re.sub(r"(?<=Your line: )(.*?)(?=</div>)", r"<code>\1</code>", text)
    return output.box(text, edge=edge)
