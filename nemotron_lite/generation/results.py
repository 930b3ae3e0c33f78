"""What `generate(..., return_details=True)` returns: tokens, text, log-probabilities, and the end.

Log-probabilities are those of the model itself, before penalty, processors, temperature and
filters. So they say how likely the model finds the text, whatever it was drawn from. vLLM and
OpenAI's API define them in this way too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

StopReason = Literal["length", "stop_token", "stop_string", "unfinished"]


@dataclass(frozen=True)
class GenerationResult:
    """One continuation.

    Attributes:
        tokens: ids that were written, a stop token or the tokens of a stop string included. A cache
            that was given has read exactly these after the prompt.
        text: the same as text, without the stop token and without the stop string; None for a model
            without a tokenizer.
        stop_reason: "length" (max_new_tokens was reached), "stop_token", "stop_string", or
            "unfinished" for a stream that has not come to its end.
        stop: the stop token's id or the stop string; None for the other reasons.
        prompt_tokens: tokens of the prompt that were read, without those that a given cache had
            read before.
        logprobs: log-probability of each token; None unless `logprobs` was asked for.
        top_logprobs: for each token the most likely ones at its place, as pairs of id and
            log-probability in falling order; None unless `logprobs` was asked for.
    """

    tokens: list[int]
    text: str | None
    stop_reason: StopReason
    stop: int | str | None
    prompt_tokens: int
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
