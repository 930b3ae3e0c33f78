"""The tokenizer of a checkpoint folder: read, compared, and checked against the vocabulary.

Its ids must be rows of the embedding. Whether two tokenizers are the same is asked of their tokens
and ids: a file can be written in many ways.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from nemotron_lite.checkpoint.errors import printable
from nemotron_lite.config import NemotronConfig
from nemotron_lite.input_files import FileError, read_bytes, read_text

TOKENIZER = "tokenizer.json"


def read_tokenizer(
    folder: Path, config: NemotronConfig | None
) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer of the folder, if any, without truncation and padding; and the problems.

    A call such as `tokenizer(texts, truncation=True)` in transformers leaves its truncation and
    padding in the tokenizer, and so in the tokenizer.json that is saved later. They belong to that
    call and not to the model: transformers sets both anew at every call. Here they would cut
    prompts, or add padding tokens to them, without a message.
    """
    try:
        text = read_text(folder / TOKENIZER)
    except FileNotFoundError:
        return None, []
    except FileError as error:
        return None, [f"tokenizer.json {error.fault}; download or copy it again"]
    try:
        tokenizer = Tokenizer.from_str(text)
        highest = highest_id(tokenizer)
    except BaseException as error:  # the library raises bare Exception, and panics are not even one
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        cause = printable(str(error), 200)
        return None, [f"tokenizer.json is unreadable ({cause}); download or copy it again"]
    if config is not None and highest >= config.vocab_size:
        return None, [
            f"tokenizer.json has ids up to {highest:,}, but the vocabulary of config.json has only "
            f"{config.vocab_size:,} entries; take the file that belongs to this model"
        ]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, []


def tokenizer_in(folder: Path) -> Tokenizer | None:
    """The tokenizer that is in a folder; None if there is none or it is damaged."""
    try:
        return parsed(read_bytes(folder / TOKENIZER))
    except (FileError, OSError):
        return None


def parsed(content: bytes) -> Tokenizer | None:
    """The tokenizer in a file's content; None if it is damaged."""
    try:
        return Tokenizer.from_buffer(content)
    except BaseException as error:  # the library raises bare Exception, and panics are not even one
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return None


def same_tokens(one: Tokenizer | None, other: Tokenizer | None) -> bool:
    """Whether two tokenizers have the same tokens under the same ids."""
    if one is None or other is None or one is other:
        return one is other
    return bool(one.get_vocab(True) == other.get_vocab(True))


def plain_tokenizer(tokenizer: Any) -> Tokenizer | None:
    """The `tokenizers.Tokenizer` itself; transformers' fast tokenizers have one inside.

    Raises:
        TypeError: something else.
    """
    inside = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if inside is not None and not isinstance(inside, Tokenizer):
        kind = type(tokenizer).__name__
        raise TypeError(f"tokenizer is a {kind}: expected a tokenizers.Tokenizer or None.")
    return inside


def vocabulary_problems(tokenizer: Tokenizer | None, config: NemotronConfig) -> list[str]:
    """The problem with a tokenizer to be saved whose ids are beyond the vocabulary."""
    if tokenizer is None or (highest := highest_id(tokenizer)) < config.vocab_size:
        return []
    return [
        f"the tokenizer has ids up to {highest}, but the model's vocabulary has only "
        f"{config.vocab_size} entries: give the tokenizer of this model"
    ]


def highest_id(tokenizer: Tokenizer) -> int:
    """The largest id of its tokens; -1 without any."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
