"""A prepared text: tokens to train on, held-out documents, the tokenizer and the baselines.

`prepare` (prepared_text.py) makes it, and `text_cache.py` keeps it on the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
from tokenizers import Tokenizer

from nemotron_lite.data.baselines import Baselines
from nemotron_lite.data.batches import Batch, ConcatenatedDocuments


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
    """A prepared corpus: a `BatchSource` for training, the held-out documents, the baselines.

    `checksum` is a SHA-256 over the tokenizer and all tokens, held-out ones included.
    """

    tokenizer: Tokenizer
    train: ConcatenatedDocuments
    held_out: HeldOut
    baselines: Baselines
    train_bytes: int
    checksum: str = ""

    def batch(
        self,
        index: SupportsIndex,
        *,
        batch_size: SupportsIndex,
        seq_len: SupportsIndex,
        seed: SupportsIndex,
    ) -> Batch:
        """A batch of training windows; see `ConcatenatedDocuments.batch`."""
        return self.train.batch(index, batch_size=batch_size, seq_len=seq_len, seed=seed)

    def fingerprint(self) -> str:
        """Identifies the text: equal if tokenizer, batches and held-out documents are equal."""
        return self.checksum or self.train.fingerprint()
