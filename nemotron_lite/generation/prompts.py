"""Prompts as people give them, text or token ids, one or many; and text from the tokens written.

    "def f"                        one text                   the result is one text
    ["def f", "class A"]           several texts              a list of texts
    [5, 17, 3], or a `t` tensor    the token ids of one       one list of ids
    [[5, 17], [3]], `b t` tensor   the ids of several         a list of lists

Instead of a tensor, a NumPy array may be given; both may have any integer dtype. Bytes are refused:
they may be text or ids, and nobody can tell which.

So what comes out is of the kind that went in. Text is read with `model.tokenizer`, whose
tokenizer.json alone decides whether a beginning-of-text token (BOS) is put in front. An empty text
becomes the config's `bos_token_id`, because a prompt needs at least one token. Token ids are taken
as they are.

Left out: chat templates.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from nemotron_lite.model import Nemotron

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


def encode_prompts(model: Nemotron, prompts: Prompts) -> EncodedPrompts:
    """Token ids of prompts in any of the forms above.

    Raises:
        ValueError: no prompts, an empty row of ids, text for a model without a tokenizer, or
            something that is neither text nor token ids.
    """
    given = _as_list(prompts)
    single = isinstance(given, str) or (
        isinstance(given, list) and len(given) > 0 and _is_id(given[0])
    )
    if not single and not isinstance(given, list):
        raise _wrong_prompt(given)
    rows = [given] if single else [_as_list(row) for row in given]
    if rows and all(isinstance(row, str) for row in rows):
        tokenizer = model.tokenizer
        if tokenizer is None:
            raise ValueError(
                f"the prompt {rows[0][:40]!r} is text, but this model has no tokenizer "
                "(model.tokenizer is None): set model.tokenizer, put tokenizer.json into the "
                "checkpoint folder, or give token ids."
            )
        encoded = [tokenizer.encode(row).ids or [model.config.bos_token_id] for row in rows]
        return EncodedPrompts(encoded, single, tokenizer)
    for row in rows:
        if not isinstance(row, list) or not all(map(_is_id, row)):
            raise _wrong_prompt(row)
    if not rows or not all(len(row) for row in rows):
        raise ValueError(
            "every prompt needs at least one token: give a list of token ids such as "
            f"[{model.config.bos_token_id}] (bos_token_id) for each."
        )
    return EncodedPrompts([[int(token) for token in row] for row in rows], single, None)


def _as_list(value: Any) -> Any:
    """A tensor, array or sequence as a list; text, bytes and everything else unchanged."""
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview):
        return list(value)
    return value


def _is_id(token: Any) -> bool:
    return isinstance(token, Integral) and not isinstance(token, bool)


def _wrong_prompt(prompt: Any) -> ValueError:
    shown = reprlib.repr(prompt)
    if isinstance(prompt, bytes | bytearray | memoryview):
        return ValueError(
            f"the prompt {shown} is of type {type(prompt).__name__}, which may be text or token "
            "ids: give text (bytes.decode() makes it), or list(prompt) for token ids."
        )
    return ValueError(
        f"the prompt {shown} is not a list of token ids: expected one text, one list of token ids, "
        "several texts, or several lists of token ids, and not a mixture. Token ids are integers; "
        "in place of lists, tensors and NumPy arrays of one or two axes are accepted."
    )


class TextRow:
    """Turns the tokens of one row into text while they are written.

    Args:
        tokenizer: of the model.
        prompt: the row's prompt, which the first piece of text continues.
        stop: tokens that end the row and are not shown.
        max_new_tokens: tokens after which the row ends.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: list[int], stop: frozenset[int], max_new_tokens: int
    ) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self._stop, self._max_new_tokens = stop, max_new_tokens
        self._decoder = DecodeStream(ids=prompt, skip_special_tokens=True)
        self._tokens: list[int] = []
        self._length = 0  # characters given so far

    def add(self, token: int | None) -> str:
        """The text that this token completes; often nothing, for a part of a character.

        The last token of the row gives the rest, even if its last character is not complete.
        """
        if token is None:
            return ""
        self._tokens.append(token)
        if token in self._stop or len(self._tokens) >= self._max_new_tokens:
            whole = continuation(self._tokenizer, self._prompt, self._tokens, self._stop)
            return whole[self._length :]
        piece = self._decoder.step(self._tokenizer, token) or ""
        self._length += len(piece)
        return piece


def continuation(
    tokenizer: Tokenizer, prompt: list[int], tokens: list[int], stop: frozenset[int]
) -> str:
    """The text of `tokens` behind `prompt`, without the stop token at its end."""
    if tokens and tokens[-1] in stop:
        tokens = tokens[:-1]
    before = tokenizer.decode(prompt)
    return tokenizer.decode(prompt + tokens)[len(before) :]
