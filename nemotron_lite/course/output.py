"""Outputs of the course: several MIME types for a notebook, plain text for a terminal.

A notebook stores an output as one bundle with several MIME types and shows the richest one that it
can. The tests of the chapters compare the plain text, so it must be the same on every machine. HTML
is not compared: measured times and sizes go there.

Text in HTML has the colour of the theme, so a box can be read in the light and in the dark theme.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

# The contrast of these edges is 3:1 or more, on white and on JupyterLab's dark grey. They are not
# CSS variables, because JupyterLab removes those from a notebook that is not trusted.
ACCENT = "#1976d2"
RIGHT = "#2e7d32"
WRONG = "#c62828"
FAINT = "var(--jp-content-font-color2, #616161)"


class LabMissingError(ImportError):
    """A package of the `lab` extra is not installed."""


def import_lab(module: str) -> Any:
    """Import a module that comes with the `lab` extra, or say how to get it.

    Raises:
        LabMissingError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise LabMissingError(
            f"This needs {module.partition('.')[0]}, which is not installed. It comes with the "
            "lab extra: pip install 'nemotron-lite[lab]' (`make lab` installs it)."
        ) from error


def ipython_shell() -> Any:
    """The running IPython shell; None in plain Python, where IPython may not be installed."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


def in_notebook() -> bool:
    """Whether this is a kernel, whose front end may show widgets, and not a terminal."""
    running = ipython_shell()
    return running is not None and hasattr(running, "kernel")


def cell_number() -> int | None:
    """The number of the cell that is running, None outside IPython."""
    running = ipython_shell()
    return None if running is None else int(running.execution_count)


def show_output(
    plain: str,
    rich: str | None = None,
    *,
    more: Mapping[str, Any] | None = None,
    updatable: bool = False,
) -> Any:
    """Show one output.

    Args:
        plain: text that is the same on every machine; a terminal shows nothing else.
        rich: the same as HTML; it may contain values measured on this machine.
        more: further data by MIME type, such as a figure or a live widget.
        updatable: return a handle with which `update_output` replaces the output later.
    """
    if ipython_shell() is None:
        sys.stdout.write(plain + "\n")
        return None
    display = import_lab("IPython.display").display
    return display(_bundle(plain, rich, more), raw=True, display_id=updatable or None)


def update_output(
    handle: Any,
    plain: str,
    rich: str | None = None,
    *,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Replace an updatable output. `plain` stays as it was: tests compare the first one."""
    if handle is not None:
        handle.update(_bundle(plain, rich, more), raw=True)


def _bundle(plain: str, rich: str | None, more: Mapping[str, Any] | None) -> dict[str, Any]:
    html_form = {} if rich is None else {"text/html": rich}
    return {**(more or {}), "text/plain": plain, **html_form}


def inline_html(text: str) -> str:
    """Escape text for HTML; `code`, **bold** and *italic* work as in markdown."""
    pieces = re.split(r"`([^`]+)`", text)
    out = []
    for position, piece in enumerate(pieces):
        safe = html.escape(piece, quote=False)
        if position % 2:
            out.append(f"<code>{safe}</code>")
            continue
        safe = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", safe)
        out.append(re.sub(r"(?<![\w*])\*([^*\s][^*]*?)\*(?![\w*])", r"<i>\1</i>", safe))
    return "".join(out)


def box(body: str, *, edge: str = ACCENT) -> str:
    """HTML in a box with a coloured left edge; its text has the colour of the theme."""
    style = (
        f"border-left: 4px solid {edge}; padding: 4px 0 4px 12px; margin: 4px 0; line-height: 1.5;"
    )
    return f'<div style="{style}">{body}</div>'


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> str:
    """An HTML table; the cells are HTML already, the first column names the rows."""
    bold_title = f"<b>{inline_html(title)}</b>"
    caption = f'<caption style="text-align: left">{bold_title}</caption>' if title else ""
    top = "".join(f'<th style="text-align: left">{cell}</th>' for cell in head)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align: left">{cell}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table>{caption}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> str:
    """The same table as plain text, in columns."""
    table = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in ([title, *lines] if title else lines))


def format_number(value: Any, digits: int = 3) -> str:
    """A number for a reader: whole numbers in full, others with `digits` significant digits."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and 1000 <= abs(value) < 1e15):
        return f"{int(value):,}"
    size = abs(value)
    if size != 0 and not 1e-4 <= size < 1e15:
        return f"{value:.{digits}g}"
    if size >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def with_unit(text: str, unit: str) -> str:
    """`3 ms`, `40 %`, `7`."""
    return f"{text} {unit}" if unit else text


def some_names(names: Mapping[str, Any] | Sequence[str], most: int = 8) -> str:
    """The first few names of a collection, for an error message."""
    every = sorted(names)
    return ", ".join(every[:most]) + (f" … ({len(every)} in all)" if len(every) > most else "")
