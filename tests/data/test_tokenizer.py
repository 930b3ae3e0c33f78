"""The tokenizer: bytes in, the same bytes out, and no text that can end a document by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nemotron_lite.data import END_OF_TEXT, END_OF_TEXT_ID, decode, encode_documents, load_corpus
from nemotron_lite.data.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [d.content.decode() for d in load_corpus().train[:40]]
    return train_tokenizer(texts, vocab_size=600)


@given(text=st.text() | st.text("ab \n\r\t<|endoftext|>é漢🙂\x00"))
@settings(max_examples=200)
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    (tokens,) = encode_documents(tokenizer, [text])
    assert decode(tokenizer, tokens.tolist()).encode() == text.encode()
    assert tokens[0] == tokens[-1] == END_OF_TEXT_ID
    assert END_OF_TEXT_ID not in tokens[1:-1]


def test_round_trip_of_held_out_files_and_of_a_saved_tokenizer(
    tokenizer: Tokenizer, tmp_path
) -> None:
    path = str(tmp_path / "tokenizer.json")
    tokenizer.save(path)
    texts = [d.content.decode() for d in load_corpus().held_out]
    for tokens, again, text in zip(
        encode_documents(tokenizer, texts),
        encode_documents(Tokenizer.from_file(path), texts),
        texts,
        strict=True,
    ):
        assert decode(tokenizer, tokens.tolist()) == text
        assert np.array_equal(tokens, again)


def test_special_token_spelled_in_a_text_is_text(tokenizer: Tokenizer) -> None:
    text = f"before {END_OF_TEXT} after"
    (tokens,) = encode_documents(tokenizer, [text])
    assert (tokens == END_OF_TEXT_ID).sum() == 2
    assert decode(tokenizer, tokens.tolist()) == text
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID


def test_vocabulary_is_exactly_as_asked_and_merges_pay(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 600
    text = load_corpus().held_out[0].content.decode()
    (tokens,) = encode_documents(tokenizer, [text])
    assert len(tokens) < 0.7 * len(text.encode())


def test_impossible_vocabularies() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=256 .* at least 257"):
        train_tokenizer(["abc"], vocab_size=256)
    with pytest.raises(ValueError, match=r"vocab_size=4096 .*: train on more text"):
        train_tokenizer(["abc"], vocab_size=4096)
