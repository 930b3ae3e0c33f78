"""What drafting and verifying cost on this machine, measured: prices for `Adaptive`.

    draft    time of one turn of the MTP module with the head     / time of a plain step
    verify   (time of verifying k+1 tokens - of verifying two) / (k-1)       / the same
    start    what is left of verifying two tokens and keeping one

The ledger's prices (prediction.py) count bytes. A GPU at a small batch comes near that; a CPU
spends much of a small model's step between operations, and its prices are others. They are medians
of a few turns, taken in rounds, so that a slow moment falls on all of them.

With prices of its own a run is as repeatable as ever, as long as the same prices are given again:
`Costs` are three numbers that can be written down.

Source: ours. Left out: prices as a function of batch and context.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from nemotron_lite.generation.speculative.cost_model import Costs
from nemotron_lite.layers import ForwardContext
from nemotron_lite.model import Nemotron
from nemotron_lite.ops import linear


def seconds_by_part(
    model: Nemotron,
    draft_length: int = 4,
    *,
    context: int = 128,
    rounds: int = 15,
    shortlist: Int[Tensor, "s"] | None = None,
    timer: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of a plain step, a draft step, and verifications of 2 and k+1 tokens.

    Args:
        context: tokens the cache has read before.
        shortlist: the tokens that drafts are made of, as for `generate`.
        timer: gives seconds.

    Raises:
        ValueError: a model without an MTP module, or a draft length below 2.
    """
    if model.mtp is None or draft_length < 2:
        raise ValueError(
            f"calibration needs an MTP module (mtp_pattern {model.config.mtp_pattern!r}) and drafts"
            f" of at least 2 tokens (draft_length={draft_length})."
        )
    mtp, dice = model.mtp, torch.Generator().manual_seed(0)

    def tokens(count: int) -> torch.Tensor:
        drawn = torch.randint(model.config.vocab_size, (1, count), generator=dice)
        return drawn.to(model.device)

    with torch.inference_mode():
        whole = model.lm_head.weight
        head = whole if shortlist is None else whole[shortlist.to(model.device)]
        cache = model.empty_cache(1, capacity=context + 8 * draft_length, mtp=True)
        hidden = model(tokens(context), cache).hidden[:, -1:]
        before = cache.clone()
        one, two, all_of_it = tokens(1), tokens(2), tokens(draft_length + 1)

        def verify(draft: torch.Tensor) -> None:
            model(draft, cache, draft=True).logits.argmax(-1).tolist()
            cache.accept(1)

        def turn() -> None:
            context = ForwardContext(cache.mtp_starts)
            found = mtp.forward_last(hidden, model.backbone.embed(one), cache.mtp, context)
            linear(found, head).argmax(-1).tolist()

        calls: dict[str, Callable[[], object]] = {
            "step": lambda: model(one, cache, logits_to_keep=1).logits.argmax(-1).tolist(),
            "draft": turn,
            "verify_two": lambda: verify(two),
            "verify_all": lambda: verify(all_of_it),
        }
        found: dict[str, list[float]] = {name: [] for name in calls}
        for turn_number in range(rounds + 2):
            for name, call in calls.items():
                started = timer()
                call()
                if turn_number > 1:  # the first two warm up
                    found[name].append(timer() - started)
                cache = before.clone()
    return {name: statistics.median(values) for name, values in found.items()}


def prices_of(seconds: dict[str, float], draft_length: int) -> Costs:
    """`seconds_by_part` in units of a plain step."""
    step = seconds["step"]
    verify = max(0.0, seconds["verify_all"] - seconds["verify_two"]) / (draft_length - 1) / step
    return Costs(
        draft=seconds["draft"] / step,
        verify=verify,
        start=max(0.0, seconds["verify_two"] / step - 1 - verify),
    )


def calibrate(
    model: Nemotron, draft_length: int = 4, *, shortlist: Int[Tensor, "s"] | None = None
) -> Costs:
    """Prices on this machine at batch 1; takes about a second for a small model."""
    parts = seconds_by_part(model, draft_length, shortlist=shortlist)
    return prices_of(parts, draft_length)
