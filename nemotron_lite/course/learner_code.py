"""What the course asks of a learner's code: is it written, who raised an error, what is its text?

`check` grades any function or class it is given, so it cannot recognize an unchanged stub by its
name. It compares compiled code, without docstrings and line numbers. The parts that a learner has
to write are the functions and methods of the stub that end in `raise NotImplementedError`; the
others are given. In a Triton exercise the kernel has to be written and the function that launches
it is given, so the kernel is looked up under its name in the globals of that function.

When an error is raised, the learner needs two things that are hard to find in a traceback: whether
their own code raised it, and which of their lines led to it. Triton's interpreter wraps an error of
a kernel in its own; the cause is what counts.

When an answer passes, its text is kept: the definition with everything that it uses (imports,
helper functions, constants), but without the other statements of the cell. IPython keeps the text
of a cell in `linecache`, under the file name of the code that was compiled from it.

Answers need not be Python functions of this process: coursework is graded through an object that
forwards calls to another process. Such an object has no code to look at. An error that it raises
may have the attributes `raised_by_learner` (bool) and `learner_line` (str), which are used instead.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import linecache
import sys
from collections.abc import Iterable, Iterator, Mapping
from types import CodeType, FunctionType, ModuleType
from typing import Any

from nemotron_lite.course.syntax import parse

Body = tuple[Any, ...]
# Instructions that read a name of the module, in functions and in the bodies of classes.
READS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_GLOBALS"}
# Statements with a call of these are about the course, not part of an answer.
COURSE_CALLS = {
    "check", "explore", "hint", "measured", "own", "predict", "progress", "progress_page", "quiz",
    "setup", "show", "show_source", "solution", "stepper", "tell",
}  # fmt: skip


# --- Which parts are written -------------------------------------------------------------------


def bodies_of_source(source: str) -> dict[str, Body]:
    """The compiled functions and methods of some source code, by name; nothing is run."""
    found: dict[str, Body] = {}
    for code in _codes(_compiled(source)):
        if not _is_class_body(code):
            found[code.co_qualname] = _body(code)
    return found


def bodies_of(thing: Any, called: str, others: Iterable[str] = ()) -> dict[str, Body]:
    """The compiled functions of an answer, by name; nothing for an object without Python code.

    Args:
        thing: a function or a class; of a class its methods.
        called: its name in the stub, whatever the learner calls it.
        others: names of functions that belong to the answer too, such as its kernel. They are
            looked up in the globals of the answer.
    """
    found = {}
    for function in _plain_functions(thing):
        code = function.__code__
        name = f"{called}.{code.co_name}" if isinstance(thing, type) else called
        found[name] = _body(code)
    for name in others:
        for function in functions_of(thing, (name,))[len(found) :]:
            found[name] = _body(function.__code__)
    return found


def functions_of(thing: Any, names: Iterable[str] = ()) -> list[FunctionType]:
    """The Python functions of an answer: itself or its methods, and those called `names`."""
    own = list(_plain_functions(thing))
    for name in names:
        for function in own[:1]:
            other = function.__globals__.get(name)
            if other is not None and other is not thing:
                own += _plain_functions(other)
    return own


def _plain_functions(thing: Any) -> Iterator[FunctionType]:
    """The function that was written; of a class each method, without decorators."""
    for member in vars(thing).values() if isinstance(thing, type) else [thing]:
        for one in _unwrapped(member):
            if isinstance(one, FunctionType):
                yield one


def _unwrapped(member: Any) -> list[Any]:
    if isinstance(member, property):
        return [f for f in (member.fget, member.fset) if f is not None]
    for _ in range(10):
        if isinstance(member, staticmethod | classmethod):
            member = member.__func__
        elif _is_triton(member) and hasattr(member, "fn"):
            member = member.fn  # a JIT function, an autotuner or the interpreter's wrapper
        elif "__wrapped__" in getattr(member, "__dict__", {}):
            member = member.__wrapped__
        else:
            break
    return [member]


def _is_triton(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] == "triton"


def _codes(code: CodeType) -> Iterator[CodeType]:
    """The functions and classes that a module or a class defines, not those inside functions."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            if _is_class_body(constant):
                yield from _codes(constant)


