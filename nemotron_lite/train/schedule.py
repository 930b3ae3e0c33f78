"""Warm-up, stable, decay (WSD): the learning rate as a function of the progress of the run.

    progress in [0, w)        peak * progress / w                    warm-up, linear
    progress in [w, 1 - c]    peak                                   stable
    progress in (1 - c, 1]    floor + (peak - floor) (1 - sqrt x)    decay, x = (progress - (1-c))/c

Here w is `warmup_fraction` and c is `decay_fraction`. WSD keeps the rate at its peak for most of
the run and decays it only at the end. So the length of the stable part need not be decided in
advance, and several decays can start from the same stable run (Hu et al. 2024, arXiv 2404.06395).
The minus-sqrt shape falls fastest at the start of the decay.

Super: warm-up over 0.8 % of 25T tokens, peak 4.5e-4, decay over the last 20 % to 4.5e-6 (reference
sheet 7). A run of a few hundred steps needs a longer warm-up fraction than one of a million.

The argument is a fraction and not a step, because a run can end after `steps` or after
`max_seconds`. With steps, the progress of update s (counted from 1) is s / steps, so the last
update uses the floor. With a time it is elapsed / max_seconds. With both it is the larger of the
two.
"""

from __future__ import annotations

import math


def learning_rate(
    progress: float,
    *,
    peak: float,
    floor: float,
    warmup_fraction: float,
    decay_fraction: float,
) -> float:
    """The learning rate at `progress`.

    Args:
        progress: fraction of the run that is done when the update is made, from 0 to 1.
        peak, floor: largest and last rate.
        warmup_fraction, decay_fraction: fractions of the run; their sum is at most 1.

    Raises:
        ValueError: `progress` is outside 0 to 1.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress} does not work: expected a number from 0 to 1.")
    if progress < warmup_fraction:
        return peak * progress / warmup_fraction
    if progress <= 1 - decay_fraction:
        return peak
    x = (progress - (1 - decay_fraction)) / decay_fraction
    return floor + (peak - floor) * minus_sqrt(min(1.0, x))


def minus_sqrt(x: float) -> float:
    """The shape of the decay, 1 - sqrt(x): from 1 at its start to 0 at its end."""
    return 1 - math.sqrt(x)
