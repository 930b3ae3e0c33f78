r"""Text that learners chose, made fit to be written: names, notes, sources, outputs, file names.

A name may hold bytes that are not UTF-8, a line break, an escape sequence for the terminal, or a
sign that reverses the text after it. A source may hold half a surrogate pair, which no file in
UTF-8 can. Nothing of that may end the grading or deceive who reads the results. So such characters
are replaced by their escapes, as in "caf\udce9": different names stay different.

`PageNames` gives each feedback page a path that no other page has, on any file system: without case
and in every Unicode form, without names that Windows reserves.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath

SURROGATE = "\ud800-\udfff"
CONTROL = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
LINES = "\t\n\r\u2028\u2029"
DECEIVING = "\u200b\u2060\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ufff9-\ufffb"
UNWRITABLE = re.compile(f"[{CONTROL}{SURROGATE}\ufffe\uffff]")
NOT_IN_A_LINE = re.compile(f"[{CONTROL}{SURROGATE}{LINES}{DECEIVING}\ufffe\uffff]")
NOT_IN_A_PATH = re.compile(r'[/\\:*?"<>|\x00-\x1f]')
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
LONGEST_NAME = 100  # bytes of one part of a path; file systems allow 255
LONGEST_LINE = 500  # characters


def writable(text: str) -> str:
    """Text that can be written as UTF-8 and shown: escapes for control characters but no lines."""
    return UNWRITABLE.sub(_escaped, text)


def one_line(text: str, longest: int = LONGEST_LINE) -> str:
    """The same in one line, and not longer than `longest` characters."""
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    return NOT_IN_A_LINE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def path_part(text: str) -> str:
    """Text as the name of a file or folder; two texts may become the same name."""
    plain = NOT_IN_A_PATH.sub("_", one_line(unicodedata.normalize("NFC", text)))
    plain = plain.encode()[:LONGEST_NAME].decode(errors="ignore").strip(" .")
    return f"_{plain}" if not plain or RESERVED.fullmatch(plain) else plain


class PageNames:
    """Paths of pages, each given once."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}
        self._taken: set[str] = set()

    def path(self, student: str, page: str) -> PurePosixPath:
        """The path of a new page in the folder of a student."""
        if student not in self._folders:
            self._folders[student] = self._unused("", path_part(student), "")
        folder = self._folders[student]
        return PurePosixPath(folder, self._unused(folder, path_part(page), ".html"))

    def _unused(self, folder: str, name: str, ending: str) -> str:
        number, chosen = 1, name
        while (key := _key(f"{folder}/{chosen}{ending}")) in self._taken:
            number += 1
            chosen = f"{name} ({number})"
        self._taken.add(key)
        return chosen + ending


def _key(path: str) -> str:
    """The same for all paths that some file system takes for one."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold())
