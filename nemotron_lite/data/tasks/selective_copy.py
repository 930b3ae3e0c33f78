"""Selective copy: a few letters among many silent tokens, to be repeated in order.

    . . C . . . A . . . . . B . F . ? C A B F
    input                           : answers

Every row draws its letters and their positions at random. To answer, a model has to keep the
letters, ignore the silent tokens between them, and keep the order of the letters. So it has to
select by *content* what it writes into its state. A scan whose step size and write direction are
the same for every token treats letters and silent tokens alike, and its final state depends on
where the letters were. One such layer is a convolution, and no single kernel fits all rows. Several
layers with norms between them learn the task as well, but far more slowly than selective ones.

With `places="fixed"` the letters are at the same evenly spaced positions in every row. Then nothing
has to be selected, because each answer is a known number of tokens back. This is the control
experiment.

Only the answers count in the loss (`Batch.mask`). They are part of the row, so a model reads the
right answers so far before it gives the next one.

Source: Gu and Dao 2023, "Mamba" (arXiv 2312.00752), section 4.1.1, after Jing et al. 2019. Theirs
reads 4,096 tokens with 16 letters and asks with blank tokens; here the caller sets the sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, SupportsIndex

import numpy as np
import torch

from nemotron_lite.arguments import integer
from nemotron_lite.data.batches import LARGEST_BATCH, LARGEST_INDEX, Batch, BatchArguments

PLACES = ("random", "fixed")
LARGEST_ALPHABET = 1 << 20


@dataclass(frozen=True)
class SelectiveCopy:
    """Rows of letters among silent tokens, then the same letters as answers; a `BatchSource`.

    Token 0 is silent, token 1 asks for the answers, and tokens 2 to letters+1 are the letters.

    Attributes:
        items: letters in a row.
        letters: size of the alphabet. The same letter may occur several times in a row.
        places: "random", or "fixed" for the control experiment.

    Raises:
        TypeError: not integers.
        ValueError: `items` below 1, `letters` below 2, or an unknown value of `places`.
    """

    items: int = 4
    letters: int = 8
    places: str = "random"

    SILENCE: ClassVar[int] = 0
    ASK: ClassVar[int] = 1
    FIRST_LETTER: ClassVar[int] = 2

    def __post_init__(self) -> None:
        for name in ("items", "letters"):
            value = integer(name, getattr(self, name), high=LARGEST_ALPHABET)
            object.__setattr__(self, name, value)
        if self.items < 1:
            raise ValueError(
                f"items={self.items} does not work: expected at least 1 letter in a row."
            )
        if self.letters < 2:
            raise ValueError(f"letters={self.letters} does not work: expected at least 2.")
        if not isinstance(self.places, str):
            raise TypeError(
                f"places is {type(self.places).__name__}: expected one of {', '.join(PLACES)}."
            )
        if self.places not in PLACES:
            raise ValueError(
                f"places={self.places!r} does not work: expected one of {', '.join(PLACES)}."
            )

    @property
    def vocab_size(self) -> int:
        """Number of different tokens."""
        return self.letters + self.FIRST_LETTER

    @property
    def chance(self) -> float:
        """Fraction of right answers that random guessing gives."""
        return 1 / self.letters

    def batch(
        self,
        index: SupportsIndex,
        *,
        batch_size: SupportsIndex,
        seq_len: SupportsIndex,
        seed: SupportsIndex,
    ) -> Batch:
        """Batch number `index` of the stream `seed`: `batch_size` rows of `seq_len` tokens.

        A row is `seq_len - items - 1` tokens of prompt, the question and the answers. `mask` is
        True on the answers.

        Raises:
            ValueError: `seq_len` is too short for the letters, the question and the answers.
        """
        which = BatchArguments.checked(index, batch_size, seq_len, seed)
        batch_size, seq_len = which.batch_size, which.seq_len
        prompt = seq_len - self.items - 1
        if prompt < self.items:
            raise ValueError(
                f"seq_len={seq_len} does not work: expected at least {2 * self.items + 1}, for "
                f"{self.items} letters, the question and {self.items} answers."
            )
        random = which.generator(2)
        drawn = random.integers(0, self.letters, size=(batch_size, self.items))
        everywhere = np.broadcast_to(np.arange(prompt), (batch_size, prompt))
        # Both variants draw positions, so that one seed gives both the same letters.
        where = np.sort(random.permuted(everywhere, axis=1)[:, : self.items], axis=1)
        if self.places == "fixed":
            where = np.broadcast_to(np.arange(self.items) * prompt // self.items, where.shape)
        tokens = np.full((batch_size, seq_len), self.SILENCE, dtype=np.int64)
        np.put_along_axis(tokens, where, drawn + self.FIRST_LETTER, axis=1)
        tokens[:, prompt] = self.ASK
        tokens[:, prompt + 1 :] = drawn + self.FIRST_LETTER
        mask = np.zeros((batch_size, seq_len), dtype=bool)
        mask[:, prompt + 1 :] = True
        return Batch(torch.from_numpy(tokens), mask=torch.from_numpy(mask))

    def test_set(
        self, *, rows: SupportsIndex, seq_len: SupportsIndex, seed: SupportsIndex = 0
    ) -> Batch:
        """Rows to measure on: different from those of any training run with a seed below 2^40."""
        rows = integer("rows", rows, low=1, high=LARGEST_BATCH)
        seed = integer("seed", seed, low=0, high=LARGEST_INDEX)
        return self.batch(seed, batch_size=rows, seq_len=seq_len, seed=2**40)

    def text(self, tokens: torch.Tensor) -> str:
        """A row as text: `.` is silent, `?` the question, and A, B, C are the letters.

        Raises:
            ValueError: a token that this task does not have, or several rows.
        """
        names = ".?" + "".join(chr(ord("A") + i % 26) for i in range(self.letters))
        ids = tokens.tolist()
        if tokens.ndim != 1 or any(not 0 <= token < len(names) for token in ids):
            raise ValueError(
                f"tokens of shape {list(tokens.shape)} are not a row of this task: expected one "
                f"axis, and tokens from 0 to {len(names) - 1}."
            )
        return " ".join(names[token] for token in ids)
