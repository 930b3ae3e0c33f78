"""Writing text: prefill the prompt, then one token at a time, or several where a draft is right.

    t_{i+1} ~ p( . | t_1 .. t_i),      p = softmax(logits / temperature) after the filters

    generate(model, "def mean(values):", max_new_tokens=64)              a text gives a text
    generate(model, [[5, 17], [3]], temperature=0)                       ids give ids
    for piece in stream(model, "def mean(values):"): print(piece, end="")

Rows of a batch may have prompts of different lengths; each gives the tokens it would give alone.
Each row draws from its own random stream, row r with `seed + r`, so this holds for sampling too.

A conversation goes on from a cache, and nothing is read twice:

    cache = model.empty_cache(1)
    answer = generate(model, "User: hello", cache=cache, stop_strings="User:")
    answer = generate(model, " and then?", cache=cache)            only what is new

The cache is advanced in place. At the end it has read prompt and answer of each row, the last token
too, and also a stop token and the tokens of a stop string; the next call continues from there, as
if everything had been one prompt. `GenerationResult.tokens` are what it has read behind the prompt.
An empty prompt goes on where the row stands. `max_new_tokens=0` only reads. If a stream is closed
before its end, the cache has read all tokens that were written by then (`TokenStream.results`; with
speculation a few more than were given). If an error ends a run, the cache is refused afterwards:
keep `cache.clone()` where that matters.

With `speculation=SpeculationOptions()` the MTP module proposes the next few tokens and the backbone
verifies them in one pass (speculative/). Greedy decoding then writes the same tokens. Sampling
keeps the distribution; the individual tokens differ, because the random numbers are used
differently. All options work with it. A cache must be made with `mtp=True`; tokens that it reads
without speculation are missing in the MTP module's part, which only lowers the acceptance.

On a CPU decoding is bound by reading the projection matrices. Where it helps (see
prepared_weights.py), `generate` and `stream` first make a copy of them in a layout that oneDNN
reads faster. The copies take as much memory as the matrices, and stay with the model for later
calls; products with them differ by rounding. A weight that changes afterwards is multiplied without
its copy, and copied again by the next call; a forward pass with gradients drops all copies. The
exception are writes through `parameter.data` between two calls, which nothing notices: avoid them,
or give `prepare_weights=False`.

Source: reference sheet 8.6 for the recommended temperature and top_p. Options are in options.py,
prompts in prompts.py, filters in sampling.py, the loops in decoding.py and speculative/. Left out:
beam search.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import Any, Generic, Literal, Required, TypeVar, Unpack, overload

from torch import nn

from nemotron_lite.arguments import flag
from nemotron_lite.cache import Cache
from nemotron_lite.generation.options import GenerationOptions, GenerationSettings
from nemotron_lite.generation.prompts import Prompts
from nemotron_lite.generation.results import GenerationResult
from nemotron_lite.generation.run import Run, complete_options
from nemotron_lite.generation.statistics import Statistics
from nemotron_lite.model import Nemotron
from nemotron_lite.wrappers import model_for_inference

# What mypy tells apart: one text, several texts, ids of one prompt, ids of several. Tensors and
# arrays may be one prompt or several, so their results are Any.
Texts = list[str] | tuple[str, ...]
Ids = list[int] | tuple[int, ...]
IdRows = Sequence[Sequence[int]]

Step = TypeVar("Step")


# The keywords of a call, for the overloads below. A key that may be missing has its default.
class _Stream(GenerationSettings, total=False):
    options: GenerationOptions | None
    cache: Cache | None
    num_samples: None


class _Plain(_Stream, total=False):
    return_statistics: Literal[False]
    return_details: Literal[False]


class _Details(_Stream, total=False):
    return_statistics: Literal[False]
    return_details: Required[Literal[True]]


class _WithStatistics(_Stream, total=False):
    return_statistics: Required[Literal[True]]
    return_details: Literal[False]


@overload
def generate(
    model: Nemotron, prompts: str, max_new_tokens: int | None = None, **settings: Unpack[_Plain]
) -> str: ...


@overload
def generate(
    model: Nemotron, prompts: Texts, max_new_tokens: int | None = None, **settings: Unpack[_Plain]
) -> list[str]: ...


@overload
def generate(
    model: Nemotron, prompts: Ids, max_new_tokens: int | None = None, **settings: Unpack[_Plain]
) -> list[int]: ...


@overload
def generate(
    model: Nemotron, prompts: IdRows, max_new_tokens: int | None = None, **settings: Unpack[_Plain]
) -> list[list[int]]: ...


@overload
def generate(
    model: Nemotron,
    prompts: str | Ids,
    max_new_tokens: int | None = None,
    **settings: Unpack[_Details],
) -> GenerationResult: ...


@overload
def generate(
    model: Nemotron,
    prompts: Texts | IdRows,
    max_new_tokens: int | None = None,
    **settings: Unpack[_Details],
) -> list[GenerationResult]: ...


@overload
def generate(
    model: Nemotron,
    prompts: str,
    max_new_tokens: int | None = None,
    **settings: Unpack[_WithStatistics],
) -> tuple[str, Statistics]: ...


@overload
def generate(
    model: Nemotron,
    prompts: Texts,
    max_new_tokens: int | None = None,
    **settings: Unpack[_WithStatistics],
) -> tuple[list[str], Statistics]: ...


@overload
def generate(
    model: Nemotron,
    prompts: Ids,
    max_new_tokens: int | None = None,
    **settings: Unpack[_WithStatistics],
) -> tuple[list[int], Statistics]: ...


@overload
def generate(
    model: Nemotron,
    prompts: IdRows,
    max_new_tokens: int | None = None,
    **settings: Unpack[_WithStatistics],
) -> tuple[list[list[int]], Statistics]: ...


@overload
def generate(
    model: nn.Module,
    prompts: Prompts,
    max_new_tokens: int | None = None,
    *,
    options: GenerationOptions | None = None,
    cache: Cache | None = None,
    num_samples: int | None = None,
    return_statistics: bool = False,
    return_details: bool = False,
    **settings: Unpack[GenerationSettings],
) -> Any: ...


def generate(
    model: nn.Module,
    prompts: Prompts,
    max_new_tokens: int | None = None,
    *,
    options: GenerationOptions | None = None,
    cache: Cache | None = None,
    num_samples: int | None = None,
    return_statistics: bool = False,
    return_details: bool = False,
    **settings: Unpack[GenerationSettings],
) -> Any:
    """Continue each prompt.

    Args:
        model: a `Nemotron`. Of a model in DistributedDataParallel, DataParallel or AveragedModel
            the one inside writes; one from `torch.compile` is called as it is.
        prompts: one text, a list of texts, the token ids of one prompt, or a list or `b t` tensor
            of several. Text needs `model.tokenizer`.
        max_new_tokens: the most tokens to write per row.
        options: all options together; None takes those of the model (`default_options`).
        cache: has read the conversation so far, one row per prompt; the prompts are what is new.
            It is advanced in place (see above).
        num_samples: how many continuations to write of each prompt; the result of a prompt is then
            a list of them. The prompt is read once. Sample s of prompt p is row
            `p * num_samples + s`, which gives its random stream. None writes one, without a list.
        return_statistics: also return the `Statistics`: how many passes, how much of the drafts was
            accepted, where the time went.
        return_details: return a `GenerationResult` in place of each text or list of ids: tokens,
            text, log-probabilities and why the row ended.
        settings: any option of `GenerationOptions` as a keyword, such as `temperature=0.8`; it
            takes the place of the one in `options`.

    Returns:
        What was written, without the prompt: a text for a text, token ids for ids, and a list for
        several prompts. A stop token is the last id of its row; in text it is not shown. With
        `return_statistics`, a pair: that, and the statistics.

    Raises:
        ValueError: an option out of range, an empty prompt, a prompt that is neither text nor token
            ids, text or stop strings for a model without a tokenizer, speculation with a model that
            has no MTP module, an `ssm_dtype` that caches do not have, a cache that does not fit, or
            `logprobs` without `return_details`.
        TypeError: an option that does not exist, or a value of a wrong type.
        FloatingPointError: logits that are not finite; the message names step, row and layer.
    """
    return_statistics = flag("return_statistics", return_statistics)
    return_details = flag("return_details", return_details)
    model = model_for_inference(model)
    found = complete_options(model, options, max_new_tokens, settings)
    if settings.get("logprobs") is not None and not return_details:
        raise ValueError(
            f"logprobs={found.logprobs} without return_details=True: they are part of the details."
        )
    run = Run(model, prompts, found, cache, num_samples)
    for _ in run.steps():
        pass
    result = run.grouped(run.results() if return_details else run.outputs())
    return (result, run.statistics) if return_statistics else result


class TokenStream(Iterator[Step], Generic[Step]):
    """What `stream` returns: the steps, and the statistics of the run so far.

    Attributes:
        statistics: counted while the run goes on; complete after the last step.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._steps: Generator[Step, None, None] = run.pieces()
        self.statistics = run.statistics

    def __iter__(self) -> TokenStream[Step]:
        return self

    def __next__(self) -> Step:
        return next(self._steps)

    def close(self) -> None:
        """End the run before its last step and free its cache; no step follows.

        A cache that the caller gave then reads the last token of each row, so that it has read
        exactly the tokens in `results`. If no step was asked for, it has read nothing.

        `with contextlib.closing(stream(...)) as steps:` calls it at the end of the block.
        """
        self._steps.close()
        self._run.drop_cache()

    @property
    def results(self) -> Any:
        """The `GenerationResult` of what was written so far, or a list of them as the steps are.

        With speculation a row may have written more tokens than the steps have given.
        """
        return self._run.grouped(self._run.results())


