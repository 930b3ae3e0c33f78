"""Writing text: prefill the prompt, then one token at a time, or several where a draft is right.

    t_{i+1} ~ p( . | t_1 .. t_i),      p = softmax(logits / temperature) after the filters

    generate(model, "def mean(values):", max_new_tokens=64)              a text gives a text
    generate(model, [[5, 17], [3]], temperature=0)                       ids give ids
    for piece in stream(model, "def mean(values):"): print(piece, end="")

Rows of a batch may have prompts of different lengths; each gives the tokens it would give alone.
Each row draws from its own random stream, row r with `seed + r`, so this holds for sampling too.

With `speculation=SpeculationOptions()` the MTP module proposes the next few tokens and the backbone
verifies them in one pass (speculative/). Greedy decoding then writes the same tokens. Sampling
keeps the distribution; the individual tokens differ, because the random numbers are used
differently.

On a CPU decoding is bound by reading the projection matrices. Where it helps (see
prepared_weights.py), `generate` and `stream` first make a copy of them in a layout that oneDNN
reads faster. The copies take as much memory as the matrices, and stay with the model for later
calls; products with them differ by rounding. A weight that changes afterwards is multiplied without
its copy, and copied again by the next call; a forward pass with gradients drops all copies. The
exception are writes through `parameter.data` between two calls, which nothing notices: avoid them,
or give `prepare_weights=False`.

Source: reference sheet 8.6 for the recommended temperature and top_p. Options are in options.py,
prompts in prompts.py, filters in sampling.py. Left out: beam search, repetition penalties.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any, Unpack

import torch
from jaxtyping import Int
from torch import Tensor

from nemotron_lite.generation.options import GenerationOptions, GenerationSettings
from nemotron_lite.generation.prefill import pad_right, prefill
from nemotron_lite.generation.prepared_weights import prepare_weights
from nemotron_lite.generation.prompts import Prompts, TextRow, continuation, encode_prompts
from nemotron_lite.generation.sampling import Sampler
from nemotron_lite.generation.speculative.loop import SpeculativeDecoding
from nemotron_lite.generation.speculative.statistics import Statistics
from nemotron_lite.model import Nemotron


def generate(
    model: Nemotron,
    prompts: Prompts,
    max_new_tokens: int | None = None,
    *,
    options: GenerationOptions | None = None,
    return_statistics: bool = False,
    **settings: Unpack[GenerationSettings],
) -> Any:
    """Continue each prompt.

    Args:
        prompts: one text, a list of texts, the token ids of one prompt, or a list or `b t` tensor
            of several. Text needs `model.tokenizer`.
        max_new_tokens: the most tokens to write per row.
        options: all options together; None takes the defaults.
        return_statistics: also return the `Statistics`: how many passes, how much of the drafts was
            accepted, where the time went.
        settings: any option of `GenerationOptions` as a keyword, such as `temperature=0.8`; it
            takes the place of the one in `options`.

    Returns:
        What was written, without the prompt: a text for a text, token ids for ids, and a list for
        several prompts. A stop token is the last id of its row; in text it is not shown. With
        `return_statistics`, a pair: that, and the statistics.

    Raises:
        ValueError: an option out of range, an empty prompt, a prompt that is neither text nor token
            ids, text for a model without a tokenizer, speculation with a model that has no MTP
            module, or an `ssm_dtype` that caches do not have.
        TypeError: an option that does not exist.
    """
    run = _Run(model, prompts, _options(options, max_new_tokens, settings))
    texts: list[list[int]] = [[] for _ in run.rows]
    for step in run.steps():
        for text, token in zip(texts, step, strict=True):
            if token is not None:
                text.append(token)
    found: list[Any] = texts
    if run.tokenizer is not None:
        found = [
            continuation(run.tokenizer, prompt, text, run.stop)
            for prompt, text in zip(run.rows, texts, strict=True)
        ]
    result = found[0] if run.single else found
    return (result, run.statistics) if return_statistics else result


class TokenStream(Iterator[Any]):
    """What `stream` returns: the steps, and the statistics of the run so far.

    Attributes:
        statistics: counted while the run goes on; complete after the last step.
    """

    def __init__(self, steps: Generator[Any, None, None], statistics: Statistics) -> None:
        self._steps = steps
        self.statistics = statistics

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> Any:
        return next(self._steps)

    def close(self) -> None:
        """End the run before its last step and free its cache; no step follows.

        `with contextlib.closing(stream(...)) as steps:` calls it at the end of the block.
        """
        self._steps.close()


def stream(
    model: Nemotron,
    prompts: Prompts,
    max_new_tokens: int | None = None,
    *,
    options: GenerationOptions | None = None,
    **settings: Unpack[GenerationSettings],
) -> TokenStream:
    """`generate`, one step at a time.

    Each step has one token of every row. For several prompts it is a list: of token ids, with None
    for rows that have ended; or of pieces of text, where a piece is "" as long as a character is
    not complete, and for rows that have ended. For one prompt it is the id or the piece itself. The
    pieces of a row, joined, are the text that `generate` returns.

    The arguments are those of `generate`. They are checked immediately; the prompt is read when the
    first step is requested.
    """
    run = _Run(model, prompts, _options(options, max_new_tokens, settings))
    return TokenStream(run.pieces(), run.statistics)


def _options(
    options: GenerationOptions | None, max_new_tokens: int | None, settings: Mapping[str, Any]
) -> GenerationOptions:
    if max_new_tokens is not None:
        settings = {**settings, "max_new_tokens": max_new_tokens}
    return (options or GenerationOptions()).replace(**settings)


class _Run:
    """Prompts and options, checked and ready to be continued."""

    def __init__(self, model: Nemotron, prompts: Prompts, options: GenerationOptions) -> None:
        if options.stop is None:
            options = options.replace(stop=model.config.eos_token_ids)
        assert options.stop is not None
        self.model, self.options, self.stop = model, options, frozenset(options.stop)
        self.rows, self.single, self.tokenizer = encode_prompts(model, prompts)
        prompt, lengths = pad_right(self.rows)
        decoding = PlainDecoding if options.speculation is None else SpeculativeDecoding
        self.decoding = decoding(model, prompt, lengths, options)
        self.statistics = self.decoding.statistics

    def steps(self) -> Iterator[list[int | None]]:
        """A token per row and step; None for rows that have ended."""
        if self.options.prepare_weights:
            prepare_weights(self.model, self.options.max_new_tokens)
        yield from self.decoding.steps()

    def pieces(self) -> Generator[Any, None, None]:
        """The steps as `stream` gives them."""
        most = self.options.max_new_tokens
        texts = [
            TextRow(self.tokenizer, row, self.stop, most) for row in self.rows if self.tokenizer
        ]
        for step in self.steps():
            found: list[Any] = step
            if texts:
                found = [text.add(token) for text, token in zip(texts, step, strict=True)]
            yield found[0] if self.single else found


class PlainDecoding:
    """One token per row and forward pass.

    Args:
        prompt: padded on the right; `lengths` are the real tokens of each row.
        options: how to continue; `stop` holds the tokens that end a row.
    """

    def __init__(
        self,
        model: Nemotron,
        prompt: Int[Tensor, "b t"],
        lengths: list[int],
        options: GenerationOptions,
    ) -> None:
        self.model, self.prompt, self.lengths, self.options = model, prompt, lengths, options
        self.statistics = Statistics()
        self.sampler = Sampler(len(prompt), options, options.seed)
        self.cache = model.empty_cache(
            len(prompt),
            prompt.shape[1] + options.max_new_tokens,
            ssm_dtype=options.ssm_dtype,
            ssm_seed=options.ssm_seed,
        )

    def steps(self) -> Iterator[list[int | None]]:
        """A token per row and step; None for rows that have ended."""
        stop, seconds = self.options.stop or (), self.statistics.seconds
        ended = [False] * len(self.prompt)
        chosen = self.prompt[:, 0]
        for step in range(self.options.max_new_tokens):
            started = time.perf_counter()
            # Inference mode must not stay on while the caller holds the iterator.
            with torch.inference_mode():
                if step == 0:
                    segment = self.options.prefill_segment
                    logits = prefill(self.model, self.prompt, self.lengths, self.cache, segment)
                else:
                    out = self.model(chosen.unsqueeze(1), self.cache, logits_to_keep=1)
                    logits = out.logits[:, 0]
                chosen = self.sampler(logits)
                tokens = chosen.tolist()
            seconds["verify" if step else "prompt"] += time.perf_counter() - started
            if step:
                going = [0 for over in ended if not over]
                self.statistics.count(going, going)
            yield [None if over else token for token, over in zip(tokens, ended, strict=True)]
            ended = [over or token in stop for token, over in zip(tokens, ended, strict=True)]
            if all(ended):
                return
