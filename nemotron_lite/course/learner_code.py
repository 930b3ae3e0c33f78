"""What `check` needs to know about a learner's function: is it still the stub, who raised an error?

`check` grades any function it is given, so it cannot recognize an unchanged stub by its name. It
compares the compiled code, without the docstring and the line numbers. When an error is raised, the
learner needs two things that are hard to find in a traceback: whether their own code raised it, and
which of their lines led to it.
"""

from __future__ import annotations

import dis
import linecache
from types import CodeType, FunctionType
from typing import Any


def compiled_bodies(thing: Any) -> set[tuple[Any, ...]]:
    """The compiled bodies of a function, or of the methods of a class."""
    members = vars(thing).values() if isinstance(thing, type) else [thing]
    return {_body(m.__code__) for m in members if isinstance(m, FunctionType)}


def _body(code: CodeType) -> tuple[Any, ...]:
    """The instructions of a function, without its docstring and line numbers."""
    steps = tuple(
        (step.opname, _body(step.argval) if isinstance(step.argval, CodeType) else step.argrepr)
        for step in dis.get_instructions(code)
    )
    return (code.co_name, steps)


def does_nothing(body: tuple[Any, ...]) -> bool:
    """Whether a body only returns None: it is a docstring, `...`, `pass` or `return None`."""
    harmless = {"RESUME", "NOP", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "COPY_FREE_VARS"}
    return all(
        name in harmless and (name == "RESUME" or word in ("", "None")) for name, word in body[1]
    )


def raised_by(function: Any, error: BaseException) -> bool:
    """Whether the function itself raised the error, and not something that it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename in _files(function)


def _files(function: Any) -> set[str]:
    members = vars(function).values() if isinstance(function, type) else [function]
    return {m.__code__.co_filename for m in members if isinstance(m, FunctionType)}


def describe_error(function: Any, error: Exception) -> str:
    """The error in words, with the learner's line that led to it."""
    lines = str(error).strip().splitlines()
    message = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    line, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename in _files(function):
            line = linecache.getline(code.co_filename, trace.tb_lineno).strip()
        trace = trace.tb_next
    if not line:
        return f"it could not be called, or its result could not be used: {with_full_stop(message)}"
    return f"it raised {with_full_stop(message)} Your line: {line}"


def with_full_stop(text: str) -> str:
    """The text, with a full stop if it does not end a sentence."""
    return text if not text or text.endswith((".", "?", "!")) else f"{text}."
