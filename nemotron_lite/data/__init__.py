"""Text for a small model: corpus, tokenizer, batches and baselines. `prepare` does all of it.

    data = prepare()                 a few seconds the first time, from the disk cache after that
    data.tokenizer                   byte-level BPE, 4096 tokens
    data.batch(0, batch_size=8, seq_len=256, seed=0)
    data.held_out                    documents never trained on
    data.baselines                   gzip, LZMA and n-gram bits per byte of those documents

The disk cache is in `$XDG_CACHE_HOME/nemotron_lite` (`~/.cache/nemotron_lite`). It has one folder
for each text and setting. The folder's name is a hash of the Python version, the settings and every
byte of the corpus. Folders are written atomically (`nemotron_lite/files.py`), so an interrupted
`prepare` leaves no folder that looks complete. The disk cache can be deleted at any time; it is
then built again.
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
from nemotron_lite.data.batches import (
    Batch,
    BatchSource,
    ConcatenatedDocuments,
    concatenate_documents,
)
from nemotron_lite.data.corpus import Corpus, CorpusError, Document, load_corpus
from nemotron_lite.data.tokenizer import (
    END_OF_TEXT,
    END_OF_TEXT_ID,
    decode,
    encode_documents,
    train_tokenizer,
)
from nemotron_lite.data.windows import sample_windows
from nemotron_lite.files import atomic_folder

__all__ = [
    "END_OF_TEXT",
    "END_OF_TEXT_ID",
    "Baselines",
    "Batch",
    "BatchSource",
    "ConcatenatedDocuments",
    "Corpus",
    "CorpusError",
    "Document",
    "HeldOut",
    "NGram",
    "TextData",
    "cache_folder",
    "concatenate_documents",
    "decode",
    "encode_documents",
    "load_corpus",
    "measure_baselines",
    "prepare",
    "sample_windows",
    "train_tokenizer",
]

_FORMAT = 1  # version of the cached files; raise it when their layout or the corpus rules change


@dataclass(frozen=True)
class HeldOut:
    """Documents never trained on.

    `documents[i]` holds one file as `<|endoftext|> tokens <|endoftext|>`. `num_bytes` is the size
    of all files together.
    """

    documents: tuple[np.ndarray, ...]
    num_bytes: int


@dataclass(frozen=True)
class TextData:
    """A prepared corpus: a `BatchSource` for training, the held-out documents, the baselines."""

    tokenizer: Tokenizer
    train: ConcatenatedDocuments
    held_out: HeldOut
    baselines: Baselines
    train_bytes: int

    def batch(self, index: int, *, batch_size: int, seq_len: int, seed: int) -> Batch:
        """A batch of training windows; see `ConcatenatedDocuments.batch`."""
        return self.train.batch(index, batch_size=batch_size, seq_len=seq_len, seed=seed)

    def fingerprint(self) -> str:
        """Identifies the training text; see `ConcatenatedDocuments.fingerprint`."""
        return self.train.fingerprint()


def cache_folder() -> Path:
    """The folder of prepared texts: `nemotron_lite` in `$XDG_CACHE_HOME` or `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nemotron_lite"


def prepare(
    *,
    vocab_size: int = 4096,
    root: str | Path | None = None,
    held_out_bytes: int = 192 * 1024,
    cache: str | Path | None = None,
) -> TextData:
    """Read the corpus, train the tokenizer, encode, and measure the baselines; or read the cache.

    Args:
        vocab_size: number of tokens, `<|endoftext|>` included.
        root: folder of `.py` files; this interpreter's standard library by default.
        held_out_bytes: size of the text that is never trained on.
        cache: folder for the results; `cache_folder()` by default.

    Raises:
        CorpusError: no text, or too little of it.
        ValueError: a vocabulary that is too small, or too large for the text.
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
            tokens, starts = concatenate_documents(encode_documents(tokenizer, split_texts))
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
        train=ConcatenatedDocuments(train, np.load(folder / "train_starts.npy")),
        held_out=HeldOut(tuple(np.split(held_out, bounds)), meta["held_out_bytes"]),
        baselines=Baselines(**meta["baselines"]),
        train_bytes=meta["train_bytes"],
    )
