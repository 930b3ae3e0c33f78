"""Stop strings: any cut into tokens, characters of several bytes, several strings, streams."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nemotron_lite import Nemotron, SpeculationOptions, generate, stream
from nemotron_lite.generation.text_rows import StopStrings, TextRow, continuation
from tests.generation.speculative.conftest import SMALL
from tests.generation.text_models import text_model

TEXT = "für value in values: total = total + value  # naïve → 数値, but exact\n"


def _cut(text: str, strings: list[str]) -> tuple[str, str | None]:
    """Character by character: the first stop string that is complete, and what stands before it."""
    for end in range(len(text) + 1):
        ready = [string for string in strings if text[:end].endswith(string)]
        if ready:
            longest = max(ready, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_any_cut_into_pieces_gives_the_same() -> None:
    draw = random.Random(0)
    stopped = 0
    for _ in range(3000):
        text = "".join(draw.choice("ab→") for _ in range(draw.randrange(12)))
        strings = [
            "".join(draw.choice("ab→") for _ in range(draw.randrange(1, 5)))
            for _ in range(draw.randrange(4))
        ]
        expected, found = _cut(text, strings)
        search, given, place = StopStrings(strings), "", 0
        while place < len(text) and search.found is None:
            step = draw.randrange(1, 4)
            given += search.add(text[place : place + step])
            assert expected.startswith(given), "nothing is given that is cut off later"
            # Nothing is held back without a reason: a stop string may begin in it.
            held = text[: place + step][len(given) :]
            assert search.found is not None or not held or any(s.startswith(held) for s in strings)
            place += step
        if search.found is None:
            given += search.end()
        assert (given, search.found) == (expected, found)
        stopped += found is not None
    assert 1000 < stopped < 2500


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return text_model(TEXT, vocab_size=280)


def test_rows_of_tokens(model: Nemotron) -> None:
    """Tokens are bytes and words here, so stop strings end inside tokens and across them."""
    draw, tokenizer = random.Random(1), model.tokenizer
    prompt = tokenizer.encode("für").ids
    for _ in range(300):
        words = [TEXT[i:j] for i, j in (sorted(draw.sample(range(40), 2)) for _ in range(3))]
        tokens = tokenizer.encode("".join(words)).ids
        strings = [word[:3] for word in draw.sample(words, 2) if word] + ["値"]
        row = TextRow(tokenizer, prompt, (), len(tokens), stop_strings=strings)
        pieces = [row.add(token) for token in tokens]
        whole = continuation(tokenizer, prompt, tokens, ())
        expected, found = _cut(whole, strings)
        assert "".join(pieces) == row.text == expected
        assert row.stop_string == found


def test_bytes_that_are_no_characters(model: Nemotron) -> None:
    """A random model writes them; the text is that of the tokenizer all the same."""
    draw = random.Random(2)
    for _ in range(100):
        tokens = [draw.randrange(3, 280) for _ in range(12)]
        row = TextRow(model.tokenizer, [5], (), len(tokens), stop_strings=["~~~"])
        joined = "".join(row.add(token) for token in tokens)
        assert joined == continuation(model.tokenizer, [5], tokens, ())


@pytest.mark.parametrize("speculation", [None, SpeculationOptions(draft_length=3, adaptive=False)])
def test_generate_and_stream(model: Nemotron, speculation: SpeculationOptions | None) -> None:
    kind: dict[str, Any] = dict(
        temperature=1.2, top_p=None, seed=4, stop=(), speculation=speculation
    )
    prompts = ["für value", "total", "in"]
    free = generate(model, prompts, 25, return_details=True, **kind)
    strings = [free[0].text[5:7], free[1].text[8:9]]
    found = generate(model, prompts, 25, stop_strings=strings, return_details=True, **kind)
    for row, whole in zip(found, free, strict=True):
        text, string = _cut(whole.text, strings)
        assert row.text == text and row.stop == string
        assert row.stop_reason == ("length" if string is None else "stop_string")
        assert row.tokens == whole.tokens[: len(row.tokens)]
        if string is not None:  # the last token is the one that completes it
            before = continuation(model.tokenizer, [], row.tokens[:-1], ())
            assert string not in before.replace("�", "")
    assert any(row.stop_reason == "stop_string" for row in found)
    assert generate(model, prompts, 25, stop_strings=strings, **kind) == [r.text for r in found]
    steps = list(stream(model, prompts, 25, stop_strings=strings, **kind))
    assert ["".join(row) for row in zip(*steps, strict=True)] == [r.text for r in found]
    ids = [model.tokenizer.encode(prompt).ids for prompt in prompts]
    assert generate(model, ids, 25, stop_strings=strings, **kind) == [r.tokens for r in found]
    one = generate(model, prompts[0], 25, stop_strings=strings[0], **kind)
    assert one == _cut(free[0].text, strings[:1])[0]


def test_a_stop_token_comes_before_a_stop_string(model: Nemotron) -> None:
    free = generate(model, "für", 9, temperature=0, stop=(), return_details=True)
    kind: dict[str, Any] = dict(temperature=0, stop_strings=free.text, return_details=True)
    row = generate(model, "für", 9, stop=free.tokens[3:4], **kind)
    first = free.tokens.index(free.tokens[3])
    assert (row.stop_reason, row.stop) == ("stop_token", free.tokens[3])
    assert row.tokens == free.tokens[: first + 1]


def test_stop_strings_need_a_tokenizer() -> None:
    bare = Nemotron(SMALL, seed=1)
    with pytest.raises(ValueError, match=r"stop_strings=\('a',\) needs a tokenizer"):
        generate(bare, [1], 3, stop_strings="a")
