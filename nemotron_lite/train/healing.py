"""MTP healing: teach the MTP module the text that its own backbone writes.

Drafts are judged by the backbone, so what the module has to predict is not text as it is found but
text as this backbone writes it. After training has moved the backbone (fine-tuning, reinforcement
learning, where the MTP loss is off), the module lags behind. Healing:

    1. the frozen backbone writes continuations of prompts, sampled as it will be used
    2. the module alone is trained on them, with the loss of every depth it was trained for: on the
       tokens written, or (`mtp_target="backbone"`) on the distributions they were drawn from
    3. acceptance is measured before and after, on prompts that were not trained on

Only MTP parameters move: embedding and head, which it shares, belong to the backbone. So plain
decoding writes the same after as before, token for token. The training itself is `loop.train`, with
the backbone's parameters frozen, prompts masked out of the loss, and the routers' selection biases
left alone.

The distributions teach far more per token. On the `lite` preset after 150 seconds of training, 25
seconds of healing took the acceptance length of drafts of five from 1.97 to 2.22 on the tokens and
to 3.21 on the distributions; on text found elsewhere, the distributions gave 2.21. Which of the two
answers a published model was healed with: tokens in Super, distributions ("boosting") in Ultra.

Source: Nemotron 3 Super report 3.2; reference sheet 5.2. Left out: a temperature for the
divergence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nemotron_lite.data.batches import Batch
from nemotron_lite.generation.decoding import generate
from nemotron_lite.generation.options import SpeculationOptions
from nemotron_lite.generation.speculative import Statistics
from nemotron_lite.model import Nemotron
from nemotron_lite.train.config import TrainConfig
from nemotron_lite.train.loop import TrainResult, train

WRITING_ROWS = 16  # prompts continued together


class Written:
    """Prompts with the continuations that a model wrote: a `BatchSource` for healing.

    Args:
        prompts: token ids, all of one length.
        texts: the continuations, all of one length.

    Raises:
        ValueError: rows of different lengths, or none.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> None:
        rows = [[*p, *t] for p, t in zip(prompts, texts, strict=True)]
        if not rows or len({(len(p), len(t)) for p, t in zip(prompts, texts, strict=True)}) != 1:
            raise ValueError("healing needs rows: prompts of one length, texts of one length.")
        self.tokens: Int[Tensor, "n t"] = torch.tensor(rows)
        self.mask: Bool[Tensor, "n t"] = torch.ones_like(self.tokens, dtype=torch.bool)
        self.mask[:, : len(prompts[0])] = False

    def batch(self, index: int, *, batch_size: int, length: int, seed: int) -> Batch:
        """Rows drawn with replacement, as a function of (seed, index); cut to `length` tokens.

        Raises:
            ValueError: a length that leaves nothing but the prompt.
        """
        if length > self.tokens.shape[1] or not bool(self.mask[:, :length].any()):
            raise ValueError(
                f"length={length}: expected more than the prompt and at most "
                f"{self.tokens.shape[1]} tokens."
            )
        dice = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, 0]))
        rows = torch.from_numpy(dice.integers(0, len(self.tokens), size=batch_size))
        return Batch(self.tokens[rows, :length], None, self.mask[rows, :length])


@dataclass(frozen=True)
class Healing:
    """What healing did.

    Attributes:
        before, after: statistics of the same prompts, drafted before and after.
        result: of the training.
        written: tokens that the backbone wrote for it.
    """

    before: Statistics
    after: Statistics
    result: TrainResult
    written: int


def write(
    model: Nemotron, prompts: Sequence[Sequence[int]], length: int, *,
    temperature: float = 1.0, top_p: float | None = 0.95, seed: int = 0,
) -> Written:  # fmt: skip
    """Let the backbone continue `prompts` (one length) by `length` tokens each, whatever they are.

    Stop tokens end nothing here: the rows stay of one length, and a new document is text as well.
    """
    texts: list[list[int]] = []
    for first in range(0, len(prompts), WRITING_ROWS):
        some = prompts[first : first + WRITING_ROWS]
        texts += generate(
            model, some, length, temperature=temperature, top_p=top_p, seed=seed + first, stop=()
        )
    return Written(prompts, texts)


def acceptance(
    model: Nemotron, prompts: Sequence[Sequence[int]], length: int, *, draft_length: int = 4,
    temperature: float = 0.0, seed: int = 0,
) -> Statistics:  # fmt: skip
    """Draft `draft_length` tokens all along, and count what is accepted."""
    _, statistics = generate(
        model, prompts, length, temperature=temperature, top_p=None, seed=seed, stop=(),
        speculation=SpeculationOptions(draft_length=draft_length, adaptive=False),
        return_statistics=True,
    )  # fmt: skip
    return statistics


def heal(
    model: Nemotron,
    written: Written,
    config: TrainConfig,
    *,
    judges: Sequence[Sequence[int]],
    judged_length: int = 64,
    draft_length: int = 4,
    progress: bool = True,
) -> Healing:
    """Train the MTP module of `model` in place on what its backbone has written.

    Args:
        written: made with `write`.
        config: of the training. `mtp_weight` counts for all depths together; `bias_rate` is taken
            as 0, since the routers of a frozen backbone must not move.
        judges: prompts to measure acceptance on, greedily, for `judged_length` tokens.
        draft_length: tokens of their drafts.

    Raises:
        ValueError: a model without an MTP module, or `mtp_weight` 0.
    """
    if model.mtp is None or not config.mtp_weight:
        raise ValueError(
            "healing trains the MTP module: the model needs one (mtp_pattern), and the config an "
            f"mtp_weight above 0; got {model.config.mtp_pattern!r} and {config.mtp_weight}."
        )
    before = acceptance(model, judges, judged_length, draft_length=draft_length)
    with _only_mtp(model):
        result = train(model, written, replace(config, bias_rate=0.0), progress=progress)
    after = acceptance(model, judges, judged_length, draft_length=draft_length)
    return Healing(before, after, result, int(written.mask.sum()))


@contextmanager
def _only_mtp(model: Nemotron) -> Iterator[None]:
    """Inside, nothing but the MTP module has gradients."""
    frozen = [
        p for name, p in model.named_parameters()
        if not name.startswith("mtp.") and p.requires_grad
    ]  # fmt: skip
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
