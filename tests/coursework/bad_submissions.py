"""Submissions that somebody damaged or made to harm, generated. Each is put below a folder.

Each entry of `BAD` is a name and a function that makes the entry of one learner in a folder.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Make = Callable[[Path], None]
DIGITS = "9" * 5000
DEEP = 2000  # folders below each other: longer than any path


def _text(content: str | bytes, name: str = "x.ipynb") -> Make:
    def make(folder: Path) -> None:
        (folder / "bad").mkdir()
        data = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        (folder / "bad" / name).write_bytes(data)

    return make


def _book(**changes: Any) -> Make:
    return _text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {}, **changes}))


def _sparse(folder: Path) -> None:
    with (folder / "bad.ipynb").open("wb") as file:
        file.truncate(2**42)


def _sparse_aside(folder: Path) -> None:
    """A file of terabytes beside nothing: it must not be read to compare the folder."""
    (folder / "bad").mkdir()
    with (folder / "bad" / "data.bin").open("wb") as file:
        file.truncate(2**42)


def _named(name: bytes) -> Make:
    def make(folder: Path) -> None:
        place = os.path.join(os.fsencode(folder), name)
        os.mkdir(place)
        with open(os.path.join(place, b"x.ipynb"), "wb") as file:
            file.write(b"{")

    return make


def _special(kind: str) -> Make:
    def make(folder: Path) -> None:
        (folder / "bad").mkdir()
        path = folder / "bad" / "x.ipynb"
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            place = os.getcwd()
            os.chdir(path.parent)  # the path of a socket is short
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
            os.chdir(place)
        elif kind == "device":
            path.symlink_to("/dev/zero")
        elif kind == "dead link":
            path.symlink_to("nowhere")
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "unreadable":
            path.write_text("{}")
            path.chmod(0)
        elif kind == "link to a folder":
            (path.parent / "more").symlink_to(folder)

    return make


def _top(kind: str) -> Make:
    def make(folder: Path) -> None:
        path = folder / ("bad.ipynb" if kind != "loop of folders" else "bad")
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "dead link":
            path.symlink_to("nowhere")
        else:
            path.mkdir()
            (path / "again").symlink_to(path)

    return make


def _deep(folder: Path) -> None:
    place = os.getcwd()
    os.mkdir(folder / "bad")
    os.chdir(folder / "bad")
    for _ in range(DEEP):
        os.mkdir("deep")
        os.chdir("deep")
    Path("x.ipynb").write_text("{}")
    os.chdir(place)


def _many(folder: Path) -> None:
    (folder / "bad").mkdir()
    for number in range(6000):
        (folder / "bad" / f"{number}.txt").touch()


def _many_notebooks(folder: Path) -> None:
    (folder / "bad").mkdir()
    for number in range(60):
        (folder / "bad" / f"{number}.ipynb").write_text("{}")


def _nested(value: Any, depth: int) -> str:
    text = json.dumps(value)
    return '{"a":' * depth + text + "}" * depth


FILES: dict[str, Make] = {
    "a number of 5,000 digits": _text('{"nbformat": 4, "cells": [], "x": ' + DIGITS + "}"),
    "nbformat of 5,000 digits": _text('{"nbformat": ' + DIGITS + ', "cells": []}'),
    "a fraction of 5,000 digits": _text('{"nbformat": 4, "cells": [], "x": 0.' + DIGITS + "}"),
    "infinite": _text('{"nbformat": 4, "cells": [1e999]}'),
    "not a number": _text('{"nbformat": NaN, "cells": []}'),
    "nested lists": _text("[" * 200_000),
    "nested objects": _text(_nested([], 100_000)),
    "nested in a cell": _text('{"nbformat": 4, "cells": [' + "[" * 5000 + "]" * 5000 + "]}"),
    "bytes": _text(bytes(range(256)) * 20),
    "UTF-16": _text('{"nbformat": 4}'.encode("utf-16")),
    "surrogates": _text('{"nbformat": 4, "cells": ["\ud800"]}'),
    "null bytes": _text(b"\0" * 1000),
    "empty": _text(""),
    "a text": _text('"nbformat"'),
    "null": _text("null"),
    "unreadable": _special("unreadable"),
    "a sparse file": _sparse,
    "a sparse file beside": _sparse_aside,
    "a pipe": _special("fifo"),
    "a socket": _special("socket"),
    "a device": _special("device"),
    "a dead link": _special("dead link"),
    "a link to itself": _special("loop"),
    "a folder named as a notebook": _special("folder"),
    "a link to a folder": _special("link to a folder"),
    "a pipe at the top": _top("fifo"),
    "a folder at the top": _top("folder"),
    "a dead link at the top": _top("dead link"),
    "a loop of folders": _top("loop of folders"),
    "a deep folder": _deep,
    "thousands of files": _many,
    "many notebooks": _many_notebooks,
    "a name that is not UTF-8": _named(b"caf\xe9"),
    "a name with a line break": _named(b"a\nb"),
    "a name with an escape sequence": _named(b"\x1b]0;owned\x07\x1b[2J"),
    "a name that reverses text": _named("a\u202eb".encode()),
    "a long name": _named(b"n" * 250),
    "a name that is a formula": _named(b"=cmd|' !A0"),
}  # fmt: skip


def schema_faults() -> Iterator[tuple[str, Make]]:
    """JSON of every type where a notebook has something else."""
    values: list[Any] = [None, True, 7, -1.5, "text", [], {}, [[]], [{}], [None], "\ud800"]
    for value in values:
        yield f"nbformat {value!a}", _book(nbformat=value, cells=[])
        yield f"cells {value!a}", _book(cells=value)
        for key in ("cell_type", "source", "id", "metadata"):
            cell = {"cell_type": "code", "source": "x", "id": "own", "metadata": {}, key: value}
            yield f"{key} {value!a}", _book(cells=[cell])
        marks = {"metadata": {"nbgrader": value}}
        yield f"nbgrader {value!a}", _book(cells=[{"cell_type": "code", **marks}])
        marks = {"metadata": {"nbgrader": {"grade_id": value}}}
        yield f"grade_id {value!a}", _book(cells=[{"cell_type": "code", **marks}])


BAD: dict[str, Make] = {**FILES, **dict(schema_faults())}
