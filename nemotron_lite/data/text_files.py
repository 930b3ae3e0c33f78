"""Finding and reading the files of a text, in folders that nobody has prepared for it.

A folder of source code holds more than readable files: the lock of an editor (a link to nothing), a
named pipe, a file of another user, a file that is deleted while the folder is read. None of them
may end a run, or let it wait for ever. What cannot be read is left out and counted by kind, and the
caller says so in one line.

    found = read_folder(Path("src"), (".py",))
    found.files        [("a.py", b"..."), ("pkg/b.py", b"...")], in the order of the names
    found.skipped      {"links to nothing": 1, "files that are not UTF-8": 2}

A link to a regular file is read, wherever the file is; links to folders are not followed, so a
folder that links to itself ends. Names need not be UTF-8: Python keeps such bytes as surrogates,
and `os.fsencode` gives them back.

Left out: compressed files, and files of other encodings (convert them with iconv).
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from nemotron_lite.data.jsonl import read_jsonl
from nemotron_lite.input_files import LIMIT, FileError, read_bytes

TEXT_LIMIT = 1 << 30  # bytes of a whole text; all of it is held in memory
JSONL = ".jsonl"


class TextTooLargeError(ValueError):
    """A text of more than `TEXT_LIMIT` bytes."""


@dataclass
class FoundText:
    """What was read.

    Attributes:
        files: name and content (UTF-8) of each text, sorted by name. A file of JSON Lines gives one
            text a line, with the number of the line in its name.
        skipped: how many files, links, folders and lines were left out, by kind.
        text_field: the field of a JSON Lines object that is read.
    """

    files: list[tuple[str, bytes]] = field(default_factory=list)
    skipped: dict[str, int] = field(default_factory=dict)
    text_field: str = "text"

    def skip(self, kind: str, count: int = 1) -> None:
        """Count something that was left out."""
        self.skipped[kind] = self.skipped.get(kind, 0) + count


def read_folder(
    folder: Path,
    suffixes: Collection[str],
    *,
    skipped_folders: Collection[str] = (),
    text_field: str = "text",
) -> FoundText:
    """Every usable file below a folder; of files with the same content, the first by name.

    Empty files and second copies are passed over without being counted.

    Args:
        suffixes: endings of the names that are read.
        skipped_folders: names of folders that are not entered.
        text_field: the field of the objects in JSON Lines files that is read.

    Raises:
        TextTooLargeError: more than `TEXT_LIMIT` bytes in all.
    """
    found = FoundText(text_field=text_field)
    seen: set[bytes] = set()
    total = 0
    for name, path in sorted(_walk(folder, tuple(suffixes), skipped_folders, found)):
        for text_name, content in _read(name, path, found):
            identity = hashlib.sha256(content).digest()
            if identity in seen:
                continue
            seen.add(identity)
            total += len(content)
            if total > TEXT_LIMIT:
                raise TextTooLargeError(
                    f"{folder} has more than {TEXT_LIMIT:,} bytes of text: give a part of it."
                )
            found.files.append((text_name, content))
    return found


def read_file(path: Path, *, text_field: str = "text") -> FoundText:
    """One file as a text; a file of JSON Lines as one text a line.

    Raises:
        FileNotFoundError: there is no such file.
        FileError: not a regular file, too large, not readable, binary or not UTF-8.
    """
    found = FoundText(text_field=text_field)
    if path.suffix == JSONL:
        found.files = _jsonl_lines(path.name, path, found)
        return found
    content = read_bytes(path, limit=TEXT_LIMIT)
    fault = _not_text(content)
    if fault:
        raise FileError(path, f"is no text in UTF-8 ({fault})")
    if content:
        found.files.append((path.name, content))
    return found


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """`links to nothing (2), files that are not UTF-8 (1)`, for a message."""
    return ", ".join(f"{kind} ({count:,})" for kind, count in sorted(skipped.items()))


def _walk(
    folder: Path, suffixes: tuple[str, ...], skipped_folders: Collection[str], found: FoundText
) -> Iterator[tuple[str, Path]]:
    """Name below the folder and path of every entry with one of the suffixes.

    A loop instead of recursion: a folder may be nested deeper than Python's calls may be.
    """
    waiting = [("", str(folder))]
    while waiting:
        prefix, parent = waiting.pop()
        try:
            with os.scandir(parent) as listing:
                entries = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in listing]
        except OSError:
            found.skip("folders that cannot be read")
            continue
        for entry_name, is_folder in entries:
            path = os.path.join(parent, entry_name)
            if is_folder:
                if entry_name not in skipped_folders:
                    waiting.append((f"{prefix}{entry_name}/", path))
            elif entry_name.endswith(suffixes):
                yield prefix + entry_name, Path(path)


def _read(name: str, path: Path, found: FoundText) -> list[tuple[str, bytes]]:
    """The texts of one file, or none and one more count of what was left out."""
    try:
        status = os.stat(path)
    except OSError:
        if path.is_symlink():
            found.skip("links to nothing")
        else:
            found.skip("files that cannot be read")
        return []
    if stat.S_ISDIR(status.st_mode):
        return []  # a link to a folder
    if not stat.S_ISREG(status.st_mode):
        found.skip("pipes, sockets or devices")
    elif status.st_size > LIMIT:
        found.skip(f"files above {LIMIT >> 20} MiB")
    else:
        try:
            if path.suffix == JSONL:
                return _jsonl_lines(name, path, found)
            content = read_bytes(path)
        except (FileError, FileNotFoundError):
            found.skip("files that cannot be read")
            return []
        fault = _not_text(content)
        if fault:
            found.skip(fault)
        elif content:
            return [(name, content)]
    return []


def _jsonl_lines(name: str, path: Path, found: FoundText) -> list[tuple[str, bytes]]:
    text = read_jsonl(path, text_field=found.text_field)
    for reason, count in text.skipped.items():
        found.skip(f"lines {reason}", count)
    return [(f"{name}:{number}", document.encode()) for number, document in text.documents]


def _not_text(content: bytes) -> str:
    """The kind of files that are not usable as text to which this one belongs; "" for a text."""
    if b"\0" in content:
        return "binary files"
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return "files that are not UTF-8"
    return ""
