"""A byte-level BPE tokenizer. Decoding gives back the same bytes; no input is unknown to it.

Byte-pair encoding starts from the 256 bytes. It merges the most frequent pair of neighbors into a
new token, and repeats this until the vocabulary has the wanted size (Sennrich et al. 2016; on bytes
as in GPT-2). Text is first split at spaces and punctuation, so that no token crosses a word
boundary.

Token 0 is `<|endoftext|>`. It is the first and the last token of every document. At the start, the
first token of the text is predicted from it (bos). At the end, a model predicts it to say that the
document ends (eos). If a text itself contains the characters `<|endoftext|>`, they are encoded as
ordinary characters, so a document cannot end early.

Left out: normalization (it would lose bytes), chat tokens, and the 131,072 entries of the real
tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn, SupportsIndex

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nemotron_lite.arguments import integer
from nemotron_lite.data.checks import several

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
SMALLEST_VOCABULARY = 257  # the special token and 256 bytes
LARGEST_VOCABULARY = 1 << 20  # the real tokenizer has 131,072; the trainer reserves memory for all
LARGEST_ID = 2**31 - 1  # of an int32 array


def train_tokenizer(texts: Iterable[str], *, vocab_size: SupportsIndex = 4096) -> Tokenizer:
    """Learn the merges from texts.

    Raises:
        TypeError: something that is no text.
        ValueError: a vocabulary that is too small for every byte, or too large for the texts; a
            text that UTF-8 cannot hold.
    """
    vocab_size = integer("vocab_size", vocab_size, high=LARGEST_VOCABULARY)
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} does not work: expected at least {SMALLEST_VOCABULARY}, "
            "the 256 bytes and one special token."
        )
    texts = several("texts", texts, "texts")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    try:
        tokenizer.train_from_iterator(texts, trainer)
    except Exception as error:
        _explain(texts, error)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is too large for this text, which gives only "
            f"{tokenizer.get_vocab_size()} tokens: train on more text, or lower vocab_size."
        )
    return tokenizer


def encode_documents(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    start: SupportsIndex = END_OF_TEXT_ID,
    end: SupportsIndex = END_OF_TEXT_ID,
) -> list[np.ndarray]:
    """Each text as an int32 array `<|endoftext|> tokens <|endoftext|>`; encoded in parallel.

    For another model's tokenizer, give the ids of its start and end tokens as `start` and `end`.

    Raises:
        TypeError: something that is no text.
        ValueError: an id out of range, or a text that UTF-8 cannot hold.
    """
    start = integer("start", start, low=0, high=LARGEST_ID)
    end = integer("end", end, low=0, high=LARGEST_ID)
    texts = several("texts", texts, "texts")
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is just characters
    try:
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except Exception as error:
        _explain(texts, error)
    return [np.array([start, *e.ids, end], dtype=np.int32) for e in encoded]


def decode(tokenizer: Tokenizer, tokens: Iterable[SupportsIndex]) -> str:
    """The text of a sequence of tokens, without the end-of-text token.

    Raises:
        TypeError, ValueError: something that is no token id.
    """
    ids = several("tokens", tokens, "token ids")
    try:
        return tokenizer.decode(ids, skip_special_tokens=True)
    except (TypeError, OverflowError):
        # The library names no argument: find the one that is wrong, or accept NumPy's integers.
        ids = [integer(f"tokens[{i}]", t, low=0, high=LARGEST_ID) for i, t in enumerate(ids)]
        return tokenizer.decode(ids, skip_special_tokens=True)


def _explain(texts: list[str], error: Exception) -> NoReturn:
    """Say which text the library could not read, where its own message does not."""
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"texts[{i}] is {type(text).__name__}: expected a text.") from error
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as fault:
            raise ValueError(
                f"texts[{i}] has a character at position {fault.start:,} that UTF-8 does not have "
                f"({text[fault.start]!r}, half of a surrogate pair): leave it out."
            ) from error
    raise error
