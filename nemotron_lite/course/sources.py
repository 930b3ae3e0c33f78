"""`show_source`: the package's own code in a chapter, read from the file at that moment.

A chapter that copies code grows apart from the package. This shows the live object, so the text
beside it can only be about the code that runs. The plain form is the source itself; when the
package changes, the stored output no longer matches and the chapter has to be published again.

Left out: the docstring, unless it is asked for. In a chapter the text around the cell does its
work.
"""

from __future__ import annotations

import ast
import html
import inspect
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from nemotron_lite.course import _output

# JupyterLab's editor colours, so that the code looks like a cell in either theme.
_COLOURS = {
    "Keyword": "var(--jp-mirror-editor-keyword-color, #007b00)",
    "Comment": "var(--jp-mirror-editor-comment-color, #406060)",
    "String": "var(--jp-mirror-editor-string-color, #a31515)",
    "Number": "var(--jp-mirror-editor-number-color, #006b3c)",
    "Operator.Word": "var(--jp-mirror-editor-keyword-color, #007b00)",
    "Name.Builtin": "var(--jp-mirror-editor-builtin-color, #006b6b)",
    "Name.Decorator": "var(--jp-mirror-editor-meta-color, #7a3e9d)",
    "Name.Function": "var(--jp-mirror-editor-def-color, #0000cc)",
    "Name.Class": "var(--jp-mirror-editor-def-color, #0000cc)",
}


def show_source(obj: Any, *, docstring: bool = False) -> None:
    """Show the source of a function, method, class, property or Triton kernel.

    Args:
        obj: the object itself, not its name.
        docstring: keep the docstring of the object (methods of a class keep theirs either way).

    Raises:
        TypeError: Python keeps no source for it; a number, or something written in C.
    """
    source, where = source_of(obj, docstring=docstring)
    heading = f'<div style="color: {_output.FAINT}"><code>{html.escape(where)}</code></div>'
    _output.emit(source, heading + _highlighted(source))


def source_of(obj: Any, *, docstring: bool = False) -> tuple[str, str]:
    """The source of `obj`, and where it stands: `nemotron_lite/ops/scan.py, line 31`."""
    target = _python_object(obj)
    try:
        lines, first = inspect.getsourcelines(target)
        path = inspect.getsourcefile(target) or "?"
    except (TypeError, OSError) as error:
        raise TypeError(
            f"show_source({obj!r:.80}) has no Python source to show. Pass a function, a method, "
            "a class or a Triton kernel, and pass the object itself rather than a call."
        ) from error
    source = textwrap.dedent("".join(lines)).rstrip("\n")
    if not docstring:
        source = _without_docstring(source)
    return source, f"{_short(path)}, line {first}"


def _python_object(obj: Any) -> Any:
    """Undo what stands between a name and the function that was written."""
    for _ in range(10):
        if isinstance(obj, property):
            obj = obj.fget
        elif type(obj).__module__.partition(".")[0] == "triton" and hasattr(obj, "fn"):
            obj = obj.fn  # a JIT function, an autotuner or the interpreter's stand-in
        elif hasattr(obj, "func") and hasattr(obj, "keywords"):
            obj = obj.func  # functools.partial
        else:
            break
    return inspect.unwrap(obj) if callable(obj) else obj


def _without_docstring(source: str) -> str:
    tree = ast.parse(source)
    node = tree.body[0]
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return source
    first = node.body[0]
    if ast.get_docstring(node) is None or len(node.body) == 1:
        return source
    lines = source.splitlines()
    end = first.end_lineno or first.lineno
    while end < len(lines) and not lines[end].strip():
        end += 1
    return "\n".join([*lines[: first.lineno - 1], *lines[end:]])


def _short(path: str) -> str:
    """The path from the package's folder on, or the file's name."""
    parts = Path(path).parts
    for root in ("nemotron_lite", "nemotron_kernels"):
        if root in parts:
            return "/".join(parts[len(parts) - parts[::-1].index(root) - 1 :])
    return "this notebook" if "ipykernel" in path or path.startswith("<") else Path(path).name


@cache
def _colours() -> dict[Any, str]:
    from pygments.token import string_to_tokentype

    return {string_to_tokentype(f"Token.{name}"): colour for name, colour in _COLOURS.items()}


def _highlighted(source: str) -> str:
    from pygments.lexers import PythonLexer

    colours = _colours()
    out = []
    for kind, text in PythonLexer(stripnl=False).get_tokens(source):
        while kind not in colours and kind.parent is not None:
            kind = kind.parent
        safe = html.escape(text, quote=False)
        colour = colours.get(kind)
        out.append(f'<span style="color: {colour}">{safe}</span>' if colour else safe)
    style = (
        f"border: 1px solid {_output.BORDER}; padding: 8px 12px; overflow-x: auto; "
        "line-height: 1.4;"
    )
    return f'<pre style="{style}">{"".join(out).rstrip()}</pre>'
