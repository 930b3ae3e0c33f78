"""How likely a model finds texts: log-likelihoods, token by token.

    log p(t_1 .. t_n) = sum_i log p(t_i | BOS, t_1 .. t_{i-1})

    score(model, "def f(x):").logprob                      a text from its first token on
    score(model, ["a", "b"])                               several
    score(model, ["2 + 2 ="], [" 4"])                      a continuation after its context
    score(model, [[5, 17]], [[3, 9]])                      ids in place of texts

A context and its continuation are encoded together, because a tokenizer may join characters across
the border. The tokens behind those of the context alone count as the continuation. Where the
border lies inside a token ("ret" and "urn"), both are encoded on their own, so that nothing of the
continuation is left out. Spaces at the
end of the context belong to the continuation's first token, as the tokenizer of a text would have
them.

Texts of similar length are read together, padded on the right, and long ones segment by segment
with a cache. Logits are made for a few thousand places at a time. So the memory does not grow with
the length of a text, apart from the keys and values of its attention layers. Nothing is cut off:
each token is predicted from all tokens before it.

Logits are float32, and so is the log-probability of each token; sums are taken in float64.

Source: the definitions of EleutherAI's lm-evaluation-harness (`loglikelihood`,
`loglikelihood_rolling`), which harness.py serves with these functions. Left out: the likelihood of
several continuations of one context in a single pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nemotron_lite.arguments import integer, shown
from nemotron_lite.finite import logits_error
from nemotron_lite.generation.prefill import pad_right
from nemotron_lite.generation.prompts import Prompts, encode_prompts
from nemotron_lite.model import Nemotron, segment
from nemotron_lite.openmp import watching
from nemotron_lite.wrappers import model_for_inference

BATCH_SIZE = 8
LOGITS = 1 << 24  # numbers of logits at a time: 64 MB in float32
MAX_BATCH_SIZE = 1 << 16


@dataclass(frozen=True)
class Score:
    """The log-likelihood of one text.

    Attributes:
        logprob: of the whole text, natural logarithm.
        tokens: ids that were scored.
        token_logprobs: of each of them, given all tokens before it.
        is_greedy: whether each token is the most likely one at its place, so that greedy decoding
            would write this text.
        num_bytes: length of the scored text in UTF-8; None where ids were given.
    """

    logprob: float
    tokens: list[int]
    token_logprobs: list[float]
    is_greedy: bool
    num_bytes: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that were scored."""
        return len(self.tokens)

    @property
    def perplexity(self) -> float:
        """exp of the mean loss of a token; 1 for an empty text."""
        return math.exp(-self.logprob / len(self.tokens)) if self.tokens else 1.0

    @property
    def bits_per_byte(self) -> float | None:
        """Bits that the model needs for a byte of the text; comparable between tokenizers."""
        return -self.logprob / math.log(2) / self.num_bytes if self.num_bytes else None


@dataclass
class _Row:
    """Tokens to read, how many of them are only context, and what was found."""

    context: list[int]
    tokens: list[int]
    num_bytes: int | None
    logprobs: list[float] = field(default_factory=list)
    greedy: bool = True

    @property
    def inputs(self) -> list[int]:
        return [*self.context, *self.tokens][:-1]


@overload
def score(
    model: Nemotron,
    texts: str | list[int] | tuple[int, ...],
    continuations: str | list[int] | tuple[int, ...] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    segment_length: int | None = None,
) -> Score: ...


@overload
def score(
    model: Nemotron,
    texts: list[str] | tuple[str, ...] | Sequence[Sequence[int]],
    continuations: list[str] | tuple[str, ...] | Sequence[Sequence[int]] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    segment_length: int | None = None,
) -> list[Score]: ...


@overload
def score(
    model: nn.Module,
    texts: Prompts,
    continuations: Prompts | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    segment_length: int | None = None,
) -> Any: ...


def score(
    model: nn.Module,
    texts: Prompts,
    continuations: Any = None,
    *,
    batch_size: int = BATCH_SIZE,
    segment_length: int | None = None,
) -> Any:
    """Log-likelihoods of texts, or of continuations of texts.

    Args:
        model: a `Nemotron`, or one in a wrapper that `generate` takes.
        texts: in any form that `generate` takes. Without `continuations` all their tokens are
            scored, the first one after the model's BOS token (which is not put in front again).
        continuations: one for each text, in the same form. Only they are scored; `texts` are the
            contexts before them. An empty context is the BOS token.
        batch_size: texts that are read together.
        segment_length: tokens of a text that are read at once; None lets the model choose. Every
            value gives the same numbers up to rounding.

    Returns:
        A `Score` for one text, a list of them for several. An empty text has the log-likelihood 0.

    Raises:
        ValueError: texts that are neither text nor token ids, an id outside the vocabulary, another
            number of continuations than of texts, or text for a model without a tokenizer.
        TypeError: another argument of a wrong type.
        FloatingPointError: logits that are not finite; the message names row, place and layer.
    """
    batch_size = integer("batch_size", batch_size, low=1, high=MAX_BATCH_SIZE)
    if segment_length is not None:
        segment_length = integer("segment_length", segment_length, low=1)
    model = model_for_inference(model)
    rows, single = _rows(model, texts, continuations)
    # Long rows first: what does not fit into memory fails at once.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].inputs))
    order = [i for i in order if rows[i].tokens]
    for start in range(0, len(order), batch_size):
        some = order[start : start + batch_size]
        _score_batch(model, [rows[i] for i in some], some, segment_length)
    found = [
        Score(math.fsum(row.logprobs), row.tokens, row.logprobs, row.greedy, row.num_bytes)
        for row in rows
    ]
    return found[0] if single else found


