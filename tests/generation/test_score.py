"""Log-likelihoods against the model's logits and transformers; batches, segments, memory."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nemotron_lite import Nemotron, Score, generate, load, score
from nemotron_lite.generation import score as module
from tests.generation.text_models import text_model

TEXT = "für value in values: total = total + value  # naïve, but exact\n"


@pytest.fixture(scope="module")
def model() -> Nemotron:
    return text_model(TEXT, vocab_size=276)


def by_hand(model: Nemotron, context: list[int], tokens: list[int]) -> list[float]:
    """One full forward pass, without padding, batch or cache."""
    logits = model(torch.tensor([context + tokens])).logits[0].detach()
    logprobs = logits.log_softmax(-1)
    return [float(logprobs[len(context) - 1 + i, token]) for i, token in enumerate(tokens)]


@pytest.mark.parametrize("segment", [None, 1, 3, 1000])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_rows_of_any_lengths(
    model: Nemotron, segment: int | None, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOGITS", 276 * 5)  # a few places at a time
    rows = [[5, 6, 7, 8], [9], list(range(3, 30)), [4, 4], [7] * 11]
    contexts = [[3], [1, 2, 3, 4, 5, 6], [], [5] * 20, [8, 9]]
    bos = model.config.bos_token_id
    kind: dict[str, Any] = dict(batch_size=batch_size, segment_length=segment)
    for found, context, row in zip(
        score(model, contexts, rows, **kind), contexts, rows, strict=True
    ):
        expected = by_hand(model, context or [bos], row)
        assert found.token_logprobs == pytest.approx(expected, rel=1e-9)
        assert found.logprob == pytest.approx(math.fsum(expected), rel=1e-12)
        assert (found.tokens, found.num_tokens, found.num_bytes) == (row, len(row), None)
    for found, row in zip(score(model, rows, **kind), rows, strict=True):
        assert found.token_logprobs == pytest.approx(by_hand(model, [bos], row), rel=1e-9)


def test_texts(model: Nemotron) -> None:
    bos, encode = [model.config.bos_token_id], model.tokenizer.encode
    texts = ["für value", "total = total", ""]
    for found, text in zip(score(model, texts), texts, strict=True):
        ids = encode(text).ids
        assert found.tokens == ids and found.num_bytes == len(text.encode())
        assert found.token_logprobs == pytest.approx(by_hand(model, bos, ids) if ids else [])
    assert score(model, texts[0]) == score(model, texts[:1])[0]
    empty = score(model, "")
    assert (empty.logprob, empty.is_greedy, empty.perplexity, empty.bits_per_byte) == (
        0.0, True, 1.0, None,
    )  # fmt: skip
    one = score(model, texts[0])
    assert one.perplexity == pytest.approx(math.exp(-one.logprob / one.num_tokens))
    assert one.bits_per_byte == pytest.approx(-one.logprob / math.log(2) / len(texts[0].encode()))
    for context, continuation in (("für", " value"), ("für ", "value"), ("", "total"), ("a", "")):
        found = score(model, context, continuation)
        whole = encode(context.rstrip() + context[len(context.rstrip()) :] + continuation).ids
        before = encode(context.rstrip()).ids
        assert found.tokens == whole[len(before) :]
        expected = by_hand(model, before or bos, found.tokens) if found.tokens else []
        assert found.token_logprobs == pytest.approx(expected)


def test_what_greedy_decoding_writes_is_greedy(model: Nemotron) -> None:
    prompts = [[5, 6, 7], [9]]
    written = generate(model, prompts, 12, temperature=0, stop=())
    assert all(row.is_greedy for row in score(model, prompts, written, segment_length=4))
    other = [[*row[:7], (row[7] + 1) % 276, *row[8:]] for row in written]
    assert not any(row.is_greedy for row in score(model, prompts, other, segment_length=4))
    assert score(model, [5, 6, 7], written[0][:5]).is_greedy


def test_logprobs_of_generate_are_the_scores(model: Nemotron) -> None:
    row = generate(model, "für", 9, seed=3, stop=(), logprobs=0, return_details=True)
    found = score(model, model.tokenizer.encode("für").ids, row.tokens)
    assert found.token_logprobs == pytest.approx(row.logprobs)


def test_a_long_text_is_read_in_segments_with_one_cache(
    model: Nemotron, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pass reads more than a segment, and no logits are made for more than a few places."""
    passes: list[int] = []
    heads: list[int] = []
    forward, head = Nemotron.forward_hidden, Nemotron.head

    def count(self: Nemotron, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        passes.append(tokens.shape[1])
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(Nemotron, "forward_hidden", count)
    monkeypatch.setattr(
        Nemotron, "head", lambda self, hidden: heads.append(len(hidden)) or head(self, hidden)
    )
    monkeypatch.setattr(module, "LOGITS", 276 * 40)
    score(model, [[5] * 1000, [6] * 10], segment_length=128)
    assert max(passes) == 128 and len(passes) == 8
    assert max(heads) == 40


def test_against_transformers(tmp_path: Path) -> None:
    """A checkpoint that transformers wrote; its own loss on the same texts."""
    pytest.importorskip("transformers")
    from tests.checkpoint.test_transformers_parity import write_reference

    theirs = write_reference(tmp_path, 0, hybrid_override_pattern="MEM*", moe_latent_size=12)
    ours = load(tmp_path)
    rows = torch.randint(128, (3, 40))
    found = score(ours, rows[:, :1], rows[:, 1:], segment_length=16)
    for row, mine in zip(rows, found, strict=True):
        with torch.no_grad():
            loss = theirs(row[None], labels=row[None]).loss
        assert mine.logprob / mine.num_tokens == pytest.approx(-float(loss), abs=2e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(texts=[]), "every prompt needs at least one token"),
        (dict(texts=["a"], continuations=["b", "c"]), r"2 in continuations=\['b', 'c'\] for 1 in"),
        (dict(texts="a", continuations=["b"]), "1 in continuations=.* for a single one in texts"),
        (dict(texts="a", continuations=[1]), "both be text, or both be token ids"),
        (dict(texts=[[1, 999]]), "the token id 999 of a prompt is outside the vocabulary"),
        (dict(texts="a", batch_size=0), "batch_size=0"),
        (dict(texts="a", segment_length=0), "segment_length=0"),
        (dict(texts="\ud800"), "lone surrogate"),
    ],
)
def test_wrong_arguments_are_named(
    model: Nemotron, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(model, **arguments)


def test_a_score_is_plain_data() -> None:
    one = Score(-2.0, [1, 2], [-0.5, -1.5], False, 4)
    assert one.bits_per_byte == pytest.approx(2 / math.log(2) / 4)
