"""Reading small files that anybody may have written: config.json, an index, a log, a results file.

Such a file may be damaged, or it may be made to harm: a named pipe that never ends, a link to
/dev/zero, a hundred thousand open brackets, a number of a million digits. So every small file is
read by one of these functions. They accept regular files only (through links), read at most `limit`
bytes, and bound the nesting and the digits of JSON. All errors are one kind, `FileError`, with a
text that names the file, the fault and what to do.

    config = read_json("config.json")                     an object, or FileError
    text = read_text("prompt.txt", limit=1 << 20)

Source: RFC 8259 for JSON; it has no NaN and no Infinity, which Python's reader accepts.
Left out: safetensors files, which the safetensors library checks (checkpoint/validation.py).
"""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

LIMIT = 64 << 20  # bytes; the largest index of a released model has 12 MB
DEPTH = 64  # of nested arrays and objects
DIGITS = 400  # of one number; a float64 needs 24
_PIECE = 1 << 16  # bytes that are asked for at once, if a file says that it has fewer
_SHOWN = 200  # characters of a cause that is shown

# A text in JSON; one that does not end extends to the end of the file.
_TEXTS = re.compile(r'"(?:[^"\\]|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = re.compile(r"[^\[\]{}]+")


class FileError(ValueError):
    """A small file that cannot be used. The text names the file, the fault, and what to do.

    Attributes:
        path: of the file.
        fault: what is wrong and what to do, without the name of the file.
    """

    def __init__(self, path: str | os.PathLike[str], fault: str) -> None:
        self.path = Path(path)
        self.fault = fault
        super().__init__(f"{self.path} {fault}")

    def __reduce__(self) -> tuple[type[FileError], tuple[Path, str]]:
        return type(self), (self.path, self.fault)


def read_bytes(
    path: str | os.PathLike[str], *, limit: int = LIMIT, follow_links: bool = True
) -> bytes:
    """The content of a regular file.

    Args:
        limit: the most bytes to read; a longer file is refused.
        follow_links: whether the last part of `path` may be a symbolic link.

    Raises:
        FileNotFoundError: there is no such file; a dangling link is none either.
        FileError: not a regular file, too long, or not readable.
    """
    # O_NONBLOCK: opening a named pipe without a writer would wait for ever.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW)
    try:
        if not follow_links and Path(path).is_symlink():
            raise FileError(path, "is a symbolic link; put the file itself there")
        handle = os.open(path, flags)
    except (FileNotFoundError, FileError):
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise FileError(path, f"cannot be opened ({_cause(error)})") from error
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise FileError(path, f"is {_kind(found.st_mode)}; expected a regular file")
        if found.st_size > limit:
            raise FileError(path, _too_long(f"{found.st_size:,}", limit))
        with os.fdopen(handle, "rb", closefd=False) as file:
            content = _read_at_most(file, limit + 1, found.st_size + 1)
    except OSError as error:
        raise FileError(path, f"cannot be read ({_cause(error)})") from error
    finally:
        os.close(handle)
    if len(content) > limit:
        raise FileError(path, _too_long(f"more than {limit:,}", limit))
    return content


def _read_at_most(file: BinaryIO, most: int, piece: int) -> bytes:
    """The bytes of a file up to `most`, in pieces: it may have grown, and /proc says 0 bytes.

    `read(most)` would ask the system for that much memory at once.
    """
    pieces, left = [], most
    while found := file.read(min(left, max(piece, _PIECE))):
        pieces.append(found)
        left -= len(found)
    return b"".join(pieces)


def check_regular(path: str | os.PathLike[str]) -> None:
    """Refuse what is not a regular file, for a library that opens the file itself.

    Links are followed. A library that opens a named pipe waits for ever.

    Raises:
        FileNotFoundError: there is no such file; a dangling link is none either.
        FileError: not a regular file, or not readable.
    """
    try:
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            return
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise FileError(path, f"cannot be opened ({_cause(error)})") from error
    raise FileError(path, f"is {_kind(found.st_mode)}; expected a regular file")


def read_text(
    path: str | os.PathLike[str], *, limit: int = LIMIT, follow_links: bool = True
) -> str:
    """The content of a regular file in UTF-8; a byte order mark at its start is left out.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: not a regular file, too long, not readable, or not UTF-8.
    """
    content = read_bytes(path, limit=limit, follow_links=follow_links)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(
            path, f"is not UTF-8 (byte {error.start:,}); save it in that encoding"
        ) from error


def read_json(
    path: str | os.PathLike[str],
    *,
    kind: type | tuple[type, ...] = dict,
    limit: int = LIMIT,
    follow_links: bool = True,
    infinity: bool = False,
) -> Any:
    """The JSON value in a regular file.

    Args:
        kind: type that the value must have; an object is a dict.
        limit: the most bytes.
        infinity: accept bare Infinity and -Infinity, as the config.json of released models has.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: not readable, no JSON, a value of another type, nesting deeper than `DEPTH`, a
            number of more than `DIGITS` digits, NaN or Infinity.
    """
    text = read_text(path, limit=limit, follow_links=follow_links)
    try:
        value = parse_json(text, infinity=infinity)
    except ValueError as error:
        raise FileError(path, f"is no readable JSON ({_cause(error)})") from error
    if not isinstance(value, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(_JSON_NAMES.get(item, item.__name__) for item in kinds)
        found = _JSON_NAMES.get(type(value), type(value).__name__)
        raise FileError(path, f"holds {found}, expected {names}")
    return value


def parse_json(text: str, *, infinity: bool = False) -> Any:
    """The JSON value in a text, with the bounds of `read_json`.

    Raises:
        ValueError: no JSON, or beyond a bound.
    """
    _check_depth(text)
    constant = _accept_infinity if infinity else _refuse_constant
    return json.loads(
        text, parse_constant=constant, parse_int=_bounded_int, parse_float=_bounded_float
    )


_JSON_NAMES = {
    dict: "an object",
    list: "an array",
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _check_depth(text: str) -> None:
    """Refuse deep nesting before the parser recurses into it; brackets in texts do not count."""
    if text.count("[") + text.count("{") <= DEPTH:
        return
    depth = 0
    for bracket in _NO_BRACKETS.sub("", _TEXTS.sub("", text)):
        if bracket in "[{":
            depth += 1
            if depth > DEPTH:
                raise ValueError(f"nested deeper than {DEPTH} levels")
        else:
            depth -= 1


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _accept_infinity(name: str) -> float:
    return float(name) if name.endswith("Infinity") else _refuse_constant(name)


def _bounded_int(digits: str) -> int:
    return int(_bounded(digits))


def _bounded_float(digits: str) -> float:
    value = float(_bounded(digits))
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _bounded(digits: str) -> str:
    if len(digits) > DIGITS:
        raise ValueError(f"a number of {len(digits):,} digits")
    return digits


def _kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    ):
        if test(mode):
            return name
    return "no regular file"


def _too_long(size: str, limit: int) -> str:
    return f"has {size} bytes; expected at most {limit:,}"


def _cause(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
