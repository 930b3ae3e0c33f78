"""The options of generation, in one place: for `generate`, `stream` and the command line.

    SamplingOptions      from logits to a distribution: temperature, top_k, top_p
    GenerationOptions    those, and everything else that a text depends on
    GenerationSettings   the same as keywords, for editors and type checkers
    SpeculationOptions   drafting with the MTP module
    SpeculationCosts     what drafting and verifying cost

All are frozen dataclasses that check their values when they are made. An error names the value and
says what is expected.

The default temperature is 1.0 with top_p 0.95, everywhere: it is what the release recommends for
Nemotron 3. A base model, or a small one, often writes better text with a lower temperature; 0 is
greedy decoding, which always gives the same text.

This module does not import torch, so that the command line can show the defaults at once.

Source: reference sheet 8.6 for temperature and top_p. Left out: beam search, repetition penalties,
min-p.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, TypedDict


@dataclass(frozen=True)
class SamplingOptions:
    """How logits become a distribution; `sampling.distribution` has the equation.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding, whatever the filters.
        top_k: keep the most likely tokens only, this many; None keeps all.
        top_p: keep the smallest set of tokens that has this probability; None keeps all.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float | int = 1.0
    top_k: int | None = None
    top_p: float | int | None = 0.95

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature={self.temperature} does not work: expected a finite number of at "
                "least 0 (0 is greedy decoding)."
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(
                f"top_k={self.top_k} does not work: expected at least 1, or None to keep all "
                "tokens."
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} does not work: expected a number above 0 and at most 1, or "
                "None to keep all tokens."
            )

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, and no random number is needed."""
        return self.temperature == 0


@dataclass(frozen=True)
class SpeculationCosts:
    """Costs of drafting and verifying, in units of one plain decoding step.

    Attributes:
        draft: one step of the MTP module, with the head and the choice of a token.
        verify: each token of a verification after the first.
        start: what a verification costs beyond a plain step, before any token is added.
    """

    draft: float
    verify: float
    start: float = 0.0

    def of_pass(self, draft_length: int | float) -> float:
        """Drafting this many tokens and verifying them; without a draft, a plain step."""
        if draft_length == 0:
            return 1.0
        return 1.0 + self.start + draft_length * (self.draft + self.verify)


@dataclass(frozen=True)
class SpeculationOptions:
    """How the model's MTP module makes drafts; see `speculative/`.

    Attributes:
        draft_length: the most tokens of a draft.
        adaptive: draft only as far as it pays; False always drafts `draft_length` tokens.
        costs: what `adaptive` compares the gain with. None takes the costs that follow from the
            model's sizes; `speculative.measure_costs` measures those of this machine.
        shortlist: the only tokens to draft, for a head that is cheaper to compute
            (`speculative.shortlist` finds them); None drafts from the whole vocabulary.

    Raises:
        ValueError: a value out of range.
    """

    draft_length: int = 4
    adaptive: bool = True
    costs: SpeculationCosts | None = None
    shortlist: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.draft_length < 1:
            raise ValueError(
                f"draft_length={self.draft_length} does not work: expected at least 1. To decode "
                "without drafts, give no SpeculationOptions."
            )


@dataclass(frozen=True)
class GenerationOptions(SamplingOptions):
    """Everything that a text depends on, in addition to the model and the prompt.

    Attributes:
        max_new_tokens: the most tokens to write per row.
        stop: token ids that end a row. None takes the end-of-text tokens of the model's config
            (`config.eos_token_ids`); `()` never stops before `max_new_tokens`.
        seed: row r draws its random numbers from a stream with seed `seed + r`, so the same call
            gives the same text. None takes a fresh seed.
        prefill_segment: tokens of the prompt per forward pass; None lets the model choose. Every
            value gives the same logits up to rounding.
        ssm_dtype: of the SSM states in the cache, `torch.float32` or `torch.float16`; None is
            float32. float16 halves their memory. The states are then rounded stochastically, with
            random bits that follow from `seed` (from 0 where there is none).
        speculation: draft several tokens and verify them together; None writes token by token.
        prepare_weights: call `model.prepare_for_decoding()` first, where that makes decoding faster
            (prepared_weights.py says where). The projection matrices are then held twice, and the
            copies stay with the model for the next call. False saves that memory.

    Raises:
        ValueError: a value out of range.
    """

    max_new_tokens: int = 200
    stop: Collection[int] | None = None
    seed: int | None = None
    prefill_segment: int | None = None
    ssm_dtype: Any = None  # torch.dtype | None, without importing torch
    speculation: SpeculationOptions | None = None
    prepare_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_new_tokens < 0:
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} does not work: expected 0 or more."
            )
        if self.prefill_segment is not None and self.prefill_segment < 1:
            raise ValueError(
                f"prefill_segment={self.prefill_segment} does not work: expected at least 1, or "
                "None to let the model choose."
            )
        if self.stop is not None:
            object.__setattr__(self, "stop", _token_ids(self.stop))

    def replace(self, **changes: Any) -> GenerationOptions:
        """The same options with some changed.

        Raises:
            ValueError: a value out of range.
            TypeError: an option that does not exist.
        """
        unknown = sorted(changes.keys() - self.__dataclass_fields__.keys())
        if unknown:
            raise TypeError(
                f"generation has no option {unknown[0]!r}; its options are "
                f"{', '.join(self.__dataclass_fields__)}."
            )
        return replace(self, **changes)

    @property
    def ssm_seed(self) -> int:
        """The seed for rounding SSM states to float16."""
        return (self.seed or 0) % 2**63


class GenerationSettings(TypedDict, total=False):
    """The fields of `GenerationOptions` as keywords, so that editors and type checkers know them.

    `max_new_tokens` is missing: `generate` and `stream` have it as an argument of its own.
    """

    temperature: float | int
    top_k: int | None
    top_p: float | int | None
    stop: Collection[int] | None
    seed: int | None
    prefill_segment: int | None
    ssm_dtype: Any
    speculation: SpeculationOptions | None
    prepare_weights: bool


def _token_ids(stop: Any) -> tuple[int, ...]:
    """Stop tokens of any collection, as a tuple."""
    if not isinstance(stop, str | Integral):
        ids = tuple(stop)
        if all(isinstance(token, Integral) for token in ids):
            return tuple(int(token) for token in ids)
    raise ValueError(
        f"stop={stop!r} does not work: expected token ids such as (2, 11), None for those of "
        "model.config.eos_token_ids, or () to never stop."
    )