def _rows(model: Nemotron, texts: Prompts, continuations: Any) -> tuple[list[_Row], bool]:
    """Contexts and tokens to score."""
    bos = [model.config.bos_token_id]
    encoded = encode_prompts(model, texts, behind=True)
    given = _texts(texts, encoded.single) if encoded.tokenizer is not None else None
    if continuations is None:
        sizes = [None] * len(encoded.rows) if given is None else [len(t.encode()) for t in given]
        rows = zip(encoded.rows, sizes, strict=True)
        return [_Row(bos, row, size) for row, size in rows], encoded.single
    after = encode_prompts(model, continuations, behind=True)
    if after.single != encoded.single or len(after.rows) != len(encoded.rows):
        raise ValueError(
            f"{_count(after.rows, after.single)} in continuations={shown(continuations)} for "
            f"{_count(encoded.rows, encoded.single)} in texts: give one for each text, in the same "
            "form."
        )
    if (after.tokenizer is None) != (encoded.tokenizer is None):
        raise ValueError(
            "texts and continuations must both be text, or both be token ids: one is text, and "
            "the other is not."
        )
    if given is None:
        pairs = zip(encoded.rows, after.rows, strict=True)
        return [_Row(row or bos, new, None) for row, new in pairs], encoded.single
    found = [
        _joined(model, context, text)
        for context, text in zip(given, _texts(continuations, after.single), strict=True)
    ]
    return found, encoded.single


def _joined(model: Nemotron, context: str, continuation: str) -> _Row:
    """Tokens of a continuation as they are when it stands behind its context."""
    size = len(continuation.encode())
    bare = context.rstrip()
    if bare:
        moved = context[len(bare) :] + continuation
        before = model.tokenizer.encode(bare).ids
        whole = model.tokenizer.encode(bare + moved).ids
        if whole[: len(before)] != before or len(whole) == len(before):
            whole = [*before, *model.tokenizer.encode(moved, add_special_tokens=False).ids]
        return _Row(whole[: len(before)] or [model.config.bos_token_id], whole[len(before) :], size)
    new = model.tokenizer.encode(context + continuation, add_special_tokens=False).ids
    return _Row([model.config.bos_token_id], new, size)


def _texts(texts: Any, single: bool) -> list[str]:
    return [texts] if single else [str(text) for text in texts]


def _count(rows: list[list[int]], single: bool) -> str:
    return "a single one" if single else f"{len(rows)}"


def _score_batch(
    model: Nemotron, rows: list[_Row], numbers: list[int], segment_length: int | None
) -> None:
    """Fill in the log-probabilities of rows that are read together."""
    inputs, lengths = pad_right([row.inputs for row in rows])
    targets, _ = pad_right([[*row.inputs[1:], row.tokens[-1]] for row in rows])
    inputs, targets = inputs.to(model.device), targets.to(model.device)
    ends = torch.tensor(lengths, device=model.device)
    firsts = torch.tensor([len(row.context) - 1 for row in rows], device=model.device)
    total, step = inputs.shape[1], segment_length or segment(inputs)
    with watching(), torch.inference_mode():
        cache = None if total <= step else model.empty_cache(len(rows), capacity=total)
        for start in range(0, total, step):
            part = inputs[:, start : start + step]
            real = (ends - start).clamp(0, part.shape[1])
            hidden = model.forward_hidden(part, cache, lengths=real).hidden
            places = torch.arange(start, start + part.shape[1], device=model.device)
            scored = (places >= firsts[:, None]) & (places < ends[:, None])
            found, best = _logprobs(model, hidden[scored], targets[:, start : start + step][scored])
            if not math.isfinite(math.fsum(found.tolist())):
                raise _not_finite(model, rows, numbers, scored, found, start)
            values, greedy = found.tolist(), best.tolist()
            taken = 0
            for row, count in zip(rows, scored.sum(1).tolist(), strict=True):
                row.logprobs += values[taken : taken + count]
                row.greedy = row.greedy and all(greedy[taken : taken + count])
                taken += count


def _logprobs(
    model: Nemotron, hidden: Float[Tensor, "n d"], targets: Int[Tensor, "n"]
) -> tuple[Float[Tensor, "n"], Tensor]:
    """Log-probability of each target, and whether it is the most likely token."""
    size = max(1, LOGITS // model.config.vocab_size)
    found, best = [], []
    for start in range(0, len(hidden), size):
        logits = model.head(hidden[start : start + size])
        mine = logits.gather(1, targets[start : start + size, None])[:, 0]
        low, high = logits.aminmax(dim=-1)
        fine = low.isfinite() & high.isfinite()
        found.append((mine - logits.logsumexp(-1)).masked_fill(~fine, math.nan))
        best.append(logits.argmax(-1) == targets[start : start + size])
    if not found:
        return hidden.new_zeros(0), hidden.new_zeros(0, dtype=torch.bool)
    return torch.cat(found), torch.cat(best)


def _not_finite(
    model: Nemotron, rows: list[_Row], numbers: list[int], scored: Tensor, found: Tensor, start: int
) -> FloatingPointError:
    """The error for log-probabilities that are not finite.

    Inside a chunk of a Mamba layer a NaN reaches earlier tokens too, so the layer and the token
    where it began are looked for in the whole row.
    """
    wrong = ~found.isfinite()
    row, place = scored.nonzero()[int(wrong.nonzero()[0])].tolist()
    step = start + place + 1 - len(rows[row].context)
    return logits_error(model, found, row=numbers[row], step=step, tokens=rows[row].inputs)
