"""How far to draft: as long as the next token is worth more than it costs, and else not at all.

Drafting one more token costs c = draft + verify (in plain steps, prediction.py) and adds a token
with probability reach * a, where reach is the chance that everything drafted so far is accepted and
a the chance of the next one. What the same time would bring otherwise is the rate R, the tokens per
plain step of the rounds with drafts lately. So draft on while

    reach * a > R c

reach is the product over the draft of g(confidence), the confidence being the probability that the
drafter itself gave its token. A drafter may be too sure of itself or too modest: g is learnt, as
the share accepted in each of eight bands of confidence. a is learnt too, by position in the draft.

Whether to draft at all is another question, since the first token's confidence is only known once
it is drafted. There the rounds themselves answer: draft as long as they brought more tokens, beyond
the one that a plain step brings too, than plain steps they cost beyond one.

Exactness is not touched. Whether to draft a further token is decided from tokens that will be
judged anyway, and before that token is drawn; dropping a drawn token because it looks unlikely
would bias the text. And decisions follow from what was accepted, not from a clock: with a seed, a
run repeats.

A row begins with a draft. Where drafting does not pay, it decodes plainly and tries a draft now and
then: after 16 tokens, then 32, then 64, up to 256; after each success at once again. That is what
bounds the loss when drafts are poor.

Left out: learning prices while running, and sharing what was learnt between rows or calls.
"""

from __future__ import annotations

from nemotron_lite.generation.speculative.cost_model import Costs

BANDS = 8
PRIOR = 3.0  # tokens' worth of belief that a band's own confidence is its acceptance
FADE = 0.98  # of counts, per token judged
OPTIMISM = 0.7  # acceptance before anything was seen
CREDIT = 4.0  # rounds that are believed to have gone that well
FADE_ROUNDS = 0.96  # of the account of rounds, per round with a draft
SLOWEST = 0.03  # least weight of a new observation
FIRST_PAUSE, LONGEST_PAUSE = 16, 256  # plain tokens between trials


class Adaptive:
    """The controller of one row.

    Args:
        longest: most tokens of a draft.
        costs: prices of drafting and verifying a token.
    """

    def __init__(self, longest: int, costs: Costs) -> None:
        self.longest, self.costs = longest, costs
        self.good = [PRIOR * (band + 0.5) / BANDS for band in range(BANDS)]
        self.seen = [PRIOR] * BANDS
        self.next = [OPTIMISM] * longest
        self.count = [0] * longest
        # The account of rounds with drafts: how many, tokens gained and steps paid beyond one each.
        self.rounds, self.gained = CREDIT, CREDIT * OPTIMISM
        self.paid = CREDIT * min(OPTIMISM, costs.round(1) - 1)
        self.pause, self.waited = FIRST_PAUSE, FIRST_PAUSE  # the first token is a trial already
        self.reach = 1.0

    def wants(self, confidences: list[float]) -> bool:
        """Whether to draft one more token behind those of these confidences."""
        j = len(confidences)
        if j == 0:
            self.reach = 1.0
            return self.pays or self.waited >= self.pause
        if j >= self.longest:
            return False
        self.reach *= self._calibrated(confidences[-1])
        price = self.costs.draft + self.costs.verify
        return self.reach * self.next[j] > self.rate * price

    @property
    def pays(self) -> bool:
        """Whether drafts have brought more than they cost."""
        return self.gained > self.paid

    @property
    def rate(self) -> float:
        """Tokens per plain step that drafting brings; at least the 1 of plain decoding."""
        return max(1.0, (self.rounds + self.gained) / (self.rounds + self.paid))

    def learn(self, confidences: list[float], accepted: int) -> None:
        """What became of a draft; call it with no confidences after a plain step."""
        length = len(confidences)
        if length == 0:
            self.waited += 1
            return
        for j, confidence in enumerate(confidences[: accepted + 1]):
            yes = float(j < accepted)
            band = min(BANDS - 1, int(confidence * BANDS))
            self.good[band] = self.good[band] * FADE + yes
            self.seen[band] = self.seen[band] * FADE + 1
            self.count[j] += 1
            weight = max(SLOWEST, 1 / (self.count[j] + 3))
            self.next[j] += weight * (yes - self.next[j])
        self.rounds = self.rounds * FADE_ROUNDS + 1
        self.gained = self.gained * FADE_ROUNDS + accepted
        self.paid = self.paid * FADE_ROUNDS + self.costs.round(length) - 1
        if self.pays:
            self.pause, self.waited = FIRST_PAUSE, 0
        elif accepted:
            self.waited = self.pause  # a trial that went well is followed by another
        else:
            self.pause = min(LONGEST_PAUSE, 2 * self.pause) if self.waited else self.pause
            self.waited = 0

    def _calibrated(self, confidence: float) -> float:
        band = min(BANDS - 1, int(confidence * BANDS))
        return self.good[band] / self.seen[band]


class Fixed:
    """Drafts of one length, whatever becomes of them."""

    def __init__(self, length: int) -> None:
        self.length = length

    def wants(self, confidences: list[float]) -> bool:
        """True until the length is reached."""
        return len(confidences) < self.length

    def learn(self, confidences: list[float], accepted: int) -> None:
        """Nothing to learn."""
