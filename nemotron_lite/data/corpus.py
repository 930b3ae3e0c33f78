"""The text: the source code of the Python standard library, which every reader already has.

A course that starts with a download does not work without a network. The standard library is about
twelve megabytes of commented code by many authors. It is on every machine that can run this
package, and a small model soon writes lines that look like it.

What is read: every `.py` file below the interpreter's `stdlib` path, as raw bytes, in the order of
the paths. What is left out, and why:

    site-packages, dist-packages   other people's code, different on every machine
    test, tests, idlelib, ...      tests repeat themselves; a model learns the repetition
    encodings, pydoc_data          generated tables and manual pages, not source
    files that are not UTF-8, files of the same content as an earlier one

A text of one's own is a folder, one file, or a file of JSON Lines (`jsonl.py`). Of a folder, the
`.py` files are read; if it has none, its `.txt`, `.md` and `.jsonl` files. What cannot be read is
left out, counted, and named in one line of the log (`text_files.py`).

The held-out split is by document. Documents are ordered by a hash of their name; the first of them,
until their sizes add up to `held_out_bytes`, are never trained on. A document above 32 KiB is not
eligible, so that no single one decides the score. The split depends on names and sizes and on no
random number. A source file is one document. Other texts, which may be whole books, are cut at line
ends into documents of at most 32 KiB.

Left out: checks of licence and provenance, near-duplicate removal, and quality filters. A real
pre-training corpus needs all of them.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import SupportsIndex

from nemotron_lite.arguments import integer
from nemotron_lite.data.text_files import (
    TEXT_LIMIT,
    FoundText,
    TextTooLargeError,
    describe_skipped,
    read_file,
    read_folder,
)
from nemotron_lite.input_files import FileError

_log = logging.getLogger(__name__)

SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idlelib",
        "idle_test",
        "encodings",
        "pydoc_data",
        "lib2to3",
        "ensurepip",
        "lib-dynload",
    }
)
LARGEST_HELD_OUT_FILE = 32 * 1024  # bytes
SOURCE = (".py",)
OWN_TEXT = (".txt", ".md", ".jsonl")


class CorpusError(RuntimeError):
    """The text cannot be read. The message names the folder and says what to do."""


@dataclass(frozen=True)
class Document:
    """One text: its path below the corpus root, with forward slashes, and its bytes (UTF-8)."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Corpus:
    """The two disjoint parts of the split, each in the order of the file names.

    `skipped` says how many files could not be read, by kind.
    """

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def train_bytes(self) -> int:
        """Size of all training files."""
        return sum(len(document.content) for document in self.train)

    @property
    def held_out_bytes(self) -> int:
        """Size of all held-out files."""
        return sum(len(document.content) for document in self.held_out)

    def fingerprint(self) -> str:
        """SHA-256 over the name, size, content and split of every file. It identifies the text."""
        digest = hashlib.sha256()
        for split in (self.train, self.held_out):
            digest.update(f"{len(split)}\n".encode())
            for document in split:
                digest.update(os.fsencode(document.name))
                digest.update(f"\n{len(document.content)}\n".encode())
                digest.update(document.content)
        return digest.hexdigest()


