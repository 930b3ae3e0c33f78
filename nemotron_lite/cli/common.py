"""Code that the commands share: the application, two consoles, options, and error messages.

Every command runs inside `plain_errors`: a wrong size, a missing file or a damaged checkpoint ends
in one message and exit code 1. A bug still shows its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from nemotron_lite.openmp import let_idle_threads_sleep
from nemotron_lite.quantization.recipe import RECIPES

let_idle_threads_sleep()  # the commands import torch after this module

app = typer.Typer(
    help="A small Nemotron 3 Super: train it, load it, quantize it, generate text with it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
settings = SimpleNamespace(traceback=False)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

DTYPES = ("float32", "bfloat16")

ModelSizes = Annotated[str, typer.Option("--model", help="a preset, or the path of a config.json")]
Text = Annotated[
    Path | None, typer.Option(help="folder of .py files; the standard library if not given")
]
Seed = Annotated[int, typer.Option(help="seed of weights, data order and sampling")]
Precision = Annotated[str, typer.Option(help=f"precision of matrix products: {', '.join(RECIPES)}")]


@app.callback()
def _options(
    traceback: Annotated[
        bool, typer.Option("--traceback", help="show where an error came from")
    ] = False,
) -> None:
    settings.traceback = traceback


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print an error of the user as one message, and exit with code 1."""
    try:
        yield
    except Exception as error:
        if settings.traceback or not _is_user_error(error):
            raise
        err.print(f"[bold red]Error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


def program() -> str:
    """How these commands were started, for a command that is shown to be copied."""
    started_as_module = Path(sys.argv[0]).name == "__main__.py"
    return f"{sys.executable} -m nemotron_lite" if started_as_module else sys.argv[0]


def title(step: int, text: str) -> None:
    """Print the heading of one step of a command."""
    out.print(f"\n[bold]{step}. {escape(text)}[/]")


def _is_user_error(error: Exception) -> bool:
    if not isinstance(error, RuntimeError):
        return isinstance(error, ValueError | OSError | FloatingPointError)
    from nemotron_lite.data import CorpusError
    from nemotron_lite.train import ResumeError

    return isinstance(error, CorpusError | ResumeError)
