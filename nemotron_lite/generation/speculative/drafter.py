"""The MTP module as a writer: it looks one token ahead, and then ahead of itself.

Entry i of the module's memory joins what the backbone knew at position i with the token that came
after it, (h_i, t_{i+1}). When token t_n has been chosen and the backbone has read up to n-1, the
module takes in what is missing up to (h_{n-1}, t_n) and answers with h^1: its reading of position
n.

    d_1 ~ head(h^1)      h^2 = MTP(h^1, d_1)      d_2 ~ head(h^2)      h^3 = MTP(h^2, d_2)    ...

So from the second token on the module reads its own output where the backbone's should be. That is
the recursion it was trained on for two depths, with shared weights, and it may go on beyond them;
acceptance falls with each turn. One difference to training remains, as in all engines: a deeper
turn sees the entries of the true text at depth 1, not at its own depth.

Entries made from the module's own output are scaffolding. When the draft is done they are cut off,
and after the verification the accepted positions are taken in again, with the backbone's hidden
states: the memory is that of a run that never drafted. While a run decodes without drafts, hidden
states wait here and are taken in together when drafting goes on.

The head is the dearest part of a turn in a small model with a large vocabulary. A shortlist of
tokens, those that texts are mostly made of, lets the drafter read only their rows of it. What it
then draws from, q, is zero elsewhere, and the judgement is as exact as ever: tokens off the list
are never drafted, and so never accepted.

Source: reference sheet 5.1 and 5.5 (greedy chains, `num_nextn_predict_layers` 1, the layer re-run
for further drafts); the shortlist is FR-Spec's (Zhao et al. 2025, arXiv 2502.14856). Left out:
trees, and drafting for position 0 of an empty prompt.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nemotron_lite.cache import Cache
from nemotron_lite.generation.sampling import Filters
from nemotron_lite.layers import ForwardContext
from nemotron_lite.model import Nemotron
from nemotron_lite.ops import draw, linear

MOST_WAITING = 256  # hidden states per row that wait before they are taken in


@runtime_checkable
class Controller(Protocol):
    """Decides for one row how far to draft; see adaptive.py."""

    def wants(self, confidences: list[float]) -> bool:
        """Whether to draft one more token behind those of these confidences."""
        ...

    def learn(self, confidences: list[float], accepted: int) -> None:
        """What became of a draft."""
        ...


class Draft(NamedTuple):
    """Drafted tokens of every row, padded to the longest."""

    tokens: Int[Tensor, "b k"]
    q: Float[Tensor, "b k v"] | None  # what they were drawn from; None when greedy
    confidences: list[list[float]]  # of the tokens that count, row by row

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row that count."""
        return [len(row) for row in self.confidences]


def shortlist(texts: Iterable[Sequence[int]], size: int) -> Int[Tensor, "s"]:
    """The `size` most frequent tokens of some texts, in rising order; fewer if there are fewer.

    Texts that the model has written itself are the best to count.

    Raises:
        ValueError: a size below 1, or no token at all.
    """
    counts = Counter(token for text in texts for token in text)
    if size < 1 or not counts:
        raise ValueError(f"a shortlist of {size} tokens from {counts.total()}: nothing to draft.")
    return torch.tensor(sorted(token for token, _ in counts.most_common(size)))


def check_shortlist(tokens: Int[Tensor, "s"], vocab_size: int) -> None:
    """Raises ValueError for an empty list, a token twice, or one outside the vocabulary."""
    fits = tokens.ndim == 1 and len(tokens) and len(tokens.unique()) == len(tokens)
    if not fits or int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        raise ValueError(
            f"the shortlist must be different tokens of 0 to {vocab_size - 1}, at least one; got "
            f"{tokens.tolist()[:8]}... of shape {list(tokens.shape)}."
        )


