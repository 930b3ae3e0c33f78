"""Selective copy: a few letters in a long silence, to be repeated in order.

    . . C . . . A . . . . . B . F . ? C A B F
    what is read                    : what is asked for

Every row draws its letters and their places afresh. To answer, a model has to keep the letters,
drop the silence between them, and know which letter came first: it has to choose by *content* what
enters its memory. A scan whose step size and write direction are the same for every token treats a
letter and a silence alike, and what it holds in the end depends on where the letters stood. That is
why the task separates selective from time-invariant scans.

With `places="fixed"` the letters stand at the same evenly spaced places in every row. Nothing has
to be chosen then, since each answer lies a known number of tokens back: the control experiment.

Only the answers count in the loss (`Batch.mask`). They stand in the row, so a model reads the right
answers so far before it gives the next one.

Source: Gu and Dao 2023, "Mamba" (arXiv 2312.00752), section 4.1.1, after Jing et al. 2019. Theirs
reads 4,096 tokens with 16 letters and asks with blanks; the sizes here are the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from nemotron_lite.data.batches import Batch

PLACES = ("random", "fixed")


@dataclass(frozen=True)
class SelectiveCopy:
    """Rows of letters among silence, and the same letters without it; a `BatchSource`.

    Token 0 is silence, token 1 asks for the answer, the letters are 2 to letters+1.

    Attributes:
        items: letters in a row.
        letters: size of the alphabet they are drawn from, each time all of it.
        places: "random", or "fixed" for the control without a choice.

    Raises:
        ValueError: no item, fewer than two letters, or unknown places.
    """

    items: int = 4
    letters: int = 8
    places: str = "random"

    SILENCE: ClassVar[int] = 0
    ASK: ClassVar[int] = 1
    FIRST_LETTER: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.items < 1:
            raise ValueError(f"items={self.items}: a row needs at least 1 letter.")
        if self.letters < 2:
            raise ValueError(f"letters={self.letters}: with fewer than 2 there is nothing to copy.")
        if self.places not in PLACES:
            raise ValueError(f"places={self.places!r}; choose one of {', '.join(PLACES)}.")

    @property
    def vocab_size(self) -> int:
        """Tokens in all."""
        return self.letters + self.FIRST_LETTER

    @property
    def chance(self) -> float:
        """Share of right answers from guessing a letter."""
        return 1 / self.letters

    def batch(self, index: int, *, batch_size: int, length: int, seed: int) -> Batch:
        """Batch number `index` of the stream `seed`: `batch_size` rows of `length` tokens.

        A row is `length - items - 1` tokens of prompt, the question and the answers. `mask` is True
        on the answers.

        Raises:
            ValueError: a length with no room for the letters, the question and the answers.
        """
        prompt = length - self.items - 1
        if prompt < self.items:
            raise ValueError(
                f"length={length}: expected at least {2 * self.items + 1}, room for {self.items} "
                f"letters, the question and {self.items} answers."
            )
        random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, 2]))
        drawn = random.integers(0, self.letters, size=(batch_size, self.items))
        everywhere = np.broadcast_to(np.arange(prompt), (batch_size, prompt))
        # Both variants draw, so that they ask for the same letters under the same seed.
        where = np.sort(random.permuted(everywhere, axis=1)[:, : self.items], axis=1)
        if self.places == "fixed":
            where = np.broadcast_to(np.arange(self.items) * prompt // self.items, where.shape)
        tokens = np.full((batch_size, length), self.SILENCE, dtype=np.int64)
        np.put_along_axis(tokens, where, drawn + self.FIRST_LETTER, axis=1)
        tokens[:, prompt] = self.ASK
        tokens[:, prompt + 1 :] = drawn + self.FIRST_LETTER
        mask = np.zeros((batch_size, length), dtype=bool)
        mask[:, prompt + 1 :] = True
        return Batch(torch.from_numpy(tokens), mask=torch.from_numpy(mask))

    def exam(self, *, rows: int, length: int, seed: int = 0) -> Batch:
        """Fresh rows that no training stream with a seed below 2^40 meets."""
        return self.batch(seed, batch_size=rows, length=length, seed=2**40)

    def text(self, tokens: torch.Tensor) -> str:
        """A row for a person to read: `.` is silence, `?` the question, A, B, C the letters."""
        names = ".?" + "".join(chr(ord("A") + i % 26) for i in range(self.letters))
        return " ".join(names[token] for token in tokens.tolist())
