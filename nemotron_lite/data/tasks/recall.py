"""Multi-query associative recall: key-value pairs, then questions about them.

    k1 v1 k2 v2 ... kn vn | q1 a1 q2 a2 ...

Every row has new pairs: n distinct keys with random values. Then come questions. A question is one
of the keys, and the token after it is that key's value. The pairs cannot be memorized during
training. To answer, a model must have kept all n pairs of the row in its cache, and must find the
one that is asked for.

So the number of pairs sets the difficulty. Attention keeps every token and looks the key up. A
state-space layer has the same number of floats for 4 pairs as for 400. Only the answers count in
the loss (`Batch.mask`). The right answers are part of the row, so one row can ask many questions.

Each batch draws its number of pairs from `pairs`; all its rows have that number. Short lists are
learned first and make long lists easier. When a row has space for more questions than pairs, each
key is asked once before any is asked again.

Source: Arora et al. 2023, "Zoology" (arXiv 2312.04927). They measured that this skill explains most
of the gap between attention and fixed-state models on language. Left out: in
their version, as in real text, the distance between pair and question has a power distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nemotron_lite.arguments import integer
from nemotron_lite.data.batches import LARGEST_BATCH, LARGEST_SEED, Batch, BatchArguments
from nemotron_lite.data.checks import several

LARGEST_ALPHABET = 1 << 20  # keys or values


@dataclass(frozen=True)
class Recall:
    """Rows of pairs and questions; a `BatchSource`.

    Keys are the tokens 0 to keys-1, values the tokens keys to keys+values-1.

    Attributes:
        pairs: possible numbers of pairs in a row; each batch draws one of them.
        keys, values: number of different keys and values.

    Raises:
        TypeError: not integers.
        ValueError: `pairs` is empty, or holds a number below 1 or above `keys`.
    """

    pairs: tuple[int, ...]
    keys: int = 64
    values: int = 64

    def __post_init__(self) -> None:
        given = several("pairs", self.pairs, "integers")
        pairs = tuple(integer("pairs", n, high=LARGEST_ALPHABET) for n in given)
        object.__setattr__(self, "pairs", pairs)
        for name in ("keys", "values"):
            value = integer(name, getattr(self, name), high=LARGEST_ALPHABET)
            object.__setattr__(self, name, value)
        if not self.pairs or min(self.pairs) < 1:
            raise ValueError(
                f"pairs={self.pairs!r} does not work: expected at least one number, each 1 or more."
            )
        if max(self.pairs) > self.keys:
            raise ValueError(
                f"pairs={self.pairs!r} with keys={self.keys} does not work: the keys of a row are "
                f"distinct, so it has at most {self.keys} pairs."
            )
        if self.values < 2:
            raise ValueError(f"values={self.values} does not work: expected at least 2.")

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return self.keys + self.values

    def batch(
        self,
        index: SupportsIndex,
        *,
        batch_size: SupportsIndex,
        seq_len: SupportsIndex,
        seed: SupportsIndex,
    ) -> Batch:
        """Batch number `index` of the stream `seed`: `batch_size` rows of `seq_len` tokens.

        `mask` is True on the answers.

        Raises:
            ValueError: `seq_len` is odd, or too short for the pairs and one question.
        """
        which = BatchArguments.checked(index, batch_size, seq_len, seed)
        batch_size, seq_len = which.batch_size, which.seq_len
        shortest = 2 * max(self.pairs) + 2
        if seq_len % 2 or seq_len < shortest:
            raise ValueError(
                f"seq_len={seq_len} does not work: expected an even number of at least {shortest}, "
                f"two tokens for each of {max(self.pairs)} pairs and two for a question."
            )
        if batch_size * self.keys > LARGEST_BATCH:
            raise ValueError(
                f"batch_size={batch_size:,} rows that each draw from keys={self.keys:,} do not "
                f"work: expected a product of at most {LARGEST_BATCH:,}."
            )
        random = which.generator(1)
        n = int(random.choice(self.pairs))
        questions = seq_len // 2 - n
        every_key = np.broadcast_to(np.arange(self.keys), (batch_size, self.keys))
        key = random.permuted(every_key, axis=1)[:, :n]
        value = self.keys + random.integers(0, self.values, size=(batch_size, n))
        repeats = -(-questions // n)
        order = np.broadcast_to(np.arange(n), (batch_size, repeats, n))
        asked = random.permuted(order, axis=2).reshape(batch_size, -1)[:, :questions]
        pair = np.concatenate([np.broadcast_to(np.arange(n), (batch_size, n)), asked], axis=1)
        tokens = np.stack([np.take_along_axis(part, pair, 1) for part in (key, value)], axis=2)
        mask = np.zeros((batch_size, seq_len), dtype=bool)
        mask[:, 2 * n + 1 :: 2] = True
        return Batch(
            torch.from_numpy(tokens.reshape(batch_size, seq_len).astype(np.int64)),
            mask=torch.from_numpy(mask),
        )

    def test_set(
        self,
        pairs: SupportsIndex,
        *,
        rows: SupportsIndex,
        questions: SupportsIndex = 16,
        seed: SupportsIndex = 0,
    ) -> Batch:
        """Rows to measure recall on: exactly `pairs` pairs, and no key is asked twice.

        The rows differ from those of any training run with a seed below 2^40. With fewer pairs than
        `questions`, each key is asked once.
        """
        pairs = integer("pairs", pairs, low=1, high=LARGEST_ALPHABET)
        rows = integer("rows", rows, low=1, high=LARGEST_BATCH)
        seed = integer("seed", seed, low=0, high=LARGEST_SEED - 2**40)
        asked = min(integer("questions", questions, low=1), pairs)
        task = Recall((pairs,), self.keys, self.values)
        return task.batch(0, batch_size=rows, seq_len=2 * (pairs + asked), seed=2**40 + seed)


def recall_score(logits: Float[Tensor, "b t v"], batch: Batch) -> float:
    """Fraction of the batch's questions that `logits` answer correctly, from 0 to 1.

    Raises:
        ValueError: the batch has no mask, its mask marks no answer or the first token, or `logits`
            are not of this batch.
    """
    if logits.ndim != 3 or logits.shape[:2] != batch.tokens.shape:
        raise ValueError(
            f"logits have shape {list(logits.shape)}: expected [b, t, v] with b and t of the "
            f"batch, {list(batch.tokens.shape)}."
        )
    if batch.mask is None or not bool(batch.mask.any()):
        raise ValueError(
            "the batch has no questions: its mask must be True on the answers, as in Recall.batch."
        )
    if bool(batch.mask[:, 0].any()):
        raise ValueError("the mask marks the first token, which nothing can predict.")
    row, position = torch.nonzero(batch.mask, as_tuple=True)
    found = logits[row, position - 1].argmax(-1)  # the question is one token before its answer
    return float((found == batch.tokens[row, position]).float().mean())
