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

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
SMALLEST_VOCABULARY = 257  # the special token and 256 bytes


def train_tokenizer(texts: Iterable[str], *, vocab_size: int = 4096) -> Tokenizer:
    """Learn the merges from texts.

    Raises:
        ValueError: a vocabulary that is too small for every byte, or too large for the texts.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocab_size={vocab_size} does not work: expected at least {SMALLEST_VOCABULARY}, "
            "the 256 bytes and one special token."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
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
    start: int = END_OF_TEXT_ID,
    end: int = END_OF_TEXT_ID,
) -> list[np.ndarray]:
    """Each text as an int32 array `<|endoftext|> tokens <|endoftext|>`; encoded in parallel.

    For another model's tokenizer, give the ids of its start and end tokens as `start` and `end`.
    """
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is just characters
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array([start, *e.ids, end], dtype=np.int32) for e in encoded]


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """The text of a sequence of tokens, without the end-of-text token."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True)
