"""A byte-level BPE tokenizer: any bytes in, the same bytes out, nothing unknown.

Byte-pair encoding starts from the 256 bytes and merges the most frequent neighbouring pair into a
new token, again and again, until the vocabulary is full (Sennrich et al. 2016, on bytes as in
GPT-2). Text is first cut at spaces and punctuation, so that no token crosses a word.

Token 0 is `<|endoftext|>`. It stands at both ends of every document: at the front it is what the
first real token is predicted from (bos), at the back it is what a model predicts to say "this file
is over" (eos). Text that happens to spell `<|endoftext|>` is encoded as ordinary characters, so no
document can end itself.

Left out: normalisation (it would lose bytes), chat tokens, and the 131,072 entries of the real one.
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
        ValueError: a vocabulary without room for every byte, or texts too short to fill it.
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
            f"the text gives only {tokenizer.get_vocab_size()} tokens of vocab_size={vocab_size}: "
            "train on more text or ask for fewer tokens."
        )
    return tokenizer


def encode_documents(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    start: int = END_OF_TEXT_ID,
    end: int = END_OF_TEXT_ID,
) -> list[np.ndarray]:
    """Each text as `<|endoftext|> tokens <|endoftext|>`, in parallel; int32 arrays, one a text.

    Another model's tokenizer has other marks: give their ids as `start` and `end`.
    """
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" inside a text is just characters
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    return [np.array([start, *e.ids, end], dtype=np.int32) for e in encoded]


def decode(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """The text of a run of tokens; the end-of-text token is left out."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True)
