"""Warm up, stay, decay: the learning rate as a function of how much of the run is done.

    progress in [0, w)        peak * progress / w                    warm-up, linear
    progress in [w, 1 - c]    peak                                   stable
    progress in (1 - c, 1]    floor + (peak - floor) (1 - sqrt x)    decay; x = share of it done

WSD keeps the rate at its peak for most of the run and pays the decay only at the end, so the stable
part can be lengthened, or branched from, without deciding on the length in advance (Hu et al. 2024,
arXiv 2404.06395). The minus-sqrt shape falls fast at first and ends with a kink at the floor.

Super: warm-up over 0.8 % of 25T tokens, peak 4.5e-4, decay over the last 20 % to 4.5e-6
(reference sheet 7). A run of some hundred steps needs a longer warm-up share than one of a million.

The argument is a share and not a step, because a run can be bounded by steps or by a clock. With
steps, progress of update s (counted from 1) is s / steps: the last update uses the floor. With a
clock it is elapsed / max_seconds, and with both the larger of the two.
"""

from __future__ import annotations

import math


def learning_rate(
    progress: float, *, peak: float, floor: float, warmup: float, decay: float
) -> float:
    """The rate at `progress`, a share of the run from 0 to 1.

    Args:
        progress: share of the run that is done when the update is made.
        peak, floor: largest and last rate.
        warmup, decay: shares of the run spent rising and falling; together at most 1.

    Raises:
        ValueError: a share outside 0 to 1.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress={progress} does not work: expected a share from 0 to 1.")
    if progress < warmup:
        return peak * progress / warmup
    if progress <= 1 - decay:
        return peak
    x = (progress - (1 - decay)) / decay
    return floor + (peak - floor) * (1 - math.sqrt(min(1.0, x)))
