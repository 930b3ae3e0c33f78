"""Baselines: gzip, LZMA and an n-gram model, in bits per byte of the held-out text.

A loss of 3.1 alone does not tell whether a model is good. Bits per byte can be compared with any
compressor, because a model that gives the next symbol probability p can code it in -log2 p bits
(Shannon 1948). Every function here scores every byte of the held-out files that `train.evaluate`
scores.

    gzip    DEFLATE level 9 over the held-out files, joined into one stream. It has seen no other
            text.
    lzma    what the held-out files add to an archive of the training text:
            |C(train + held out)| - |C(train)|. It may copy any phrase of the training text.
    n-gram  a byte model of order n trained on the training text, with the interpolation of Witten
            and Bell (1991, method C): a context c that was followed n(c) times by d(c) different
            bytes gives  p(x | c) = (n(c, x) + d(c) p(x | c')) / (n(c) + d(c)),  where c' is c
            without its oldest byte. Below the empty context the distribution is uniform, 1/256.

The n-gram counts are sorted arrays of 64-bit keys (eight bytes fit in one) instead of dictionaries.
Nine million training bytes are counted in seconds that way.

Left out: context mixing (PPM with escape symbols, PAQ), which is slow and far better than these.
"""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np

from nemotron_lite.arguments import integer
from nemotron_lite.data.checks import byte_documents

MAX_ORDER = 8  # bytes in one 64-bit key: the predicted one and seven before it


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of the held-out text; lower is better."""

    gzip: float
    lzma: float
    ngram: float
    ngram_order: int


def measure_baselines(
    train: Sequence[bytes], held_out: Sequence[bytes], *, order: SupportsIndex = 6
) -> Baselines:
    """All three baselines on the same held-out bytes. The module text says what each has seen.

    Raises:
        ValueError: no held-out bytes, or an order outside 1 to 8.
    """
    order = integer("order", order, low=1, high=MAX_ORDER)
    train, held_out = byte_documents("train", train), byte_documents("held_out", held_out)
    if not any(held_out):
        raise ValueError("held_out has no bytes: give at least one document that is not empty.")
    return Baselines(
        gzip=gzip_bits_per_byte(held_out),
        lzma=lzma_bits_per_byte(train, held_out),
        ngram=NGram(train, order=order).bits_per_byte(held_out),
        ngram_order=order,
    )


def gzip_bits_per_byte(documents: Sequence[bytes]) -> float:
    """Size of `gzip -9` of the joined documents, header and checksum included, per byte."""
    text = _joined(documents)
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)


def lzma_bits_per_byte(train: Sequence[bytes], documents: Sequence[bytes]) -> float:
    """The bits that the joined documents add to an LZMA archive of the training text, per byte.

    The LZMA dictionary is large enough for all of the training text.
    """
    text, before = _joined(documents), b"".join(byte_documents("train", train))
    with ThreadPoolExecutor(2) as pool:  # lzma releases the interpreter lock
        with_text, without = pool.map(_lzma_size, (before + text, before))
    return 8 * (with_text - without) / len(text)


def _lzma_size(text: bytes) -> int:
    dictionary = max(1 << 12, 1 << math.ceil(math.log2(len(text) + 1)))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 4, "dict_size": dictionary}]
    return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters))


def _joined(documents: Sequence[bytes]) -> bytes:
    text = b"".join(byte_documents("documents", documents))
    if not text:
        raise ValueError(
            "the documents hold no bytes: give at least one document that is not empty."
        )
    return text


class NGram:
    """A byte n-gram with Witten-Bell interpolation, trained on construction.

    Each document starts from the empty context: no byte is predicted from another document.

    Args:
        documents: training text.
        order: length of an n-gram in bytes, the predicted byte included; 1 to 8.

    Raises:
        ValueError: an order outside 1 to 8.
    """

    def __init__(self, documents: Sequence[bytes], *, order: SupportsIndex = 6) -> None:
        order = integer("order", order)
        if not 1 <= order <= MAX_ORDER:
            shown = order if abs(order) < 1000 else "…"
            raise ValueError(f"order={shown} does not work: expected 1 to {MAX_ORDER} bytes.")
        self.order = order
        documents = byte_documents("documents", documents)
        self._levels = [_count(documents, n) for n in range(1, order + 1)]

    def probabilities(self, document: bytes) -> np.ndarray:
        """p(byte i | the bytes before it in this document), float64, one per byte."""
        byte_documents("document", [document])
        p = np.full(len(document), 1 / 256)
        for n, (keys, counts, contexts, totals, distinct) in enumerate(self._levels, start=1):
            if len(document) < n:
                break
            window = _windows(document, n)
            seen = _look_up(keys, counts, window)
            total = _look_up(contexts, totals, window >> np.uint64(8))
            kinds = _look_up(contexts, distinct, window >> np.uint64(8))
            known = total > 0  # for an unknown context, the shorter context's p stays
            longer = (seen + kinds * p[n - 1 :]) / np.where(known, total + kinds, 1)
            p[n - 1 :] = np.where(known, longer, p[n - 1 :])
        return p

    def bits_per_byte(self, documents: Sequence[bytes]) -> float:
        """Average -log2 p over every byte of every document.

        Raises:
            ValueError: no bytes.
        """
        size = len(_joined(documents))
        return sum(-np.log2(self.probabilities(d)).sum() for d in documents) / size


def _windows(document: bytes, n: int) -> np.ndarray:
    """Every n bytes in a row as one uint64, the last byte lowest: shape [len(document) - n + 1]."""
    text = np.frombuffer(document, dtype=np.uint8).astype(np.uint64)
    keys = np.zeros(len(text) - n + 1, dtype=np.uint64)
    for i in range(n):
        keys = (keys << np.uint64(8)) | text[i : len(text) - n + 1 + i]
    return keys


def _count(documents: Sequence[bytes], n: int) -> tuple[np.ndarray, ...]:
    """Counts of n-grams and of their contexts.

    The context of an n-gram is its key without the lowest byte, so sorted n-grams give sorted
    contexts.

    Returns:
        Sorted n-grams, their counts, sorted contexts, how often each context was followed by any
        byte, and by how many different bytes.
    """
    windows = [_windows(d, n) for d in documents if len(d) >= n]
    grams = np.sort(np.concatenate(windows)) if windows else np.zeros(0, dtype=np.uint64)
    keys, counts = _runs(grams)
    contexts, totals = _runs(grams >> np.uint64(8))
    distinct = _runs(keys >> np.uint64(8))[1]
    return keys, counts, contexts, totals, distinct


def _runs(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different values of a sorted array and how often each occurs."""
    if not len(ordered):
        return ordered, np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
    return ordered[starts], np.diff(np.append(starts, len(ordered)))


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """values[i] where keys[i] equals the wanted key; 0 where no key does."""
    if not len(keys):
        return np.zeros(len(wanted), dtype=np.int64)
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)
