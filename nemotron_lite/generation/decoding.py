"""A run of decoding, pass by pass: what plain and speculative decoding have in common.

    passes     the prompt, then one pass of the model after the other, until every row has ended
    rows       what each row has written, and whether it has ended (written_row.py)
    cache      made for the run, or given by the caller to be continued
    checks     logits that are not finite end the run with an error that names the layer

`PlainDecoding` below writes one token per row and pass; speculative/loop.py writes several.

A cache that the caller gave is read and advanced in place. While a run goes on, the last token of a
row is chosen but not read yet. So at the end it is read too, and rows that have ended read nothing
more (`lengths` 0 in their place): the cache has read prompt and answer of every row, and no other
token. The same holds after a stream is closed before its end. If an error ends a run in the middle
of a pass, some layers have read a token and others have not; such a cache is marked as broken.

A cache that was made for the run is dropped with it. There rows that have ended go on reading,
which costs less than leaving them out.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.cache import Cache, Transcript
from nemotron_lite.finite import NotFiniteError, check_layers, logits_error
from nemotron_lite.generation.adjustments import Adjustments
from nemotron_lite.generation.options import GenerationOptions
from nemotron_lite.generation.prefill import prefill
from nemotron_lite.generation.sampling import Sampler
from nemotron_lite.generation.statistics import Statistics
from nemotron_lite.generation.text_rows import TextRow
from nemotron_lite.generation.written_row import WrittenRow
from nemotron_lite.input_checks import check_cache, check_transcript
from nemotron_lite.layers import MambaCache, compiled_decoding
from nemotron_lite.model import Nemotron

RESERVED = 4096  # new tokens per row that a cache has room for at once; it grows beyond them


class Decoding:
    """One run. Subclasses say what is done with the prompt, and in each pass after it.

    Args:
        model: to continue with.
        prompt: padded on the right; `lengths` are the real tokens of each row.
        options: how to continue; `stop` holds the tokens that end a row.
        samples: continuations of each prompt.
        cache: of the caller, to be continued; None makes one for this run.
        texts: what makes the text of each row and sample; None where nobody asks for text.

    Attributes:
        rows: one for each prompt and sample.
        statistics: counted while the run goes on.

    Raises:
        ValueError: a cache that does not fit, several samples into one cache, an empty row that
            the cache cannot continue, or adjustments of logits whose earlier tokens are unknown.
    """

    needs_mtp = False  # whether the cache must have a part for the MTP module

    def __init__(
        self,
        model: Nemotron,
        prompt: Int[Tensor, "b t"],
        lengths: list[int],
        options: GenerationOptions,
        *,
        samples: int = 1,
        cache: Cache | None = None,
        texts: Sequence[TextRow] | None = None,
    ) -> None:
        self.model, self.prompt, self.lengths = model, prompt.to(model.device), lengths
        self.options, self.samples = options, samples
        self.statistics = Statistics()
        self._warned = False
        self.chosen: Int[Tensor, "b"]  # the token of each row that the model reads next
        self.given = cache is not None
        self._before: list[list[int] | None] = [[] for _ in lengths]  # read by the given cache
        self._last_hidden: Float[Tensor, "b d"] | None = None  # of the last token that a row read
        if cache is None:
            room = min(options.max_new_tokens, RESERVED)
            if options.speculation is not None:
                room += options.speculation.draft_length + 1
            cache = model.empty_cache(
                len(lengths),
                max(1, prompt.shape[1] + room),
                mtp=self.needs_mtp,
                ssm_dtype=options.ssm_dtype,
                ssm_seed=options.ssm_seed,
            )
        else:
            _check_given(model, cache, lengths, options, self.needs_mtp)
            left = cache.transcript
            self._before = [
                [] if not n else None if left is None else left.tokens[i]
                for i, n in enumerate(cache.lengths.tolist())
            ]
            self._last_hidden = None if left is None else left.hidden
        self.cache = cache
        count = len(lengths) * self.samples
        self.sampler = Sampler(count, options, options.seed)
        stop, most = frozenset(options.stop or ()), options.max_new_tokens
        each = [None] * count if texts is None else texts
        self.rows = [WrittenRow(stop, most, text) for text in each]
        known = [row or [] for row in self._prompts()] if options.adjusts else []
        self.adjust = Adjustments(options, known, model.config.vocab_size, model.device)

    def steps(self) -> Generator[list[int | None], None, None]:
        """A token per row and step; None for rows that have ended."""
        if not self.given:
            yield from self._steps()
            return
        self.cache.transcript = None
        try:
            yield from self._steps()
        except GeneratorExit:
            if sys.is_finalizing():  # the program ends, and torch may be gone already
                self.cache.broken_by = "GeneratorExit"
            else:
                self._finish()
            raise
        except BaseException as error:
            self.cache.broken_by = type(error).__name__
            raise
        self._finish()

    def _steps(self) -> Iterator[list[int | None]]:
        """The tokens of `passes`, one per row at a time: a row that is ahead waits for the others.

        Rows that have ended are ahead of all.
        """
        given = 0
        for _ in self.passes():
            lengths = [len(row.tokens) for row in self.rows]
            going = [n for n, row in zip(lengths, self.rows, strict=True) if not row.ended]
            ready = min(going) if going else max(lengths)
            for place in range(given, ready):
                yield [row.tokens[place] if place < len(row.tokens) else None for row in self.rows]
            given = ready

    def passes(self) -> Iterator[None]:
        """Write into `rows`: the prompt's first token, then one pass of the model at a time."""
        if not self.given and not any(self.going):
            return
        started = time.perf_counter()
        with self._pass():
            self._begin()
        self.statistics.seconds["prompt"] += time.perf_counter() - started
        yield
        while any(self.going):
            with self._pass():
                self._continue()
            yield

    def _begin(self) -> None:
        """Read the prompts, and choose the first token of each row unless none is wanted."""
        raise NotImplementedError

    def _continue(self) -> None:
        """One pass after the prompt: at least one token in each row that has not ended."""
        raise NotImplementedError

    @property
    def going(self) -> list[bool]:
        """Which rows have not ended."""
        return [not row.ended for row in self.rows]

    @contextmanager
    def _pass(self) -> Iterator[None]:
        """Around each pass of the model. Inference mode must not stay on between two steps."""
        watch = check_layers(self.model) if self.options.check_layers else nullcontext()
        compiled = compiled_decoding() if self.options.compiled else nullcontext()
        with torch.inference_mode(), watch, compiled as refusals:
            try:
                yield
                if refusals:
                    self._warn(refusals[0])
            except NotFiniteError as error:
                step = max(len(row.tokens) for row in self.rows)
                raise FloatingPointError(f"at step {step}: {error}") from error

    def _warn(self, refusal: str) -> None:
        """Say once per run why compiled code is not used."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"compiled=True: decoding goes the ordinary way, because {refusal}.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _read_prompt(self, segment: int | None, keep_hidden: bool) -> Float[Tensor, "b v"]:
        """Read the prompts, and repeat them for each sample; the logits after each row."""
        if self.prompt.shape[1]:
            logits = prefill(
                self.model,
                self.prompt,
                self.lengths,
                self.cache,
                segment,
                on_hidden=self._on_hidden if keep_hidden else None,
            )
        if not all(self.lengths):  # rows that go on without a new token
            assert self._last_hidden is not None
            ready = self.model.head(self._last_hidden)
            empty = torch.tensor([not n for n in self.lengths], device=ready.device)[:, None]
            logits = torch.where(empty, ready, logits) if self.prompt.shape[1] else ready
        if self.samples > 1:
            self.cache = self.cache.repeat(self.samples)
            logits = logits.repeat_interleave(self.samples, 0)
        return logits

    def _read_chosen(
        self, uniforms: Float[Tensor, "b n"] | None
    ) -> tuple[Float[Tensor, "b 1 d"], Int[Tensor, "b"] | None]:
        """Read the token chosen last in each row, and choose and write the next one.

        Returns:
            The hidden state of the token that was read, and `_real` of the pass.
        """
        real = self._real()
        out = self.model(self.chosen.unsqueeze(1), self.cache, lengths=real, logits_to_keep=1)
        self.chosen = self._choose(out.logits[:, 0], uniforms)
        return out.hidden, real

    def _choose(
        self, logits: Float[Tensor, "b v"], uniforms: Float[Tensor, "b n"] | None
    ) -> Int[Tensor, "b"]:
        """Choose and write one token per row, by the last of its random numbers."""
        total = logits.sum()
        last = None if uniforms is None else uniforms[:, -1]
        chosen = self.sampler.choose(self.adjust(logits, self.going), last)
        tokens = chosen.tolist()
        self._check(total.item(), logits.unsqueeze(1), [1] * len(tokens))
        logprobs = self._logprobs(logits)
        self._write(
            [[token] for token in tokens], None if logprobs is None else logprobs.unsqueeze(1)
        )
        return chosen

    def _uniforms(self, count: int) -> Float[Tensor, "b count"] | None:
        """The next `count` random numbers of each row; None for greedy decoding."""
        return self.sampler.uniforms(count, self.prompt.device)

    def _on_hidden(self, hidden: Float[Tensor, "b t d"], start: int) -> None:
        """Keep the hidden state of each row's last token, from one segment of the prompt."""
        ends = torch.tensor(self.lengths, device=hidden.device) - 1 - start
        here = (ends >= 0) & (ends < hidden.shape[1])
        rows = torch.arange(len(hidden), device=hidden.device)
        found = hidden[rows, ends.clamp(0, hidden.shape[1] - 1)]
        last = self._last_hidden
        self._last_hidden = found if last is None else torch.where(here[:, None], found, last)

    def _real(self) -> Int[Tensor, "b"] | None:
        """How many tokens of a pass of one token are real: none in rows that have ended.

        Only a caller's cache must not read on there.
        """
        going = self.going
        if not self.given or all(going):
            return None
        return torch.tensor(going, device=self.model.device).long()

    def _check(self, total: float, logits: Float[Tensor, "b k v"], places: Sequence[int]) -> None:
        """Refuse logits of the model that are not finite.

        Args:
            total: sum of all logits. This one number tells whether they need a closer look.
            logits: at the k places that a pass has read.
            places: how many of them count, row by row.

        Raises:
            FloatingPointError: naming step, row and layer.
        """
        if math.isfinite(total):
            return
        fine = logits.isfinite().all(-1).tolist()
        for i, (row, count) in enumerate(zip(self.rows, places, strict=True)):
            if row.ended or all(fine[i][:count]):
                continue
            place = fine[i].index(False)
            before = self._prompts()[i]
            raise logits_error(
                self.model,
                logits[i, place],
                row=i,
                step=len(row.tokens) + place,
                cache=self.cache,
                tokens=None if before is None else [*before, *row.tokens],
            )

    def _logprobs(self, logits: Float[Tensor, "*rows v"]) -> Float[Tensor, "*rows v"] | None:
        """Log-probabilities of the model itself, where they are recorded."""
        return None if self.options.logprobs is None else logits.log_softmax(-1)

    def _write(self, new: Sequence[Sequence[int]], logprobs: Float[Tensor, "b k v"] | None) -> None:
        """Add tokens to the rows that have not ended, up to the end of each row."""
        written = []
        for i, (row, tokens) in enumerate(zip(self.rows, new, strict=True)):
            start = len(row.tokens)
            for place, token in enumerate(tokens):
                if row.ended:
                    break
                row.add(token)
                if logprobs is not None:
                    row.record(token, logprobs[i, place], self.options.logprobs or 0)
            written.append(row.tokens[start:])
        self.adjust.add(written)

    def _prompts(self) -> list[list[int] | None]:
        """All tokens before a row's first new one; None where a cache does not know them."""
        new = [row[:n] for row, n in zip(self.prompt.tolist(), self.lengths, strict=True)]
        known = [
            None if old is None else [*old, *row]
            for old, row in zip(self._before, new, strict=True)
        ]
        return [tokens for tokens in known for _ in range(self.samples)]

    def _finish(self) -> None:
        """Let the caller's cache read each row's last token, and leave the transcript with it."""
        try:
            with self._pass():
                self._read_last()
        except BaseException as error:
            self.cache.broken_by = type(error).__name__
            raise
        if self._last_hidden is not None:
            tokens = [
                None if before is None else [*before, *row.tokens]
                for before, row in zip(self._prompts(), self.rows, strict=True)
            ]
            lengths = self.cache.lengths.tolist()
            # A copy outside inference mode is an ordinary tensor.
            self.cache.transcript = Transcript(tokens, self._last_hidden.clone(), lengths)

    def _read_last(self) -> None:
        """Read the tokens that were written last."""
        unread = [row.unread for row in self.rows]
        if not any(unread):
            return
        tokens = torch.tensor(
            [[row.tokens[-1] if row.unread else 0] for row in self.rows], device=self.model.device
        )
        real = torch.tensor(unread, device=self.model.device)
        lengths = None if all(unread) else real.long()
        hidden = self.model.forward_hidden(tokens, self.cache, lengths=lengths).hidden[:, 0]
        last = self._last_hidden
        self._last_hidden = hidden if last is None else torch.where(real[:, None], hidden, last)
        for row in self.rows:
            row.unread = False


