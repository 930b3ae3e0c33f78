"""Packages that are made for a test: files, metadata and a RECORD, as pip leaves them."""

from __future__ import annotations

import random
from pathlib import Path

from nemotron_lite.data.corpus import Corpus, Document


def code(seed: int, lines: int = 60) -> str:
    """Lines of Python that no other seed has."""
    return "".join(
        f"value_of_{word} = compute_the_next_value_of({word!r})\n" for word in _words(seed, lines)
    )


def prose(seed: int) -> str:
    """A paragraph that no other seed has."""
    return "".join(f"The {word} is described in the chapter of it.\n" for word in _words(seed, 9))


def _words(seed: int, count: int) -> list[str]:
    choose = random.Random(seed)
    return [f"{_name(seed)}_{''.join(choose.choices('abcdefgh', k=8))}" for _ in range(count)]


def _name(seed: int) -> str:
    return "".join("abcdefghij"[int(digit)] for digit in str(seed))


def install(
    place: Path, name: str, files: dict[str, str], *, version: str = "1.5", readme: str = ""
) -> None:
    """Put a package into a folder that is on `sys.path`."""
    for path, content in files.items():
        target = place / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)
    about = place / f"{name}-{version}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    (about / "METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\nLicense-Expression: MIT\n\n"
        + readme
    )
    (about / "RECORD").write_text("".join(f"{path},,\n" for path in files))


def corpus_of(count: int) -> Corpus:
    """A standard library of a few files, and one that is held out."""
    train = tuple(Document(f"m{i}.py", code(1000 + i).encode()) for i in range(count))
    return Corpus(train, (Document("held.py", code(2000).encode()),))
