"""The MTP module as a drafter: it predicts one token ahead, and then reads its own predictions.

Entry i of the module's cache joins what the backbone knew at position i with the token that came
after it, (h_i, t_{i+1}). When token t_n has been chosen and the backbone has read up to n-1, the
module reads the missing entries up to (h_{n-1}, t_n) and returns h^1, its hidden state for position
n.

    d_1 ~ head(h^1)      h^2 = MTP(h^1, d_1)      d_2 ~ head(h^2)      h^3 = MTP(h^2, d_2)    ...

So from the second token on the module reads its own output in place of the backbone's. This is the
recursion that it was trained on for two depths, with shared weights, and it can be continued beyond
them; acceptance falls with each step. One difference to training remains, as in all inference
engines: a deeper step attends to the entries of the text that were made at depth 1, not at its own
depth.

Entries made from the module's own output are temporary. When the draft is done they are removed,
and after the verification the accepted positions are read again, with the backbone's hidden states:
the cache is that of a run that never drafted. While a run decodes without drafts, hidden states are
kept as pending, and are read together when drafting starts again.

In a small model with a large vocabulary the head is the most expensive part of a step. With a
shortlist of tokens, those that texts are mostly made of, the drafter reads only their rows of it.
The distribution q that it then draws from is zero elsewhere, and the verification is still
exact: other tokens are never drafted, and so never accepted.

Source: reference sheet 5.1 and 5.5 (greedy chains, `num_nextn_predict_layers` 1, the layer re-run
for further drafts); the shortlist is FR-Spec's (Zhao et al. 2025, arXiv 2502.14856). Left out:
trees, and drafting for position 0 of an empty prompt.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.cache import Cache
from nemotron_lite.dtypes import widened
from nemotron_lite.finite import find_bad_layer
from nemotron_lite.generation.options import SamplingOptions
from nemotron_lite.generation.sampling import probabilities
from nemotron_lite.generation.speculative.draft_length import DraftLength
from nemotron_lite.layers import ForwardContext, plain_weight
from nemotron_lite.model import Nemotron
from nemotron_lite.ops import draw, linear

MAX_PENDING = 256  # hidden states per row that are kept before the module reads them


class Draft(NamedTuple):
    """Drafted tokens of every row, padded to the longest."""

    tokens: Int[Tensor, "b k"]
    q: Float[Tensor, "b k v"] | None  # the distributions they were drawn from; None when greedy
    confidences: list[list[float]]  # of each row's tokens, without the padding

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, without the padding."""
        return [len(row) for row in self.confidences]


def shortlist(texts: Iterable[Sequence[int]], size: int) -> tuple[int, ...]:
    """The `size` most frequent tokens of some texts, in rising order; fewer if there are fewer.

    Count texts that the model has written itself: drafts predict what it writes.

    Raises:
        ValueError: a size below 1, or no token at all.
    """
    counts = Counter(token for text in texts for token in text)
    if size < 1 or not counts:
        raise ValueError(
            f"a shortlist of size={size} from texts of {counts.total()} tokens leaves nothing to "
            "draft: expected a size of at least 1, and at least one token."
        )
    return tuple(sorted(token for token, _ in counts.most_common(size)))


