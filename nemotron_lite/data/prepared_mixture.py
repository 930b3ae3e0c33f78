"""`open_mixture`: the text of a manifest, read from this machine, encoded, and ready to train on.

    data = open_mixture(batches=4000)               the shipped lite model's text
    data.batch(0, batch_size=8, seq_len=256, seed=0)
    data.held_out                                   the same files as `prepare().held_out`

The first call reads the packages, trains the tokenizer and encodes everything. The result is kept
in the disk cache, like that of `prepare`, and later calls only open it.

The text is compared with the manifest first, and other content is refused. With `strict=False` the
differences are logged as a warning, and the text of this machine is taken as it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, SupportsIndex

import tokenizers
from tokenizers import Tokenizer

from nemotron_lite.data import text_cache
from nemotron_lite.data.batches import Batch, ConcatenatedDocuments, concatenate_documents
from nemotron_lite.data.corpus import Document, load_corpus
from nemotron_lite.data.manifest import (
    LITE,
    Manifest,
    ManifestError,
    TokenizerSettings,
    compare,
    describe_sources,
    manifest_of,
    read_manifest,
    refuse,
)
from nemotron_lite.data.mixture import Mixture, Phase
from nemotron_lite.data.prepared_text import token_dtype
from nemotron_lite.data.sources import SOURCES, FoundSources, read_sources
from nemotron_lite.data.text_cache import CachedFiles
from nemotron_lite.data.text_data import HeldOut
from nemotron_lite.data.tokenizer import check_vocabulary, encode_documents, train_tokenizer
from nemotron_lite.input_files import parse_json

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MixtureData:
    """The prepared text of a manifest: a `BatchSource`, the tokenizer and the held-out documents.

    Attributes:
        tokenizer: trained on the sources.
        train: the sources with their weights.
        held_out: documents never trained on.
        manifest: what was read.
        checksum: SHA-256 over the tokenizer and all tokens, held-out ones included.
    """

    tokenizer: Tokenizer
    train: Mixture
    held_out: HeldOut
    manifest: Manifest
    checksum: str

    def batch(
        self,
        index: SupportsIndex,
        *,
        batch_size: SupportsIndex,
        seq_len: SupportsIndex,
        seed: SupportsIndex,
    ) -> Batch:
        """A batch of training windows; see `Mixture.batch`."""
        return self.train.batch(index, batch_size=batch_size, seq_len=seq_len, seed=seed)

    def fingerprint(self) -> str:
        """Identifies text and order: equal if tokens, weights and places of the phases are."""
        phases = [
            [start, sorted(phase.weights.items())]
            for phase, start in zip(self.train.phases, self.train.phase_starts, strict=True)
        ]
        return hashlib.sha256(f"{self.checksum}\n{json.dumps(phases)}".encode()).hexdigest()


def open_mixture(
    manifest: Manifest | str | os.PathLike[str] = LITE,
    *,
    batches: SupportsIndex,
    vocab_size: SupportsIndex | None = None,
    phases: Sequence[Phase] | None = None,
    strict: bool = True,
    cache: str | Path | None = None,
) -> MixtureData:
    """The text of a manifest, from the packages of this machine or from the disk cache.

    Args:
        manifest: a manifest or the path of one; the shipped lite model's by default.
        batches: number of batches of the run, which places the phases.
        vocab_size: of the tokenizer; the manifest's by default.
        phases: other weights than the manifest's.
        strict: refuse a machine whose text is not that of the manifest.
        cache: folder for the results; `cache_folder()` by default.

    Raises:
        FileNotFoundError, FileError: no readable manifest.
        ManifestError: `strict`, and the text of this machine is another one.
        CorpusError: there is no standard library to read.
        TypeError, ValueError: an argument out of range.
    """
    wanted = manifest if isinstance(manifest, Manifest) else read_manifest(manifest)
    settings = wanted.tokenizer
    if vocab_size is not None:
        size = check_vocabulary(vocab_size, settings.special_tokens)
        settings = replace(settings, vocab_size=size)
    key: dict[str, str | int] = {
        "manifest": wanted.sha256_of_text(),
        "tokenizers": tokenizers.__version__,
        "vocab_size": settings.vocab_size,
    }
    if not strict:
        key["machine"] = _machine(wanted)
    found = text_cache.through_cache(
        cache, key, FILES, _opened, lambda: _build(wanted, settings, strict)
    )
    if found.differences:
        _log.warning("%s", _note(found.differences))
    train = Mixture(found.sources, wanted.phases if phases is None else phases, batches)
    read = replace(found.manifest, phases=train.phases)
    return MixtureData(found.tokenizer, train, found.held_out, read, found.checksum)


FILES = (
    "tokenizer.json", "manifest.json", "held_out.npy", "held_out_starts.npy",
    *(f"train{i}{end}.npy" for i in range(len(SOURCES)) for end in ("", "_starts")),
)  # fmt: skip


@dataclass(frozen=True)
class _Opened:
    """The files of a mixture, opened."""

    tokenizer: Tokenizer
    sources: Mapping[str, ConcatenatedDocuments]
    held_out: HeldOut
    manifest: Manifest
    differences: tuple[str, ...]
    checksum: str


def _opened(found: CachedFiles) -> _Opened:
    sources = {
        name: ConcatenatedDocuments(
            found.arrays[f"train{i}.npy"], text_cache.array(found.contents[f"train{i}_starts.npy"])
        )
        for i, name in enumerate(SOURCES)
    }
    return _Opened(
        Tokenizer.from_str(found.contents["tokenizer.json"].decode()),
        sources,
        text_cache.held_out_documents(found),
        manifest_of(parse_json(found.contents["manifest.json"].decode())),
        tuple(found.meta["differences"]),
        text_cache.checksum(found),
    )


def _build(
    wanted: Manifest, settings: TokenizerSettings, strict: bool
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The contents of the files of a mixture, and what its `meta.json` says beside the key."""
    corpus = load_corpus()
    found = read_sources(corpus, wanted.packages)
    here = describe_sources(found, corpus, wanted.phases, settings)
    differences = compare(wanted, here)
    if differences and strict:
        raise refuse(differences, wanted)
    for name in SOURCES:
        if not found.documents(name):
            raise ManifestError(
                f"this machine has no text for {name!r}: install the packages of the manifest."
            )
    tokenizer = train_tokenizer(
        _sample(found, wanted.phases[0].weights, settings.train_bytes),
        vocab_size=settings.vocab_size,
        special_tokens=settings.special_tokens,
    )
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "manifest.json": here.to_json().encode(),
        **_encoded(tokenizer, "held_out", corpus.held_out),
    }
    for i, name in enumerate(SOURCES):
        files |= _encoded(tokenizer, f"train{i}", found.documents(name))
    return files, {"held_out_bytes": corpus.held_out_bytes, "differences": differences}


