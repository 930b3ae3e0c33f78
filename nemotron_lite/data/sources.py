"""The named sources of text on this machine: what the shipped lite model is trained on.

Everybody who installs this project has the same text: Python's standard library and the packages
that the project depends on. Four sources come from it:

    standard library source    what `load_corpus` reads
    packages: source           .py files of the packages
    packages: documentation    .md, .rst and .txt files, and the description in the metadata
    docstrings                 docstrings of the packages, without the code

Only files that a package's own RECORD lists are read. Left out are, with the reason:

    test, tests, ...           tests repeat themselves, as in `load_corpus`
    _vendor, ...               copies of other packages, which may have another licence
    licences, requirements     the same text in every package
    tables                     a line of more than 1,000 characters, or a quarter of digits
    long files                 more than 256 KiB: most are generated
    duplicates                 `duplicates.py`: the same document, or most of its lines
    copies of held-out files   a fifth of the lines is enough

A large package would be most of the text: torch, transformers and sympy have 125 MB of code. So a
package gives at most `SOURCE_LIMIT` bytes of source. Its files are taken in the order of a hash of
their names, which is a sample of all its parts. Docstrings are taken in the opposite order. Those
of a large package then come from files that are not in its sample.

Left out: judging the quality of a text.
"""

from __future__ import annotations

import ast
import hashlib
import os
import platform
import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata

from nemotron_lite.data.corpus import Corpus, Document
from nemotron_lite.data.duplicates import SeenText
from nemotron_lite.input_files import FileError, read_bytes

STANDARD_LIBRARY = "standard library source"
PACKAGES = "packages: source"
DOCUMENTATION = "packages: documentation"
DOCSTRINGS = "docstrings"
SOURCES = (STANDARD_LIBRARY, PACKAGES, DOCUMENTATION, DOCSTRINGS)

PYTHON = "python"  # the name of the standard library in a list of packages
SOURCE_LIMIT = 2 << 20  # bytes of source of one package
TEXT_LIMIT = 512 << 10  # bytes of documentation, and of docstrings, of one package
LONGEST_FILE = 256 << 10
LONGEST_LINE = 1000
MOST_DIGITS = 0.25  # share of the characters that are no spaces
HELD_OUT_LINES = 0.2  # share of lines that makes a copy of a held-out file
KNOWN_LINES = 0.5  # share of lines that makes a duplicate
SHORTEST_TEXT = 200  # bytes

SKIPPED_FOLDERS = frozenset(
    {
        "test", "tests", "testing", "__pycache__", "_vendor", "_vendored", "vendor", "vendored",
        "third_party", "externals", "extern", "node_modules", "licenses",
    }
)  # fmt: skip
_SKIPPED_TEXTS = re.compile(
    r"licen[cs]e|copying|notice|authors|third.?party|requirements|top_level|entry_points|sources"
    r"|cmakelists|robots|constraints|unimathsymbols",
    re.IGNORECASE,
)
_DOCUMENTATION = (".md", ".rst", ".txt")
_NUMBERS = re.compile(rb"0[xX][0-9a-fA-F]+|[0-9]")
_SHORTEST_DOCSTRING = 40  # characters: shorter ones repeat the name of the function


