"""What a run of `generate` did: how much of the drafts was accepted, and where the time went.

    acceptance length    tokens per verification, including the one that the backbone adds
    acceptance rate j    of the drafted tokens at position j before which everything was accepted,
                         the share that was accepted too
    tokens per pass      of the backbone, including passes without a draft: 1 is plain decoding

Reports differ in whether the added token counts. The usual convention counts it, and so does this
one (reference sheet 5.4): 1.0 means that drafting gained nothing. Times are those of the calling
thread; work that a GPU still has queued is not waited for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any


@dataclass
class Statistics:
    """Counts over all rows; those of several runs can be added with `+`.

    Attributes:
        tried: entry j counts the drafted tokens at position j+1 that were verified: everything
            before them was accepted.
        accepted: entry j counts those of them that were accepted.
        verifications: drafts verified, one per row and pass.
        verified_tokens: tokens written by them, including those that the backbone added.
        plain: tokens written without a draft, apart from the first one after the prompt.
        passes: of the backbone after the prompt.
        drafted: tokens drafted.
        seconds: spent on reading the prompt, on drafting, and on verifying with the acceptance;
            steps without a draft count as verifying.
    """

    tried: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    verifications: int = 0
    verified_tokens: int = 0
    plain: int = 0
    passes: int = 0
    drafted: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: {"prompt": 0.0, "draft": 0.0, "verify": 0.0}
    )

    def __add__(self, other: Statistics) -> Statistics:
        return Statistics(
            tried=_add(self.tried, other.tried),
            accepted=_add(self.accepted, other.accepted),
            verifications=self.verifications + other.verifications,
            verified_tokens=self.verified_tokens + other.verified_tokens,
            plain=self.plain + other.plain,
            passes=self.passes + other.passes,
            drafted=self.drafted + other.drafted,
            seconds={part: self.seconds[part] + other.seconds[part] for part in self.seconds},
        )

    def count(self, lengths: Iterable[int], accepted: Iterable[int]) -> None:
        """Add one pass: drafted and accepted tokens of each row that has not ended."""
        self.passes += 1
        for length, kept in zip(lengths, accepted, strict=True):
            if length == 0:
                self.plain += 1
                continue
            self.verifications += 1
            self.verified_tokens += kept + 1
            self.drafted += length
            missing = length - len(self.tried)
            self.tried += [0] * missing
            self.accepted += [0] * missing
            for j in range(min(kept + 1, length)):
                self.tried[j] += 1
                self.accepted[j] += j < kept

    @property
    def acceptance_length(self) -> float:
        """Tokens per verification, including the added one; 1 before the first."""
        return self.verified_tokens / self.verifications if self.verifications else 1.0

    @property
    def acceptance_rates(self) -> list[float]:
        """By position in the draft, where everything before it was accepted."""
        return [a / n if n else 0.0 for a, n in zip(self.accepted, self.tried, strict=True)]

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a row gets from one pass of the backbone, on average."""
        row_passes = self.verifications + self.plain
        return (self.verified_tokens + self.plain) / row_passes if row_passes else 1.0

    @property
    def mean_draft(self) -> float:
        """Drafted tokens per row and pass, including passes without a draft."""
        row_passes = self.verifications + self.plain
        return self.drafted / row_passes if row_passes else 0.0

    @property
    def draft_share(self) -> float:
        """The share of drafting in the time after the prompt."""
        total = self.seconds["draft"] + self.seconds["verify"]
        return self.seconds["draft"] / total if total else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for records."""
        return {
            "acceptance_length": self.acceptance_length,
            "acceptance_rates": self.acceptance_rates,
            "tokens_per_pass": self.tokens_per_pass,
            "mean_draft": self.mean_draft,
            "verifications": self.verifications,
            "plain_tokens": self.plain,
            "passes": self.passes,
            "draft_share": self.draft_share,
            "seconds": dict(self.seconds),
        }

    def __str__(self) -> str:
        rates = " ".join(f"{rate:.0%}" for rate in self.acceptance_rates) or "nothing drafted"
        return (
            f"acceptance length {self.acceptance_length:.2f} ({self.tokens_per_pass:.2f} tokens per"
            f" pass), accepted by position: {rates}; drafting took {self.draft_share:.0%} of the"
            " time"
        )


def _add(one: list[int], other: list[int]) -> list[int]:
    return [a + b for a, b in zip_longest(one, other, fillvalue=0)]
