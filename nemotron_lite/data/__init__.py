"""Text for a small model: corpus, tokenizer, batches and baselines. `prepare` does all of it.

    data = prepare()                 a few seconds the first time, from the disk cache after that
    data.tokenizer                   byte-level BPE, 4096 tokens
    data.batch(0, batch_size=8, seq_len=256, seed=0)
    data.held_out                    documents never trained on
    data.baselines                   gzip, LZMA and n-gram bits per byte of those documents

    prepared_text.py     `prepare`
    prepared_mixture.py  `open_mixture`: the shipped lite model's text, from a manifest
    manifest.py          what a model is trained on, with versions and hashes
    make_manifest.py     the command that writes one
    sources.py           the standard library and the packages of this project, as named sources
    duplicates.py        copies, and near copies of held-out files
    mixture.py           batches of several sources, drawn by weight
    long_context.py      long rows, in turn with short ones
    corpus.py            a folder, a file or the standard library, and its held-out part
    text_files.py        which files are read, and which are left out
    jsonl.py             JSON Lines
    tokenizer.py         byte-level BPE
    batches.py           the sampler
    windows.py           windows within one document
    baselines.py         gzip, LZMA and n-grams
    text_cache.py        prepared texts on the disk
    tasks/               synthetic tasks

The disk cache is in `$XDG_CACHE_HOME/nemotron_lite` (`~/.cache/nemotron_lite`). It has one folder
for each text and setting. Folders are written atomically and checked before they are used. The disk
cache can be deleted at any time; it is then built again.
"""

from nemotron_lite.data.baselines import Baselines, NGram, measure_baselines
from nemotron_lite.data.batches import (
    Batch,
    BatchSource,
    ConcatenatedDocuments,
    concatenate_documents,
)
from nemotron_lite.data.corpus import Corpus, CorpusError, Document, load_corpus
from nemotron_lite.data.jsonl import JsonlText, read_jsonl
from nemotron_lite.data.long_context import DocumentWindows, LongAndShort
from nemotron_lite.data.manifest import Manifest, ManifestError, read_manifest
from nemotron_lite.data.mixture import Mixture, Phase
from nemotron_lite.data.prepared_mixture import MixtureData, open_mixture
from nemotron_lite.data.prepared_text import prepare
from nemotron_lite.data.text_data import HeldOut, TextData
from nemotron_lite.data.tokenizer import (
    CHAT_PIECES,
    CHAT_TOKENS,
    END_OF_TEXT,
    END_OF_TEXT_ID,
    chat_ids,
    decode,
    encode_documents,
    train_tokenizer,
)
from nemotron_lite.data.windows import sample_windows
from nemotron_lite.files import cache_folder

__all__ = [
    "CHAT_PIECES",
    "CHAT_TOKENS",
    "END_OF_TEXT",
    "END_OF_TEXT_ID",
    "Baselines",
    "Batch",
    "BatchSource",
    "ConcatenatedDocuments",
    "Corpus",
    "CorpusError",
    "Document",
    "DocumentWindows",
    "HeldOut",
    "JsonlText",
    "LongAndShort",
    "Manifest",
    "ManifestError",
    "Mixture",
    "MixtureData",
    "NGram",
    "Phase",
    "TextData",
    "cache_folder",
    "chat_ids",
    "concatenate_documents",
    "decode",
    "encode_documents",
    "load_corpus",
    "measure_baselines",
    "open_mixture",
    "prepare",
    "read_jsonl",
    "read_manifest",
    "sample_windows",
    "train_tokenizer",
]
