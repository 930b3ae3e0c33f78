"""The loop of speculative decoding: draft, verify, accept, keep; each row at its own pace.

Each pass of the backbone writes one to k+1 tokens in each row. Rows accept different numbers of
tokens, so after a few passes they have different lengths; the cache counts them row by row. Nothing
that a row writes depends on its neighbors: each row has its own random stream, its own choice of
draft lengths, and takes the same number of random numbers per pass whether it uses them or not.
Where one row drafts less than another, it is padded with tokens that are read and never kept.

At the end of a text: a stop token inside an accepted draft ends the row there, and what was
accepted after it is discarded. A row that may write m more tokens drafts at most m - 1.

Source: Leviathan et al. 2023 (arXiv 2211.17192). Left out: dropping rows that have ended from the
batch, which plain decoding does not do either.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite import ops
from nemotron_lite.cache import Cache
from nemotron_lite.generation.decoding import Decoding
from nemotron_lite.generation.options import GenerationOptions, SpeculationOptions
from nemotron_lite.generation.sampling import probabilities
from nemotron_lite.generation.speculative.cost_model import ledger_costs
from nemotron_lite.generation.speculative.draft_length import (
    AdaptiveDraftLength,
    DraftLength,
    FixedDraftLength,
)
from nemotron_lite.generation.speculative.drafter import Draft, Drafter, check_shortlist
from nemotron_lite.generation.text_rows import TextRow
from nemotron_lite.model import Nemotron, segment


class SpeculativeDecoding(Decoding):
    """One run: prompts that are continued with drafts of the MTP module.

    The arguments are those of `Decoding`; `options.speculation` says how to draft (its defaults
    where it is None).

    Raises:
        ValueError: a model without an MTP module, or a shortlist of tokens outside the vocabulary.
    """

    needs_mtp = True

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
        options = options.replace(speculation=speculation)
        super().__init__(model, prompt, lengths, options, samples=samples, cache=cache, texts=texts)
        self.max_new_tokens = options.max_new_tokens
        self.segment = options.prefill_segment or segment(self.prompt)
        self.max_draft = speculation.draft_length
        self.draft_lengths: list[DraftLength] = _draft_lengths(model, speculation, len(self.rows))

    def _begin(self) -> None:
        self.drafter = Drafter(self.model, self.cache, self.options, self.shortlist)
        self._resume()
        logits = self._read_prompt(self.segment, keep_hidden=True)
        self.drafter.repeat(self.samples, self.cache)
        if any(self.going):
            self.chosen = self._choose(logits, self._uniforms(1))
            self.drafter.add_first_token(self.chosen)

    def _resume(self) -> None:
        """The MTP module's entry for the last token of each row that the given cache has read.

        It needs the token that comes after it. A row without a new token waits for its first one.
        """
        if self._last_hidden is None:
            return
        known = [
            int(read > 0 and new > 0)
            for read, new in zip(self.cache.lengths.tolist(), self.lengths, strict=True)
        ]
        after = self.prompt[:, :1] if self.prompt.shape[1] else None
        self.drafter.resume(self._last_hidden, after, known)

    def _on_hidden(self, hidden: Float[Tensor, "b t d"], start: int) -> None:
        self.drafter.add_prompt(hidden, prompt=self.prompt, lengths=self.lengths, start=start)
        if self.given:
            super()._on_hidden(hidden, start)

    def _continue(self) -> None:
        """One pass of the backbone: over a draft, or over one token where no row drafts."""
        k = self.max_draft
        seconds = self.statistics.seconds
        started = time.perf_counter()
        going = self.going
        limits = [
            0 if row.ended else min(k, self.max_new_tokens - len(row.tokens) - 1)
            for row in self.rows
        ]
        uniforms = self._uniforms(2 * k + 1)
        draft = self.drafter.draft(
            None if uniforms is None else uniforms[:, :k], self.draft_lengths, limits
        )
        drafted = time.perf_counter()
        if draft is None:
            confidences: list[list[float]] = [[] for _ in limits]
            accepted = [0] * len(limits)
            hidden, real = self._read_chosen(uniforms)
            self.drafter.add(hidden, self.chosen.unsqueeze(1), real)
        else:
            confidences = draft.confidences
            accepted = self._verify(draft, uniforms)
        for chooser, row, count, active in zip(
            self.draft_lengths, confidences, accepted, going, strict=True
        ):
            if active:
                chooser.update(row, count)
        active_rows = [i for i, active in enumerate(going) if active]
        self.statistics.count(
            [len(confidences[i]) for i in active_rows], [accepted[i] for i in active_rows]
        )
        seconds["draft"] += drafted - started
        seconds["verify"] += time.perf_counter() - drafted

    def _verify(self, draft: Draft, uniforms: Tensor | None) -> list[int]:
        """Read, verify, write and keep a draft; returns how many tokens of each are accepted."""
        length = draft.tokens.shape[1]
        inputs = torch.cat([self.chosen.unsqueeze(1), draft.tokens], dim=1)
        out = self.model(inputs, self.cache, draft=True)
        drafted = draft.tokens.tolist()
        going, total = self.going, out.logits.sum()
        real = [row[:n] for row, n in zip(drafted, draft.lengths, strict=True)]
        logits = self.adjust.places(out.logits, real, going)
        if uniforms is None:
            accepted, following = _verify_greedy(logits, drafted, draft.lengths)
        else:
            assert draft.q is not None
            k = self.max_draft
            verdict = ops.verify(
                probabilities(logits, self.options),
                draft.q,
                draft.tokens,
                torch.cat([uniforms[:, k : k + length], uniforms[:, -1:]], dim=1),
                torch.tensor(draft.lengths, device=inputs.device),
            )
            accepted, following = verdict.accepted.tolist(), verdict.token.tolist()
        self._check(total.item(), out.logits, [n + 1 for n in accepted])
        new = [
            [*row[:n], token] for row, n, token in zip(drafted, accepted, following, strict=True)
        ]
        before = [len(row.tokens) for row in self.rows]
        self._write(new, self._logprobs(out.logits))
        # In the cache of this run a row that ends may read tokens behind its end. In a caller's
        # cache it must not: there it reads what was written, and no more.
        counts = [n + 1 if active else 0 for n, active in zip(accepted, going, strict=True)]
        known = counts  # positions whose next token is part of the text
        if self.given:
            counts, known = self._end_inside_drafts(out.hidden, accepted, going, before)
        self.chosen = torch.tensor(following, device=inputs.device)
        self.cache.accept(_uniform_or_each(counts))
        longest = max(known)
        after = torch.tensor([(row + [0] * longest)[:longest] for row in new], device=inputs.device)
        same = len(set(known)) == 1
        each = None if same else torch.tensor(known, device=inputs.device)
        self.drafter.add(out.hidden[:, :longest], after, each)
        return accepted

    def _end_inside_drafts(
        self,
        hidden: Float[Tensor, "b k1 d"],
        accepted: list[int],
        going: list[bool],
        before: list[int],
    ) -> tuple[list[int], list[int]]:
        """Tokens that the cache may take in, and positions for the drafter, row by row.

        A row may end inside an accepted draft. Its last token is then read already.
        """
        counts, known = [], []
        for i, (row, n) in enumerate(zip(self.rows, accepted, strict=True)):
            written = len(row.tokens) - before[i]
            counts.append(min(written, n) + 1 if going[i] else 0)
            known.append(written)
            if going[i] and written <= n:
                row.unread = False
                assert self._last_hidden is not None
                self._last_hidden = self._last_hidden.clone()
                self._last_hidden[i] = hidden[i, written]
        return counts, known

    def _read_last(self) -> None:
        super()._read_last()
        self.drafter.read_pending()


def _uniform_or_each(counts: list[int]) -> int | Int[Tensor, "b"]:
    """One number where all rows agree, which is faster."""
    return counts[0] if len(set(counts)) == 1 else torch.tensor(counts, device="cpu")


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
