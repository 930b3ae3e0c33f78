"""One call of `generate` or `stream`: its arguments checked, its rows given back as they came.

    options     those of the model, of the call's `options` and of its keywords become one
    prompts     text or ids, one or several, become rows of ids; each is repeated for `num_samples`
    results     rows become texts or ids again, by prompt and by sample

In between a `Decoding` writes the tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import Any

from nemotron_lite.arguments import integer, shown
from nemotron_lite.cache import Cache
from nemotron_lite.generation.decoding import Decoding, PlainDecoding
from nemotron_lite.generation.defaults import default_options, stop_tokens
from nemotron_lite.generation.options import GenerationOptions
from nemotron_lite.generation.prefill import pad_right
from nemotron_lite.generation.prepared_weights import prepare_weights
from nemotron_lite.generation.prompts import Prompts, encode_prompts
from nemotron_lite.generation.results import GenerationResult
from nemotron_lite.generation.speculative.loop import SpeculativeDecoding
from nemotron_lite.generation.text_rows import TextRow, continuation
from nemotron_lite.model import Nemotron
from nemotron_lite.openmp import watching

MAX_SAMPLES = 4096  # per prompt; each is a row with a cache of its own


def complete_options(
    model: Nemotron,
    options: GenerationOptions | None,
    max_new_tokens: int | None,
    settings: Mapping[str, Any],
) -> GenerationOptions:
    """The options of a call; see defaults.py for the order."""
    if max_new_tokens is not None:
        settings = {**settings, "max_new_tokens": max_new_tokens}
    if options is None:
        return default_options(model, settings).replace(**settings)
    if not isinstance(options, GenerationOptions):
        raise TypeError(
            f"options={shown(options)} ({type(options).__name__}): expected GenerationOptions."
        )
    return options.replace(**settings)


class Run:
    """Prompts and options, checked and ready to be continued."""

    def __init__(
        self,
        model: Nemotron,
        prompts: Prompts,
        options: GenerationOptions,
        cache: Cache | None,
        num_samples: int | None,
        pieces: bool = False,
    ) -> None:
        if cache is not None and not isinstance(cache, Cache):
            raise TypeError(
                f"cache={shown(cache)} ({type(cache).__name__}): expected a Cache, as "
                "model.empty_cache(rows) makes it."
            )
        if num_samples is not None:
            num_samples = integer("num_samples", num_samples, low=1, high=MAX_SAMPLES)
        if cache is not None and num_samples is not None:
            raise ValueError(
                f"num_samples={num_samples} with a cache: a cache holds one continuation of each "
                "row. Give cache.repeat(num_samples) and as many prompts."
            )
        stop = stop_tokens(model) if options.stop is None else options.stop
        options = options.replace(stop=stop)
        read = None if cache is None else cache.lengths.tolist()
        self.prompts, self.single, self.tokenizer = encode_prompts(model, prompts, read)
        self.model, self.options, self.stop = model, options, frozenset(stop)
        self.samples = num_samples
        owners = [row for row in self.prompts for _ in range(num_samples or 1)]
        texts = None
        if options.stop_strings or (pieces and self.tokenizer is not None):
            texts = [self._text_row(row) for row in owners]
        prompt, lengths = pad_right(self.prompts)
        kind = PlainDecoding if options.speculation is None else SpeculativeDecoding
        decoding = kind(
            model, prompt, lengths, options, samples=num_samples or 1, cache=cache, texts=texts
        )
        self.decoding: Decoding | None = decoding
        self.statistics, self.rows, self.owners = decoding.statistics, decoding.rows, owners

    def _text_row(self, prompt: list[int]) -> TextRow:
        if self.model.tokenizer is None:
            raise ValueError(
                f"stop_strings={shown(self.options.stop_strings)} needs a tokenizer, and this "
                "model has none (model.tokenizer is None): set model.tokenizer, or give stop "
                "tokens (stop=...)."
            )
        return TextRow(
            self.model.tokenizer,
            prompt,
            self.stop,
            self.options.max_new_tokens,
            stop_strings=tuple(self.options.stop_strings),
        )

    def steps(self) -> Iterator[list[int | None]]:
        """A token per row and step; None for rows that have ended."""
        if self.options.prepare_weights:
            rows, speculation = len(self.rows), self.options.speculation
            most = 1 if speculation is None else speculation.draft_length + 1
            prepare_weights(self.model, self.options.max_new_tokens, (rows, rows * most))
        assert self.decoding is not None
        try:
            with watching():
                yield from self.decoding.steps()
        finally:
            self.drop_cache()

    def drop_cache(self) -> None:
        """Free the cache of this run; what was written stays."""
        self.decoding = None

    def pieces(self) -> Generator[Any, None, None]:
        """The steps as `stream` gives them."""
        for number, step in enumerate(self.steps()):
            found: list[Any] = step
            if self.tokenizer is not None:
                found = [
                    row.pieces[number] if number < len(row.pieces) else "" for row in self.rows
                ]
            yield self.grouped(found)

    def outputs(self) -> list[Any]:
        """What each row has written, as text where text was given."""
        if self.tokenizer is None:
            return [row.tokens for row in self.rows]
        return [self._text(i) for i in range(len(self.rows))]

    def results(self) -> list[Any]:
        """What each row has written, with the details."""
        recorded = self.options.logprobs is not None
        return [
            GenerationResult(
                tokens=list(row.tokens),
                text=self._text(i),
                stop_reason=row.stop_reason,
                stop=row.stop,
                prompt_tokens=len(self.owners[i]),
                logprobs=list(row.logprobs) if recorded else None,
                top_logprobs=list(row.top_logprobs) if recorded else None,
            )
            for i, row in enumerate(self.rows)
        ]

    def _text(self, i: int) -> str | None:
        row = self.rows[i]
        if row.text is not None and row.ended:
            return row.text.text
        if self.model.tokenizer is None:
            return None
        return continuation(self.model.tokenizer, self.owners[i], row.tokens, self.stop)

    def grouped(self, rows: list[Any]) -> Any:
        """Values of the rows as the result has them: by prompt, and by sample if asked for."""
        n = self.samples
        found = rows if n is None else [rows[i : i + n] for i in range(0, len(rows), n)]
        return found[0] if self.single else found
