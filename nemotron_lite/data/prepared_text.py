"""`prepare`: corpus, tokenizer, tokens and baselines in one call, from the disk cache if it can.

The key of a cached text holds everything that it depends on: every byte of the corpus and its
split, the settings, and the versions of Python and of the libraries that train the tokenizer and
compress the baselines.

A cache that is damaged, or that cannot be written, costs time and nothing else. It is named in one
line of the log (logger `nemotron_lite.data`), and the text is prepared again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import zlib
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from nemotron_lite.arguments import integer
from nemotron_lite.data import text_cache
from nemotron_lite.data.baselines import measure_baselines
from nemotron_lite.data.batches import concatenate_documents
from nemotron_lite.data.checks import several
from nemotron_lite.data.corpus import Corpus, load_corpus
from nemotron_lite.data.text_data import TextData
from nemotron_lite.data.text_files import TEXT_LIMIT
from nemotron_lite.data.tokenizer import (
    CHAT_TOKENS,
    END_OF_TEXT_ID,
    LARGEST_ID,
    check_special_tokens,
    check_vocabulary,
    encode_documents,
    train_tokenizer,
)

_log = logging.getLogger(__name__)


def prepare(
    *,
    vocab_size: SupportsIndex = 4096,
    root: str | Path | None = None,
    held_out_bytes: SupportsIndex = 192 * 1024,
    cache: str | Path | None = None,
    tokenizer: Tokenizer | None = None,
    special_tokens: Sequence[str] = CHAT_TOKENS,
    special_ids: Sequence[SupportsIndex] = (END_OF_TEXT_ID, END_OF_TEXT_ID),
    text_field: str = "text",
    held_out_names: Collection[str] | None = None,
) -> TextData:
    """Read the corpus, train the tokenizer, encode, and measure the baselines; or read the cache.

    Args:
        vocab_size: number of tokens, `<|endoftext|>` and the special ones included.
        root: a folder, a text file or a `.jsonl` file, as in `load_corpus`; this interpreter's
            standard library by default.
        held_out_bytes: size of the text that is never trained on.
        cache: folder for the results; `cache_folder()` by default.
        tokenizer: of another model, or of an earlier run; by default one is trained. `vocab_size`
            and `special_tokens` have no meaning with it.
        special_tokens: texts that are one token each, as in `train_tokenizer`.
        special_ids: the tokens of a tokenizer that begin and end a document.
        text_field: the field of the objects in JSON Lines files that holds the text.
        held_out_names: the documents to hold out, in place of `held_out_bytes` (`load_corpus`).

    Raises:
        CorpusError: no text, or too little of it.
        TypeError: an argument of another type.
        ValueError: a vocabulary that is too small, or too large for the text.
    """
    special_tokens = check_special_tokens(special_tokens)
    vocab_size = check_vocabulary(vocab_size, special_tokens)
    held_out_bytes = integer("held_out_bytes", held_out_bytes, low=1, high=TEXT_LIMIT)
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"tokenizer is {type(tokenizer).__name__}: expected tokenizers.Tokenizer.")
    begin, end = _two_ids(special_ids)
    corpus = load_corpus(
        root, held_out_bytes=held_out_bytes, text_field=text_field, held_out_names=held_out_names
    )
    key: dict[str, str | int] = {
        "python": platform.python_version(),
        "tokenizers": tokenizers.__version__,
        "numpy": np.__version__,
        "zlib": zlib.ZLIB_RUNTIME_VERSION,
        "vocab_size": vocab_size,
        "special_tokens": json.dumps(special_tokens),
        "held_out_bytes": held_out_bytes,
        "begin": begin,
        "end": end,
        "text": corpus.fingerprint(),
    }
    if tokenizer is not None:
        del key["vocab_size"], key["special_tokens"]
        key["tokenizer"] = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    wanted = tokenizer or _Training(vocab_size, special_tokens)
    return text_cache.through_cache(
        cache,
        key,
        text_cache.FILES,
        text_cache.text_of,
        lambda: _build(corpus, wanted, (begin, end)),
    )


def _two_ids(special_ids: Any) -> tuple[int, int]:
    found = several("special_ids", special_ids, "two token ids")
    if len(found) != 2:
        raise ValueError(f"special_ids has {len(found)} entries: expected two token ids.")
    begin, end = (integer("special_ids", token, low=0, high=LARGEST_ID) for token in found)
    return begin, end


class _Training(NamedTuple):
    """The settings of a tokenizer that is to be trained."""

    vocab_size: int
    special_tokens: tuple[str, ...]


def _build(
    corpus: Corpus,
    tokenizer: Tokenizer | _Training,
    special_ids: tuple[int, int],
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The contents of the files of a text, and what its `meta.json` says beside the key."""
    texts = [document.content.decode("utf-8") for document in corpus.train]
    held_out_texts = [document.content.decode("utf-8") for document in corpus.held_out]
    if isinstance(tokenizer, _Training):
        tokenizer = train_tokenizer(texts, **tokenizer._asdict())
    files = {"tokenizer.json": tokenizer.to_str(pretty=True).encode()}
    begin, end = special_ids
    dtype = token_dtype(tokenizer, special_ids)
    for split, split_texts in (("train", texts), ("held_out", held_out_texts)):
        tokens, starts = concatenate_documents(
            encode_documents(tokenizer, split_texts, start=begin, end=end)
        )
        files[f"{split}.npy"] = text_cache.npy(tokens.astype(dtype))
        files[f"{split}_starts.npy"] = text_cache.npy(starts)
    baselines = measure_baselines(
        [d.content for d in corpus.train], [d.content for d in corpus.held_out]
    )
    sizes = {"train_bytes": corpus.train_bytes, "held_out_bytes": corpus.held_out_bytes}
    return files, {**sizes, "baselines": asdict(baselines)}


def token_dtype(tokenizer: Tokenizer, special_ids: Sequence[int] = ()) -> type[np.integer[Any]]:
    """The smallest dtype for the tokens of a file: uint16 or int32."""
    largest = max(*special_ids, *tokenizer.get_vocab(with_added_tokens=True).values())
    return np.uint16 if largest < 1 << 16 else np.int32
