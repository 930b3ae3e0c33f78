"""What a run of speculative decoding did: how much was accepted, and where the time went.

    acceptance length    tokens per verification, the one that the backbone adds included
    acceptance rate j    of the drafts at position j whose predecessors were all accepted, the share
                         that was accepted too
    tokens per pass      of the backbone, passes without a draft included: 1 is plain decoding

Whether the added token counts differs between reports; the usual convention counts it, and so does
this one (reference sheet 5.4): 1.0 means that drafting gained nothing. Times are those of the
calling thread; work that a GPU still has queued is not waited for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Statistics:
    """Counts over all rows, filled in while a run goes on.

    Attributes:
        tried: entry j counts the drafts at position j+1 that were judged: all before it accepted.
        accepted: entry j counts those of them that were accepted.
        verifications: rows judged, once per row and pass; `added` tokens came with them.
        plain: tokens written without a draft, the first one after the prompt left out.
        passes: of the backbone after the prompt.
        seconds: spent reading the prompt, drafting, verifying (acceptance included).
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

    def count(self, lengths: Iterable[int], accepted: Iterable[int]) -> None:
        """Add one pass: drafted and accepted tokens of each row that is still being written."""
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
        """Tokens per verification, the added one included; 1 before the first."""
        return self.verified_tokens / self.verifications if self.verifications else 1.0

    @property
    def acceptance_rates(self) -> list[float]:
        """By position in the draft, given that everything before it was accepted."""
        return [a / n if n else 0.0 for a, n in zip(self.accepted, self.tried, strict=True)]

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a row got from one pass of the backbone, on average."""
        judged = self.verifications + self.plain
        return (self.verified_tokens + self.plain) / judged if judged else 1.0

    @property
    def mean_draft(self) -> float:
        """Drafted tokens per row and pass, passes without a draft included."""
        judged = self.verifications + self.plain
        return self.drafted / judged if judged else 0.0

    @property
    def draft_share(self) -> float:
        """Of the time after the prompt, the share that drafting took."""
        both = self.seconds["draft"] + self.seconds["verify"]
        return self.seconds["draft"] / both if both else 0.0

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
