"""Names and texts of learners can be written anywhere, and no two entries share a page."""

from __future__ import annotations

import json
import os
import random
import unicodedata

import pytest

from nemotron_lite.coursework.texts import PageNames, one_line, path_part, writable

ODD = [
    os.fsdecode(b"caf\xe9"), "a\nb", "a\x00b", "\x1b]0;title\x07", "\ud800", "\udc00x", "a\u202eb",
    "\x85", "\u2028", "\ufeffbom", "a\rb", "tab\t", "\x9b31m", "\uffff",
]  # fmt: skip


@pytest.mark.parametrize("text", ODD, ids=map(ascii, ODD))
def test_odd_characters_become_escapes(text: str) -> None:
    made = one_line(text)
    assert made.isprintable()
    made.encode()
    assert made != text
    assert len(made.splitlines()) == 1
    writable(text).encode()


def test_any_text_can_be_written() -> None:
    random.seed(3)
    for _ in range(300):
        text = "".join(chr(random.choice((random.randrange(256), random.randrange(0x11000))))
                       for _ in range(20))  # fmt: skip
        for made in (one_line(text), writable(text), path_part(text)):
            assert json.loads(json.dumps(made, ensure_ascii=False).encode()) == made
        assert "\x1b" not in writable(text)


def test_different_names_stay_different_and_lines_short() -> None:
    assert len({one_line(text) for text in ODD}) == len(ODD)
    assert len(one_line("x" * 10_000)) == 500
    assert writable("é ✓ \t\n日本") == "é ✓ \t\n日本"


NAMES = [
    "ann", "Ann", "ANN", "ann.", "ann ", " ann", "an\u0303n", "a\u00f1n", "\uff41nn", "a/nn",
    "a\\nn", "a:nn", "a*nn", "..", ".", "", "con", "CON", "con.html", "aux", "nul", "lpt1", "ß",
    "ss", "ﬁ", "fi", "x" * 300, "x" * 301, "é" * 200, "\x00", "\ud800", "a\nnn", "<b>", "ann (2)",
    "../ann",
]  # fmt: skip


def key(path: str) -> str:
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", path).casefold())


def test_no_two_entries_share_a_page() -> None:
    names = PageNames()
    paths = [names.path(student, page) for student in NAMES for page in ("chapter_01", *NAMES[:8])]
    assert len({key(str(path)) for path in paths}) == len(paths)
    for path in paths:
        assert len(path.parts) == 2
        for part in path.parts:
            assert len(part.encode()) < 200
            assert part not in (".", "..")
            assert not set(part) & set('/\\:*?"<>|\0\n')
            assert not part.endswith((" ", "."))
            assert part.partition(".")[0].lower() not in ("con", "aux", "nul", "lpt1")


def test_pages_of_one_student_are_together_and_plain_names_stay() -> None:
    names = PageNames()
    assert str(names.path("ann", "chapter_01")) == "ann/chapter_01.html"
    assert str(names.path("Ann", "chapter_01")) == "Ann (2)/chapter_01.html"
    assert str(names.path("ann", "chapter_02")) == "ann/chapter_02.html"
    assert str(names.path("ann", "chapter_01")) == "ann/chapter_01 (2).html"
    assert str(names.path("Ann", "chapter_02")) == "Ann (2)/chapter_02.html"
