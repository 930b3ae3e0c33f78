"""The loop of speculative decoding: draft, verify, accept, keep; each row at its own pace.

Each pass of the backbone writes one to k+1 tokens in each row. Rows accept different numbers of
tokens, so after a few passes they have different lengths; the cache counts them row by row. Nothing
that a row writes depends on its neighbors: each row has its own random stream, its own choice of
draft lengths, and takes the same number of random numbers per pass whether it uses them or not.
Where one row drafts less than another, it is padded with tokens that are read and never kept.

At the end of a text: a stop token inside an accepted draft ends the row there, and what was
accepted after it is discarded. A row that may write m more tokens drafts at most m - 1.

`steps` gives one token per row at a time, as plain decoding does. A row that is ahead waits for the
others.

Source: Leviathan et al. 2023 (arXiv 2211.17192). Left out: dropping rows that have ended from the
batch, which plain decoding does not do either.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite import ops
from nemotron_lite.generation.options import GenerationOptions, SpeculationOptions
from nemotron_lite.generation.prefill import prefill
from nemotron_lite.generation.sampling import Sampler, probabilities
from nemotron_lite.generation.speculative.cost_model import ledger_costs
from nemotron_lite.generation.speculative.draft_length import (
    AdaptiveDraftLength,
    DraftLength,
    FixedDraftLength,
)
from nemotron_lite.generation.speculative.drafter import Draft, Drafter, check_shortlist
from nemotron_lite.generation.speculative.statistics import Statistics
from nemotron_lite.model import Nemotron, segment


class SpeculativeDecoding:
    """One run: prompts that are continued with drafts of the MTP module.

    Args:
        prompt: padded on the right; `lengths` are the real tokens of each row.
        options: how to continue; `stop` holds the tokens that end a row, `speculation` says how to
            draft (its defaults where it is None).

    Attributes:
        statistics: counted while the run goes on.

    Raises:
        ValueError: a model without an MTP module, or a shortlist of tokens outside the vocabulary.
    """

    def __init__(
        self,
        model: Nemotron,
        prompt: Int[Tensor, "b t"],
        lengths: list[int],
        options: GenerationOptions,
    ) -> None:
        speculation = options.speculation or SpeculationOptions()
        if model.mtp is None:
            raise ValueError(
                "speculation needs an MTP module, and this model has none (mtp_pattern is empty): "
                "decode with speculation=None, or load a checkpoint that has one."
            )
        self.shortlist: Int[Tensor, "s"] | None = None
        if speculation.shortlist is not None:
            check_shortlist(speculation.shortlist, model.config.vocab_size)
            self.shortlist = torch.tensor(speculation.shortlist, device="cpu")
        self.model, self.prompt, self.lengths = model, prompt.to(model.device), lengths
        self.options = options
        self.max_new_tokens, self.stop = options.max_new_tokens, frozenset(options.stop or ())
        self.segment = options.prefill_segment or segment(self.prompt)
        self.max_draft = speculation.draft_length
        self.statistics = Statistics()
        rows, capacity = len(lengths), prompt.shape[1] + self.max_new_tokens + self.max_draft + 1
        self.cache = model.empty_cache(
            rows, capacity, mtp=True, ssm_dtype=options.ssm_dtype, ssm_seed=options.ssm_seed
        )
        self.sampler = Sampler(rows, options, options.seed)
        self.draft_lengths: list[DraftLength] = _draft_lengths(model, speculation, rows)
        self.texts: list[list[int]] = [[] for _ in lengths]
        self.ended = [self.max_new_tokens == 0] * rows

    def steps(self) -> Iterator[list[int | None]]:
        """A token per row and step; None for rows that have ended."""
        given = 0
        for _ in self.passes():
            while given < max(map(len, self.texts)) and all(
                over or given < len(text) for over, text in zip(self.ended, self.texts, strict=True)
            ):
                yield [text[given] if given < len(text) else None for text in self.texts]
                given += 1

    def passes(self) -> Iterator[None]:
        """Write into `texts`: the prompt's first token, then one pass of the backbone at a time."""
        if all(self.ended):
            return
        # Inference mode must not stay on while the caller holds the iterator.
        with torch.inference_mode():
            started = time.perf_counter()
            self.drafter = Drafter(self.model, self.cache, self.options, self.shortlist)
            add_prompt = partial(self.drafter.add_prompt, prompt=self.prompt, lengths=self.lengths)
            logits = prefill(
                self.model,
                self.prompt,
                self.lengths,
                self.cache,
                self.segment,
                on_hidden=lambda hidden, start: add_prompt(hidden, start=start),
            )
            self.chosen = self._choose(logits, self._uniforms(1))
            self.drafter.add_first_token(self.chosen)
            self._write([[token] for token in self.chosen.tolist()])
            self.statistics.seconds["prompt"] += time.perf_counter() - started
        yield
        while not all(self.ended):
            with torch.inference_mode():
                self._draft_and_verify()
            yield

    def _draft_and_verify(self) -> None:
        """One pass of the backbone: over a draft, or over one token where no row drafts."""
        k = self.max_draft
        seconds = self.statistics.seconds
        started = time.perf_counter()
        limits = [
            0 if over else min(k, self.max_new_tokens - len(text) - 1)
            for over, text in zip(self.ended, self.texts, strict=True)
        ]
        uniforms = self._uniforms(2 * k + 1)
        draft = self.drafter.draft(
            None if uniforms is None else uniforms[:, :k], self.draft_lengths, limits
        )
        drafted = time.perf_counter()
        if draft is None:
            confidences: list[list[float]] = [[] for _ in limits]
            accepted = [0] * len(limits)
            new = self._plain(uniforms)
        else:
            confidences = draft.confidences
            accepted, new = self._verify(draft, uniforms)
        for chooser, row, count, over in zip(
            self.draft_lengths, confidences, accepted, self.ended, strict=True
        ):
            if not over:
                chooser.update(row, count)
        going = [i for i, over in enumerate(self.ended) if not over]
        self.statistics.count([len(confidences[i]) for i in going], [accepted[i] for i in going])
        self._write(new)
        seconds["draft"] += drafted - started
        seconds["verify"] += time.perf_counter() - drafted

    def _plain(self, uniforms: Tensor | None) -> list[list[int]]:
        """One token per row, as plain decoding writes it."""
        out = self.model(self.chosen.unsqueeze(1), self.cache, logits_to_keep=1)
        self.chosen = self._choose(out.logits[:, 0], uniforms)
        self.drafter.add(out.hidden, self.chosen.unsqueeze(1))
        return [[token] for token in self.chosen.tolist()]

    def _verify(self, draft: Draft, uniforms: Tensor | None) -> tuple[list[int], list[list[int]]]:
        """Read, verify and keep a draft: how many tokens are accepted, and the new ones."""
        length = draft.tokens.shape[1]
        inputs = torch.cat([self.chosen.unsqueeze(1), draft.tokens], dim=1)
        out = self.model(inputs, self.cache, draft=True)
        drafted = draft.tokens.tolist()
        if uniforms is None:
            accepted, following = _verify_greedy(out.logits, drafted, draft.lengths)
        else:
            assert draft.q is not None
            k = self.max_draft
            verdict = ops.verify(
                probabilities(out.logits, self.options),
                draft.q,
                draft.tokens,
                torch.cat([uniforms[:, k : k + length], uniforms[:, -1:]], dim=1),
                torch.tensor(draft.lengths, device=inputs.device),
            )
            accepted, following = verdict.accepted.tolist(), verdict.token.tolist()
        new = [
            [*row[:n], token] for row, n, token in zip(drafted, accepted, following, strict=True)
        ]
        counts = [0 if over else n + 1 for n, over in zip(accepted, self.ended, strict=True)]
        same = counts[0] if len(set(counts)) == 1 else None
        self.chosen = torch.tensor(following, device=inputs.device)
        longest = max(counts)
        after = torch.tensor([(row + [0] * longest)[:longest] for row in new], device=inputs.device)
        if same is not None:
            self.cache.accept(same)
            self.drafter.add(out.hidden[:, :same], after)
        else:
            each = torch.tensor(counts, device="cpu")
            self.cache.accept(each)
            self.drafter.add(out.hidden[:, :longest], after, each.to(inputs.device))
        return accepted, new

    def _choose(self, logits: Float[Tensor, "b v"], uniforms: Tensor | None) -> Int[Tensor, "b"]:
        return self.sampler.choose(logits, None if uniforms is None else uniforms[:, -1])

    def _uniforms(self, count: int) -> Float[Tensor, "b count"] | None:
        return self.sampler.uniforms(count, self.prompt.device)

    def _write(self, new: list[list[int]]) -> None:
        """Add tokens to the rows that have not ended, up to a stop token or `max_new_tokens`."""
        for i, tokens in enumerate(new):
            for token in tokens:
                if self.ended[i]:
                    break
                self.texts[i].append(token)
                self.ended[i] = token in self.stop or len(self.texts[i]) >= self.max_new_tokens


def _draft_lengths(
    model: Nemotron, speculation: SpeculationOptions, rows: int
) -> list[DraftLength]:
    """What decides how far to draft, for each row."""
    longest, shortlist = speculation.draft_length, speculation.shortlist
    if not speculation.adaptive:
        return [FixedDraftLength(longest) for _ in range(rows)]
    costs = speculation.costs or ledger_costs(
        model.config, longest, drafted_tokens=None if shortlist is None else len(shortlist)
    )
    return [AdaptiveDraftLength(longest, costs) for _ in range(rows)]


def _verify_greedy(
    logits: Float[Tensor, "b k1 v"], drafts: list[list[int]], lengths: list[int]
) -> tuple[list[int], list[int]]:
    """The rule for greedy decoding: accept what the model itself would have written."""
    accepted, following = [], []
    for best, draft, length in zip(logits.argmax(-1).tolist(), drafts, lengths, strict=True):
        n = 0
        while n < length and draft[n] == best[n]:
            n += 1
        accepted.append(n)
        following.append(best[n])
    return accepted, following
