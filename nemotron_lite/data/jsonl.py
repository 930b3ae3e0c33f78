r"""JSON Lines as text: one JSON object per line, and the text of a document in one of its fields.

    {"text": "def f(x):\n    return x\n", "source": "a.py"}
    {"text": "class A: pass\n"}

Data sets are often published this way. Each line is a document of its own, so its end is known and
no prediction crosses it.

A file of millions of lines often has a few damaged ones: the last is cut off, a text is null. Such
lines are left out and counted, with the reason and the number of the first one, so that a run does
not fail after hours because of one line. A file without a single usable line is refused. The
message then names the fields that were found, because a wrong field name is the usual cause.

Source: jsonlines.org. Left out: compressed files (.jsonl.gz) and Parquet; unpack or convert them
first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from nemotron_lite.input_files import FileError, parse_json, read_bytes

FILE_LIMIT = 1 << 30  # bytes of one file
LINE_LIMIT = 16 << 20  # bytes of one line
_SHOWN = 8  # field names in a message


@dataclass(frozen=True)
class JsonlText:
    """The documents of a JSON Lines file.

    Attributes:
        documents: number of the line, from 1, and the text; in the order of the file.
        skipped: how many lines were left out, by reason.
        first_skipped: number of the first line that was left out; None if there is none.
    """

    documents: tuple[tuple[int, str], ...]
    skipped: Mapping[str, int] = field(default_factory=dict)
    first_skipped: int | None = None


def read_jsonl(path: str | os.PathLike[str], *, text_field: str = "text") -> JsonlText:
    """Read the texts of a JSON Lines file.

    Empty lines and empty texts are passed over without being counted.

    Args:
        path: a regular file in UTF-8, of at most 1 GiB.
        text_field: the field that holds the text of a document.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: not a readable regular file, too long, or no line has a text.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is {type(path).__name__}: expected the path of a file.")
    if not isinstance(text_field, str):
        raise TypeError(f"text_field is {type(text_field).__name__}: expected a text.")
    content = read_bytes(path, limit=FILE_LIMIT)
    documents: list[tuple[int, str]] = []
    skipped: dict[str, int] = {}
    first: int | None = None
    fields: dict[str, None] = {}
    for number, line in _lines(content):
        try:
            text = _text(line, text_field, fields)
        except ValueError as error:
            reason = str(error)
            skipped[reason] = skipped.get(reason, 0) + 1
            first = first or number
            continue
        if text:
            documents.append((number, text))
    if not documents:
        raise FileError(path, f"holds no usable line of JSON: {_why_none(skipped, fields, first)}")
    return JsonlText(tuple(documents), skipped, first)


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank with their number. Only a line feed ends one, as in the format."""
    start = 3 if content.startswith(b"\xef\xbb\xbf") else 0  # a byte order mark
    number = 0
    while start < len(content):
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        number += 1
        line = content[start:end]
        if line.strip():
            yield number, line
        start = end + 1


def _text(line: bytes, text_field: str, fields: dict[str, None]) -> str:
    """The text of one line; a ValueError's text is the reason why there is none."""
    if len(line) > LINE_LIMIT:
        raise ValueError(f"longer than {LINE_LIMIT >> 20} MiB")
    try:
        value: Any = parse_json(line.decode("utf-8"))
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except ValueError:
        raise ValueError("not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    if text_field not in value:
        fields.update(dict.fromkeys(list(value)[:_SHOWN]))
        raise ValueError(f"without a field {text_field!r}")
    text = value[text_field]
    if not isinstance(text, str):
        raise ValueError(f"with a field {text_field!r} that is no text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, "\ud800"
        raise ValueError("with a character that UTF-8 does not have") from None
    return text


def _why_none(skipped: Mapping[str, int], fields: Mapping[str, None], first: int | None) -> str:
    if not skipped:
        return "it is empty"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in skipped.items())
    found = f"; fields found: {', '.join(map(repr, list(fields)[:_SHOWN]))}" if fields else ""
    return f"{reasons} (the first is line {first}){found}"
