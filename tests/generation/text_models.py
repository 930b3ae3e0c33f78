"""Random models that read and write text, some of it in characters of several bytes."""

from __future__ import annotations

import torch

from nemotron_lite import Nemotron
from nemotron_lite.data.tokenizer import train_tokenizer
from tests.generation.speculative.conftest import SMALL

TEXT = "for value in values: total = total + value  # naïve, but exact\n"


def text_model(
    text: str = TEXT, vocab_size: int = 272, dtype: torch.dtype = torch.float64
) -> Nemotron:
    """A model of a few thousand weights, with a tokenizer trained on `text`."""
    model = Nemotron(SMALL.replace(vocab_size=vocab_size), dtype=dtype, seed=1)
    model.tokenizer = train_tokenizer([text] * 3, vocab_size=vocab_size)
    return model