def load_corpus(
    root: str | Path | None = None,
    *,
    held_out_bytes: SupportsIndex = 192 * 1024,
    text_field: str = "text",
    held_out_names: Collection[str] | None = None,
) -> Corpus:
    """Read the corpus and split it.

    Args:
        root: a folder, a text file, or a `.jsonl` file; the standard library of this interpreter by
            default.
        held_out_bytes: smallest size of the held-out text; the document that reaches it is the
            last.
        text_field: the field of the objects in JSON Lines files that holds the text.
        held_out_names: the documents to hold out, in place of `held_out_bytes`: those of a model
            that was trained elsewhere. Names that are not here are left out.

    Raises:
        CorpusError: `root` does not exist or cannot be read, or holds too little text for both
            parts, or more than 1 GiB; or none of the named documents.
        TypeError, ValueError: `root` is no path, or `held_out_bytes` no number from 0 to 1 GiB.
    """
    wanted = integer("held_out_bytes", held_out_bytes, low=0, high=TEXT_LIMIT)
    if root is not None and not isinstance(root, str | os.PathLike):
        raise TypeError(f"root is {type(root).__name__}: expected the path of a folder or a file.")
    if not isinstance(text_field, str):
        raise TypeError(f"text_field is {type(text_field).__name__}: expected a text.")
    place = Path(root) if root is not None else Path(sysconfig.get_path("stdlib"))
    found, documents = _read(place, text_field)
    left_out = describe_skipped(found.skipped)
    if left_out and root is not None:
        _log.warning("%s: left out of the text: %s.", place, left_out)
    chosen = _held_out_names(documents, wanted) if held_out_names is None else {*held_out_names}
    train = tuple(d for d in documents if d.name not in chosen)
    held_out = tuple(d for d in documents if d.name in chosen)
    corpus = Corpus(train, held_out, found.skipped)
    if held_out_names is not None:
        if not held_out or not train:
            raise CorpusError(
                f"{place} has {len(held_out)} of the {len(chosen)} files to hold out, and "
                f"{len(train)} others: expected some of both."
            )
        return corpus
    if corpus.held_out_bytes < wanted or corpus.train_bytes < 2 * wanted:
        total = corpus.train_bytes + corpus.held_out_bytes
        raise CorpusError(
            f"{place} has only {total:,} bytes in {len(documents)} usable files"
            f"{f' (left out: {left_out})' if left_out else ''}. Expected {wanted:,} held-out bytes "
            "and at least twice as many to train on: give a larger root= or a smaller "
            "held_out_bytes=."
        )
    return corpus


def _read(place: Path, text_field: str) -> tuple[FoundText, list[Document]]:
    """What is at a path, and its documents."""
    try:
        mode = os.stat(place).st_mode
        if not stat.S_ISDIR(mode):
            found = read_file(place, text_field=text_field)
            return found, list(_documents(found, whole=()))
        found = read_folder(place, SOURCE, skipped_folders=SKIPPED_FOLDERS, text_field=text_field)
        if not found.files:
            own = read_folder(place, OWN_TEXT, text_field=text_field)
            found = own if own.files else found
        return found, list(_documents(found, whole=SOURCE))
    except FileNotFoundError:
        raise CorpusError(
            f"there is no folder or file {place}: give a folder of .py files, a text file or a "
            ".jsonl file (--text in the shell, root= in Python)."
        ) from None
    except (FileError, TextTooLargeError) as error:
        raise CorpusError(str(error)) from error
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        cause = getattr(error, "strerror", None) or error
        raise CorpusError(f"{str(place)!r} cannot be read ({cause}).") from error


def _documents(found: FoundText, *, whole: tuple[str, ...]) -> Iterator[Document]:
    """The texts as documents; large ones in pieces, except files with an ending in `whole`."""
    for name, content in found.files:
        if len(content) <= LARGEST_HELD_OUT_FILE or (whole and name.endswith(whole)):
            yield Document(name, content)
        else:
            for number, piece in enumerate(_pieces(content)):
                yield Document(f"{name}#{number:06d}", piece)


def _pieces(content: bytes) -> Iterator[bytes]:
    """Cut behind the last line end that fits, or else between two characters."""
    start = 0
    while start < len(content):
        end = start + LARGEST_HELD_OUT_FILE
        if end < len(content):
            line_end = content.rfind(b"\n", start, end) + 1
            if line_end > start:
                end = line_end
            else:
                while content[end] & 0b1100_0000 == 0b1000_0000:  # inside a character
                    end -= 1
        yield content[start:end]
        start = end


def _held_out_names(documents: list[Document], held_out_bytes: int) -> set[str]:
    eligible = [d for d in documents if len(d.content) <= LARGEST_HELD_OUT_FILE]
    eligible.sort(key=lambda d: hashlib.sha256(os.fsencode(d.name)).digest())
    names: set[str] = set()
    total = 0
    for document in eligible:
        if total >= held_out_bytes:
            break
        names.add(document.name)
        total += len(document.content)
    return names
