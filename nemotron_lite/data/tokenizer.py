"""A byte-level BPE tokenizer. Decoding gives back the same bytes; no input is unknown to it.

Byte-pair encoding starts from the 256 bytes. It merges the most frequent pair of neighbors into a
new token, and repeats this until the vocabulary has the wanted size (Sennrich et al. 2016; on bytes
as in GPT-2). Text is first split at spaces and punctuation, so that no token crosses a word
boundary. Digits are split one by one: 1234 is always four tokens, so a model that calculates sees
the same digits at the same places in every number.

Token 0 is `<|endoftext|>`. It is the first and the last token of every document. At the start, the
first token of the text is predicted from it (bos). At the end, a model predicts it to say that the
document ends (eos).

The tokens after it are the fixed pieces of the released chat format (`CHAT_PIECES`), one token
each. A tool call of 52 tokens has 18 with them. A base model never sees them; they are reserved for
the training on conversations. The line break that follows a piece belongs to it. The role belongs
to `<|im_start|>`, because `user` and a line break alone also occur in ordinary text.

If a document spells such a token, it is encoded as ordinary characters, so no text can end a
document or open another turn. A chat is rendered from the ids of `chat_ids` and encoded contents.

Source: reference sheet 8.6 (the chat format). Left out: normalization (it would lose bytes), and
the 131,072 entries of the real tokenizer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import NoReturn, SupportsIndex

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nemotron_lite.arguments import integer
from nemotron_lite.data.checks import several

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
SMALLEST_VOCABULARY = 257  # <|endoftext|> and 256 bytes
LARGEST_VOCABULARY = 1 << 20  # the real tokenizer has 131,072; the trainer reserves memory for all
LARGEST_ID = 2**31 - 1  # of an int32 array
_AT_ONCE = 256  # documents; the library needs much memory for each token while it encodes

CHAT_PIECES: Mapping[str, str] = MappingProxyType(
    {
        "start": "<|im_start|>",
        "end": "<|im_end|>",
        "end_turn": "<|im_end|>\n",
        "system": "<|im_start|>system\n",
        "user": "<|im_start|>user\n",
        "assistant": "<|im_start|>assistant\n",
        "think": "<think>\n",
        "end_think": "\n</think>\n",
        "no_think": "<think></think>",
        "tool_call": "<tool_call>\n<function=",
        "parameter": ">\n<parameter=",
        "end_parameter": "\n</parameter>\n",
        "end_tool_call": "</function>\n</tool_call>\n",
        "tool_response": "<tool_response>\n",
        "end_tool_response": "\n</tool_response>\n",
    }
)
CHAT_TOKENS = tuple(CHAT_PIECES.values())


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: SupportsIndex = 4096,
    special_tokens: Sequence[str] = (),
) -> Tokenizer:
    """Learn the merges from texts.

    Args:
        vocab_size: number of tokens, special ones and the 256 bytes included.
        special_tokens: texts that are one token each; they get the ids from 1 on. `CHAT_TOKENS`
            are those of the chat format.

    Raises:
        TypeError: something that is no text.
        ValueError: a vocabulary that is too small for every byte, or too large for the texts; a
            text that UTF-8 cannot hold; a special token that ordinary text could become.
    """
    special_tokens = check_special_tokens(special_tokens)
    vocab_size = check_vocabulary(vocab_size, special_tokens)
    texts = several("texts", texts, "texts")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, *special_tokens],
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


def check_vocabulary(vocab_size: SupportsIndex, special_tokens: Sequence[str]) -> int:
    """A vocabulary size that has room for the special tokens and every byte.

    Raises:
        TypeError: no integer.
        ValueError: too small, or more than 2^20.
    """
    size = integer("vocab_size", vocab_size, high=LARGEST_VOCABULARY)
    smallest = SMALLEST_VOCABULARY + len(special_tokens)
    if size < smallest:
        count = len(special_tokens) + 1
        raise ValueError(
            f"vocab_size={size} does not work: expected at least {smallest}, the 256 bytes and "
            f"{count} special token{'s' if count > 1 else ''}."
        )
    return size


def check_special_tokens(special_tokens: Sequence[str]) -> tuple[str, ...]:
    """Special tokens that are distinct texts, none of which ordinary text can be merged to.

    A text that the pre-tokenizer does not cut could also be learned as a merge. It would then have
    the id of the special token wherever it occurs.

    Raises:
        TypeError: something that is no text.
        ValueError: a text that occurs twice, or is `<|endoftext|>`, or could be learned.
    """
    found = several("special_tokens", special_tokens, "texts")
    for i, text in enumerate(found):
        if not isinstance(text, str):
            raise TypeError(f"special_tokens[{i}] is {type(text).__name__}: expected a text.")
        if text == END_OF_TEXT or text in found[:i]:
            raise ValueError(f"special_tokens[{i}]={text!r} exists already: leave it out.")
        try:
            pieces = _pre_tokenizer().pre_tokenize_str(text)
        except Exception as error:
            _explain([text], error, f"special_tokens[{i}]")
        if len(pieces) < 2:
            raise ValueError(
                f"special_tokens[{i}]={text!r} does not work, because ordinary text could become "
                "this token: expected letters and punctuation, such as '<|name|>'."
            )
    return tuple(found)


def chat_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The id of each piece of the chat format, by the names of `CHAT_PIECES`.

        ids = chat_ids(tokenizer)
        turn = [ids["user"], *tokens_of_the_question, ids["end_turn"], ids["assistant"]]

    Raises:
        ValueError: the tokenizer has not all of them.
    """
    found = ((name, tokenizer.token_to_id(text)) for name, text in CHAT_PIECES.items())
    ids = {name: number for name, number in found if number is not None}
    missing = [text for name, text in CHAT_PIECES.items() if name not in ids]
    count = len(CHAT_PIECES)
    if missing:
        raise ValueError(
            f"the tokenizer has no token {missing[0]!r}; {len(missing)} of {count} pieces of "
            "the chat format are missing. Train it with special_tokens=CHAT_TOKENS."
        )
    return ids


