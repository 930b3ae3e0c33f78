"""Prompts as people give them: text or token ids, one or many.

    "def f"                        one text                   the result is one text
    ["def f", "class A"]           several texts              a list of texts
    [5, 17, 3], or a `t` tensor    the token ids of one       one list of ids
    [[5, 17], [3]], `b t` tensor   the ids of several         a list of lists

Instead of a tensor, a NumPy array may be given; both may have any integer dtype. Bytes are refused:
they may be text or ids, and nobody can tell which.

So what comes out is of the kind that went in. Text is read with `model.tokenizer`, whose
tokenizer.json alone decides whether a beginning-of-text token (BOS) is put in front. An empty text
becomes the config's `bos_token_id`, because a prompt needs at least one token. Token ids are taken
as they are. A text that continues what a cache has read gets no BOS, and an empty one stays empty.

Left out: chat templates (chat_template.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer
from torch import Tensor

from nemotron_lite.arguments import shown
from nemotron_lite.model import Nemotron

MAX_TOKENS = 1 << 28  # of a prompt

Prompts = (
    str
    | Sequence[str]
    | Sequence[int]
    | Sequence[Sequence[int]]
    | Integer[Tensor, "t"]
    | Integer[Tensor, "b t"]
    | Integer[np.ndarray, "t"]
    | Integer[np.ndarray, "b t"]
    | Sequence[Integer[Tensor, "_"]]
    | Sequence[Integer[np.ndarray, "_"]]
)


class EncodedPrompts(NamedTuple):
    """Prompts as token ids, and what kind of result belongs to them."""

    rows: list[list[int]]
    single: bool  # one prompt, not a list of one
    tokenizer: Tokenizer | None  # to turn the result into text; None where ids were given


def encode_prompts(
    model: Nemotron,
    prompts: Prompts,
    read: Sequence[int] | None = None,
    *,
    behind: bool = False,
) -> EncodedPrompts:
    """Token ids of prompts in any of the forms above.

    Args:
        read: how many tokens a cache has read of each row. A text that continues such a row gets
            no beginning-of-text token, and may be empty.
        behind: whether all rows stand behind other tokens in the same way.

    Raises:
        ValueError: no prompts, an empty row of ids, text for a model without a tokenizer, an id
            outside the vocabulary, or something that is neither text nor token ids.
    """
    given = _as_list(prompts)
    # An empty list is one empty prompt where a single row of a cache is continued.
    single = isinstance(given, str) or (
        isinstance(given, list)
        and (_is_id(given[0]) if given else read is not None and len(read) == 1)
    )
    if not single and not isinstance(given, list):
        raise _wrong_prompt(given)
    rows = [given] if single else [_as_list(row) for row in given]
    if read is not None and len(rows) != len(read):
        raise ValueError(
            f"{len(rows)} prompts for a cache of {len(read)} rows: give one prompt for each row, "
            f"or make a cache with model.empty_cache({max(len(rows), 1)})."
        )
    counts = read or [int(behind)] * len(rows)
    if rows and all(isinstance(row, str) for row in rows):
        encoded = [_encode(model, row, count) for row, count in zip(rows, counts, strict=True)]
        return EncodedPrompts(encoded, single, model.tokenizer)
    for row in rows:
        if not isinstance(row, list) or not all(map(_is_id, row)):
            raise _wrong_prompt(row)
    if not rows or not all(len(row) or count for row, count in zip(rows, counts, strict=True)):
        raise ValueError(
            "every prompt needs at least one token: give a list of token ids such as "
            f"[{model.config.bos_token_id}] (bos_token_id) for each."
        )
    ids = [[token if type(token) is int else int(token) for token in row] for row in rows]
    vocabulary = model.config.vocab_size
    for row in ids:
        if row and (min(row) < 0 or max(row) >= vocabulary):
            wrong = next(token for token in row if not 0 <= token < vocabulary)
            raise ValueError(
                f"the token id {shown(wrong)} of a prompt is outside the vocabulary: expected 0 to "
                f"{vocabulary - 1:,}. Is this the model's tokenizer?"
            )
    return EncodedPrompts(ids, single, None)


def _encode(model: Nemotron, text: str, read: int) -> list[int]:
    """The ids of a text that stands behind `read` tokens."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise ValueError(
            f"the prompt {shown(text[:40])} is text, but this model has no tokenizer "
            "(model.tokenizer is None): set model.tokenizer, put tokenizer.json into the "
            "checkpoint folder, or give token ids."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the prompt {shown(text[:40])} has a lone surrogate at character {error.start}, which "
            "no text in UTF-8 has: read the text with errors='replace', or remove it."
        ) from None
    if read:
        return tokenizer.encode(text, add_special_tokens=False).ids
    ids = tokenizer.encode(text).ids or [model.config.bos_token_id]
    if max(ids) >= model.config.vocab_size:
        raise ValueError(
            f"the tokenizer gives the id {max(ids)}, but the model's vocabulary has "
            f"{model.config.vocab_size:,} entries: this tokenizer belongs to another model."
        )
    return ids


def _as_list(value: Any) -> Any:
    """A tensor, array or sequence as a list; text, bytes and everything else unchanged."""
    if isinstance(value, Tensor | np.ndarray):
        try:
            return value.tolist()
        except Exception:  # on the meta device, sparse, with data that is not there
            return value
    if isinstance(value, range) and len(value) > MAX_TOKENS:
        raise ValueError(f"the prompt {shown(value)} has more than {MAX_TOKENS:,} tokens.")
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        try:
            return list(value)
        except Exception as error:  # whatever a foreign sequence raises
            raise _wrong_prompt(value) from error
    return value


def _is_id(token: Any) -> bool:
    if type(token) is int:
        return True
    if isinstance(token, Tensor | np.ndarray):  # without axes it is one id, else a row
        return not token.ndim and not getattr(token, "is_meta", False) and _is_id(token.tolist())
    return isinstance(token, Integral) and not isinstance(token, bool)


def _wrong_prompt(prompt: Any) -> ValueError:
    if isinstance(prompt, bytes | bytearray | memoryview):
        return ValueError(
            f"the prompt {shown(prompt)} is of type {type(prompt).__name__}, which may be text or "
            "token ids: give text (bytes.decode() makes it), or list(prompt) for token ids."
        )
    return ValueError(
        f"the prompt {shown(prompt)} is not a list of token ids: expected one text, one list of "
        "token ids, several texts, or several lists of token ids, and not a mixture. Token ids are "
        "integers; in place of lists, tensors and NumPy arrays of one or two axes are accepted."
    )
