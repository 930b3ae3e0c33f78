"""Duplicates: the same content, and the share of long lines that is known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nemotron_lite.data.duplicates import SHORTEST_LINE, SeenText

LINES = st.lists(st.integers(0, 60), max_size=40)


def line(number: int) -> bytes:
    return f"    value_{number:03d} = compute_the_value({number})  # of the model".encode()


@given(known=LINES, lines=LINES, short=st.integers(0, 5))
def test_share_of_lines(known: list[int], lines: list[int], short: int) -> None:
    seen = SeenText([b"\n".join(map(line, known)) + b"\nreturn None\n"])
    document = b"\r\n".join([*(line(n).strip() for n in lines), *[b"return None"] * short])
    expected = sum(n in known for n in lines) / len(lines) if lines else 0.0
    assert seen.share_of_lines(document) == expected


def test_the_same_content_is_known_and_another_is_not() -> None:
    seen = SeenText([b"a\n"])
    assert seen.has(b"a\n")
    assert not seen.has(b"a")
    seen.add(b"a")
    assert seen.has(b"a")


def test_lines_count_from_thirty_characters_without_spaces() -> None:
    long, short = b"x" * SHORTEST_LINE, b"x" * (SHORTEST_LINE - 1)
    assert SeenText([long]).share_of_lines(b"  " + long + b"  \n") == 1.0
    assert SeenText([short]).share_of_lines(b"  " + short + b"  \n") == 0.0