@overload
def stream(
    model: Nemotron, prompts: str, max_new_tokens: int | None = None, **settings: Unpack[_Stream]
) -> TokenStream[str]: ...


@overload
def stream(
    model: Nemotron, prompts: Texts, max_new_tokens: int | None = None, **settings: Unpack[_Stream]
) -> TokenStream[list[str]]: ...


@overload
def stream(
    model: Nemotron, prompts: Ids, max_new_tokens: int | None = None, **settings: Unpack[_Stream]
) -> TokenStream[int]: ...


@overload
def stream(
    model: Nemotron, prompts: IdRows, max_new_tokens: int | None = None, **settings: Unpack[_Stream]
) -> TokenStream[list[int | None]]: ...


@overload
def stream(
    model: nn.Module,
    prompts: Prompts,
    max_new_tokens: int | None = None,
    *,
    options: GenerationOptions | None = None,
    cache: Cache | None = None,
    num_samples: int | None = None,
    **settings: Unpack[GenerationSettings],
) -> TokenStream[Any]: ...


def stream(
    model: nn.Module,
    prompts: Prompts,
    max_new_tokens: int | None = None,
    *,
    options: GenerationOptions | None = None,
    cache: Cache | None = None,
    num_samples: int | None = None,
    **settings: Unpack[GenerationSettings],
) -> TokenStream[Any]:
    """`generate`, one step at a time.

    Each step has one token of every row. For several prompts it is a list: of token ids, with None
    for rows that have ended; or of pieces of text, where a piece is "" as long as a character is
    not complete or a stop string may begin, and for rows that have ended. For one prompt it is the
    id or the piece itself. The pieces of a row, joined, are the text that `generate` returns. Ids
    are given as they come, those of a stop string too.

    The arguments are those of `generate`. They are checked immediately; the prompt is read when the
    first step is requested.
    """
    model = model_for_inference(model)
    found = complete_options(model, options, max_new_tokens, settings)
    return TokenStream(Run(model, prompts, found, cache, num_samples, pieces=True))
