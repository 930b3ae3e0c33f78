"""Cells of a learner's notebook: executed in an IPython shell, their outputs kept as data.

The shell has no history, writes no files and shows nothing itself. What a cell prints or displays
becomes an output of the feedback page, in order, up to a size. A cell that takes too long is
interrupted by a signal, with an exception that `except Exception` does not catch.

This runs in a learner's process.
"""

from __future__ import annotations

import base64
import contextlib
import io
import linecache
import signal
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any

MOST_TEXT = 100_000  # characters of one output, and of all printed text of a cell
MOST_PICTURE = 1_000_000
MOST_OUTPUTS = 50
MOST_FRAMES = 20
KINDS_SHOWN = (
    "text/plain", "text/html", "text/markdown", "text/latex", "image/png", "image/jpeg",
    "image/svg+xml",
)  # fmt: skip


class TimeOverError(BaseException):
    """The time of a cell or call is over; not an Exception, so that `except` lets it through."""


class Printed(io.TextIOBase):
    """stdout or stderr of a cell: its text becomes an output."""

    def __init__(self, name: str, outputs: list[dict[str, Any]]) -> None:
        super().__init__()
        self.name, self.outputs = name, outputs

    def writable(self) -> bool:
        """It is written to."""
        return True

    def write(self, text: str) -> int:
        """Add text to the last output, if it is of the same stream."""
        last = self.outputs[-1] if self.outputs else {}
        if last.get("output_type") == "stream" and last["name"] == self.name:
            last["text"] = (last["text"] + text)[:MOST_TEXT]
        elif len(self.outputs) < MOST_OUTPUTS:
            stream = {"output_type": "stream", "name": self.name, "text": text[:MOST_TEXT]}
            self.outputs.append(stream)
        return len(text)


def make_shell(outputs: list[dict[str, Any]]) -> Any:
    """An IPython shell without history and files; what a cell shows is appended to `outputs`."""
    from IPython.core.compilerop import CachingCompiler
    from IPython.core.displayhook import DisplayHook
    from IPython.core.displaypub import DisplayPublisher
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets import Type
    from traitlets.config import Config

    def add(kind: str, data: dict[str, Any]) -> None:
        shown = {}
        for name in KINDS_SHOWN:
            value = data.get(name)
            most = MOST_PICTURE if name.startswith("image/") else MOST_TEXT
            if isinstance(value, bytes):
                value = base64.b64encode(value).decode()
            if isinstance(value, str):
                shown[name] = value if len(value) <= most else "(too large to be shown)"
        if len(outputs) < MOST_OUTPUTS:
            outputs.append({"output_type": kind, "data": shown, "metadata": {}})

    class Compiler(CachingCompiler):  # type: ignore[misc]
        """Gives a cell's code the cell's name, which tracebacks then show."""

        cell = "a cell"

        def get_code_name(self, raw_code: str, transformed_code: str, number: int) -> str:
            return self.cell

    class Hook(DisplayHook):  # type: ignore[misc]
        """Keeps the value of a cell's last expression."""

        def __call__(self, result: Any = None) -> None:
            if result is not None and not self.quiet():
                data, _ = self.compute_format_data(result)
                self.update_user_ns(result)
                add("execute_result", data)

    class Publisher(DisplayPublisher):  # type: ignore[misc]
        """Keeps what `display` shows."""

        def publish(self, data: dict[str, Any], *unused: Any, **ignored: Any) -> None:
            add("display_data", data)

        def clear_output(self, wait: bool = False) -> None:
            outputs.clear()

    class Shell(InteractiveShell):  # type: ignore[misc]
        """A shell that writes errors among the outputs."""

        displayhook_class = Type(Hook)
        display_pub_class = Type(Publisher)
        compiler_class = Type(Compiler)
        failed = False

        def showtraceback(self, *unused: Any, **ignored: Any) -> None:
            """Append the error to the outputs."""
            self.failed = True
            error = sys.exc_info()[1]
            if error is not None:
                outputs.append(error_output(error))

        showsyntaxerror = showindentationerror = showtraceback

    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "NoColor"
    return Shell.instance(config=config)


def error_output(error: BaseException) -> dict[str, Any]:
    """An error as an output of a cell, with the learner's lines that led to it."""
    lines = [
        f"{frame.filename.strip('<>')}, line {frame.lineno}: "
        f"{linecache.getline(frame.filename, frame.lineno or 0).strip()}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith("<")
    ]
    if isinstance(error, SyntaxError) and error.text:
        lines = [f"line {error.lineno}: {error.text.strip()}"]
    return {
        "output_type": "error",
        "ename": type(error).__name__,
        "evalue": error_text(error)[:MOST_TEXT],
        "traceback": [line[:1000] for line in lines[-MOST_FRAMES:]],
    }


def error_text(error: BaseException) -> str:
    """What an error says, "" if its own `__str__` fails."""
    if isinstance(error, TimeOverError):
        return "stopped because its time was over: an endless loop?"
    try:
        return str(error)
    except BaseException:
        return ""


class Alarm:
    """Raises TimeOverError in code that runs too long, again each second."""

    def __init__(self) -> None:
        self.armed = False
        signal.signal(signal.SIGALRM, self._ring)

    def _ring(self, number: int, frame: types.FrameType | None) -> None:
        if self.armed:
            raise TimeOverError

    @contextlib.contextmanager
    def after(self, seconds: float | int) -> Iterator[None]:
        """Interrupt the block after so many seconds."""
        self.armed = True
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01), 1.0)
        try:
            yield
        finally:
            self.armed = False
            signal.setitimer(signal.ITIMER_REAL, 0)