def _encoded(tokenizer: Tokenizer, name: str, documents: Sequence[Document]) -> dict[str, bytes]:
    """Two files: the tokens of documents, and where each document starts."""
    texts = [document.content.decode("utf-8") for document in documents]
    tokens, starts = concatenate_documents(encode_documents(tokenizer, texts))
    return {
        f"{name}.npy": text_cache.npy(tokens.astype(token_dtype(tokenizer))),
        f"{name}_starts.npy": text_cache.npy(starts),
    }


def _sample(found: FoundSources, weights: Mapping[str, float], num_bytes: int) -> list[str]:
    """Texts of all sources in the shares of the weights, in the order of a hash of their names."""
    texts = []
    for name in SOURCES:
        left = num_bytes * weights.get(name, 0.0)
        documents = found.documents(name)
        documents.sort(key=lambda d: hashlib.sha256(os.fsencode(d.name)).digest())
        for document in documents:
            if left <= 0:
                break
            texts.append(document.content.decode("utf-8"))
            left -= len(document.content)
    return texts


def _machine(wanted: Manifest) -> str:
    """The versions of this machine, for the key of a text that is not the manifest's."""
    versions = [platform.python_version()]
    for name in wanted.packages:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return hashlib.sha256("\n".join(versions).encode()).hexdigest()


def _note(differences: Sequence[str]) -> str:
    return (
        f"The text of this machine differs from the manifest in {len(differences)} places, such as:"
        f" {'; '.join(differences[:3])}."
    )
