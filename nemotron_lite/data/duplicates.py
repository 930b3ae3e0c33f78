"""Duplicates and near copies, so that nothing is read twice and nothing held out is trained on.

Packages carry copies of each other and of the standard library: setuptools has its own distutils, a
model of transformers repeats the code of another. A changed copy has another checksum. So two tests
are made:

    content      the SHA-256 of a document is known already
    lines        a large part of its lines stand in documents that are known already

Only lines of at least 30 characters count, without the spaces around them. Shorter ones, such as
`return None`, are the same everywhere. A line counts once for each time it stands in the document.

Source: line-level duplicates as in CCNet (Wenzek et al. 2019). Left out: near copies with renamed
variables, for which MinHash over shingles of words is the usual test.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

SHORTEST_LINE = 30  # characters


class SeenText:
    """The checksums and the long lines of documents."""

    def __init__(self, documents: Iterable[bytes] = ()) -> None:
        self._documents: set[bytes] = set()
        self._lines: set[int] = set()
        for document in documents:
            self.add(document)

    def add(self, document: bytes) -> None:
        """Remember a document."""
        self._documents.add(hashlib.sha256(document).digest())
        self._lines.update(_long_lines(document))

    def has(self, document: bytes) -> bool:
        """Whether this exact document was added."""
        return hashlib.sha256(document).digest() in self._documents

    def share_of_lines(self, document: bytes) -> float:
        """Which part of the long lines of a document is known; 0 for a document without any."""
        lines = _long_lines(document)
        return sum(line in self._lines for line in lines) / len(lines) if lines else 0.0


def _long_lines(document: bytes) -> list[int]:
    """The hash of every long line, in 64 bits: of a hundred million, few would collide."""
    return [
        int.from_bytes(hashlib.blake2b(line, digest_size=8).digest())
        for line in map(bytes.strip, document.split(b"\n"))
        if len(line) >= SHORTEST_LINE
    ]