class Drafter:
    """Drafts behind a cache with room for the MTP module's memory.

    Args:
        model: with an MTP module.
        cache: made with `model.empty_cache(..., mtp=True)`, before its first token.
        shortlist: the only tokens to draft; all of them when None.

    Raises:
        ValueError: a model without an MTP module, a cache without room for it, or a shortlist with
            tokens outside the vocabulary.
    """

    def __init__(
        self, model: Nemotron, cache: Cache, filters: Filters,
        shortlist: Int[Tensor, "s"] | None = None,
    ) -> None:  # fmt: skip
        if model.mtp is None:
            raise ValueError(
                "this model has no MTP module to draft with (mtp_pattern is empty): leave draft "
                "away, or load a checkpoint that has one."
            )
        if len(cache.mtp) != len(model.config.mtp_pattern):
            raise ValueError("the cache has no room for the MTP module: make it with mtp=True.")
        self.model, self.cache, self.filters = model, cache, filters
        self.mtp, self.embed = model.mtp, model.backbone.embed
        self._waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []
        self._positions = 0  # of all that wait
        self._last: Tensor | None = None
        self.shortlist = shortlist
        if shortlist is not None:
            check_shortlist(shortlist, model.config.vocab_size)
            self.shortlist = shortlist.to(model.device)
            self._short_head = model.lm_head.weight[self.shortlist]

    def read_prompt(
        self, hidden: Float[Tensor, "b t d"], prompt: Int[Tensor, "b s"], lengths: list[int],
        start: int,
    ) -> None:  # fmt: skip
        """Take in a piece of the prompts: hidden states of the t positions from `start` on.

        The last position of a row has no token after it yet: it waits for `read`.
        """
        t = hidden.shape[1]
        after = prompt.new_zeros(len(prompt), t)
        known = prompt[:, start + 1 : start + 1 + t]
        after[:, : known.shape[1]] = known
        ends = torch.tensor(lengths, device=hidden.device) - 1 - start  # place of the last token
        counts = ends.clamp(0, t)
        if int(counts.max()):
            uniform = min(lengths) == max(lengths) and int(counts[0]) == t
            self._absorb(hidden, after, None if uniform else counts)
        here = (ends >= 0) & (ends < t)
        rows = torch.arange(len(prompt), device=hidden.device)
        found = hidden[rows, ends.clamp(0, t - 1)]
        last = found if self._last is None else torch.where(here[:, None], found, self._last)
        self._last = last

    def start(self, chosen: Int[Tensor, "b"]) -> None:
        """The first token after the prompts."""
        assert self._last is not None
        self.read(self._last.unsqueeze(1), chosen.unsqueeze(1))
        self._last = None

    def read(
        self,
        hidden: Float[Tensor, "b t d"],
        after: Int[Tensor, "b t"],
        counts: Int[Tensor, "b"] | None = None,
    ) -> None:
        """New positions of the text: the backbone's hidden states and the token after each.

        Args:
            counts: how many of the t are real, row by row; all when None.
        """
        self._waiting.append((hidden, after, counts))
        self._positions += hidden.shape[1]
        if self._positions > MOST_WAITING:
            self._absorb_waiting(leave=1)

    def draft(self, streams: Float[Tensor, "b k"] | None, controllers: list[Controller],
              limits: list[int]) -> Draft | None:  # fmt: skip
        """Draft for every row as far as its controller wants and its limit allows.

        Args:
            streams: a uniform number for each drafted token; None when greedy.
            limits: most tokens by row; 0 for rows that have ended.

        Returns:
            None when no row wants a draft.
        """
        trails: list[list[float]] = [[] for _ in limits]
        going = self._going(controllers, limits, trails, [True] * len(limits))
        if not any(going):
            return None
        hidden = self._absorb_waiting()
        kept = self.cache.mtp_lengths
        tokens: list[Tensor] = []
        laws: list[Tensor] = []
        while True:
            token, law, confidence = self._choose(self._head(hidden[:, 0]), streams, len(tokens))
            tokens.append(token)
            if law is not None:
                laws.append(law)
            for trail, on, sure in zip(trails, going, confidence.tolist(), strict=True):
                if on:
                    trail.append(sure)
            going = self._going(controllers, limits, trails, going)
            if not any(going):
                break
            context = ForwardContext(self.cache.mtp_starts)
            embedded = self.embed(token.unsqueeze(1))
            hidden = self.mtp.forward_last(hidden, embedded, self.cache.mtp, context)
            self.cache.advance_mtp(1)
        self.cache.truncate_mtp(kept)
        return Draft(torch.stack(tokens, 1), torch.stack(laws, 1) if laws else None, trails)

    def _going(
        self, controllers: list[Controller], limits: list[int], trails: list[list[float]],
        going: list[bool],
    ) -> list[bool]:  # fmt: skip
        return [
            on and len(trail) < limit and controller.wants(trail)
            for controller, limit, trail, on in zip(controllers, limits, trails, going, strict=True)
        ]

    def _choose(
        self, logits: Float[Tensor, "b v"], streams: Tensor | None, j: int
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """A token per row, the distribution it was drawn from, and its probability there."""
        if streams is None:
            best = logits.max(-1)
            sure = (best.values - logits.logsumexp(-1)).exp()
            token = best.indices if self.shortlist is None else self.shortlist[best.indices]
            return token, None, sure
        law = self.filters(logits)
        if self.shortlist is not None:
            whole = law.new_zeros(len(law), self.model.config.vocab_size)
            law = whole.index_copy_(1, self.shortlist, law)
        token = draw(law, streams[:, j])
        return token, law, law.gather(1, token[:, None])[:, 0]

    def _head(self, hidden: Float[Tensor, "b d"]) -> Float[Tensor, "b s"]:
        """Logits of the tokens that may be drafted."""
        if self.shortlist is None:
            return self.model.head(hidden)
        logits = linear(hidden, self._short_head)
        return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()

    def _absorb_waiting(self, leave: int = 0) -> Float[Tensor, "b 1 d"]:
        """Take in what waits; h^1 of each row's last position. `leave` pieces stay waiting."""
        pieces = self._waiting[: len(self._waiting) - leave]
        self._waiting = self._waiting[len(pieces) :]
        self._positions = sum(hidden.shape[1] for hidden, _, _ in self._waiting)
        answer: Tensor | None = None
        # Neighbours without padding are one piece.
        for whole, group in itertools.groupby(pieces, key=lambda piece: piece[2] is None):
            several = list(group)
            if whole:
                hidden = torch.cat([piece[0] for piece in several], 1)
                several = [(hidden, torch.cat([piece[1] for piece in several], 1), None)]
            for hidden, after, counts in several:
                answer = self._later(answer, self._absorb(hidden, after, counts), counts)
        assert answer is not None
        return answer

    @staticmethod
    def _later(old: Tensor | None, new: Tensor, counts: Tensor | None) -> Tensor:
        """The newer answer, in rows that had anything to take in."""
        if old is None or counts is None:
            return new
        return torch.where((counts > 0)[:, None, None].to(new.device), new, old)

    def _absorb(self, hidden: Tensor, after: Tensor, counts: Tensor | None) -> Tensor:
        context = ForwardContext(self.cache.mtp_starts, counts)
        answer = self.mtp.forward_last(hidden, self.embed(after), self.cache.mtp, context)
        self.cache.advance_mtp(hidden.shape[1] if counts is None else counts)
        return answer
