"""Code that the commands share: the application, options, and how results and notes are printed.

    say("text")         a line of the result, on stdout, exactly as it is
    note("text")        a line for the person who waits, on stderr; not with --quiet
    title(2, "Read")    the heading of a step, on stdout; not with --quiet
    out.print(table)    a table of rich, on stdout

Texts are never markup: see `terminal.py`. `out` and `err` have markup, emoji codes and highlighting
switched off too, so that a name in a table is shown as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nemotron_lite import __version__
from nemotron_lite.cli.application import (
    Application,
    Group,
    Quiet,
    Traceback,
    plain_errors,
    settings,
)
from nemotron_lite.cli.terminal import ignore_absurd_width, visible, write, write_note
from nemotron_lite.progress import is_terminal, still_working
from nemotron_lite.quantization.recipe import RECIPES

__all__ = [
    "DTYPES", "SHIPPED", "JsonlField", "ModelFolder", "ModelSizes", "Precision", "Seed", "Text",
    "app", "err", "note", "out", "plain_errors", "program", "say", "settings", "title", "visible",
    "working", "write",
]  # fmt: skip

app = Application(
    cls=Group,
    help="A small Nemotron 3 Super: train it, load it, quantize it, generate text with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
ignore_absurd_width()
out = Console(highlight=False, markup=False, emoji=False)
err = Console(stderr=True, highlight=False, markup=False, emoji=False)

DTYPES = ("float32", "bfloat16")

SHIPPED = Path("lite")  # what is used if no model is named
ModelFolder = Annotated[
    Path,
    typer.Option(
        "--model",
        help="checkpoint folder, a shipped model (lite), or a hub id in the local cache",
    ),
]
ModelSizes = Annotated[
    str,
    typer.Option(
        "--model", help="a preset (also lite-1, lite-2, ...), or the path of a config.json"
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        help="folder of .py files (or .txt, .md and .jsonl), a text file, or a .jsonl file; the "
        "standard library if not given"
    ),
]
JsonlField = Annotated[str, typer.Option(help="field of a .jsonl file that holds the text")]
Seed = Annotated[int, typer.Option(help="seed of weights, data order and sampling")]
Precision = Annotated[str, typer.Option(help=f"precision of matrix products: {', '.join(RECIPES)}")]


def _show_version(wanted: bool) -> bool:
    if wanted:
        say(f"nemotron-lite {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    quiet: Quiet = False,
    traceback: Traceback = False,
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="print the version and exit"
        ),
    ] = False,
) -> None:
    settings.quiet, settings.traceback = quiet, traceback


def program() -> str:
    """How these commands were started, for a command that is shown to be copied."""
    started_as_module = Path(sys.argv[0]).name == "__main__.py"
    return f"{sys.executable} -m nemotron_lite" if started_as_module else sys.argv[0]


def say(text: str = "", *, style: str = "") -> None:
    """Print a line of the result, exactly as it is."""
    write(text, style=style)
    write("\n")


def note(text: str, *, style: str = "dim") -> None:
    """Print a line for the person who waits, on stderr; nothing with `--quiet`."""
    if not settings.quiet:
        write_note(text, style=style)


def title(step: int, text: str) -> None:
    """Print the heading of one step of a command; nothing with `--quiet`."""
    if not settings.quiet:
        say()
        say(f"{step}. {text}", style="bold")


@contextmanager
def working(what: str) -> Iterator[None]:
    """Show that something is going on: a moving sign on a terminal, seldom a line in a file."""
    if settings.quiet:
        yield
    elif is_terminal(sys.stderr):
        with err.status(what):
            yield
    else:
        with still_working(what):
            yield
