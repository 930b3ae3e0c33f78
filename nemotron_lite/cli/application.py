"""The application: options that all commands have, errors as one line, and a quiet end.

    exit code 0     done
    1               an error: one line `Error: ...` on stderr
    2               wrong usage: an option or a command that does not exist, a missing one
    130             interrupted (Ctrl-C): one line
    141             the reader of the output has gone: nothing is said, as `cat` and `grep` do

A wrong size, a missing file or a damaged checkpoint is an error of the user, and its message says
what to do. Any other exception is a fault of the package. It ends in one line too, which names the
place; `--traceback` or `NEMOTRON_LITE_TRACEBACK=1` shows all of it.

The options `--quiet` and `--traceback` may stand before or behind the name of a command.
"""

from __future__ import annotations

import functools
import inspect
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, NoReturn, get_type_hints

import typer
from typer.core import TyperGroup

from nemotron_lite.cli.terminal import end_quietly, prepare_streams, write_note

PACKAGE = "nemotron_lite"
TRACEBACK_VARIABLE = "NEMOTRON_LITE_TRACEBACK"
INTERRUPTED = 128 + signal.SIGINT
PIPE_CLOSED = 128 + signal.SIGPIPE

settings = SimpleNamespace(traceback=False, quiet=False)

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="no progress and no notes: only results and errors")
]
Traceback = Annotated[bool, typer.Option("--traceback", help="show where an error came from")]


class Group(TyperGroup):
    """The commands, called as a program: every way in which they can end is handled here."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run a command and exit, as click's `main` does."""
        if not options.pop("standalone_mode", True):
            return super().main(*args, **{**options, "standalone_mode": False})
        prepare_streams()
        with _notes_on_stderr():
            code = self._run(*args, **{**options, "standalone_mode": False})
        if sys.stdout is sys.__stdout__:
            end_quietly()
        sys.exit(code)

    def _run(self, *args: Any, **options: Any) -> int:
        try:
            with plain_errors():
                found = super().main(*args, **options)
                code = found if isinstance(found, int) else 0
                if code == 0 and sys.stdout is not None:
                    sys.stdout.flush()
            return code
        except typer.Exit as end:
            return end.exit_code


class Application(typer.Typer):
    """A `Typer` whose commands also have the options that all of them share."""

    def command(self, *args: Any, **options: Any) -> Callable[[Any], Any]:
        """Register a function as a command; it is returned unchanged."""
        register = super().command(*args, **options)

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            register(_with_shared_options(function))
            return function

        return add


@contextmanager
def plain_errors() -> Iterator[None]:
    """Print an error as one message, and exit with its code."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        if settings.traceback:
            raise
        _end("Interrupted.", INTERRUPTED)
    except BrokenPipeError:
        raise typer.Exit(PIPE_CLOSED) from None
    except Exception as error:
        if hasattr(error, "format_message"):  # click's, or typer's copy of it
            _end_usage(error)
        if isinstance(error, typer.Abort):
            _end("Interrupted.", INTERRUPTED)
        if settings.traceback or os.environ.get(TRACEBACK_VARIABLE):
            raise
        _end(f"Error: {_explained(error)}", 1)


def _end(line: str, code: int) -> NoReturn:
    write_note(line, style="red" if line.startswith("Error") else "")
    raise typer.Exit(code) from None


def _end_usage(error: Any) -> NoReturn:
    """One line for wrong usage; the help, where that is what the exception stands for."""
    if type(error).__name__ == "NoArgsIsHelpError":
        if error.format_message():  # empty if rich has printed the help
            write_note(error.format_message())
        raise typer.Exit(error.exit_code) from None
    context = getattr(error, "ctx", None)
    more = f" ({context.command_path} --help lists the options)" if context else ""
    _end(f"Error: {error.format_message().rstrip()}{more}", error.exit_code)


def _explained(error: Exception) -> str:
    """The message of an error of the user; of another one, what it is and where it was raised."""
    if isinstance(error, OSError) and error.strerror:
        names = " and ".join(os.fsdecode(n) for n in (error.filename, error.filename2) if n)
        return f"{names}: {error.strerror}" if names else error.strerror
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        cause = str(error).splitlines()[:1]
        return f"the memory does not suffice ({cause[0][:200] if cause else 'of Python'})."
    ours = type(error).__module__.split(".")[0] == PACKAGE
    if ours or isinstance(error, ValueError | OSError | FloatingPointError):
        return str(error)
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):
        return str(error)
    lines = str(error).splitlines() or [""]
    places = traceback.extract_tb(error.__traceback__)
    inside = [p for p in places if PACKAGE in p.filename] or places
    where = f"{Path(inside[-1].filename).name}, line {inside[-1].lineno}" if inside else "unknown"
    return (
        f"{type(error).__name__}: {lines[0][:200]} (a fault of {PACKAGE}, in {where}; --traceback "
        "shows all of it)"
    )


def _current_folder_exists() -> bool:
    try:
        os.getcwd()
    except OSError:
        return False
    return True


def _with_shared_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with two more options, which change `settings`; errors are printed plainly."""
    shared = {"quiet": Quiet, "traceback": Traceback}

    @functools.wraps(function)
    def command(*args: Any, quiet: bool, traceback: bool, **options: Any) -> Any:
        settings.quiet = settings.quiet or quiet
        settings.traceback = settings.traceback or traceback
        if not _current_folder_exists():  # relative paths mean nothing, and MKL ends the process
            _end("Error: the current folder no longer exists: go to another one (cd).", 1)
        with plain_errors():
            return function(*args, **options)

    kinds = {**get_type_hints(function, include_extras=True), **shared}
    parameters = [
        *inspect.signature(function).parameters.values(),
        *(inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=False) for n in shared),
    ]
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [parameter.replace(annotation=kinds[parameter.name]) for parameter in parameters]
    )
    command.__annotations__ = kinds
    return command


class _NoteHandler(logging.Handler):
    """Warnings of the package as one line each."""

    def emit(self, record: logging.LogRecord) -> None:
        if not settings.quiet:
            write_note(f"Note: {record.getMessage()}")


@contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """Show what the package logs and warns about as notes, while a command runs."""
    logger, handler = logging.getLogger(PACKAGE), _NoteHandler()
    logger.addHandler(handler)
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: Any, filename: str, *where: Any, **more: Any) -> None:
            if PACKAGE not in Path(filename).parts:
                usual(message, category, filename, *where, **more)
            elif not settings.quiet:
                write_note(f"Note: {message}")

        warnings.showwarning = show
        try:
            yield
        finally:
            logger.removeHandler(handler)
