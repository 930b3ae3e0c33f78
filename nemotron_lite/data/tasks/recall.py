"""Multi-query associative recall: a phone book, then questions about it.

    k1 v1 k2 v2 ... kn vn | q1 a1 q2 a2 ...

Every row invents a new book: n distinct keys, each with a value of its own, drawn afresh. Then come
questions: a question is one of the keys, and the token after it is that key's value. Nothing can be
learnt by heart. A model that answers must have kept all n pairs somewhere, and must find the one
that is asked for.

That makes the number of pairs a dial of difficulty for whatever remembers. Attention keeps every
token and looks the key up. A state-space layer has the same number of floats for 4 pairs as for
400. Only the answers count in the loss (`Batch.mask`); they stand in the row, so that one row asks
many questions.

A batch draws its own number of pairs from `pairs`, the same for all of its rows: short books are
learnt first and lead to the long ones. When a row has room for more questions than pairs, each key
is asked once before any is asked again.

Source: Arora et al. 2023, "Zoology" (arXiv 2312.04927), which measured that this skill accounts for
most of the gap between attention and its fixed-state relatives in language. Left out: the power law
of distances between pair and question, which their version has and text has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from nemotron_lite.data.batches import Batch


@dataclass(frozen=True)
class Recall:
    """Rows of pairs and questions; a `BatchSource`.

    Keys are the tokens 0 to keys-1, values the tokens keys to keys+values-1.

    Attributes:
        pairs: how many pairs a row may hold; each batch draws one of these numbers.
        keys, values: size of the two alphabets.

    Raises:
        ValueError: no number of pairs, one below 1, or more pairs than there are keys.
    """

    pairs: tuple[int, ...]
    keys: int = 64
    values: int = 64

    def __post_init__(self) -> None:
        if not self.pairs or min(self.pairs) < 1:
            raise ValueError(f"pairs={self.pairs!r}: expected at least one number, each 1 or more.")
        if max(self.pairs) > self.keys:
            raise ValueError(
                f"pairs={self.pairs!r} with keys={self.keys}: a row's keys are distinct, so it "
                f"holds at most {self.keys} pairs."
            )
        if self.values < 2:
            raise ValueError(f"values={self.values}: with fewer than 2 there is nothing to recall.")

    @property
    def vocab_size(self) -> int:
        """Tokens in all."""
        return self.keys + self.values

    def batch(self, index: int, *, batch_size: int, length: int, seed: int) -> Batch:
        """Batch number `index` of the stream `seed`: `batch_size` rows of `length` tokens.

        `mask` is True on the answers.

        Raises:
            ValueError: a length that is odd or has no room for a question behind the pairs.
        """
        room = 2 * max(self.pairs) + 2
        if length % 2 or length < room:
            raise ValueError(
                f"length={length}: expected an even number of at least {room}, two tokens for each "
                f"of {max(self.pairs)} pairs and two for a question."
            )
        random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, 1]))
        n = int(random.choice(self.pairs))
        questions = length // 2 - n
        every_key = np.broadcast_to(np.arange(self.keys), (batch_size, self.keys))
        key = random.permuted(every_key, axis=1)[:, :n]
        value = self.keys + random.integers(0, self.values, size=(batch_size, n))
        rounds = -(-questions // n)
        order = np.broadcast_to(np.arange(n), (batch_size, rounds, n))
        asked = random.permuted(order, axis=2).reshape(batch_size, -1)[:, :questions]
        pair = np.concatenate([np.broadcast_to(np.arange(n), (batch_size, n)), asked], axis=1)
        tokens = np.stack([np.take_along_axis(part, pair, 1) for part in (key, value)], axis=2)
        mask = np.zeros((batch_size, length), dtype=bool)
        mask[:, 2 * n + 1 :: 2] = True
        return Batch(
            torch.from_numpy(tokens.reshape(batch_size, length).astype(np.int64)),
            mask=torch.from_numpy(mask),
        )

    def exam(self, pairs: int, *, rows: int, questions: int = 16, seed: int = 0) -> Batch:
        """Fresh rows with exactly `pairs` pairs, no key asked twice: what recall is measured on.

        Its stream never meets that of `batch`. Fewer questions are asked where there are fewer
        pairs.
        """
        asked = min(questions, pairs)
        task = Recall((pairs,), self.keys, self.values)
        # A seed that no training run has.
        return task.batch(0, batch_size=rows, length=2 * (pairs + asked), seed=2**40 + seed)


def recall_score(logits: Float[Tensor, "b t v"], batch: Batch) -> float:
    """Share of the questions of a batch that `logits` answer correctly, from 0 to 1.

    Raises:
        ValueError: a batch without a mask, or without questions.
    """
    if batch.mask is None or not bool(batch.mask.any()):
        raise ValueError("this batch has no questions: its mask marks the answers.")
    row, place = torch.nonzero(batch.mask, as_tuple=True)
    found = logits[row, place - 1].argmax(-1)  # the question stands one place before its answer
    return float((found == batch.tokens[row, place]).float().mean())