def check_shortlist(tokens: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError for an empty list, a token twice, or one outside the vocabulary."""
    distinct = len(set(tokens)) == len(tokens)
    if not tokens or not distinct or min(tokens) < 0 or max(tokens) >= vocab_size:
        raise ValueError(
            f"the shortlist has {len(tokens)} tokens, beginning with {list(tokens[:8])}: expected "
            f"at least one, different tokens of 0 to {vocab_size - 1}. `speculative.shortlist` "
            "makes one from texts."
        )


def head_for(
    model: Nemotron, shortlist: Int[Tensor, "s"] | None
) -> Callable[[Float[Tensor, "*rows d"]], Float[Tensor, "*rows s"]]:
    """What makes logits of the tokens that may be drafted, from a hidden state.

    With a shortlist only its rows of the head are read. A head with an adapter or a hook is called
    as it is, and the logits are picked afterwards.
    """
    if shortlist is None:
        return model.head
    weight = plain_weight(model.lm_head)
    if weight is None:
        return lambda hidden: model.head(hidden)[..., shortlist]
    rows = weight[shortlist]
    return lambda hidden: widened(linear(hidden, rows))


class Drafter:
    """Drafts the continuation of what a cache holds.

    Args:
        model: with an MTP module.
        cache: made with `model.empty_cache(..., mtp=True)`, before its first token.
        options: temperature and filters.
        shortlist: the only tokens to draft, all in the vocabulary; None drafts from all of it.

    Raises:
        ValueError: a model without an MTP module, or a cache without a part for it.
    """

    def __init__(
        self,
        model: Nemotron,
        cache: Cache,
        options: SamplingOptions,
        shortlist: Int[Tensor, "s"] | None = None,
    ) -> None:
        if model.mtp is None:
            raise ValueError(
                "this model has no MTP module to draft with (mtp_pattern is empty): decode without "
                "speculation, or load a checkpoint that has one."
            )
        if len(cache.mtp) != len(model.config.mtp_pattern):
            raise ValueError(
                "the cache has no part for the MTP module: make it with mtp=True, as in "
                "model.empty_cache(1, mtp=True)."
            )
        self.model, self.cache, self.options = model, cache, options
        self.mtp, self.embed = model.mtp, model.backbone.embed
        self._pending: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._num_pending = 0  # positions per row
        self._last: Tensor | None = None
        self.shortlist = None if shortlist is None else shortlist.to(model.device)
        self._head = head_for(model, self.shortlist)

    def add_prompt(
        self,
        hidden: Float[Tensor, "b t d"],
        prompt: Int[Tensor, "b s"],
        lengths: list[int],
        start: int,
    ) -> None:
        """Read a segment of the prompts: hidden states of the t positions from `start` on.

        The last position of a row has no token after it yet; `add_first_token` gives it.
        """
        t = hidden.shape[1]
        after = prompt.new_zeros(len(prompt), t)
        known = prompt[:, start + 1 : start + 1 + t]
        after[:, : known.shape[1]] = known
        ends = torch.tensor(lengths, device=hidden.device) - 1 - start  # position of the last token
        counts = ends.clamp(0, t)
        if int(counts.max()):
            uniform = min(lengths) == max(lengths) and int(counts[0]) == t
            self._read(hidden, after, None if uniform else counts)
        here = (ends >= 0) & (ends < t)
        rows = torch.arange(len(prompt), device=hidden.device)
        found = hidden[rows, ends.clamp(0, t - 1)]
        last = found if self._last is None else torch.where(here[:, None], found, self._last)
        self._last = last

    def resume(
        self, hidden: Float[Tensor, "b d"], after: Int[Tensor, "b 1"] | None, counts: list[int]
    ) -> None:
        """Go on behind what the cache has read: the hidden state of each row's last token.

        Args:
            after: the token after it; None where no row has one yet.
            counts: 1 for rows whose next token is known, 0 for the others.
        """
        if after is not None and any(counts):
            each = None if all(counts) else torch.tensor(counts, device=hidden.device)
            self._read(hidden.unsqueeze(1), after, each)
        self._last = hidden

    def repeat(self, times: int, cache: Cache) -> None:
        """Draft for each row of the prompts several times, with a cache that was repeated so."""
        if times > 1:
            assert self._last is not None
            self.cache, self._last = cache, self._last.repeat_interleave(times, 0)

    def add_first_token(self, chosen: Int[Tensor, "b"]) -> None:
        """The first token after the prompts."""
        assert self._last is not None
        self.add(self._last.unsqueeze(1), chosen.unsqueeze(1))
        self._last = None

    def add(
        self,
        hidden: Float[Tensor, "b t d"],
        after: Int[Tensor, "b t"],
        counts: Int[Tensor, "b"] | None = None,
    ) -> None:
        """New positions of the text: the backbone's hidden states, and the token after each.

        Args:
            counts: how many of the t are real, row by row; all when None.
        """
        self._pending.append((hidden, after, counts))
        self._num_pending += hidden.shape[1]
        if self._num_pending > MAX_PENDING:
            self._read_pending(leave=1)

    def read_pending(self) -> None:
        """Read all positions whose next token is known."""
        if self._pending:
            self._read_pending()

    def draft(
        self,
        uniforms: Float[Tensor, "b k"] | None,
        draft_lengths: list[DraftLength],
        limits: list[int],
    ) -> Draft | None:
        """Draft for every row as far as its `DraftLength` and its limit allow.

        Args:
            uniforms: a random number for each drafted token; None when greedy.
            limits: the most tokens by row; 0 for rows that have ended.

        Returns:
            None when no row wants a draft.
        """
        confidences: list[list[float]] = [[] for _ in limits]

        def still_drafting(drafting: list[bool]) -> list[bool]:
            rows = zip(draft_lengths, limits, confidences, drafting, strict=True)
            return [
                active and len(row) < limit and chooser.wants_more(row)
                for chooser, limit, row, active in rows
            ]

        drafting = still_drafting([True] * len(limits))
        if not any(drafting):
            return None
        hidden = self._read_pending()
        kept = self.cache.mtp_lengths
        tokens: list[Tensor] = []
        distributions: list[Tensor] = []
        while True:
            token, q, confidence = self._choose(self._head(hidden[:, 0]), uniforms, len(tokens))
            tokens.append(token)
            if q is not None:
                distributions.append(q)
            for row, active, value in zip(confidences, drafting, confidence.tolist(), strict=True):
                if active:
                    if math.isnan(value):
                        raise self._not_finite()
                    row.append(value)
            drafting = still_drafting(drafting)
            if not any(drafting):
                break
            context = ForwardContext(self.cache.mtp_starts, last_only=True)
            embedded = self.embed(token.unsqueeze(1))
            hidden = self.mtp(hidden, embedded, self.cache.mtp, context)
            self.cache.advance_mtp(1)
        self.cache.truncate_mtp(kept)
        q = torch.stack(distributions, 1) if distributions else None
        return Draft(torch.stack(tokens, 1), q, confidences)

    def _choose(
        self, logits: Float[Tensor, "b v"], uniforms: Tensor | None, j: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """A token per row, the distribution it was drawn from, and its probability there."""
        if uniforms is None:
            best = logits.max(-1)
            confidence = (best.values - logits.logsumexp(-1)).exp()
            token = best.indices if self.shortlist is None else self.shortlist[best.indices]
            return token, None, confidence
        q = probabilities(logits, self.options)
        if self.shortlist is not None:
            whole = q.new_zeros(len(q), self.model.config.vocab_size)
            q = whole.index_copy_(1, self.shortlist, q)
        # With NaN in the logits, `draw` gives the number after the last token.
        token = draw(q, uniforms[:, j]).clamp_(max=q.shape[1] - 1)
        return token, q, q.gather(1, token[:, None])[:, 0]

    def _not_finite(self) -> FloatingPointError:
        """The error for logits of the MTP module that no token can be drafted from."""
        place = find_bad_layer(self.model, self.cache)
        where = "" if place is None else f" It began here: {place}"
        return FloatingPointError(
            "the logits of the MTP module are not finite, so no token can be drafted (without "
            f"speculation the module is not used).{where}"
        )

    def _read_pending(self, leave: int = 0) -> Float[Tensor, "b 1 d"]:
        """Read the pending positions but the last `leave` pieces; h^1 of each row's last one."""
        pieces = self._pending[: len(self._pending) - leave]
        self._pending = self._pending[len(pieces) :]
        self._num_pending = sum(hidden.shape[1] for hidden, _, _ in self._pending)
        answer: Tensor | None = None
        # Neighboring pieces without padding are read as one.
        for whole, group in itertools.groupby(pieces, key=lambda piece: piece[2] is None):
            several = list(group)
            if whole:
                hidden = torch.cat([piece[0] for piece in several], 1)
                several = [(hidden, torch.cat([piece[1] for piece in several], 1), None)]
            for hidden, after, counts in several:
                answer = self._newer(answer, self._read(hidden, after, counts), counts)
        assert answer is not None
        return answer

    @staticmethod
    def _newer(old: Tensor | None, new: Tensor, counts: Tensor | None) -> Tensor:
        """The newer answer, in rows that had anything to read."""
        if old is None or counts is None:
            return new
        return torch.where((counts > 0)[:, None, None].to(new.device), new, old)

    def _read(self, hidden: Tensor, after: Tensor, counts: Tensor | None) -> Tensor:
        context = ForwardContext(self.cache.mtp_starts, counts, last_only=True)
        answer = self.mtp(hidden, self.embed(after), self.cache.mtp, context)
        self.cache.advance_mtp(hidden.shape[1] if counts is None else counts)
        return answer
