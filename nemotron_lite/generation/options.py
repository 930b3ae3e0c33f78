"""The options of generation, in one place: for `generate`, `stream` and the command line.

    SamplingOptions      from logits to a distribution: temperature, filters, repetition penalty
    GenerationOptions    those, and everything else that a text depends on
    GenerationSettings   the same as keywords, for editors and type checkers
    SpeculationOptions   drafting with the MTP module
    SpeculationCosts     what drafting and verifying cost

All are frozen dataclasses that check their values when they are made, and keep them as plain Python
numbers, whatever library they came from. An error names the option and the value, and says what is
expected.

The default temperature is 1.0 with top_p 0.95, everywhere: it is what the release recommends for
Nemotron 3. A base model, or a small one, often writes better text with a lower temperature; 0 is
greedy decoding, which always gives the same text. A model's own generation_config.json comes before
these defaults (defaults.py).

This module does not import torch, so that the command line can show the defaults at once.

Source: reference sheet 8.6 for temperature and top_p; min_p and repetition_penalty as transformers
defines them. Left out: beam search, presence and frequency penalties.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypedDict

from nemotron_lite.arguments import flag, integer, number, shown

MAX_DRAFT_LENGTH = 256  # tokens; a draft pays for a few, and random numbers are drawn for all
MAX_STOPS = 1 << 16  # stop tokens or stop strings
MAX_PROCESSORS = 1 << 10
MAX_STOP_CHARACTERS = 1 << 12  # of a stop string, which is searched for at every token
LARGEST = 2**63 - 1  # of a count: what fits into int64

LogitsProcessor = Callable[[Sequence[int], Any], Any]  # (tokens so far, logits `v`) -> logits `v`


@dataclass(frozen=True)
class SamplingOptions:
    """How logits become a distribution; `sampling.distribution` has the equations.

    In this order: repetition penalty, processors, temperature, top_k, top_p, min_p. Greedy decoding
    uses the first two only. Every value but `logits_processors` may be a NumPy scalar or a tensor
    with one element.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding, whatever the filters.
        top_k: keep the most likely tokens only, this many; None keeps all.
        top_p: keep the smallest set of tokens that has this probability; None keeps all.
        min_p: keep the tokens with at least this share of the best token's probability; None keeps
            all, 1 keeps the best only.
        repetition_penalty: logits of tokens that stand in the prompt or were written are divided by
            it where they are positive, and multiplied where they are negative. None or 1 changes
            nothing; above 1 they become less likely.
        logits_processors: functions `(tokens, logits) -> logits`, called one after the other for
            each row and each token. `tokens` are the ids of prompt and answer so far, `logits` is
            `v` in float32 (float64 for a float64 model). They must depend on these two only: with
            speculation they are also called for drafted tokens that are rejected afterwards.
            Minus infinity bans a token.

    Raises:
        ValueError: a value out of range.
        TypeError: a value of another type.
    """

    temperature: float | int = 1.0
    top_k: int | None = None
    top_p: float | int | None = 0.95
    min_p: float | int | None = None
    repetition_penalty: float | int | None = None
    logits_processors: Sequence[LogitsProcessor] = ()

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "temperature", number("temperature", self.temperature, low=0))
        if self.top_k is not None:
            set_(self, "top_k", integer("top_k", self.top_k, low=1))
        if self.top_p is not None:
            set_(self, "top_p", number("top_p", self.top_p, above=0, high=1))
        if self.min_p is not None:
            set_(self, "min_p", number("min_p", self.min_p, low=0, high=1))
        if self.repetition_penalty is not None:
            penalty = number("repetition_penalty", self.repetition_penalty, low=1e-3, high=1e3)
            set_(self, "repetition_penalty", penalty)
        given = self.logits_processors
        processors = _listed(given, MAX_PROCESSORS)
        if processors is None or not all(map(callable, processors)):
            raise TypeError(
                f"logits_processors={shown(given)} ({type(given).__name__}): expected a list of "
                "functions (tokens, logits) -> logits."
            )
        set_(self, "logits_processors", tuple(processors))

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, and no random number is needed."""
        return self.temperature == 0

    @property
    def penalizes(self) -> bool:
        """Whether repetition_penalty changes anything."""
        return self.repetition_penalty not in (None, 1)

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before the temperature, for which all tokens must be known."""
        return self.penalizes or bool(self.logits_processors)


@dataclass(frozen=True)
class SpeculationCosts:
    """Costs of drafting and verifying, in units of one plain decoding step.

    Attributes:
        draft: one step of the MTP module, with the head and the choice of a token.
        verify: each token of a verification after the first.
        start: what a verification costs beyond a plain step, before any token is added.

    Raises:
        ValueError, TypeError: not a finite number.
    """

    draft: float
    verify: float
    start: float = 0.0

    def __post_init__(self) -> None:
        for name in ("draft", "verify", "start"):
            object.__setattr__(self, name, number(name, getattr(self, name)))

    def of_pass(self, draft_length: int | float) -> float:
        """Drafting this many tokens and verifying them; without a draft, a plain step."""
        if draft_length == 0:
            return 1.0
        return 1.0 + self.start + draft_length * (self.draft + self.verify)


@dataclass(frozen=True)
class SpeculationOptions:
    """How the model's MTP module makes drafts; see `speculative/`.

    Attributes:
        draft_length: the most tokens of a draft, up to 256.
        adaptive: draft only as far as it pays; False always drafts `draft_length` tokens.
        costs: what `adaptive` compares the gain with. None takes the costs that follow from the
            model's sizes; `speculative.measure_costs` measures those of this machine.
        shortlist: the only tokens to draft, for a head that is cheaper to compute
            (`speculative.shortlist` finds them); None drafts from the whole vocabulary.

    Raises:
        ValueError: a value out of range.
        TypeError: a value of another type.
    """

    draft_length: int = 4
    adaptive: bool = True
    costs: SpeculationCosts | None = None
    shortlist: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        length = integer("draft_length", self.draft_length, low=1, high=MAX_DRAFT_LENGTH)
        object.__setattr__(self, "draft_length", length)
        object.__setattr__(self, "adaptive", flag("adaptive", self.adaptive))
        if not isinstance(self.costs, SpeculationCosts | None):
            raise TypeError(
                f"costs={shown(self.costs)} ({type(self.costs).__name__}): expected "
                "SpeculationCosts, or None for those of the model's sizes."
            )
        if self.shortlist is not None:
            short = _token_ids("shortlist", self.shortlist, "None for the whole vocabulary", None)
            object.__setattr__(self, "shortlist", short)


@dataclass(frozen=True)
class GenerationOptions(SamplingOptions):
    """Everything that a text depends on, in addition to the model and the prompt.

    Attributes:
        max_new_tokens: the most tokens to write per row. Memory is allocated as the text grows.
        stop: token ids that end a row. None takes those of the model: of its
            generation_config.json, or `config.eos_token_ids`; `()` never stops before
            `max_new_tokens`.
        stop_strings: texts that end a row as soon as one is written, whatever its tokens are. Text
            from the stop string on is cut off; the token ids of the row include its tokens. One
            text, or several. Needs `model.tokenizer`.
        seed: row r draws its random numbers from a stream with seed `seed + r` (modulo 2^64), so
            the same call gives the same text. None takes a fresh seed.
        logprobs: record the log-probability of each token written, and of this many most likely
            tokens; None records nothing. They are those of the model itself: before the penalty,
            the processors, temperature and filters. `return_details=True` returns them.
        prefill_segment: tokens of the prompt per forward pass; None lets the model choose. Every
            value gives the same logits up to rounding.
        ssm_dtype: of the SSM states in the cache, `torch.float32` or `torch.float16`; None is
            float32. float16 halves their memory. The states are then rounded stochastically, with
            random bits that follow from `seed` (from 0 where there is none).
        speculation: draft several tokens and verify them together; None writes token by token.
        prepare_weights: call `model.prepare_for_decoding()` first, where that makes decoding faster
            (prepared_weights.py says where). The projection matrices are then in memory twice,
            and the copies stay with the model for the next call. False saves that memory.
        compiled: on a CPU, decode by C code that is compiled for this machine in about two seconds,
            the first time (layers/compiled_tokens.py). It is several times faster for small models.
            Rounding differs, so the text may differ where two tokens are almost equally likely.
            Without a C compiler, or with layers that the code does not have, decoding goes the
            ordinary way, and a warning says why.
        check_layers: look at the output of every layer, and stop at the first that is not finite
            (finite.py). Slow; for debugging.

    Raises:
        ValueError: a value out of range.
        TypeError: a value of another type.
    """

    max_new_tokens: int = 200
    stop: Collection[int] | None = None
    stop_strings: str | Collection[str] = ()
    seed: int | None = None
    logprobs: int | None = None
    prefill_segment: int | None = None
    ssm_dtype: Any = None  # torch.dtype | None, without importing torch
    speculation: SpeculationOptions | None = None
    prepare_weights: bool = True
    compiled: bool = False
    check_layers: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        set_ = object.__setattr__
        most = integer("max_new_tokens", self.max_new_tokens, low=0, high=LARGEST)
        set_(self, "max_new_tokens", most)
        for name, low, high in (
            ("seed", -(2**63), 2**64 - 1),  # what torch.Generator.manual_seed takes
            ("logprobs", 0, LARGEST),
            ("prefill_segment", 1, LARGEST),
        ):
            value = getattr(self, name)
            if value is not None:
                set_(self, name, integer(name, value, low=low, high=high))
        for name in ("prepare_weights", "compiled", "check_layers"):
            set_(self, name, flag(name, getattr(self, name)))
        if self.ssm_dtype is not None and str(type(self.ssm_dtype)) != "<class 'torch.dtype'>":
            raise TypeError(
                f"ssm_dtype={shown(self.ssm_dtype)} ({type(self.ssm_dtype).__name__}): expected "
                "torch.float32, torch.float16, or None."
            )
        if not isinstance(self.speculation, SpeculationOptions | None):
            raise TypeError(
                f"speculation={shown(self.speculation)} ({type(self.speculation).__name__}): "
                "expected SpeculationOptions(), or None to write token by token."
            )
        if self.stop is not None:
            otherwise = "None for those of the model (model.config.eos_token_ids), or () for none"
            set_(self, "stop", _token_ids("stop", self.stop, otherwise, MAX_STOPS))
        set_(self, "stop_strings", _stop_strings(self.stop_strings))

    def replace(self, **changes: Any) -> GenerationOptions:
        """The same options with some changed.

        Raises:
            ValueError: a value out of range.
            TypeError: an option that does not exist, or a value of another type.
        """
        unknown = sorted(changes.keys() - self.__dataclass_fields__.keys())
        if unknown:
            raise TypeError(
                f"generation has no option {shown(unknown[0])}; its options are "
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
    min_p: float | int | None
    repetition_penalty: float | int | None
    logits_processors: Sequence[LogitsProcessor]
    stop: Collection[int] | None
    stop_strings: str | Collection[str]
    seed: int | None
    logprobs: int | None
    prefill_segment: int | None
    ssm_dtype: Any
    speculation: SpeculationOptions | None
    prepare_weights: bool
    compiled: bool
    check_layers: bool


def _token_ids(name: str, ids: Any, otherwise: str, most: int | None) -> tuple[int, ...]:
    """Token ids of any collection, array or tensor, as a tuple of Python ints."""
    wrong = (
        f"{name}={shown(ids)} ({type(ids).__name__}) does not work: expected token ids such as "
        f"(2, 11), {otherwise}."
    )
    values = _listed(ids, most)
    if values is None:
        raise ValueError(wrong)
    try:
        return tuple(integer(name, token, low=0) for token in values)
    except (TypeError, ValueError) as error:
        raise ValueError(wrong) from error


def _stop_strings(strings: Any) -> tuple[str, ...]:
    """One stop string, or a collection of them, as a tuple."""
    values = [strings] if isinstance(strings, str) else _listed(strings, MAX_STOPS)
    if values is None or not all(isinstance(text, str) for text in values):
        raise TypeError(
            f"stop_strings={shown(strings)} ({type(strings).__name__}): expected a text such as "
            "'\\nUser:', or a list of texts."
        )
    for text in values:
        if not 0 < len(text) <= MAX_STOP_CHARACTERS:
            raise ValueError(
                f"stop_strings={shown(strings)}: expected texts of 1 to {MAX_STOP_CHARACTERS:,} "
                f"characters; one has {len(text):,}."
            )
    return tuple(dict.fromkeys(str(text) for text in values))


def _listed(values: Any, most: int | None) -> list[Any] | None:
    """The members of a collection, array or tensor; None for anything else, or too many."""
    array = hasattr(values, "tolist") and len(getattr(values, "shape", ())) == 1
    if not array and (
        isinstance(values, str | bytes | bytearray | memoryview | dict)
        or not isinstance(values, Collection)
    ):
        return None
    try:
        if most is not None and len(values) > most:
            return None
        members: Iterable[Any] = values.tolist() if array else values
        return list(members)
    except Exception:  # whatever a foreign collection raises
        return None
