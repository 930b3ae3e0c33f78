r"""What the commands write: texts as they are, in any locale, and safe on a terminal.

A text that a model wrote, a prompt or the name of a file may hold anything: `[bold]`, `:bug:`, an
escape sequence, bytes that are not UTF-8. So texts are written without markup, wrapping or
highlighting.

    in a file or a pipe     every character as it is; bytes that were no UTF-8 come out unchanged
    on a terminal           control characters other than line feed and tab are shown as `\x1b`,
                            because an escape sequence could clear the screen, change its title, or
                            type into the shell

What the encoding of the output cannot represent is written as `\u6f22`. If the locale is C, Python
chooses ASCII; that says nothing about the reader, so UTF-8 is written instead, unless
`PYTHONIOENCODING` asks for another one.

A reader that closes the pipe (`| head`) is no error. A write to stdout then raises BrokenPipeError,
and the command ends quietly (`application.py`). Notes on stderr are dropped when nobody reads them,
because they are not worth ending a computation.

Left out: right-to-left marks and other characters that only change the direction of a line.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import sys
from contextlib import suppress
from typing import Any

STYLES = {"bold": "1", "dim": "2", "red": "1;31"}  # codes of ECMA-48
NARROWEST = 40  # characters of a line
_ERRORS = "nemotron_lite.as_it_is"
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def prepare_streams() -> None:
    """Make stdin, stdout and stderr safe to use, whatever the caller left of them.

    A closed one (`>&-`) becomes /dev/null, so that no file which is opened later takes its number
    and receives what a library writes there.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the smallest free number, which is this one
    codecs.register_error(_ERRORS, _encode_as_it_is)
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, _ERRORS), (sys.stderr, _ERRORS)):
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding
            if _is_ascii(encoding) and not os.environ.get("PYTHONIOENCODING"):
                encoding = "utf-8"
            stream.reconfigure(encoding=encoding, errors=errors)


def ignore_absurd_width() -> None:
    """Forget a `COLUMNS` in which nothing could be read; rich reads it when a console is made."""
    columns = os.environ.get("COLUMNS", "")
    if columns.isascii() and columns.isdigit() and int(columns[-9:]) < NARROWEST:
        del os.environ["COLUMNS"]


def write(text: str, *, stream: Any = None, style: str = "") -> None:
    """Write a text and flush it; nothing is added, and nothing changed but for a terminal.

    Args:
        stream: stdout by default.
        style: a name of `STYLES`, for a terminal that has styles.

    Raises:
        OSError: the reader has gone (BrokenPipeError), or the disk is full.
    """
    stream = sys.stdout if stream is None else stream
    if stream is None:  # closed by the caller
        return
    if stream.isatty():
        text = visible(text)
        if style and text and has_styles(stream):
            text = f"\x1b[{STYLES[style]}m{text}\x1b[0m"
    stream.write(text)
    stream.flush()


def write_note(text: str, *, style: str = "") -> None:
    """Write a line to stderr, if anybody reads it."""
    if sys.stderr is None:
        return
    with suppress(OSError, ValueError):
        write(text + "\n", stream=sys.stderr, style=style)


def visible(text: str) -> str:
    """A text whose control characters, other than line feed and tab, are shown as escapes."""
    return _CONTROL.sub(_escape, text)


def has_styles(stream: Any) -> bool:
    """Whether a terminal shows styles, and its user wants them (no-color.org)."""
    wanted = not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in ("dumb", None)
    return bool(stream.isatty()) and wanted


def end_quietly() -> None:
    """Flush stdout and stderr; what cannot be written is dropped.

    The interpreter flushes both at its end, and complains about a closed pipe if it still holds
    text for it.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def _is_ascii(encoding: str) -> bool:
    try:
        return codecs.lookup(encoding).name == "ascii"
    except LookupError:
        return False


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte that was not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def _encode_as_it_is(error: UnicodeError) -> tuple[bytes, int]:
    """An error handler for codecs: bytes that were no text are themselves, the rest is escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = bytearray()
    for letter in error.object[error.start : error.end]:
        code = ord(letter)
        if 0xDC80 <= code <= 0xDCFF:
            found.append(code - 0xDC00)
        else:
            found += letter.encode("ascii", "backslashreplace")
    return bytes(found), error.end
