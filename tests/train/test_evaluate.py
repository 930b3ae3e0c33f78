"""Bits per byte: every token counts once; equal to the plain definition; in the right unit."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_lite.data import HeldOut
from nemotron_lite.model import Nemotron
from nemotron_lite.train import evaluate
from nemotron_lite.train.evaluate import sliding_windows


@given(length=st.integers(1, 60), window=st.integers(2, 70))
def test_windows_score_each_token_once_after_a_quarter_of_context(length: int, window: int) -> None:
    document = np.arange(length)
    scored: list[int] = []
    for piece in sliding_windows(document, window):
        assert len(piece.tokens) <= window
        new = piece.tokens[piece.first_scored :].tolist()
        assert new
        if piece.tokens[0] != 0:
            assert piece.first_scored == max(1, window // 4)
        scored += new
    assert scored == list(range(1, length))


@pytest.fixture
def held_out() -> HeldOut:
    generator = np.random.default_rng(0)
    documents = tuple(np.array([0, *generator.integers(1, 96, n), 0]) for n in (70, 3, 25, 1, 40))
    return HeldOut(documents, num_bytes=500)


def test_one_window_per_document_is_the_definition(model: Nemotron, held_out: HeldOut) -> None:
    model = model.double()
    nats = 0.0
    with torch.no_grad():
        for document in held_out.documents:
            tokens = torch.from_numpy(document)[None]
            log_p = model(tokens).logits.log_softmax(-1)[0, :-1]
            nats -= float(log_p.gather(1, tokens[0, 1:, None]).sum())
    for batch_size in (1, 3, 8):
        found = evaluate(model, held_out, window=128, batch_size=batch_size)
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 500, rel=1e-9)
        assert found.tokens == 71 + 4 + 26 + 2 + 41
        assert found.nats_per_token == pytest.approx(nats / found.tokens, rel=1e-9)
        assert found.num_bytes == 500
        assert found.tokens_per_second * found.seconds == pytest.approx(found.tokens + 5)


def test_a_short_window_has_no_context_before_its_start(model: Nemotron, held_out: HeldOut) -> None:
    """Equal to scoring each window as a separate text."""
    model = model.double()
    nats, pieces = 0.0, 0
    with torch.no_grad():
        for document in held_out.documents:
            for piece in sliding_windows(document, 16):
                tokens = torch.from_numpy(piece.tokens)
                log_p = model(tokens[None]).logits.log_softmax(-1)[0]
                for i in range(piece.first_scored, len(tokens)):
                    nats -= float(log_p[i - 1, tokens[i]])
                pieces += 1
    assert pieces > 10
    found = evaluate(model, held_out, window=16, batch_size=4)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / 500, rel=1e-9)


def test_a_model_with_equal_logits_scores_log_v(model: Nemotron, held_out: HeldOut) -> None:
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = evaluate(model, held_out, window=32)
    assert found.nats_per_token == pytest.approx(math.log(96), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(math.log2(96) * found.tokens / 500, rel=1e-6)


def test_errors(model: Nemotron, held_out: HeldOut) -> None:
    with pytest.raises(ValueError, match="window=1 with 5 documents"):
        evaluate(model, held_out, window=1)
    with pytest.raises(ValueError, match="with 0 documents"):
        evaluate(model, HeldOut((), 0))
