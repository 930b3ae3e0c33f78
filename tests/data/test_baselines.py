"""Baselines: each against a count by hand or an independent tool."""

from __future__ import annotations

import math
import zlib
from collections import Counter, defaultdict

import numpy as np
import pytest

from nemotron_lite.data import NGram, load_corpus
from nemotron_lite.data.baselines import gzip_bits_per_byte, lzma_bits_per_byte, measure_baselines


@pytest.fixture(scope="module")
def text() -> tuple[list[bytes], list[bytes]]:
    corpus = load_corpus()
    return [d.content for d in corpus.train[:60]], [d.content for d in corpus.held_out[:4]]


def test_gzip_is_deflate_plus_its_18_bytes(text: tuple[list[bytes], list[bytes]]) -> None:
    held_out = text[1]
    joined = b"".join(held_out)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    size = len(deflate.compress(joined) + deflate.flush()) + 18
    assert gzip_bits_per_byte(held_out) == 8 * size / len(joined)


def test_lzma_given_the_text_itself_needs_almost_nothing() -> None:
    noise = np.random.default_rng(0).bytes(20_000)
    assert lzma_bits_per_byte([b"other"], [noise]) > 7.9
    assert lzma_bits_per_byte([b"other", noise], [noise]) < 0.5


def witten_bell_by_hand(train: list[bytes], document: bytes, order: int) -> list[float]:
    """The definition, with dictionaries and recursion."""
    counts: dict[bytes, Counter[int]] = defaultdict(Counter)
    for text in train:
        for i, byte in enumerate(text):
            for n in range(min(order - 1, i) + 1):
                counts[text[i - n : i]][byte] += 1

    def p(context: bytes, byte: int) -> float:
        shorter = p(context[1:], byte) if context else 1 / 256
        seen = counts.get(context)
        if not seen:
            return shorter
        return (seen[byte] + len(seen) * shorter) / (seen.total() + len(seen))

    return [p(document[max(0, i - order + 1) : i], byte) for i, byte in enumerate(document)]


@pytest.mark.parametrize("order", [1, 2, 3, 5, 8])
def test_ngram_is_the_definition(order: int) -> None:
    train = [b"abracadabra", b"a", b"", b"cab\xff\x00bac", b"abra abra abra"]
    model = NGram(train, order=order)
    for document in (b"abracadabra", b"zzz", b"\x00\xff", b"a", b""):
        expected = witten_bell_by_hand(train, document, order)
        assert model.probabilities(document) == pytest.approx(expected, rel=1e-12)


def test_ngram_probabilities_sum_to_one() -> None:
    model = NGram([b"abracadabra" * 3, b"cabbage"], order=4)
    for context in (b"", b"a", b"abr", b"zzz", b"xabr"):
        total = sum(model.probabilities(context + bytes([x]))[-1] for x in range(256))
        assert total == pytest.approx(1.0, abs=1e-12)


def test_ngram_beats_uniform_and_gzip_on_source(text: tuple[list[bytes], list[bytes]]) -> None:
    train, held_out = text
    scores = [NGram(train, order=n).bits_per_byte(held_out) for n in (1, 2, 4)]
    assert 8 > scores[0] > scores[1] > scores[2]
    assert scores[2] < gzip_bits_per_byte(held_out)
    found = measure_baselines(train, held_out, order=4)
    assert found.ngram == scores[2]
    assert found.gzip == gzip_bits_per_byte(held_out)


def test_ngram_on_random_bytes_cannot_win() -> None:
    generator = np.random.default_rng(1)
    model = NGram([generator.bytes(50_000)], order=3)
    assert model.bits_per_byte([generator.bytes(5_000)]) > 8
    assert NGram([], order=3).bits_per_byte([b"abc"]) == pytest.approx(math.log2(256))


def test_errors() -> None:
    for order in (0, 9):
        with pytest.raises(ValueError, match=f"order={order} does not work: expected 1 to 8"):
            NGram([b"abc"], order=order)
    with pytest.raises(ValueError, match="no bytes"):
        gzip_bits_per_byte([b""])
