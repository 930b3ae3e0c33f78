"""All options of a training run, validated once.

The defaults follow Super's recipe (reference sheet 7) where it also suits a run of minutes: the
AdamW constants, the loss weights, the gradient clipping, and the minus-sqrt decay to 1 % of the
peak. The others were chosen by measurements on the `lite` preset: a larger learning rate, longer
fractions of warm-up and decay, and updates of only 512 tokens, because a short run makes only a few
hundred updates. A run of thousands of updates needs larger batches and a shorter warm-up.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nemotron_lite.quantization.recipe import Recipe, get_recipe


@dataclass(frozen=True)
class TrainConfig:
    """One training run. It ends after `steps` or after `max_seconds`, whichever comes first.

    With `steps` alone a run is a function of its config: if it is interrupted and resumed, the
    losses are the same bit for bit. With `max_seconds` the learning rate follows the time that has
    passed, so that the decay is always complete at the end. Two such runs are never identical.

    Raises:
        ValueError: a value that does not work; the message names it.
    """

    steps: int | None = None  # optimizer updates
    max_seconds: float | None = None  # training time; a resumed run counts its earlier parts too
    batch_size: int = 2  # b, rows per micro-batch
    seq_len: int = 256  # t, tokens per row
    gradient_accumulation_steps: int = 1  # micro-batches per update

    lr: float = 2.5e-3  # peak
    min_lr: float = 2.5e-5  # at the end of the decay
    warmup_fraction: float = 0.05  # of the run
    decay_fraction: float = 0.4  # of the run
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only
    grad_clip: float = 1.0  # largest norm of all gradients together

    mtp_weight: float = 0.3  # shared by the MTP depths; 0 does not train the MTP module
    mtp_target: str = "text"  # "text", or "backbone" for distillation (distillation.py)
    balance_weight: float = 1e-4  # of the per-sequence balance loss
    bias_rate: float = 1e-3  # update step of the routers' selection bias

    precision: str | Recipe = "fp32"  # of matrix products: "bf16", "nvfp4"; weights are float32
    seed: int = 0  # of the data order
    save_every: int | None = None  # updates between checkpoints; None: only at the end
    keep_checkpoints: int = 2  # how many of them are kept

    def __post_init__(self) -> None:
        if self.steps is None and self.max_seconds is None:
            raise ValueError(
                "steps and max_seconds are both None: give at least one of them (--steps, "
                "--max-seconds on the command line)."
            )
        for name in (
            "steps",
            "batch_size",
            "seq_len",
            "gradient_accumulation_steps",
            "save_every",
            "keep_checkpoints",
        ):
            value = getattr(self, name)
            optional = value is None and name in ("steps", "save_every")
            if not optional and (not isinstance(value, int) or value < 1):
                self._fail(name, "a whole number of at least 1")
        if self.max_seconds is not None and not 0 < self.max_seconds < math.inf:
            self._fail("max_seconds", "a number of seconds above 0")
        for name in ("lr", "eps", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                self._fail(name, "a number above 0")
        for name in ("weight_decay", "mtp_weight", "balance_weight", "bias_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                self._fail(name, "0 or more")
        if self.mtp_target not in ("text", "backbone"):
            self._fail("mtp_target", "'text' or 'backbone'")
        if not 0 <= self.min_lr <= self.lr:
            self._fail("min_lr", f"0 to lr={self.lr}")
        warmup, decay = self.warmup_fraction, self.decay_fraction
        if not (warmup >= 0 and decay >= 0 and warmup + decay <= 1):
            self._fail(
                "warmup_fraction",
                f"a number of at least 0 whose sum with decay_fraction={decay!r} is at most 1",
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            self._fail("betas", "two numbers from 0 to below 1")
        get_recipe(self.precision)
        if not isinstance(self.seed, int) or self.seed < 0:
            self._fail("seed", "a whole number of at least 0")

    def _fail(self, name: str, expected: str) -> None:
        raise ValueError(f"{name}={getattr(self, name)!r} does not work: expected {expected}.")

    @property
    def tokens_per_step(self) -> int:
        """Tokens read for one update."""
        return self.batch_size * self.seq_len * self.gradient_accumulation_steps

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for logs and checkpoints."""
        return {**asdict(self), "betas": list(self.betas)}
