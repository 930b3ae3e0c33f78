"""Every knob of a run, validated once.

The defaults are Super's recipe (reference sheet 7) where it carries over to a run of minutes: the
AdamW constants, the loss weights, the clip, minus-sqrt decay to 1 % of the peak. What does not
carry over was chosen by measuring on the `lite` preset: a larger learning rate, a longer warm-up
and decay, and updates of only 512 tokens, because a few hundred of them have to do what a million
do there. A run of thousands of updates will want larger batches and a shorter warm-up share.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from nemotron_lite.quantization.recipe import Recipe, get_recipe


@dataclass(frozen=True)
class TrainConfig:
    """One training run. `steps`, `max_seconds` or both bound it.

    With `steps` alone a run is a function of its config: interrupted and resumed, it gives the same
    losses bit for bit. A clock (`max_seconds`) shapes the schedule by the time that has passed, so
    the decay always fits in; such a run ends when it should, and no two are the same.

    Raises:
        ValueError: a value no run can be made from; the message names it.
    """

    steps: int | None = None  # optimiser updates
    max_seconds: float | None = None  # of training, earlier parts of a resumed run included
    batch_size: int = 2  # b, rows per micro-batch
    length: int = 256  # t, tokens per row
    accumulation: int = 1  # micro-batches per update

    lr: float = 2.5e-3  # peak
    min_lr: float = 2.5e-5  # at the end of the decay
    warmup: float = 0.05  # share of the run
    decay: float = 0.4  # share of the run
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1  # matrices only
    clip: float = 1.0  # largest norm of all gradients together

    mtp_weight: float = 0.3  # shared by the MTP depths; 0 leaves the MTP module untrained
    mtp_target: str = "text"  # what the MTP module predicts: "text" or "backbone" (distillation.py)
    balance_weight: float = 1e-4  # of the per-sequence balance loss
    bias_rate: float = 1e-3  # step of the routers' selection bias

    precision: str | Recipe = "fp32"  # of matrix products: "bf16", "nvfp4"; weights stay float32
    seed: int = 0  # of the data order
    save_every: int | None = None  # updates between checkpoints; None: only at the end
    keep: int = 2  # checkpoints kept

    def __post_init__(self) -> None:
        if self.steps is None and self.max_seconds is None:
            raise ValueError(
                "steps and max_seconds are both None: give at least one of them (--steps, "
                "--max-seconds on the command line)."
            )
        for name in ("steps", "batch_size", "length", "accumulation", "save_every", "keep"):
            value = getattr(self, name)
            optional = value is None and name in ("steps", "save_every")
            if not optional and (not isinstance(value, int) or value < 1):
                self._fail(name, "a whole number of at least 1")
        if self.max_seconds is not None and not 0 < self.max_seconds < math.inf:
            self._fail("max_seconds", "a number of seconds above 0")
        for name in ("lr", "eps", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                self._fail(name, "a number above 0")
        for name in ("weight_decay", "mtp_weight", "balance_weight", "bias_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                self._fail(name, "0 or more")
        if self.mtp_target not in ("text", "backbone"):
            self._fail("mtp_target", "'text' or 'backbone'")
        if not 0 <= self.min_lr <= self.lr:
            self._fail("min_lr", f"0 to lr={self.lr}")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1):
            self._fail("warmup", f"a share that leaves room for decay={self.decay} within 1")
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
        return self.batch_size * self.length * self.accumulation

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for logs and checkpoints."""
        return {**asdict(self), "betas": list(self.betas)}
