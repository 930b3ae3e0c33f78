"""MTP healing: train the MTP module on text that its own backbone generates.

The backbone verifies the drafts of the MTP module, so the module should predict the text that this
backbone generates. Training that changes the backbone without the MTP loss (fine-tuning,
reinforcement learning) makes its drafts worse. Healing repairs them:

    1. the frozen backbone continues prompts, with the sampling options that will be used later
    2. only the MTP module is trained on the continuations, with the loss of every depth: on the
       generated tokens, or (`mtp_target="backbone"`) on the distributions they were sampled from
    3. acceptance is measured before and after, on prompts that were not trained on

Only the MTP module's own parameters change. It shares embedding and head with the backbone, and
these stay frozen. So plain decoding generates the same tokens before and after healing. The
training itself is `loop.train` with the backbone's parameters frozen, the prompts masked out of the
loss, and the routers' selection biases unchanged.

The distributions teach far more per token. On the `lite` preset after 150 seconds of training, 25
seconds of healing raised the acceptance length of drafts of five tokens from 1.97 to 2.22 with the
tokens, and to 3.21 with the distributions. On other text that the backbone had not generated, the
distributions gave 2.21. NVIDIA healed Super on tokens, and Ultra on distributions ("boosting").

Source: Nemotron 3 Super report 3.2, where this step is called MTP healing; reference sheet 5.2.
Left out: a temperature for the divergence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from nemotron_lite.data.batches import Batch
from nemotron_lite.generation.generate import generate
from nemotron_lite.generation.options import SpeculationOptions
from nemotron_lite.generation.speculative import Statistics
from nemotron_lite.model import Nemotron
from nemotron_lite.train.config import TrainConfig
from nemotron_lite.train.loop import TrainResult, train

GENERATION_BATCH_SIZE = 16  # prompts that are continued together


class Continuations:
    """Prompts with the continuations that a model generated; a `BatchSource` for healing.

    Args:
        prompts: token ids, all of the same length.
        continuations: token ids, all of the same length.

    Raises:
        ValueError: there are no rows, or they have different lengths.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> None:
        rows = [[*p, *c] for p, c in zip(prompts, continuations, strict=True)]
        lengths = {(len(p), len(c)) for p, c in zip(prompts, continuations, strict=True)}
        if len(lengths) != 1:
            raise ValueError(
                f"(prompt, continuation) have the lengths {sorted(lengths)}: expected at least one "
                "row, prompts of one length and continuations of one length."
            )
        self.tokens: Int[Tensor, "n t"] = torch.tensor(rows)
        self.mask: Bool[Tensor, "n t"] = torch.ones_like(self.tokens, dtype=torch.bool)
        self.mask[:, : len(prompts[0])] = False

    def fingerprint(self) -> str:
        """SHA-256 over the tokens and the mask."""
        digest = hashlib.sha256(str(tuple(self.tokens.shape)).encode())
        for tensor in (self.tokens, self.mask):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    def batch(self, index: int, *, batch_size: int, seq_len: int, seed: int) -> Batch:
        """The first `seq_len` tokens of random rows, as a function of (seed, index).

        Raises:
            ValueError: `seq_len` is longer than the rows, or not longer than the prompts.
        """
        if seq_len > self.tokens.shape[1] or not bool(self.mask[:, :seq_len].any()):
            raise ValueError(
                f"seq_len={seq_len} does not work: expected more than the prompt and at most "
                f"{self.tokens.shape[1]} tokens."
            )
        random = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, index, 0]))
        rows = torch.from_numpy(random.integers(0, len(self.tokens), size=batch_size))
        return Batch(self.tokens[rows, :seq_len], None, self.mask[rows, :seq_len])


@dataclass(frozen=True)
class HealingResult:
    """What healing changed.

    Attributes:
        before, after: statistics of drafting for the same prompts, before and after.
        result: of the training.
        generated_tokens: number of the backbone's tokens that the module was trained on.
    """

    before: Statistics
    after: Statistics
    result: TrainResult
    generated_tokens: int


def generate_continuations(
    model: Nemotron,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_p: float | None = 0.95,
    seed: int = 0,
) -> Continuations:
    """Continue `prompts` (all of the same length) by exactly `max_new_tokens` tokens each.

    Stop tokens do not end a row, so that all rows keep one length. The text after a stop token is a
    new document, which is training text as well.
    """
    continuations: list[list[int]] = []
    for first in range(0, len(prompts), GENERATION_BATCH_SIZE):
        group = prompts[first : first + GENERATION_BATCH_SIZE]
        continuations += generate(
            model,
            group,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed + first,
            stop=(),
        )
    return Continuations(prompts, continuations)


def measure_acceptance(
    model: Nemotron,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    draft_length: int = 4,
    temperature: float = 0.0,
    seed: int = 0,
) -> Statistics:
    """Generate with drafts of exactly `draft_length` tokens, and count the accepted ones."""
    _, statistics = generate(
        model,
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_p=None,
        seed=seed,
        stop=(),
        speculation=SpeculationOptions(draft_length=draft_length, adaptive=False),
        return_statistics=True,
    )
    return statistics


def heal(
    model: Nemotron,
    data: Continuations,
    config: TrainConfig,
    *,
    eval_prompts: Sequence[Sequence[int]],
    eval_tokens: int = 64,
    draft_length: int = 4,
    progress: bool = True,
) -> HealingResult:
    """Train the MTP module of `model` in place on text that its backbone has generated.

    Args:
        model: with an MTP module.
        data: made with `generate_continuations`.
        config: of the training. `mtp_weight` is shared by all depths. `bias_rate` is set to 0,
            because the routers of a frozen backbone must not change.
        eval_prompts: prompts to measure acceptance on, with greedy decoding.
        eval_tokens: number of tokens that are generated for each of them.
        draft_length: tokens per draft in this measurement.
        progress: show a progress bar.

    Raises:
        ValueError: the model has no MTP module, or `mtp_weight` is 0.
    """
    if model.mtp is None or not config.mtp_weight:
        raise ValueError(
            f"mtp_pattern={model.config.mtp_pattern!r} and mtp_weight={config.mtp_weight} do not "
            "work: healing trains the MTP module, so expected a model with one (mtp_pattern) and "
            "an mtp_weight above 0."
        )
    before = measure_acceptance(model, eval_prompts, eval_tokens, draft_length=draft_length)
    with _only_mtp(model):
        result = train(model, data, replace(config, bias_rate=0.0), progress=progress)
    after = measure_acceptance(model, eval_prompts, eval_tokens, draft_length=draft_length)
    return HealingResult(before, after, result, int(data.mask.sum()))


@contextmanager
def _only_mtp(model: Nemotron) -> Iterator[None]:
    """Freeze all parameters outside the MTP module while the block runs."""
    frozen = [
        parameter
        for name, parameter in model.named_parameters()
        if not name.startswith("mtp.") and parameter.requires_grad
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
