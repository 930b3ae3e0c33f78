"""Held-out bits per byte: a score that does not depend on the tokenizer.

    bits per byte = sum over tokens of -log2 p(token | the tokens before it) / number of bytes

A loss per token becomes smaller when tokens are shorter. The number of bytes stays the same, so
bits per byte can be compared between tokenizers, and with gzip (`data/baselines.py`). Every byte of
every held-out file counts. A file is `<|endoftext|> tokens <|endoftext|>`: its first token is
predicted from the first `<|endoftext|>`, and the last `<|endoftext|>` is scored too, because a
complete code of a file must say where the file ends.

A file is read in sliding windows of `window` tokens that overlap by a quarter. The first window
scores all its tokens. Each later window scores the tokens that the one before it has not. So every
scored token has at least `window / 4` tokens of its file before it, or all of them. No cache is
carried from one window to the next.

The default window is twice `TrainConfig.seq_len`, which is near the lengths that the model has
seen. Only the backbone is measured, without the MTP module.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite.data import HeldOut
from nemotron_lite.model import Nemotron
from nemotron_lite.openmp import watching
from nemotron_lite.train.loss import weighted_cross_entropy
from nemotron_lite.wrappers import plain_model


@dataclass(frozen=True)
class Evaluation:
    """The score of one model on one held-out text.

    Attributes:
        bits_per_byte: lower is better; uniform guessing of bytes gives 8.
        nats_per_token: mean loss of the scored tokens.
        tokens: number of scored tokens, the last `<|endoftext|>` of each file included.
        num_bytes: size of the held-out files.
        seconds: duration of the evaluation.
        tokens_per_second: tokens that the model read per second, overlaps included.
    """

    bits_per_byte: float
    nats_per_token: float
    tokens: int
    num_bytes: int
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class ScoredWindow:
    """Tokens of one document, and the index of the first that is scored; token 0 never is."""

    tokens: Int[np.ndarray, "t"]
    first_scored: int


@torch.no_grad()
def evaluate(
    model: nn.Module, held_out: HeldOut, *, window: int = 512, batch_size: int = 8
) -> Evaluation:
    """Score every byte of the held-out files.

    Args:
        model: a `Nemotron`, or one in a wrapper such as AveragedModel. Its vocabulary is the one
            that `held_out` was encoded with.
        window: tokens per window; see the module text.
        batch_size: windows per forward pass.

    Raises:
        ValueError: a window of fewer than 2 tokens, or no documents.
    """
    if window < 2 or not held_out.documents:
        raise ValueError(
            f"window={window} with {len(held_out.documents)} documents does not work: expected a "
            "window of at least 2 tokens and at least one document."
        )
    model = plain_model(model)
    windows = [w for document in held_out.documents for w in sliding_windows(document, window)]
    windows.sort(
        key=lambda w: -len(w.tokens)
    )  # the rows of a batch then have about the same length
    started = time.perf_counter()
    nats, scored, read = 0.0, 0, 0
    with watching():
        for batch in _batches(windows, batch_size):
            nll = _negative_log_likelihoods(model, batch)
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


def sliding_windows(document: Int[np.ndarray, "n"], window: int) -> Iterator[ScoredWindow]:
    """Overlapping windows of a document that score each token except the first exactly once."""
    scored = 1
    start = 0
    while scored < len(document):
        tokens = document[start : start + window]
        yield ScoredWindow(tokens, scored - start)
        scored = start + len(tokens)
        start += window - max(1, window // 4)


def _batches(windows: Sequence[ScoredWindow], size: int) -> Iterator[Sequence[ScoredWindow]]:
    for start in range(0, len(windows), size):
        yield windows[start : start + size]


def _negative_log_likelihoods(model: Nemotron, batch: Sequence[ScoredWindow]) -> Float[Tensor, "n"]:
    """Nats of every scored token of a batch; 0 for the other tokens."""
    longest = max(len(w.tokens) for w in batch)
    tokens = torch.zeros(len(batch), longest, dtype=torch.int64)
    scored = torch.zeros(len(batch), longest)
    for row, w in enumerate(batch):
        tokens[row, : len(w.tokens)] = torch.from_numpy(w.tokens.astype(np.int64))
        scored[row, w.first_scored : len(w.tokens)] = 1
    tokens, scored = tokens.to(model.device), scored.to(model.device)
    lengths = torch.tensor([len(w.tokens) for w in batch], device=model.device)
    hidden = model.forward_hidden(tokens, lengths=lengths).hidden[:, :-1].flatten(0, 1)
    weights = scored[:, 1:].flatten()
    _, nll = weighted_cross_entropy(
        hidden, model.lm_head, tokens[:, 1:].flatten(), weights.to(hidden.dtype)
    )
    return nll * weights