def _compiled(source: str | ast.Module) -> CodeType:
    """Code as a notebook compiles it: without the `__future__` imports of this module."""
    return compile(source, "<answer>", "exec", dont_inherit=True)


def _is_class_body(code: CodeType) -> bool:
    return not code.co_flags & inspect.CO_OPTIMIZED


def _body(code: CodeType) -> Body:
    """The instructions of a function, without its docstring and line numbers."""
    steps = tuple(
        (step.opname, _body(step.argval) if isinstance(step.argval, CodeType) else step.argrepr)
        for step in dis.get_instructions(code)
    )
    return (code.co_name, steps)


def does_nothing(body: Body) -> bool:
    """Whether a body only returns None: it is a docstring, `...`, `pass` or `return None`."""
    harmless = {"RESUME", "NOP", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "COPY_FREE_VARS"}
    return all(
        name in harmless and (name == "RESUME" or word in ("", "None")) for name, word in body[1]
    )


def names_not_implemented(body: Body) -> bool:
    """Whether a body still names NotImplementedError: it is a stub, or one that was begun."""
    return any("NotImplementedError" in str(word) for name, word in body[1] if "GLOBAL" in name)


def asked_for(stub: str) -> tuple[str, ...]:
    """What a stub asks for: the functions and methods whose last statement raises.

    Names are those of the code, such as "discretise" or "Mamba2.forward". A stub without such a
    statement asks for all of its functions.
    """
    every, asked = [], []
    for name, node in _functions_in(parse(stub).body):
        every.append(name)
        last = node.body[-1]
        if isinstance(last, ast.Raise) and "NotImplementedError" in ast.unparse(last):
            asked.append(name)
    return tuple(asked or every)


