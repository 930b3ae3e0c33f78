"""The tokenizer: bytes in, the same bytes out, and no text that can end a document by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nemotron_lite.data import (
    CHAT_PIECES,
    CHAT_TOKENS,
    END_OF_TEXT,
    END_OF_TEXT_ID,
    chat_ids,
    decode,
    encode_documents,
    load_corpus,
)
from nemotron_lite.data.tokenizer import train_tokenizer
from nemotron_lite.generation.chat_template import CHATML, ChatTemplate

SPECIAL_IDS = frozenset(range(1 + len(CHAT_TOKENS)))
PIECES = st.lists(
    st.sampled_from([*CHAT_TOKENS, END_OF_TEXT])
    | st.sampled_from([text[:-1] for text in CHAT_TOKENS])
    | st.text(max_size=4)
    | st.text("0123456789 \n.", max_size=8),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [d.content.decode() for d in load_corpus().train[:40]]
    return train_tokenizer(texts, vocab_size=600, special_tokens=CHAT_TOKENS)


@given(text=st.text() | st.text("ab \n\r\t<|endoftext|>é漢🙂\x00") | PIECES)
@settings(max_examples=300)
def test_round_trip_of_any_text(tokenizer: Tokenizer, text: str) -> None:
    (tokens,) = encode_documents(tokenizer, [text])
    assert decode(tokenizer, tokens.tolist()).encode() == text.encode()
    assert tokens[0] == tokens[-1] == END_OF_TEXT_ID
    assert not SPECIAL_IDS & set(tokens[1:-1].tolist())
    assert not tokenizer.encode_special_tokens  # a chat template may use the same tokenizer


@given(text=PIECES)
@settings(max_examples=100)
def test_every_digit_is_a_token(tokenizer: Tokenizer, text: str) -> None:
    (tokens,) = encode_documents(tokenizer, [text])
    for token in tokens[1:-1].tolist():
        piece = tokenizer.id_to_token(token)
        assert len(piece) == 1 or not any(c in "0123456789" for c in piece), piece


def test_chat_pieces_are_one_token_each_behind_end_of_text(tokenizer: Tokenizer) -> None:
    ids = chat_ids(tokenizer)
    assert list(ids) == list(CHAT_PIECES)
    assert list(ids.values()) == list(range(1, 1 + len(ids)))
    for name, text in CHAT_PIECES.items():
        assert tokenizer.encode(text).ids == [ids[name]]
        assert tokenizer.decode([ids[name]], skip_special_tokens=False) == text
        assert tokenizer.decode([ids[name]]) == ""


@given(question=PIECES, thinking=PIECES, answer=st.text(max_size=6))
@settings(max_examples=100)
def test_a_chat_is_pieces_and_encoded_contents(
    tokenizer: Tokenizer, question: str, thinking: str, answer: str
) -> None:
    ids = chat_ids(tokenizer)
    template = ChatTemplate(CHATML, tokenizer)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
    rendered = template.encode(template.render(messages))
    system, asked = (t[1:-1].tolist() for t in encode_documents(tokenizer, ["Be brief.", question]))
    heads = [ids["assistant"], ids["think"]]
    wanted = [ids["system"], *system, ids["end_turn"], ids["user"], *asked, ids["end_turn"], *heads]
    special = [t for t in rendered if t in SPECIAL_IDS]
    assert special == [t for t in wanted if t in SPECIAL_IDS]
    assert tokenizer.decode(rendered, skip_special_tokens=False) == tokenizer.decode(
        wanted, skip_special_tokens=False
    )
    reply = {"role": "assistant", "content": answer, "reasoning_content": thinking}
    rendered = template.encode(template.render([*messages, reply], add_generation_prompt=False))
    assert rendered[-1] == ids["end_turn"]


def test_a_tool_call_is_short(tokenizer: Tokenizer) -> None:
    text = (
        "<tool_call>\n<function=python>\n<parameter=code>\nprint(37*4+12)\n</parameter>\n"
        "</function>\n</tool_call>\n"
    )
    short = tokenizer.encode(text).ids
    (long,) = encode_documents(tokenizer, [text])
    ids = chat_ids(tokenizer)
    pieces = ("tool_call", "parameter", "end_parameter", "end_tool_call")
    assert [t for t in short if t in SPECIAL_IDS] == [ids[name] for name in pieces]
    assert len(short) < 0.6 * len(long)


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


def test_a_tokenizer_without_the_pieces_says_so(tmp_path) -> None:
    plain = train_tokenizer(["abc"], vocab_size=257)
    assert plain.get_vocab_size() == 257
    with pytest.raises(ValueError, match=r"no token '<\|im_start\|>'; 15 of 15 pieces"):
        chat_ids(plain)
    (tokens,) = encode_documents(plain, ["<|im_start|>a"])
    assert len(tokens) == 2 + len("<|im_start|>a")


def test_a_tokenizer_of_an_earlier_version_still_encodes() -> None:
    old = Tokenizer(models.BPE())
    old.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    old.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=258, special_tokens=[END_OF_TEXT], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    old.train_from_iterator(["12 12 12"], trainer)
    again = Tokenizer.from_str(old.to_str())
    (tokens,) = encode_documents(again, ["12"])
    assert tokens.tolist() == [0, 257, 0]
    assert decode(again, tokens) == "12"


@pytest.mark.parametrize("text", ["ab", "7", " word", "\n", "<|", END_OF_TEXT, ""])
def test_special_tokens_that_ordinary_text_could_become_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"special_tokens\[1\]=.*"):
        train_tokenizer(["abc"], vocab_size=300, special_tokens=["<a>", text])


def test_special_tokens_of_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="'<a>' exists already"):
        train_tokenizer(["abc"], vocab_size=300, special_tokens=["<a>", "<a>"])
    with pytest.raises(TypeError, match="special_tokens is str"):
        train_tokenizer(["abc"], vocab_size=300, special_tokens="<a>")
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        train_tokenizer(["abc"], vocab_size=300, special_tokens=["<\ud800>"])


def test_impossible_vocabularies() -> None:
    with pytest.raises(ValueError, match=r"vocab_size=256 .* at least 257"):
        train_tokenizer(["abc"], vocab_size=256)
    with pytest.raises(ValueError, match=r"vocab_size=271 .* at least 272.* 16 special tokens"):
        train_tokenizer(["abc"], vocab_size=271, special_tokens=CHAT_TOKENS)
    with pytest.raises(ValueError, match=r"vocab_size=4096 .*: train on more text"):
        train_tokenizer(["abc"], vocab_size=4096)
