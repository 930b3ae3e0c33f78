"""Held-out bits per byte: the score that tokenizers cannot flatter.

    bits per byte = sum over tokens of -log2 p(token | what came before it) / number of bytes

A loss per token falls when tokens get shorter; the bytes stay the same, so this number can be
compared between tokenizers and with gzip (`data/baselines.py`). Every byte of every held-out file
is counted: a file is `<|endoftext|> tokens <|endoftext|>`, its first token is predicted from the
opening mark, and the closing mark is scored as well, since a file that does not say where it ends
is not coded.

How a file is read: it is cut into windows of `window` tokens that overlap by a quarter. The first
window scores all its tokens, each later one those that the window before it has not, so a token has
at least `window / 4` tokens of its file before it, or the file's beginning. Nothing is carried from
one window or file to the next.

The default window is twice the length of the default training rows, near the lengths the model has
seen. What is measured is the backbone; the MTP module takes no part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.data import HeldOut
from nemotron_lite.model import Nemotron
from nemotron_lite.train.loss import weighted_cross_entropy


@dataclass(frozen=True)
class Evaluation:
    """The score of one model on one held-out text.

    Attributes:
        bits_per_byte: lower is better; 8 is knowing nothing.
        nats_per_token: the same bits over the tokens that were scored.
        tokens: scored, closing marks included.
        num_bytes: of the held-out files.
        seconds: the evaluation took.
        tokens_per_second: read by the model, the overlap of the windows included.
    """

    bits_per_byte: float
    nats_per_token: float
    tokens: int
    num_bytes: int
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Window:
    """A piece of one document: its tokens, and the first of them that is scored (0 never is)."""

    tokens: Int[np.ndarray, "t"]
    first_scored: int


@torch.no_grad()
def evaluate(
    model: Nemotron, held_out: HeldOut, *, window: int = 512, batch_size: int = 8
) -> Evaluation:
    """Score every byte of the held-out files.

    Args:
        model: with the vocabulary that `held_out` was encoded in.
        window: tokens read together; see the module text.
        batch_size: windows per forward pass.

    Raises:
        ValueError: a window of fewer than 2 tokens or no documents.
    """
    if window < 2 or not held_out.documents:
        raise ValueError(
            f"window={window} over {len(held_out.documents)} documents scores nothing: expected a "
            "window of at least 2 tokens and at least one document."
        )
    windows = [w for document in held_out.documents for w in cut(document, window)]
    windows.sort(key=lambda w: -len(w.tokens))  # rows of one batch then have about one length
    started = time.perf_counter()
    nats, scored, read = 0.0, 0, 0
    for batch in _groups(windows, batch_size):
        nll = _score(model, batch)
        nats += float(nll.double().sum())
        scored += sum(len(w.tokens) - w.first_scored for w in batch)
        read += sum(len(w.tokens) for w in batch)
    seconds = time.perf_counter() - started
    return Evaluation(
        bits_per_byte=nats / math.log(2) / held_out.num_bytes,
        nats_per_token=nats / scored,
        tokens=scored,
        num_bytes=held_out.num_bytes,
        seconds=seconds,
        tokens_per_second=read / seconds,
    )


def cut(document: Int[np.ndarray, "n"], window: int) -> Iterator[Window]:
    """Overlapping windows of a document that score each token but the first exactly once."""
    scored = 1
    start = 0
    while scored < len(document):
        piece = document[start : start + window]
        yield Window(piece, scored - start)
        scored = start + len(piece)
        start += window - max(1, window // 4)


def _groups(windows: Sequence[Window], size: int) -> Iterator[Sequence[Window]]:
    for start in range(0, len(windows), size):
        yield windows[start : start + size]


def _score(model: Nemotron, batch: Sequence[Window]) -> Float[Tensor, "n"]:
    """Nats of every scored token of a batch; 0 in the places between."""
    longest = max(len(w.tokens) for w in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    counts = torch.zeros(len(batch), longest)
    for row, w in enumerate(batch):
        tokens[row, : len(w.tokens)] = torch.from_numpy(w.tokens.astype(np.int64))
        counts[row, w.first_scored : len(w.tokens)] = 1
    tokens, counts = tokens.to(model.device), counts.to(model.device)
    lengths = torch.tensor([len(w.tokens) for w in batch], device=model.device)
    hidden = model.forward_hidden(tokens, lengths=lengths).hidden[:, :-1].flatten(0, 1)
    weights = counts[:, 1:].flatten()
    _, nll = weighted_cross_entropy(
        hidden, model.lm_head.weight, tokens[:, 1:].flatten(), weights.to(hidden.dtype)
    )
    return nll * weights
