"""A learner's function as `check` finds it: is it still the stub, and whose error was that?

`check` grades whatever function it is handed, so a stub must not be told by its name. It is told by
what it does: its compiled steps, without the docstring and without its place in the file. And when
an error comes up, the learner needs to know two things that a traceback buries: was it raised in
their own lines, and which line led to it.
"""

from __future__ import annotations

import dis
import linecache
from types import CodeType, FunctionType
from typing import Any


def bodies(thing: Any) -> set[tuple[Any, ...]]:
    """The compiled bodies of a function, or of the methods of a class."""
    members = vars(thing).values() if isinstance(thing, type) else [thing]
    return {_body(m.__code__) for m in members if isinstance(m, FunctionType)}


def _body(code: CodeType) -> tuple[Any, ...]:
    """What a body does, without its docstring and its place in the file."""
    steps = tuple(
        (step.opname, _body(step.argval) if isinstance(step.argval, CodeType) else step.argrepr)
        for step in dis.get_instructions(code)
    )
    return (code.co_name, steps)


def does_nothing(body: tuple[Any, ...]) -> bool:
    """Whether a body only returns None: a docstring, `...`, `pass` or `return None`."""
    idle = {"RESUME", "NOP", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "COPY_FREE_VARS"}
    return all(
        name in idle and (name == "RESUME" or word in ("", "None")) for name, word in body[1]
    )


def raised_in(function: Any, error: BaseException) -> bool:
    """Whether the learner's own code raised the error, rather than something it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename in _files(function)


def _files(function: Any) -> set[str]:
    members = vars(function).values() if isinstance(function, type) else [function]
    return {m.__code__.co_filename for m in members if isinstance(m, FunctionType)}


def what_it_raised(function: Any, error: Exception) -> str:
    """What was raised, and the learner's line that led to it."""
    lines = str(error).strip().splitlines()
    said = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    line, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename in _files(function):
            line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
        trace = trace.tb_next
    if not line:
        return f"it could not be called, or what came back could not be used: {sentence(said)}"
    return f"it raised {sentence(said)} Your line: {line}"


def sentence(text: str) -> str:
    """The text with a full stop, if it has no end of its own."""
    return text if not text or text.endswith((".", "?", "!")) else f"{text}."
