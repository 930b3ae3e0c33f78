"""Plain words: no private metaphor in docstrings, comments, messages and Markdown pages.

Readers are engineers, most of them not native speakers of English. A term from papers or from
PyTorch is understood at the first reading; a picture of our own is a riddle. The list holds
metaphors that this repository once used, each with the words to write instead. Chapters' own text
and names in the code are not searched.
"""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("nemotron_lite", "kernels", "benchmarks", "tests")

# What is found, in any case → what to write.
BANNED = {
    r"\bdice\b": "random numbers, or the random stream",
    r"\b(?:front |back )?doors?\b": "function, entry point, interface",
    r"\brooms?\b(?! for\b| to\b)": "file, folder or package",
    r"\bthe house\b|\bhouse (?:rules?|tests?|style)\b": "the project, the repository",
    r"\bthe town\b": "the repository",
    r"(?<!scaling\s)(?<!power\s)\blaws?\b": "distribution, or rule",
    r"\bby chance\b": "at random, by stochastic rounding",
    r"\bfill(?:ed|ing|s)? up\b": "padded",
    r"\bturn(?:ed|ing|s)? over\b": "name the operation: flipped, transposed, reversed",
    r"\bat home\b": "say where it runs, or what it supports",
    r"\bpaper gpu\b": "simulated GPU",
    r"\bpacked (?:documents?|sequences?)\b": "concatenated documents; packed is four-bit storage",
    r"\b(?:de|re|un)?quantis\w+": "quantize, with z",
}
# Words may stand on two lines.
PATTERN = re.compile("|".join(f"({words})" for words in BANNED).replace(" ", r"\s+"), re.I)

# Folders and files that still hold such words.
PENDING: tuple[str, ...] = ()

SKIPPED = {"tests/project/test_words.py"}


def prose(source: str) -> list[tuple[int, str]]:
    """Comments and string literals of Python code, with their line; f-strings included."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [(token.start[0], token.string) for token in tokens if token.type in kinds]


def banned(pieces: list[tuple[int, str]]) -> list[str]:
    """Every banned word with its line and the words to write instead."""
    found = []
    for first, text in pieces:
        for match in PATTERN.finditer(text):
            instead = list(BANNED.values())[match.lastindex - 1]
            line = first + text.count("\n", 0, match.start())
            found.append(f"line {line}: {match[0]!r}; write: {instead}")
    return found


def pages() -> list[Path]:
    """Python files and Markdown pages, found by folder so that .venv is never walked."""
    found = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    found += [ROOT / "exercises" / "README.md", ROOT / "notebooks" / "README.md"]
    for folder in FOLDERS:
        found += [p for kind in ("*.py", "*.md") for p in (ROOT / folder).rglob(kind)]
    return sorted(p for p in found if str(p.relative_to(ROOT)) not in SKIPPED)


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_words_are_plain(page: Path) -> None:
    if str(page.relative_to(ROOT)).startswith(PENDING):
        pytest.skip("not clean yet")
    text = page.read_text()
    assert banned(prose(text) if page.suffix == ".py" else [(1, text)]) == []


@pytest.mark.parametrize(
    "code",
    [
        "# Each row has its own dice.", '"""The only door to attention."""', "'one room each'",
        'f"{n} rows were filled up"', '"""A law of tokens."""', "x = 1  # Quantised weights",
        '"""Numbers that are filled\n    up to 16."""', "# drawn by chance",
    ],
)  # fmt: skip
def test_a_banned_word_is_found(code: str) -> None:
    assert len(banned(prose(code))) == 1


def test_the_line_and_the_remedy_are_named() -> None:
    assert banned([(3, "Good.\nThrow dice.")]) == [
        "line 4: 'dice'; write: random numbers, or the random stream"
    ]


@pytest.mark.parametrize(
    "code",
    [
        "# headroom, outdoor, lawn, indices", "# a scaling law", "# leaves room for a reason",
        "'Dropout, quantized'", "# the home directory", "law = doors = 1", "class Law: pass",
    ],
)  # fmt: skip
def test_other_words_and_names_pass(code: str) -> None:
    assert banned(prose(code)) == []
