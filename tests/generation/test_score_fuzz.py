"""Random texts, contexts, batches and segments, against one softmax after another by hand."""

from __future__ import annotations

import functools
import math
import random
from typing import Any

import pytest
import torch

from nemotron_lite import Nemotron, Score, score
from nemotron_lite.data.tokenizer import decode, train_tokenizer
from nemotron_lite.generation import score as module
from tests.generation.speculative.conftest import SMALL

VOCABULARY = 296
TEXT = "return values: für value in total:\n    return total + naïve  # 日本 values\n"
ALPHABET = [*"returnvals:für +\n\t #ï日🙂\u00a0", "value", "return", " total", "  "]


@pytest.fixture(scope="module")
def model() -> Nemotron:
    model = Nemotron(SMALL.replace(vocab_size=VOCABULARY), dtype=torch.float64, seed=1)
    model.tokenizer = train_tokenizer([TEXT] * 3, vocab_size=VOCABULARY)
    return model


def texts(draw: random.Random, longest: int) -> str:
    return "".join(draw.choices(ALPHABET, k=draw.randint(0, longest)))


def by_hand(model: Nemotron, context: list[int], tokens: list[int]) -> tuple[list[float], bool]:
    """The whole text is read again for every token, and the softmax is written out."""
    found, greedy, read = [], True, list(context)
    for token in tokens:
        with torch.no_grad():
            logits = model(torch.tensor([read])).logits[0, -1].tolist()
        total = math.fsum(math.exp(value) for value in logits)
        found.append(math.log(math.exp(logits[token]) / total))
        greedy = greedy and logits[token] == max(logits)
        read.append(token)
    return found, greedy


def check(model: Nemotron, found: Score, context: list[int]) -> None:
    expected, greedy = by_hand(model, context or [model.config.bos_token_id], found.tokens)
    assert found.token_logprobs == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert found.logprob == pytest.approx(math.fsum(expected), rel=1e-9, abs=1e-12)
    assert found.is_greedy == greedy


def a_way_to_read(draw: random.Random) -> dict[str, Any]:
    return {
        "batch_size": draw.choice([1, 2, 3, 8, 100]),
        "segment_length": draw.choice([None, None, 3, 5, 17]),
    }


@pytest.mark.parametrize("seed", range(4))
def test_random_texts_and_contexts(
    model: Nemotron, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(seed)
    monkeypatch.setattr(module, "LOGITS", VOCABULARY * draw.choice([1, 3, 1000]))
    count = draw.randint(1, 4)
    given = [texts(draw, 12) for _ in range(count)]
    for found, text in zip(score(model, given, **a_way_to_read(draw)), given, strict=True):
        assert decode(model.tokenizer, found.tokens) == text
        assert found.num_bytes == len(text.encode())
        check(model, found, [])

    contexts = [texts(draw, 8) for _ in given]
    scores = score(model, contexts, given, **a_way_to_read(draw))
    for found, context, text in zip(scores, contexts, given, strict=True):
        bare = context.rstrip()
        scored = context[len(bare) :] + text
        assert decode(model.tokenizer, found.tokens) == scored, "nothing is left out or read twice"
        assert found.num_bytes == len(text.encode())
        check(model, found, model.tokenizer.encode(bare).ids)


@pytest.mark.parametrize("seed", range(3))
def test_random_ids(model: Nemotron, seed: int) -> None:
    draw = random.Random(seed)

    def ids(longest: int) -> list[int]:
        return draw.choices(range(VOCABULARY), k=draw.randint(0, longest))

    given = [(ids(10), ids(20)) for _ in range(draw.randint(1, 4))]
    scores = score(model, [a for a, _ in given], [b for _, b in given], **a_way_to_read(draw))
    for found, (context, tokens) in zip(scores, given, strict=True):
        assert found.tokens == tokens
        check(model, found, context)


def test_neither_order_nor_company_changes_a_score(model: Nemotron) -> None:
    draw = random.Random(0)
    given = [(texts(draw, 12), texts(draw, 12)) for _ in range(7)]
    given += given[:2]  # the same again, at another place
    alone = [score(model, *pair) for pair in given]
    for _ in range(3):
        order = draw.sample(range(len(given)), len(given))
        contexts, after = zip(*(given[i] for i in order), strict=True)
        for found, i in zip(
            score(model, contexts, after, **a_way_to_read(draw)), order, strict=True
        ):
            assert found.tokens == alone[i].tokens and found.is_greedy == alone[i].is_greedy
            assert found.token_logprobs == pytest.approx(alone[i].token_logprobs, rel=1e-9)


@functools.cache
def words() -> list[str]:
    """Texts that are a single token of several characters."""
    tokenizer = train_tokenizer([TEXT] * 3, vocab_size=VOCABULARY)
    tokens = [decode(tokenizer, [i]) for i in range(VOCABULARY)]
    return [
        t for i, t in enumerate(tokens) if len(t.strip()) > 1 and tokenizer.encode(t).ids == [i]
    ]


@pytest.mark.parametrize("before", ["", "value: "])
def test_a_border_inside_a_token(model: Nemotron, before: str) -> None:
    """ "ret" and "urn" make one token together; then both are encoded on their own."""
    encode = model.tokenizer.encode
    assert "return" in words() and len(words()) > 12, words()
    inside = 0
    for word in words():
        for cut in {1, len(word) - 1}:
            context, after = before + word[:cut], word[cut:]
            if not context.strip() or context != context.rstrip():
                continue
            left, whole = encode(context).ids, encode(context + after).ids
            found = score(model, context, after)
            assert decode(model.tokenizer, found.tokens) == after
            if whole[: len(left)] == left:
                assert found.tokens == whole[len(left) :]
            else:
                inside += 1
                assert found.tokens == encode(after).ids
            check(model, found, left)
    assert inside > 10
