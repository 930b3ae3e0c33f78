"""How the course speaks: one bundle for a notebook, plain words for a terminal.

A notebook keeps an output as a bundle of forms of the same thing and shows the richest it can. The
plain form is what the tests of the chapters compare, so it holds on every machine. HTML is not
compared: times and sizes of this machine go there.

Text in HTML keeps the colour of the theme, so a card reads in the light theme and in the dark.
"""

from __future__ import annotations

import html
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any

# Edges stand out on white and on JupyterLab's dark grey alike (3:1 or more). They are plain colours
# because a notebook that is not trusted keeps those and loses variables.
ACCENT = "#1976d2"
RIGHT = "#2e7d32"
WRONG = "#c62828"
FAINT = "var(--jp-content-font-color2, #616161)"


class LabMissingError(ImportError):
    """A package of the `lab` extra is not installed."""


def lab(module: str) -> Any:
    """Import a module that comes with the `lab` extra, or say how to get it.

    Raises:
        LabMissingError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise LabMissingError(
            f"This needs {module.partition('.')[0]}, which is not installed. It comes with the "
            "lab extra: pip install 'nemotron-lite[lab]' (`make lab` does it on its own)."
        ) from error


def shell() -> Any:
    """The running IPython shell; None in plain Python, where IPython may not even exist."""
    ipython = sys.modules.get("IPython")
    return None if ipython is None else ipython.get_ipython()


def in_notebook() -> bool:
    """Whether a front end with widgets may be listening: a kernel, not a terminal."""
    running = shell()
    return running is not None and hasattr(running, "kernel")


def moment() -> int | None:
    """The number of the cell that is running, None outside IPython."""
    running = shell()
    return None if running is None else int(running.execution_count)


def emit(plain: str, rich: str | None = None, *, more: Mapping[str, Any] | None = None) -> None:
    """Show one output.

    Args:
        plain: what stays the same on every machine; the only form in a terminal.
        rich: the same as HTML, free to hold what was measured here.
        more: further forms by MIME type, such as a figure or a live widget.
    """
    if shell() is None:
        sys.stdout.write(plain + "\n")
        return
    data: dict[str, Any] = {**(more or {}), "text/plain": plain}
    if rich is not None:
        data["text/html"] = rich
    lab("IPython.display").display(data, raw=True)


def inline(text: str) -> str:
    """Escape text for HTML; `code`, **bold** and *slanted* keep their markdown meaning."""
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


def card(body: str, *, edge: str = ACCENT) -> str:
    """A block with a coloured edge; the text keeps the colour of the theme."""
    style = (
        f"border-left: 4px solid {edge}; padding: 4px 0 4px 12px; margin: 4px 0; line-height: 1.5;"
    )
    return f'<div style="{style}">{body}</div>'


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> str:
    """A table of cells that are HTML already; the first column is the name of its row."""
    caption = f'<caption style="text-align: left"><b>{inline(title)}</b></caption>' if title else ""
    top = "".join(f'<th style="text-align: left">{cell}</th>' for cell in head)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align: left">{cell}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f"<table>{caption}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"


def plain_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> str:
    """The same table in columns of characters."""
    table = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(head))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in ([title, *lines] if title else lines))


def number(value: Any, digits: int = 3) -> str:
    """A number as a person writes it: whole numbers in full, the rest to some digits."""
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


def listed(names: Mapping[str, Any] | Sequence[str], most: int = 8) -> str:
    """The first few names of a collection, for an error message."""
    every = sorted(names)
    return ", ".join(every[:most]) + (f" … ({len(every)} in all)" if len(every) > most else "")