class PlainDecoding(Decoding):
    """One token per row and forward pass."""

    def _begin(self) -> None:
        logits = self._read_prompt(self.options.prefill_segment, keep_hidden=self.given)
        if any(self.going):
            self.chosen = self._choose(logits, self._uniforms(1))

    def _continue(self) -> None:
        started = time.perf_counter()
        rows = sum(self.going)
        self._read_chosen(self._uniforms(1))
        self.statistics.seconds["verify"] += time.perf_counter() - started
        self.statistics.count([0] * rows, [0] * rows)


def _check_given(
    model: Nemotron, cache: Cache, lengths: list[int], options: GenerationOptions, mtp: bool
) -> None:
    """Refuse a caller's cache that this run cannot continue."""
    if cache.broken_by:
        raise ValueError(
            f"an earlier call ended with {cache.broken_by} while this cache was being advanced, so "
            "its layers may have read different numbers of tokens: continue a copy made before "
            "that call, or an empty cache."
        )
    check_cache(model.config, model.dtype, len(lengths), model.device, cache)
    check_transcript(model.config, cache)
    found = {layer.ssm.dtype for layer in cache.layers if isinstance(layer, MambaCache)}
    if options.ssm_dtype is not None and found - {options.ssm_dtype}:
        raise ValueError(
            f"ssm_dtype={options.ssm_dtype}, but the cache has SSM states in {found.pop()}: leave "
            "the option out, or make the cache with it."
        )
    if mtp and len(cache.mtp) != len(model.config.mtp_pattern):
        raise ValueError(
            "speculation needs a cache with a part for the MTP module: make it with mtp=True, as "
            f"in model.empty_cache({cache.batch}, mtp=True)."
        )
    for i, (new, read) in enumerate(zip(lengths, cache.lengths.tolist(), strict=True)):
        if not new and (not read or cache.transcript is None):
            raise ValueError(
                f"prompt {i} is empty, and the cache does not know the model's output at the last "
                "token of this row: give at least one new token. (Only generate and stream leave "
                "that output with a cache.)"
            )
    known = cache.transcript
    tokens = [None] * cache.batch if known is None else known.tokens
    unknown = [i for i, n in enumerate(cache.lengths.tolist()) if n and tokens[i] is None]
    if options.adjusts and unknown:
        name = "repetition_penalty" if options.penalizes else "logits_processors"
        raise ValueError(
            f"{name} needs all tokens of a row, and those that the cache has read in row "
            f"{unknown[0]} are not known, because generate did not read them: let generate read "
            "the prompt (max_new_tokens=0), or leave the option out."
        )
