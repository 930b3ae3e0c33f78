"""Text for a small model: corpus, tokenizer, batches, and what to beat. `prepare` does it all.

    data = prepare()                 a few seconds the first time, from the cache after that
    data.tokenizer                   byte-level BPE, 4096 tokens
    data.batch(0, batch_size=8, length=256, seed=0)
    data.held_out                    documents never trained on
    data.baselines                   gzip, LZMA and n-gram bits per byte of those documents

The cache lives in `$XDG_CACHE_HOME/nemotron_lite` (`~/.cache/nemotron_lite`), one folder per text
and setting: its name is a hash of the Python version, the settings and every byte of the corpus. A
folder is built under another name and renamed when it is whole, so an interrupted set-up leaves
nothing that could be mistaken for a finished one. Deleting the cache costs only the time to refill.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from nemotron_lite.data.baselines import Baselines, NGram, measure_baselines
from nemotron_lite.data.batches import Batch, BatchSource, PackedTokens, pack
from nemotron_lite.data.corpus import Corpus, CorpusError, Document, load_corpus
from nemotron_lite.data.passages import passages
from nemotron_lite.data.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    decode,
    encode_documents,
    train_tokenizer,
)
from nemotron_lite.files import atomic_folder

__all__ = [
    "END_OF_TEXT", "END_OF_TEXT_ID", "Baselines", "Batch", "BatchSource", "Corpus", "CorpusError",
    "Document", "HeldOut", "NGram", "PackedTokens", "TextData", "cache_folder", "decode",
    "encode_documents", "load_corpus", "measure_baselines", "pack", "passages", "prepare",
    "train_tokenizer",
]  # fmt: skip

_FORMAT = 1  # of the cached files; a change of layout or of the corpus rules raises it


@dataclass(frozen=True)
class HeldOut:
    """Documents never trained on.

    `documents[i]` holds `<|endoftext|> tokens <|endoftext|>` of one file; `num_bytes` is the size
    of all the files.
    """

    documents: tuple[np.ndarray, ...]
    num_bytes: int


@dataclass(frozen=True)
class TextData:
    """A prepared corpus: a `BatchSource` for training, the held-out documents, the baselines."""

    tokenizer: Tokenizer
    train: PackedTokens
    held_out: HeldOut
    baselines: Baselines
    train_bytes: int

    def batch(self, index: int, *, batch_size: int, length: int, seed: int) -> Batch:
        """A batch of training windows; see `PackedTokens.batch`."""
        return self.train.batch(index, batch_size=batch_size, length=length, seed=seed)


def cache_folder() -> Path:
    """Where prepared texts are kept: `nemotron_lite` in `$XDG_CACHE_HOME` or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nemotron_lite"


def prepare(
    *,
    vocab_size: int = 4096,
    root: str | Path | None = None,
    held_out_bytes: int = 192 * 1024,
    cache: str | Path | None = None,
) -> TextData:
    """Read the corpus, train the tokenizer, encode, measure the baselines; or open the cache.

    Args:
        vocab_size: tokens, `<|endoftext|>` included.
        root: folder of `.py` files; this interpreter's standard library by default.
        held_out_bytes: size of the side that is never trained on.
        cache: folder for the results; `cache_folder()` by default.

    Raises:
        CorpusError: no text, or too little.
        ValueError: an impossible vocabulary.
    """
    corpus = load_corpus(root, held_out_bytes=held_out_bytes)
    key = json.dumps(
        [_FORMAT, platform.python_version(), vocab_size, held_out_bytes, corpus.fingerprint()]
    )
    name = f"text-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    folder = (Path(cache) if cache is not None else cache_folder()) / name
    if not folder.is_dir():
        _build(corpus, vocab_size, folder)
    return _open(folder)


def _build(corpus: Corpus, vocab_size: int, folder: Path) -> None:
    texts = [document.content.decode("utf-8") for document in corpus.train]
    held_out_texts = [document.content.decode("utf-8") for document in corpus.held_out]
    with atomic_folder(folder) as temporary:
        tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
        tokenizer.save(str(temporary / "tokenizer.json"))
        dtype = np.uint16 if vocab_size <= 1 << 16 else np.int32
        for split, split_texts in (("train", texts), ("held_out", held_out_texts)):
            tokens, starts = pack(encode_documents(tokenizer, split_texts))
            np.save(temporary / f"{split}.npy", tokens.astype(dtype))
            np.save(temporary / f"{split}_starts.npy", starts)
        baselines = measure_baselines(
            [d.content for d in corpus.train], [d.content for d in corpus.held_out]
        )
        sizes = {"train_bytes": corpus.train_bytes, "held_out_bytes": corpus.held_out_bytes}
        meta = {**sizes, "baselines": asdict(baselines)}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))


def _open(folder: Path) -> TextData:
    meta = json.loads((folder / "meta.json").read_text())
    held_out = np.load(folder / "held_out.npy").astype(np.int64)
    bounds = np.load(folder / "held_out_starts.npy")[1:]
    train = np.load(folder / "train.npy", mmap_mode="r")
    return TextData(
        tokenizer=Tokenizer.from_file(str(folder / "tokenizer.json")),
        train=PackedTokens(train, np.load(folder / "train_starts.npy")),
        held_out=HeldOut(tuple(np.split(held_out, bounds)), meta["held_out_bytes"]),
        baselines=Baselines(**meta["baselines"]),
        train_bytes=meta["train_bytes"],
    )
