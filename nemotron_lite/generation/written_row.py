"""A row of a run: the tokens that it has written, their text and log-probabilities, and its end.

Three things end a row: a token of `stop`, a stop string in its text, or `max_new_tokens`. A token
that ends a row belongs to it.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from nemotron_lite.generation.results import StopReason
from nemotron_lite.generation.text_rows import TextRow


class WrittenRow:
    """What one row has written, and why it ended.

    Args:
        stop: tokens that end it.
        max_new_tokens: tokens after which it ends.
        text: of the row, where pieces of text or stop strings are wanted.

    Attributes:
        tokens, pieces: ids, and the text that each of them completed.
        logprobs, top_logprobs: as in `GenerationResult`, where they are recorded.
        stop_reason, stop: as in `GenerationResult`.
        unread: whether the last token is still to be read by the cache.
    """

    def __init__(
        self, stop: frozenset[int], max_new_tokens: int, text: TextRow | None = None
    ) -> None:
        self._stop, self._most, self.text = stop, max_new_tokens, text
        self.tokens: list[int] = []
        self.pieces: list[str] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[list[tuple[int, float]]] = []
        self.stop: int | str | None = None
        self.stop_reason: StopReason = "unfinished" if max_new_tokens else "length"
        self.unread = False

    @property
    def ended(self) -> bool:
        """Whether no further token will be written."""
        return self.stop_reason != "unfinished"

    def record(self, token: int, logprobs: Float[Tensor, "v"], most_likely: int) -> None:
        """Keep the log-probability of a token, and of the most likely ones."""
        best = logprobs.topk(min(most_likely, len(logprobs)))
        self.logprobs.append(float(logprobs[token]))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        self.top_logprobs.append(list(pairs))

    def add(self, token: int) -> None:
        """Write a token; the row must not have ended."""
        self.tokens.append(token)
        self.unread = True
        if self.text is not None:
            self.pieces.append(self.text.add(token))
        if token in self._stop:
            self.stop_reason, self.stop = "stop_token", token
        elif self.text is not None and self.text.stop_string is not None:
            self.stop_reason, self.stop = "stop_string", self.text.stop_string
        elif len(self.tokens) >= self._most:
            self.stop_reason = "length"
