"""The loop of speculative decoding: draft, verify, accept, keep; each row at its own pace.

A round writes one to k+1 tokens in each row. Rows accept differently, so after a few rounds they
stand at different places; the cache counts that row by row. Nothing a row writes depends on its
neighbours: each has its own random stream, its own controller of draft lengths, and as many uniform
numbers per round whether they are used or not. Where one row drafts less than another, its places
are filled with tokens that are read and never kept.

At the end of a text: a stop token inside an accepted draft ends the row there, and what was
accepted behind it is thrown away; a row that may write m more tokens drafts at most m - 1.

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
from nemotron_lite.generation.prefill import prefill
from nemotron_lite.generation.sampling import Filters, Streams
from nemotron_lite.generation.speculative.cost_model import Costs, costs
from nemotron_lite.generation.speculative.draft_length import Adaptive, Fixed
from nemotron_lite.generation.speculative.drafter import (
    Controller,
    Draft,
    Drafter,
    check_shortlist,
)
from nemotron_lite.generation.speculative.statistics import Statistics
from nemotron_lite.model import Nemotron, segment


class Speculation:
    """One run: prompts that are continued with drafts of the MTP module.

    Args:
        prompt: padded on the right; `lengths` are the real tokens of each row.
        max_new_tokens: most tokens per row.
        filters: temperature, top_k, top_p, for drafts and verification alike.
        seed: row r draws from stream `seed + r`.
        stop: tokens that end a row.
        chunk: tokens of prompt per pass.
        draft_length: tokens of a draft; the most, if `adaptive`.
        adaptive: draft only as far as it pays, by the ledger's prices or by those given.
        shortlist: the only tokens to draft; all of them when None.
        statistics: filled in while the run goes on.
        ssm_dtype: of the cache; in float16 it is rounded with bits that follow from `seed`.

    Raises:
        ValueError: a model without an MTP module, a draft length below 1, or a shortlist of
            tokens outside the vocabulary.
    """

    def __init__(
        self,
        model: Nemotron,
        prompt: Int[Tensor, "b t"],
        lengths: list[int],
        max_new_tokens: int,
        filters: Filters,
        *,
        seed: int | None = None,
        stop: frozenset[int] = frozenset(),
        chunk: int | None = None,
        draft_length: int = 4,
        adaptive: bool | Costs = True,
        shortlist: Int[Tensor, "s"] | None = None,
        statistics: Statistics | None = None,
        ssm_dtype: torch.dtype | None = None,
    ) -> None:
        if model.mtp is None:
            raise ValueError(
                "draft='mtp', but this model has no MTP module (mtp_pattern is empty): leave draft "
                "away, or load a checkpoint that has one."
            )
        if draft_length < 1:
            raise ValueError(f"draft_length={draft_length} must be at least 1.")
        if shortlist is not None:
            check_shortlist(shortlist, model.config.vocab_size)
        self.shortlist = shortlist
        self.model, self.prompt, self.lengths = model, prompt.to(model.device), lengths
        self.most, self.filters, self.stop = max_new_tokens, filters, stop
        self.chunk, self.draft_length = chunk or segment(self.prompt), draft_length
        self.statistics = Statistics() if statistics is None else statistics
        rows, room = len(lengths), prompt.shape[1] + max_new_tokens + draft_length + 1
        self.cache = model.empty_cache(
            rows, room, mtp=True, ssm_dtype=ssm_dtype, ssm_seed=(seed or 0) % 2**63
        )
        self.streams = Streams(rows, 0 if filters.greedy else seed)
        if adaptive:
            drafted = None if shortlist is None else len(shortlist)
            if isinstance(adaptive, Costs):
                paid = adaptive
            else:
                paid = costs(model.config, draft_length, drafted_tokens=drafted)
            self.controllers: list[Controller] = [Adaptive(draft_length, paid) for _ in lengths]
        else:
            self.controllers = [Fixed(draft_length) for _ in lengths]
        self.texts: list[list[int]] = [[] for _ in lengths]
        self.ended = [max_new_tokens == 0] * rows

    def steps(self) -> Iterator[list[int | None]]:
        """A token per row, None for rows that have ended; as `generation.stream`."""
        given = 0
        for _ in self.rounds():
            while given < max(map(len, self.texts)) and all(
                over or given < len(text) for over, text in zip(self.ended, self.texts, strict=True)
            ):
                yield [text[given] if given < len(text) else None for text in self.texts]
                given += 1

    def rounds(self) -> Iterator[None]:
        """Write into `texts`, one round at a time, the prompt and the first token first."""
        if all(self.ended):
            return
        # Inference mode must not stay on while the caller holds the iterator.
        with torch.inference_mode():
            started = time.perf_counter()
            self.drafter = Drafter(self.model, self.cache, self.filters, self.shortlist)
            watch = partial(self.drafter.read_prompt, prompt=self.prompt, lengths=self.lengths)
            logits = prefill(
                self.model, self.prompt, self.lengths, self.cache, self.chunk,
                on_hidden=lambda hidden, start: watch(hidden, start=start),
            )  # fmt: skip
            self.chosen = self._choose(logits, self._uniforms(1))
            self.drafter.start(self.chosen)
            self._write([[token] for token in self.chosen.tolist()])
            self.statistics.seconds["prompt"] += time.perf_counter() - started
        yield
        while not all(self.ended):
            with torch.inference_mode():
                self._round()
            yield

    def _round(self) -> None:
        k = self.draft_length
        seconds = self.statistics.seconds
        started = time.perf_counter()
        limits = [
            0 if over else min(k, self.most - len(text) - 1)
            for over, text in zip(self.ended, self.texts, strict=True)
        ]
        uniforms = self._uniforms(2 * k + 1)
        draft = self.drafter.draft(
            None if uniforms is None else uniforms[:, :k], self.controllers, limits
        )
        drafted = time.perf_counter()
        if draft is None:
            trails: list[list[float]] = [[] for _ in limits]
            accepted = [0] * len(limits)
            new = self._plain(uniforms)
        else:
            trails = draft.confidences
            accepted, new = self._verify(draft, uniforms)
        for controller, trail, kept, over in zip(
            self.controllers, trails, accepted, self.ended, strict=True
        ):
            if not over:
                controller.learn(trail, kept)
        going = [i for i, over in enumerate(self.ended) if not over]
        self.statistics.count([len(trails[i]) for i in going], [accepted[i] for i in going])
        self._write(new)
        seconds["draft"] += drafted - started
        seconds["verify"] += time.perf_counter() - drafted

    def _plain(self, uniforms: Tensor | None) -> list[list[int]]:
        """One token per row, as plain decoding writes it."""
        out = self.model(self.chosen.unsqueeze(1), self.cache, logits_to_keep=1)
        self.chosen = self._choose(out.logits[:, 0], uniforms)
        self.drafter.read(out.hidden, self.chosen.unsqueeze(1))
        return [[token] for token in self.chosen.tolist()]

    def _verify(self, draft: Draft, uniforms: Tensor | None) -> tuple[list[int], list[list[int]]]:
        """Read the draft, judge it, take in what stays; accepted counts and new tokens by row."""
        length = draft.tokens.shape[1]
        inputs = torch.cat([self.chosen.unsqueeze(1), draft.tokens], dim=1)
        out = self.model(inputs, self.cache, draft=True)
        words = draft.tokens.tolist()
        if uniforms is None:
            accepted, following = _greedy(out.logits, words, draft.lengths)
        else:
            assert draft.q is not None
            k = self.draft_length
            verdict = ops.verify(
                self.filters(out.logits), draft.q, draft.tokens,
                torch.cat([uniforms[:, k : k + length], uniforms[:, -1:]], dim=1),
                torch.tensor(draft.lengths, device=inputs.device),
            )  # fmt: skip
            accepted, following = verdict.accepted.tolist(), verdict.token.tolist()
        new = [[*row[:n], token] for row, n, token in zip(words, accepted, following, strict=True)]
        counts = [0 if over else n + 1 for n, over in zip(accepted, self.ended, strict=True)]
        same = counts[0] if len(set(counts)) == 1 else None
        self.chosen = torch.tensor(following, device=inputs.device)
        longest = max(counts)
        after = torch.tensor([(row + [0] * longest)[:longest] for row in new], device=inputs.device)
        if same is not None:
            self.cache.accept(same)
            self.drafter.read(out.hidden[:, :same], after)
        else:
            each = torch.tensor(counts)
            self.cache.accept(each)
            self.drafter.read(out.hidden[:, :longest], after, each.to(inputs.device))
        return accepted, new

    def _choose(self, logits: Float[Tensor, "b v"], uniforms: Tensor | None) -> Int[Tensor, "b"]:
        if uniforms is None:
            return logits.argmax(-1)
        return ops.draw(self.filters(logits), uniforms[:, -1])

    def _uniforms(self, count: int) -> Float[Tensor, "b count"] | None:
        if self.filters.greedy:
            return None
        return self.streams.uniforms(count, self.prompt.device)

    def _write(self, new: list[list[int]]) -> None:
        """Add tokens to the rows that go on, up to a stop token or the most there may be."""
        for i, tokens in enumerate(new):
            for token in tokens:
                if self.ended[i]:
                    break
                self.texts[i].append(token)
                self.ended[i] = token in self.stop or len(self.texts[i]) >= self.most


def _greedy(
    logits: Float[Tensor, "b k1 v"], drafts: list[list[int]], lengths: list[int]
) -> tuple[list[int], list[int]]:
    """The rule for one-hot distributions: accept what the model itself would have written."""
    accepted, following = [], []
    for best, draft, length in zip(logits.argmax(-1).tolist(), drafts, lengths, strict=True):
        n = 0
        while n < length and draft[n] == best[n]:
            n += 1
        accepted.append(n)
        following.append(best[n])
    return accepted, following