@dataclass
class PackageText:
    """What one package gives to one source."""

    name: str
    version: str
    licence: str
    documents: list[Document] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Size of all documents."""
        return sum(len(document.content) for document in self.documents)

    def sha256(self) -> str:
        """Over the names and contents of all documents."""
        digest = hashlib.sha256()
        for document in self.documents:
            content = hashlib.sha256(document.content).hexdigest()
            digest.update(f"{document.name}\n{content}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


@dataclass(frozen=True)
class LeftOut:
    """A document that is not trained on, because held-out files have its lines."""

    source: str
    name: str
    share: float


@dataclass
class FoundSources:
    """The texts of this machine.

    Attributes:
        sources: name of a source, and what each package gives to it; packages without a document
            are listed too.
        missing: packages that are not installed.
        near_copies: documents that were left out because they repeat held-out files.
    """

    sources: dict[str, list[PackageText]]
    missing: list[str] = field(default_factory=list)
    near_copies: list[LeftOut] = field(default_factory=list)

    def documents(self, source: str) -> list[Document]:
        """All documents of a source."""
        return [document for package in self.sources[source] for document in package.documents]


def read_sources(corpus: Corpus, packages: Collection[str]) -> FoundSources:
    """Read every source from this machine, without duplicates and without anything held out.

    Args:
        corpus: the standard library, with its held-out part.
        packages: names of distributions. They are read in alphabetical order, whatever order is
            given: of two copies of a text the first one counts, so the order decides the result.
    """
    found = FoundSources({name: [] for name in SOURCES})
    held_out, code, prose = SeenText(d.content for d in corpus.held_out), SeenText(), SeenText()
    library = PackageText(PYTHON, platform.python_version(), "PSF-2.0")
    # The standard library stays complete: its own files may have lines in common.
    read = _Filter(STANDARD_LIBRARY, held_out, code, 2.0, found.near_copies)
    library.documents = read.take(corpus.train, sum(len(d.content) for d in corpus.train))
    found.sources[STANDARD_LIBRARY].append(library)
    for name in sorted(set(packages)):
        try:
            distribution = metadata.distribution(name)
        except (metadata.PackageNotFoundError, ValueError):
            found.missing.append(name)
            continue
        listed = _listed(distribution)
        for source, documents, seen, limit in (
            (PACKAGES, _source_files(name, listed), code, SOURCE_LIMIT),
            (DOCUMENTATION, _documentation(name, listed, distribution), prose, TEXT_LIMIT),
            (DOCSTRINGS, _docstrings(_source_files(name, listed[::-1])), prose, TEXT_LIMIT),
        ):
            text = PackageText(name, distribution.version, licence(distribution))
            read = _Filter(source, held_out, seen, KNOWN_LINES, found.near_copies)
            text.documents = read.take(documents, limit)
            found.sources[source].append(text)
    return found


@dataclass(frozen=True)
class _Filter:
    """Takes the documents of one package for one source."""

    source: str
    held_out: SeenText
    seen: SeenText
    most_known: float
    near_copies: list[LeftOut]

    def take(self, documents: Iterable[Document], limit: int) -> list[Document]:
        """New documents in their order, until the next one does not fit."""
        found: list[Document] = []
        total = 0
        for document in documents:
            content = document.content
            share = 1.0 if self.held_out.has(content) else self.held_out.share_of_lines(content)
            if share > HELD_OUT_LINES:
                self.near_copies.append(LeftOut(self.source, document.name, round(share, 3)))
                continue
            if self.seen.has(content) or self.seen.share_of_lines(content) > self.most_known:
                continue
            total += len(content)
            if total > limit:
                break
            self.seen.add(content)
            found.append(document)
        return found


def licence(distribution: metadata.Distribution) -> str:
    """The licence in a package's metadata: an SPDX expression, its classifiers, or a text."""
    about = distribution.metadata
    classifiers = [
        line.split("::")[-1].strip()
        for line in about.get_all("Classifier") or []
        if line.startswith("License ::")
    ]
    (expression,) = (about.get_all("License-Expression") or [""])[:1]
    (text,) = (about.get_all("License") or [""])[:1]
    first_line = text.strip().partition("\n")[0][:60]
    return expression or ", ".join(classifiers) or first_line or "not stated"


def _listed(distribution: metadata.Distribution) -> list[metadata.PackagePath]:
    """The files of a package in the order of a hash of their names; none outside its folder."""
    files = [
        path
        for path in distribution.files or []
        if not path.is_absolute()
        and ".." not in path.parts
        and not SKIPPED_FOLDERS.intersection(path.parts[:-1])
    ]
    return sorted(files, key=lambda path: hashlib.sha256(os.fsencode(path.as_posix())).digest())


def _source_files(package: str, listed: Sequence[metadata.PackagePath]) -> Iterator[Document]:
    for path in listed:
        if path.suffix == ".py":
            yield from _document(package, path)


def _documentation(
    package: str, listed: Sequence[metadata.PackagePath], distribution: metadata.Distribution
) -> Iterator[Document]:
    described = distribution.read_text("METADATA") or ""
    description = described.partition("\n\n")[2].encode("utf-8", "surrogateescape")
    if len(description) >= SHORTEST_TEXT and not _is_table(description):
        yield Document(f"{package}/METADATA", description)
    for path in listed:
        if path.suffix.lower() in _DOCUMENTATION and not _SKIPPED_TEXTS.search(path.name):
            yield from _document(package, path)


def _document(package: str, path: metadata.PackagePath) -> Iterator[Document]:
    """The file as a document, or nothing."""
    try:
        content = read_bytes(path.locate(), limit=LONGEST_FILE)
        content.decode("utf-8")
    except (FileError, FileNotFoundError, UnicodeDecodeError):
        return
    if len(content) >= SHORTEST_TEXT and b"\0" not in content and not _is_table(content):
        yield Document(f"{package}/{path.as_posix()}", content)


def _is_table(content: bytes) -> bool:
    """Whether a file is data rather than text."""
    if max(map(len, content.split(b"\n"))) > LONGEST_LINE:
        return True
    characters = len(content) - sum(content.count(space) for space in (b" ", b"\n", b"\t", b"\r"))
    return sum(map(len, _NUMBERS.findall(content))) > MOST_DIGITS * characters


def _docstrings(sources: Iterable[Document]) -> Iterator[Document]:
    """The docstrings of each module as one document: of the module, its classes and functions."""
    for document in sources:
        try:
            with warnings.catch_warnings():  # invalid escapes in strings
                warnings.simplefilter("ignore")
                tree = ast.parse(document.content)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        pieces = []
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= _SHORTEST_DOCSTRING:
                    pieces.append(text)
        content = ("\n\n".join(dict.fromkeys(pieces)) + "\n").encode("utf-8", "replace")
        if len(content) >= SHORTEST_TEXT and not _is_table(content):
            yield Document(document.name, content)
