"""What changes logits before temperature and filters: the repetition penalty, then processors.

    l_x  ->  l_x / penalty  if l_x > 0,   l_x * penalty  otherwise      for every token x so far
    l    ->  processor(tokens so far, l)                                one after the other

"So far" is prompt and answer of the row. With a cache the prompt is everything that the cache has
read.

A verification in speculative decoding has logits of several places at once. The tokens so far of
place j are those of the row and the first j tokens of its draft. So each place gets the
distribution that plain decoding would have there, and the acceptance rule stays exact. Drafts are
drawn without these changes. That costs acceptance, not exactness.

Source: Keskar et al. 2019 (arXiv 1909.05858) for the penalty, in the form of transformers'
RepetitionPenaltyLogitsProcessor. Left out: penalties that count how often a token occurred.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from nemotron_lite.generation.options import SamplingOptions


class Adjustments:
    """The changes of all rows, and the tokens of each row so far.

    Args:
        options: penalty and processors.
        rows: tokens of each row before the first new one.
        vocab_size: number of logits.
        device: of the logits.

    Attributes:
        active: whether there is anything to change.
    """

    def __init__(
        self,
        options: SamplingOptions,
        rows: Sequence[Sequence[int]],
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self.options = options
        self.active = options.adjusts
        self._rows = [list(row) for row in rows] if self.active else []
        self._seen: Bool[Tensor, "b v"] | None = None
        if options.penalizes:
            self._seen = torch.zeros(len(rows), vocab_size, dtype=torch.bool, device=device)
            for seen, row in zip(self._seen, self._rows, strict=True):
                seen[torch.tensor(row, dtype=torch.int64, device=device)] = True

    def add(self, new: Sequence[Sequence[int]]) -> None:
        """Tokens that were written, row by row."""
        for i, tokens in enumerate(new if self.active else ()):
            self._rows[i] += tokens
            if self._seen is not None and len(tokens):
                self._seen[i, list(tokens)] = True

    def __call__(self, logits: Float[Tensor, "b v"], going: Sequence[bool]) -> Float[Tensor, "b v"]:
        """The changed logits of the next token; rows that are not `going` keep theirs."""
        if not self.active:
            return logits
        none: list[list[int]] = [[] for _ in going]
        return self.places(logits.unsqueeze(1), none, going)[:, 0]

    def places(
        self, logits: Float[Tensor, "b k1 v"], drafts: Sequence[list[int]], going: Sequence[bool]
    ) -> Float[Tensor, "b k1 v"]:
        """The changed logits of a verification: place j stands behind j tokens of the draft.

        Places beyond a row's own draft, and rows that are not `going`, are not read by anybody.
        """
        if not self.active:
            return logits
        logits = logits.clone()
        if self._seen is not None:
            seen = self._seen.unsqueeze(1).repeat(1, logits.shape[1], 1)
            for i, draft in enumerate(drafts):
                for j, token in enumerate(draft):
                    seen[i, j + 1 :, token] = True
            penalty = self.options.repetition_penalty or 1.0
            changed = torch.where(logits < 0, logits * penalty, logits / penalty)
            logits = torch.where(seen, changed, logits)
        for i, draft in enumerate(drafts):
            for j in range(len(draft) + 1 if going[i] else 0):
                for number, processor in enumerate(self.options.logits_processors):
                    found = processor([*self._rows[i], *draft[:j]], logits[i, j].clone())
                    logits[i, j] = _checked(found, logits[i, j], number)
        return logits


def _checked(found: object, logits: Float[Tensor, "v"], number: int) -> Float[Tensor, "v"]:
    """What a processor returned, if a token can be chosen from it.

    Raises:
        TypeError: something else than logits.
        FloatingPointError: NaN or plus infinity.
        ValueError: no token is left.
    """
    name = f"logits_processors[{number}]"
    if not isinstance(found, Tensor) or not found.is_floating_point():
        kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
        raise TypeError(f"{name} returned {kind}: expected a tensor of logits.")
    if found.shape != logits.shape:
        raise ValueError(
            f"{name} returned the shape {list(found.shape)}: expected {list(logits.shape)}, one "
            "logit for each entry of the vocabulary."
        )
    best = float(found.max())
    if best == float("-inf"):
        raise ValueError(f"{name} banned every token (all logits are -inf): leave at least one.")
    if not best < float("inf"):  # NaN too
        raise FloatingPointError(
            f"{name} returned {'NaN' if best != best else '+inf'} among the logits: no token can "
            "be chosen from them."
        )
    return found.to(logits)