def encode_documents(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    start: SupportsIndex = END_OF_TEXT_ID,
    end: SupportsIndex = END_OF_TEXT_ID,
) -> list[np.ndarray]:
    """Each text as an int32 array `<|endoftext|> tokens <|endoftext|>`; encoded in parallel.

    A special token that a text spells is encoded as ordinary characters.

    For another model's tokenizer, give the ids of its start and end tokens as `start` and `end`.

    Raises:
        TypeError: something that is no text.
        ValueError: an id out of range, or a text that UTF-8 cannot hold.
    """
    start = integer("start", start, low=0, high=LARGEST_ID)
    end = integer("end", end, low=0, high=LARGEST_ID)
    texts = several("texts", texts, "texts")
    before = tokenizer.encode_special_tokens
    tokenizer.encode_special_tokens = True
    documents: list[np.ndarray] = []
    try:
        for first in range(0, len(texts), _AT_ONCE):
            encoded = tokenizer.encode_batch_fast(
                texts[first : first + _AT_ONCE], add_special_tokens=False
            )
            documents += [np.array([start, *e.ids, end], dtype=np.int32) for e in encoded]
    except Exception as error:
        _explain(texts, error)
    finally:  # a chat template writes special tokens with the same tokenizer
        tokenizer.encode_special_tokens = before
    return documents


def decode(tokenizer: Tokenizer, tokens: Iterable[SupportsIndex]) -> str:
    """The text of a sequence of tokens, without special tokens.

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


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )


def _explain(texts: list[str], error: Exception, name: str = "") -> NoReturn:
    """Say which text the library could not read, where its own message does not."""
    for i, text in enumerate(texts):
        named = name or f"texts[{i}]"
        if not isinstance(text, str):
            raise TypeError(f"{named} is {type(text).__name__}: expected a text.") from error
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as fault:
            raise ValueError(
                f"{named} has a character at position {fault.start:,} that UTF-8 does not have "
                f"({text[fault.start]!r}, half of a surrogate pair): leave it out."
            ) from error
    raise error