def _functions_in(
    body: list[ast.stmt], inside: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield inside + node.name, node
        elif isinstance(node, ast.ClassDef):
            yield from _functions_in(node.body, f"{inside}{node.name}.")


def is_untouched(stub: str, bodies: Mapping[str, Body]) -> bool:
    """Whether everything that the stub asks for is as in the stub, or does nothing.

    False for an answer without Python code: nothing is known about it.
    """
    given = bodies_of_source(stub)
    known = [name for name in asked_for(stub) if name in bodies]
    return bool(known) and all(
        bodies[name] == given[name] or does_nothing(bodies[name]) for name in known
    )


def unwritten_bodies(stub: str, bodies: Mapping[str, Body]) -> tuple[str, ...]:
    """What the stub asks for and `bodies` have not written: unchanged, empty, begun or missing."""
    given = bodies_of_source(stub)
    missing = []
    for name in asked_for(stub):
        body = bodies.get(name)
        if body is None or body == given[name] or does_nothing(body) or names_not_implemented(body):
            missing.append(name)
    return tuple(missing)


def unwritten(stub: str, source: str) -> tuple[str, ...]:
    """The same for the source code of an answer, which is compiled and not run.

    Raises:
        SyntaxError: the source is not Python.
    """
    return unwritten_bodies(stub, bodies_of_source(source))


# --- Who raised an error -----------------------------------------------------------------------


def root_cause(error: BaseException) -> BaseException:
    """The error itself; of one that Triton wraps around an error of a kernel, its cause."""
    while _is_triton(error) and error.__cause__ is not None:
        error = error.__cause__
    return error


def raised_by(function: Any, error: BaseException) -> bool:
    """Whether the answer itself raised the error, and not something that it called."""
    told = getattr(error, "raised_by_learner", None)
    if told is not None:
        return bool(told)
    code = raising_code(error)
    return code is not None and _is_learners(code, function)


def raising_code(error: BaseException) -> CodeType | None:
    """The code that raised the error."""
    trace = root_cause(error).__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return None if trace is None else trace.tb_frame.f_code


def raised_by_triton(error: BaseException) -> bool:
    """Whether Triton itself raised the error, such as its compiler."""
    return _is_triton(root_cause(error))


def describe_error(function: Any, error: BaseException) -> str:
    """The error in words, with the learner's line that led to it."""
    cause = root_cause(error)
    lines = str(cause).strip().splitlines()
    message = f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
    line = str(getattr(error, "learner_line", "")).strip() or _line_of(function, error)
    if not line:
        return f"it could not be called, or its result could not be used: {with_full_stop(message)}"
    return f"it raised {with_full_stop(message)} Your line: {line}"


def _line_of(function: Any, error: BaseException) -> str:
    """The last line of the answer in a traceback, "" if there is none."""
    line = ""
    for one in {id(e): e for e in (error, root_cause(error))}.values():
        trace = one.__traceback__
        while trace is not None:
            code = trace.tb_frame.f_code
            if _is_learners(code, function):
                line = linecache.getline(code.co_filename, trace.tb_lineno).strip() or line
            trace = trace.tb_next
    return line


def _is_learners(code: CodeType, function: Any) -> bool:
    """Whether code is of the answer's cell, or of another cell of the notebook."""
    files = {f.__code__.co_filename for f in _plain_functions(function)}
    return code.co_filename in files or is_cell(code.co_filename)


def is_cell(filename: str) -> bool:
    """Whether IPython compiled this from a cell."""
    return "ipykernel_" in filename or filename.startswith("<ipython-input")


def with_full_stop(text: str) -> str:
    """The text, with a full stop if it does not end a sentence."""
    return text if not text or text.endswith((".", "?", "!")) else f"{text}."


# --- The text of an answer ---------------------------------------------------------------------


def answer_source(thing: Any, name: str, provided: Iterable[str] = ()) -> tuple[str, str]:
    """The source code of an answer with what it uses, or why there is none.

    Args:
        thing: the function or class.
        name: what the source has to define.
        provided: names that exist where the source will run, so it need not define them.

    Returns:
        (source, problem); one of the two is empty. The problem is a clause without a full stop.
    """
    functions = functions_of(thing)
    actual = getattr(thing, "__name__", name)
    unknown = f"the text of {actual} is not known (write it in a cell without %% in its first line)"
    if not functions:
        return "", unknown
    collected = _Collected(functions[0].__globals__, set(provided) - {name})
    if not collected.add_object(actual, thing):
        return "", unknown
    source = collected.text(f"\n\n{name} = {actual}" if actual != name else "")
    if missing := _undefined(source, provided):
        return "", f"{', '.join(missing)} must be defined or imported in the same cell"
    return source, ""


def _undefined(source: str, provided: Iterable[str]) -> list[str]:
    """Global names that source code uses, and neither it nor its surroundings define."""
    bound = {name for node in parse(source).body for name in _bound_names(node)}
    known = {*bound, *provided}
    return (
        []
        if "*" in bound
        else [
            name
            for name in _global_names(_compiled(source))
            if name not in known and not hasattr(builtins, name) and not name.startswith("__")
        ]
    )


class _Collected:
    """Statements of one or more cells, in the order in which they have to run."""

    def __init__(self, space: Mapping[str, Any], provided: set[str]) -> None:
        self.space, self.provided = space, provided
        self.pieces: list[str] = []
        self.futures: set[str] = set()
        self._seen: set[str] = set()
        self._emitted: set[tuple[str, int]] = set()

    def text(self, last: str) -> str:
        """All statements as source code, `last` at the end."""
        pieces = [*sorted(self.futures), *self.pieces, *([last] if last else [])]
        return "\n".join(pieces) + "\n"

    def add_object(self, name: str, value: Any) -> bool:
        """Add the cell that defines a function or class; False if it is not found."""
        files = [function.__code__.co_filename for function in functions_of(value)]
        if isinstance(value, type):  # a data class, or one without methods, has no code of a cell
            files += [file for file in reversed(list(linecache.cache)) if is_cell(file)]
        return any(self.add_definition(name, file) for file in dict.fromkeys(files))

    def add_definition(self, name: str, filename: str) -> bool:
        """Add the statements of a cell that bind `name`, and what they use; False if none do."""
        text = "".join(linecache.getlines(filename))
        try:
            statements = parse(text).body
        except (SyntaxError, ValueError):
            return False
        bound = [(node, _bound_names(node)) for node in statements if not _about_the_course(node)]
        wanted = self._closure(name, bound)
        if not any(name in names for _, names in bound):
            return False
        chosen = [node for node, names in bound if names & wanted or "*" in names]
        self.futures |= {ast.unparse(node) for node in statements if _is_future(node)}
        chosen = [node for node in chosen if not _is_future(node)]
        for other in self._used_by(chosen, {n for node in chosen for n in _bound_names(node)}):
            self._add_global(other)
        for node in chosen:
            if (filename, node.lineno) not in self._emitted:
                self._emitted.add((filename, node.lineno))
                self.pieces.append(_text_of(node, text.splitlines()))
        return True

    def _closure(self, name: str, bound: list[tuple[ast.stmt, set[str]]]) -> set[str]:
        """The names of a cell that `name` needs, itself included."""
        wanted, waiting = {name}, [name]
        while waiting:
            one = waiting.pop()
            nodes = [node for node, names in bound if one in names]
            here = {n for _, names in bound for n in names}
            for used in self._used_by(nodes, set()):
                if used in here and used not in wanted:
                    wanted.add(used)
                    waiting.append(used)
        return wanted

    def _used_by(self, nodes: list[ast.stmt], without: set[str]) -> list[str]:
        """Global names that statements use, in order; built-in names are left out."""
        if not nodes:
            return []
        module = ast.Module(body=nodes, type_ignores=[])
        names = _global_names(_compiled(module))
        own = {n for n in names if n in self.space or not hasattr(builtins, n)}
        return [n for n in names if n in own - without and not n.startswith("__")]

    def _add_global(self, name: str) -> None:
        """Define a name that comes from an earlier cell, as far as that can be written down."""
        if name in self._seen or name in self.provided or name not in self.space:
            return
        self._seen.add(name)
        value = self.space[name]
        if isinstance(value, ModuleType):
            same = value.__name__ == name
            self.pieces.append(f"import {value.__name__}{'' if same else f' as {name}'}")
        elif isinstance(value, int | float | str | bool | tuple | None) and _is_literal(value):
            self.pieces.append(f"{name} = {value!r}")
        elif imported := _import_line(name, value):
            self.pieces.append(imported)
        else:
            self.add_object(name, value)


def _is_future(node: ast.stmt) -> bool:
    return isinstance(node, ast.ImportFrom) and node.module == "__future__"


def _is_literal(value: Any) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, TypeError):
        return False


