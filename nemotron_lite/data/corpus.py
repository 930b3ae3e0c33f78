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

The held-out split is by file. Files are ordered by a hash of their name; the first of them, until
their sizes add up to `held_out_bytes`, are never trained on. A file above 32 KiB is not eligible,
so that no single file decides the score. The split depends on names and sizes and on no random
number.

Left out: checks of licence and provenance, near-duplicate removal, and quality filters. A real
pre-training corpus needs all of them.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

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


class CorpusError(RuntimeError):
    """The text cannot be read. The message names the folder and says what to do."""


@dataclass(frozen=True)
class Document:
    """One file: its path below the corpus root, with forward slashes, and its bytes (UTF-8)."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Corpus:
    """The two disjoint parts of the split, each in the order of the file names."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]

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
                digest.update(f"{document.name}\n{len(document.content)}\n".encode())
                digest.update(document.content)
        return digest.hexdigest()


def load_corpus(root: str | Path | None = None, *, held_out_bytes: int = 192 * 1024) -> Corpus:
    """Read the corpus and split it.

    Args:
        root: folder of `.py` files; the standard library of this interpreter by default.
        held_out_bytes: smallest size of the held-out text; the file that reaches it is the last.

    Raises:
        CorpusError: `root` does not exist, or holds too little text for both parts.
    """
    folder = Path(root) if root is not None else Path(sysconfig.get_path("stdlib"))
    if not folder.is_dir():
        raise CorpusError(
            f"there is no folder {folder}: give root= (--text) a folder of .py files."
        )
    documents = _read(folder)
    held_out_names = _held_out_names(documents, held_out_bytes)
    train = tuple(d for d in documents if d.name not in held_out_names)
    held_out = tuple(d for d in documents if d.name in held_out_names)
    corpus = Corpus(train, held_out)
    if corpus.held_out_bytes < held_out_bytes or corpus.train_bytes < 2 * held_out_bytes:
        total = corpus.train_bytes + corpus.held_out_bytes
        raise CorpusError(
            f"{folder} has only {total:,} bytes in {len(documents)} usable files. Expected "
            f"{held_out_bytes:,} held-out bytes and at least twice as many to train on: give a "
            "larger root= or a smaller held_out_bytes=."
        )
    return corpus


def _read(folder: Path) -> list[Document]:
    documents = []
    seen: set[bytes] = set()
    for name, path in sorted(_python_files(folder)):
        content = path.read_bytes()
        identity = hashlib.sha256(content).digest()
        if content and identity not in seen and _is_utf8(content):
            seen.add(identity)
            documents.append(Document(name, content))
    return documents


def _python_files(folder: Path) -> list[tuple[str, Path]]:
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if f not in SKIPPED_FOLDERS]
        for file in files:
            if file.endswith(".py"):
                path = Path(parent) / file
                found.append((path.relative_to(folder).as_posix(), path))
    return found


def _is_utf8(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _held_out_names(documents: list[Document], held_out_bytes: int) -> set[str]:
    eligible = [d for d in documents if len(d.content) <= LARGEST_HELD_OUT_FILE]
    eligible.sort(key=lambda d: hashlib.sha256(d.name.encode()).digest())
    names: set[str] = set()
    total = 0
    for document in eligible:
        if total >= held_out_bytes:
            break
        names.add(document.name)
        total += len(document.content)
    return names
