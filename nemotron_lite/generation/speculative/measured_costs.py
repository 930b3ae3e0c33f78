"""What drafting and verifying cost on this machine, measured.

    draft    time of one step of the MTP module with the head     / time of a plain step
    verify   (time of verifying k+1 tokens - of verifying two) / (k-1)       / the same
    start    what is left of verifying two tokens and keeping one

The ledger's costs (cost_model.py) count bytes. A GPU at a small batch comes near that. A CPU spends
much of a small model's step between operations, so its costs differ. The times are medians over
several rounds. Each round measures every part once, so that a slow moment of the machine affects
all parts alike.

A run with measured costs can be repeated exactly if it is given the same costs again:
`SpeculationCosts` are three numbers that can be written down.

Source: ours. Left out: costs as a function of batch and context.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from nemotron_lite.generation.options import SpeculationCosts
from nemotron_lite.generation.prepared_weights import prepare_weights
from nemotron_lite.generation.speculative.drafter import check_shortlist, head_for
from nemotron_lite.layers import ForwardContext
from nemotron_lite.model import Nemotron


def measure_seconds(
    model: Nemotron,
    draft_length: int = 4,
    *,
    context: int = 128,
    rounds: int = 15,
    shortlist: Sequence[int] | None = None,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of a plain step, a draft step, and verifying 2 and k+1 tokens.

    Args:
        context: tokens that the cache already holds.
        shortlist: the only tokens to draft, as in `SpeculationOptions`.
        timer: returns the time in seconds.

    Raises:
        ValueError: a model without an MTP module, or a draft length below 2.
    """
    if model.mtp is None or draft_length < 2:
        raise ValueError(
            "measuring costs needs a model with an MTP module (mtp_pattern is "
            f"{model.config.mtp_pattern!r}) and drafts of at least 2 tokens (draft_length is "
            f"{draft_length})."
        )
    prepare_weights(model, rows=(1, draft_length + 1))  # as `generate` does
    mtp, generator = model.mtp, torch.Generator().manual_seed(0)

    def tokens(count: int) -> torch.Tensor:
        drawn = torch.randint(model.config.vocab_size, (1, count), generator=generator)
        return drawn.to(model.device)

    with torch.inference_mode():
        if shortlist is not None:
            check_shortlist(shortlist, model.config.vocab_size)
        chosen = None if shortlist is None else torch.tensor(shortlist, device=model.device)
        head = head_for(model, chosen)
        cache = model.empty_cache(1, capacity=context + 8 * draft_length, mtp=True)
        hidden = model(tokens(context), cache).hidden[:, -1:]
        before = cache.clone()
        one, two, everything = tokens(1), tokens(2), tokens(draft_length + 1)

        def verify(draft: torch.Tensor) -> None:
            model(draft, cache, draft=True).logits.argmax(-1).tolist()
            cache.accept(1)

        def draft_one() -> None:
            context = ForwardContext(cache.mtp_starts, last_only=True)
            found = mtp(hidden, model.backbone.embed(one), cache.mtp, context)
            head(found).argmax(-1).tolist()

        calls: dict[str, Callable[[], object]] = {
            "step": lambda: model(one, cache, logits_to_keep=1).logits.argmax(-1).tolist(),
            "draft": draft_one,
            "verify_two": lambda: verify(two),
            "verify_all": lambda: verify(everything),
        }
        found: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds + 2):
            for name, call in calls.items():
                started = timer()
                call()
                if number > 1:  # the first two warm up
                    found[name].append(timer() - started)
                cache = before.clone()
    return {name: statistics.median(values) for name, values in found.items()}


def costs_from_seconds(seconds: dict[str, float], draft_length: int) -> SpeculationCosts:
    """`measure_seconds` in units of a plain step."""
    step = seconds["step"]
    verify = max(0.0, seconds["verify_all"] - seconds["verify_two"]) / (draft_length - 1) / step
    return SpeculationCosts(
        draft=seconds["draft"] / step,
        verify=verify,
        start=max(0.0, seconds["verify_two"] / step - 1 - verify),
    )


def measure_costs(
    model: Nemotron, draft_length: int = 4, *, shortlist: Sequence[int] | None = None
) -> SpeculationCosts:
    """Costs on this machine at batch 1; takes about a second for a small model."""
    parts = measure_seconds(model, draft_length, shortlist=shortlist)
    return costs_from_seconds(parts, draft_length)
