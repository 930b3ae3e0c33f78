"""How far to draft: as long as the next token is worth more than it costs, or not at all.

Drafting one more token costs c = draft + verify, in plain steps (`SpeculationCosts`). It adds a
token with probability P a: P is the probability that everything drafted so far is accepted, a that
of the next token. What the same time would bring otherwise is the rate R, the tokens per plain step
that passes with drafts have brought lately. So draft on while

    P a > R c

P is the product over the draft of g(confidence). The confidence is the probability that the drafter
itself gave its token. A drafter may be too sure of itself, or not sure enough, so g is learned: it
is the share of accepted tokens in each of eight bins of confidence. a is learned too, by position
in the draft.

Whether to draft at all is another question, since the confidence of the first token is only known
once it is drafted. Here the passes with drafts are compared with plain steps: draft as long as they
brought more extra tokens (beyond the one that a plain step brings too) than they had extra cost
(beyond one plain step).

The text stays exact. Whether to draft a further token is decided from tokens that will be verified
anyway, and before that token is drawn; dropping a drawn token because it looks unlikely would
bias the text. The decisions follow from what was accepted, not from a clock, so a run with a seed
can be repeated.

A row begins with a draft. Where drafting does not pay, the row decodes plainly and tries a draft
now and then: after 16 tokens, then 32, then 64, up to 256; after each success at once again. This
bounds the loss when drafts are poor.

Left out: learning the costs while running, and sharing what was learned between rows or calls.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from nemotron_lite.generation.options import SpeculationCosts

CONFIDENCE_BINS = 8
PRIOR_COUNT = 3.0  # tokens in each bin at the start, accepted as often as their confidence says
COUNT_DECAY = 0.98  # of the bins' counts, per verified token
INITIAL_ACCEPTANCE = 0.7  # assumed before anything was seen
INITIAL_PASSES = 4.0  # passes that are assumed to have gone that well
PASS_DECAY = 0.96  # of the account of passes, per pass with a draft
MIN_UPDATE_WEIGHT = 0.03  # of a new observation
FIRST_PAUSE, LONGEST_PAUSE = 16, 256  # plain tokens between trials


@runtime_checkable
class DraftLength(Protocol):
    """Decides for one row how far to draft."""

    def wants_more(self, confidences: list[float]) -> bool:
        """Whether to draft one more token after those with these confidences."""
        ...

    def update(self, confidences: list[float], accepted: int) -> None:
        """Learn from a pass: the confidences of its draft, and how many tokens were accepted."""
        ...


class AdaptiveDraftLength:
    """Drafts as far as it pays.

    Args:
        longest: the most tokens of a draft.
        costs: of drafting and verifying a token.
    """

    def __init__(self, longest: int, costs: SpeculationCosts) -> None:
        self.longest, self.costs = longest, costs
        bins = range(CONFIDENCE_BINS)
        self.bin_accepted = [PRIOR_COUNT * (i + 0.5) / CONFIDENCE_BINS for i in bins]
        self.bin_verified = [PRIOR_COUNT] * CONFIDENCE_BINS
        self.acceptance = [INITIAL_ACCEPTANCE] * longest  # by position in the draft
        self.verified = [0] * longest
        # The account of passes with drafts: how many, and their extra tokens and extra costs.
        self.passes = INITIAL_PASSES
        self.extra_tokens = INITIAL_PASSES * INITIAL_ACCEPTANCE
        self.extra_cost = INITIAL_PASSES * min(INITIAL_ACCEPTANCE, costs.of_pass(1) - 1)
        # Plain tokens until the next trial, and since the last one; the first token is a trial.
        self.pause, self.waited = FIRST_PAUSE, FIRST_PAUSE
        self.all_accepted = 1.0  # probability that the whole draft is accepted so far

    def wants_more(self, confidences: list[float]) -> bool:
        """Whether to draft one more token after those with these confidences."""
        length = len(confidences)
        if length == 0:
            self.all_accepted = 1.0
            return self.drafting_pays or self.waited >= self.pause
        if length >= self.longest:
            return False
        self.all_accepted *= self._acceptance_at(confidences[-1])
        cost = self.costs.draft + self.costs.verify
        return self.all_accepted * self.acceptance[length] > self.tokens_per_step * cost

    @property
    def drafting_pays(self) -> bool:
        """Whether drafts have brought more than they cost."""
        return self.extra_tokens > self.extra_cost

    @property
    def tokens_per_step(self) -> float:
        """Tokens in the time of a plain step that drafting brings; at least 1, as without it."""
        return max(1.0, (self.passes + self.extra_tokens) / (self.passes + self.extra_cost))

    def update(self, confidences: list[float], accepted: int) -> None:
        """Learn from a pass; one without a draft has no confidences."""
        length = len(confidences)
        if length == 0:
            self.waited += 1
            return
        for position, confidence in enumerate(confidences[: accepted + 1]):
            success = float(position < accepted)
            i = _bin(confidence)
            self.bin_accepted[i] = self.bin_accepted[i] * COUNT_DECAY + success
            self.bin_verified[i] = self.bin_verified[i] * COUNT_DECAY + 1
            self.verified[position] += 1
            weight = max(MIN_UPDATE_WEIGHT, 1 / (self.verified[position] + 3))
            self.acceptance[position] += weight * (success - self.acceptance[position])
        self.passes = self.passes * PASS_DECAY + 1
        self.extra_tokens = self.extra_tokens * PASS_DECAY + accepted
        self.extra_cost = self.extra_cost * PASS_DECAY + self.costs.of_pass(length) - 1
        if self.drafting_pays:
            self.pause, self.waited = FIRST_PAUSE, 0
        elif accepted:
            self.waited = self.pause  # a trial that went well is followed by another
        else:
            self.pause = min(LONGEST_PAUSE, 2 * self.pause) if self.waited else self.pause
            self.waited = 0

    def _acceptance_at(self, confidence: float) -> float:
        """How often tokens of about this confidence were accepted."""
        i = _bin(confidence)
        return self.bin_accepted[i] / self.bin_verified[i]


class FixedDraftLength:
    """Drafts of one length, whatever becomes of them."""

    def __init__(self, length: int) -> None:
        self.length = length

    def wants_more(self, confidences: list[float]) -> bool:
        """True until the length is reached."""
        return len(confidences) < self.length

    def update(self, confidences: list[float], accepted: int) -> None:
        """Nothing to learn."""


def _bin(confidence: float) -> int:
    return min(CONFIDENCE_BINS - 1, int(confidence * CONFIDENCE_BINS))