def _import_line(name: str, value: Any) -> str:
    """The import of a function or class of an installed module, "" if it is not of one."""
    module, attribute = getattr(value, "__module__", None), getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(attribute, str) or module == "__main__":
        return ""
    if getattr(sys.modules.get(module), attribute, None) is not value:
        return ""
    return f"from {module} import {attribute}{'' if attribute == name else f' as {name}'}"


def _bound_names(node: ast.stmt) -> set[str]:
    """The names that a top-level statement binds; "*" for a star import."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    names: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.alias):
            names.add((inner.asname or inner.name).partition(".")[0])
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            names.add(inner.id)
        elif isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(inner.name)
    return names


def _about_the_course(node: ast.stmt) -> bool:
    """Whether a statement calls `check`, `own` or the like; inside a definition it may."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False
    return any(
        isinstance(inner, ast.Call)
        and isinstance(inner.func, ast.Name)
        and inner.func.id in COURSE_CALLS
        for inner in ast.walk(node)
    )


def _global_names(code: CodeType) -> list[str]:
    """The names that code reads from its module, in order, those in nested functions included."""
    names: dict[str, None] = {}
    for step in dis.get_instructions(code):
        if step.opname in READS:
            names[str(step.argval)] = None
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names |= dict.fromkeys(_global_names(constant))
    return list(names)


def _text_of(node: ast.stmt, lines: list[str]) -> str:
    """The lines of a statement as they were written, with the comments directly above."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
    last = node.end_lineno or node.lineno
    after = lines[last - 1].encode()[node.end_col_offset :].strip()  # offsets count bytes
    if after.startswith(b";") or node.col_offset:
        return ast.unparse(node)  # several statements on one line
    while first > 0 and lines[first - 1].startswith("#"):
        first -= 1
    blank = "\n\n" if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
    return blank + "\n".join(lines[first:last])
