"""All options of a training run, validated once.

The defaults follow Super's recipe (reference sheet 7) where it also suits a run of minutes: the
AdamW constants, the loss weights, the gradient clipping, and the minus-sqrt decay to 1 % of the
peak. The others were chosen by measurements on the `lite` preset: a larger learning rate, longer
fractions of warm-up and decay, and updates of only 512 tokens, because a short run makes only a few
hundred updates. A run of thousands of updates needs larger batches and a shorter warm-up.

A run with an output folder saves itself every ten minutes of training if nothing else is said. A
machine that fails then costs ten minutes. A save writes three times the weights (weights and two
moments), which takes seconds, so more often would cost little as well.

Numbers may come from NumPy or from a tensor of one element. They are stored as Python numbers, so
that a checkpoint and a log hold plain values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from nemotron_lite import arguments
from nemotron_lite.quantization.recipe import Recipe, get_recipe

_LARGEST_SEED = (1 << 64) - 1  # torch and stochastic rounding take 64 bits

# What a type checker reads. At run time these fields take NumPy's numbers too, and the tests check
# annotations at run time, so there they are open and `__post_init__` is the only judge.
if TYPE_CHECKING:
    Integer: TypeAlias = int
    Number: TypeAlias = float
    Flag: TypeAlias = bool
    Pair: TypeAlias = tuple[float, float]
    Integers: TypeAlias = tuple[int, ...]
    Target: TypeAlias = str
    Precision: TypeAlias = str | Recipe
else:
    Integer = Number = Flag = Pair = Integers = Target = Precision = Any

_MOST = 1 << 53  # updates, and seconds: what a float64 counts exactly
_OF_MERGING = ("merge_every", "merge_windows")
_MOST_TOKENS = (1 << 31) - 1  # of one micro-batch: numbers of tokens are 32-bit in some kernels


@dataclass(frozen=True)
class TrainConfig:
    """One training run. It ends after `steps` or after `max_seconds`, whichever comes first.

    With `steps` alone a run is a function of its config: if it is interrupted and resumed, the
    losses are the same bit for bit. With `max_seconds` the learning rate follows the time that has
    passed, so that the decay is always complete at the end. Two such runs are never identical.

    Raises:
        TypeError: a value of the wrong type; the message names it.
        ValueError: a value that does not work; the message names it.
    """

    steps: Integer | None = None  # optimizer updates
    max_seconds: Number | None = None  # training time; a resumed run counts its earlier parts too
    batch_size: Integer = 2  # b, rows per micro-batch
    seq_len: Integer = 256  # t, tokens per row
    gradient_accumulation_steps: Integer = 1  # micro-batches per update
    gradient_checkpointing: Flag = False  # less memory, more time (layers/block.py)

    optimizer: Target = "adamw"  # or "muon" for matrices (muon.py)
    lr: Number = 2.5e-3  # peak
    min_lr: Number = 2.5e-5  # at the end of the decay
    warmup_fraction: Number = 0.05  # of the run
    decay_fraction: Number = 0.4  # of the run
    betas: Pair = (0.9, 0.95)
    eps: Number = 1e-8
    weight_decay: Number = 0.1  # matrices only
    grad_clip: Number = 1.0  # largest norm of all gradients together

    mtp_weight: Number = 0.3  # shared by the MTP depths; 0 does not train the MTP module
    mtp_target: Target = "text"  # "text", or "backbone" for distillation (distillation.py)
    balance_weight: Number = 1e-4  # of the per-sequence balance loss
    bias_rate: Number = 1e-3  # update step of the routers' selection bias

    precision: Precision = "fp32"  # of matrix products: "bf16", "nvfp4"; weights are float32
    seed: Integer = 0  # of the data order
    eval_every: Integer | None = None  # updates between validations; None: no validation
    eval_batches: Integer = 8  # batches of one validation
    save_every: Integer | None = None  # updates between checkpoints; None: by time
    save_every_seconds: Number | None = 600.0  # if `save_every` is None; None: only at the end
    keep_checkpoints: Integer = 2  # how many of them are kept
    merge_every: Integer | None = None  # updates between snapshots; None: none (snapshots.py)
    merge_windows: Integers = ()  # lengths of merges to score at a validation, in updates

    def __post_init__(self) -> None:
        if self.steps is None and self.max_seconds is None:
            raise ValueError(
                "steps and max_seconds are both None: give at least one of them (--steps, "
                "--max-seconds on the command line)."
            )
        for name in ("steps", "eval_every", "save_every", "merge_every"):
            if getattr(self, name) is not None:
                self._integer(name, high=_MOST)
        for name in ("batch_size", "seq_len", "gradient_accumulation_steps", "eval_batches"):
            self._integer(name, high=_MOST_TOKENS)
        if self.batch_size * self.seq_len > _MOST_TOKENS:
            self._fail("batch_size", f"at most {_MOST_TOKENS:,} tokens with seq_len={self.seq_len}")
        self._integer("keep_checkpoints", high=_MOST)
        self._integer("seed", low=0, high=_LARGEST_SEED)
        self._set("gradient_checkpointing", arguments.flag)
        for name in ("max_seconds", "save_every_seconds"):
            if getattr(self, name) is not None:
                self._set(name, arguments.number, above=0, high=_MOST)
        for name in ("lr", "eps", "grad_clip"):
            self._set(name, arguments.number, above=0)
        for name in ("weight_decay", "mtp_weight", "balance_weight", "bias_rate"):
            self._set(name, arguments.number, low=0)
        self._set("min_lr", arguments.number, low=0)
        if self.min_lr > self.lr:
            self._fail("min_lr", f"0 to lr={self.lr}")
        for name in ("warmup_fraction", "decay_fraction"):
            self._set(name, arguments.number, low=0, high=1)
        if self.warmup_fraction + self.decay_fraction > 1:
            self._fail(
                "warmup_fraction",
                "a number of at least 0 whose sum with "
                f"decay_fraction={self.decay_fraction!r} is at most 1",
            )
        self._check_betas()
        self._check_merges()
        if not isinstance(self.mtp_target, str) or self.mtp_target not in ("text", "backbone"):
            self._fail("mtp_target", "'text' or 'backbone'")
        if not isinstance(self.optimizer, str) or self.optimizer not in ("adamw", "muon"):
            self._fail("optimizer", "'adamw' or 'muon'")
        if not isinstance(self.precision, str | Recipe):
            self._fail("precision", "the name of a recipe, or a Recipe")
        get_recipe(self.precision)

    def _check_betas(self) -> None:
        betas = self.betas
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            self._fail("betas", "two numbers from 0 to below 1")
        pair = tuple(arguments.number("betas", beta, low=0) for beta in betas)
        if max(pair) >= 1:
            self._fail("betas", "two numbers from 0 to below 1")
        object.__setattr__(self, "betas", pair)

    def _check_merges(self) -> None:
        every, windows = self.merge_every, self.merge_windows
        if not isinstance(windows, tuple | list):
            self._fail("merge_windows", "a tuple of numbers of updates")
        found = tuple(arguments.integer("merge_windows", w, low=1, high=_MOST) for w in windows)
        object.__setattr__(self, "merge_windows", found)
        if every is None and found:
            self._fail("merge_windows", "a merge_every too, the updates between two snapshots")
        if found and self.eval_every is None:
            self._fail("merge_windows", "an eval_every too, because validations score the merges")
        if every is not None and any(window % every for window in found):
            self._fail("merge_windows", f"multiples of merge_every={every}")
        if every is not None and self.eval_every is not None and self.eval_every % every:
            self._fail("merge_every", f"a divisor of eval_every={self.eval_every}")

    def _integer(self, name: str, *, low: int = 1, high: int) -> None:
        self._set(name, arguments.integer, low=low, high=high)

    def _set(self, name: str, read: Callable[..., Any], **limits: int | float) -> None:
        """Replace a field by its value as a plain Python number."""
        object.__setattr__(self, name, read(name, getattr(self, name), **limits))

    def _fail(self, name: str, expected: str) -> NoReturn:
        value = getattr(self, name)
        try:
            shown = repr(value)[:60]
        except Exception:  # such as an integer of more digits than Python prints
            shown = f"a value of type {type(value).__name__}"
        raise ValueError(f"{name}={shown} does not work: expected {expected}.")

    @property
    def tokens_per_step(self) -> int:
        """Tokens read for one update."""
        return self.batch_size * self.seq_len * self.gradient_accumulation_steps

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for logs and checkpoints.

        The options of merging are left out where nothing is merged, so that what was recorded of
        runs before there were any stays equal.
        """
        plain = {**asdict(self), "betas": list(self.betas)}
        if self.merge_every is None:
            return {n: value for n, value in plain.items() if n not in _OF_MERGING}
        return {**plain, "merge_windows": list(self.merge_windows)}
