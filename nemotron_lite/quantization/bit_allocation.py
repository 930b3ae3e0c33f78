"""Bit allocation: one format for each module, with the least cost that a budget of bits allows.

    minimize  sum_m cost(m, f_m)      such that  sum_m bits(m, f_m) <= budget

Each module takes exactly one of its formats. In the literature this is the multiple-choice knapsack
problem. `minimize_cost` solves it by dynamic programming: best(i, r) is the least cost of the first
i modules if they may take r bits more than their smallest formats. Bits are counted in steps of
their greatest common divisor, if that makes at most `MAX_STEPS` steps; then the solution is exact.
Otherwise a step is larger, and the size of each module is rounded up to whole steps. So the budget
holds in any case, and at most one step per module is lost.

A greedy choice by gain per bit is as good except near the edge of the budget: there a large module
that just does not fit leaves bits unused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nemotron_lite.quantization.sensitivity import Sensitivity

MAX_STEPS = 2**14


def allocate_bits(sensitivity: Sensitivity, bits: float) -> dict[str, str]:
    """The formats of least cost that take at most `bits` bits per weight on average.

    Args:
        sensitivity: from `measure_sensitivity`.
        bits: such as the report's 4.75; the average over the weights of all modules.

    Returns:
        Path of the module -> format.

    Raises:
        ValueError: the smallest formats exceed the budget; the message says what they take.
    """
    modules, costs = sensitivity.modules, sensitivity.nats
    total = sum(module.num_weights for module in modules)
    sizes = [[m.bits(f) for f in nats] for m, nats in zip(modules, costs, strict=True)]
    smallest = sum(min(size) for size in sizes) / total
    if smallest > bits:
        raise ValueError(
            f"bits={bits}: the smallest formats of these modules take {smallest:.3f} bits a "
            'weight. Raise the budget, or allow smaller formats (choices="any").'
        )
    picks = minimize_cost(sizes, [list(nats.values()) for nats in costs], math.floor(bits * total))
    return {
        module.path: list(nats)[pick]
        for module, nats, pick in zip(modules, costs, picks, strict=True)
    }


def minimize_cost(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """Which option of each item to take, so that the sum of the costs is least.

    Args:
        sizes, costs: of each option of each item.
        budget: the sum of the chosen sizes may not exceed it.

    Raises:
        ValueError: even the smallest options exceed the budget, or a cost is not finite.
    """
    if any(not math.isfinite(cost) for item in costs for cost in item):
        raise ValueError("a cost is NaN or infinite; expected finite costs.")
    smallest = [min(item) for item in sizes]
    spare = budget - sum(smallest)
    if spare < 0:
        raise ValueError(f"budget={budget}: the smallest options take {sum(smallest)}.")
    extras = [[size - low for size in item] for item, low in zip(sizes, smallest, strict=True)]
    step = math.gcd(*(extra for item in extras for extra in item)) or 1
    if spare // step > MAX_STEPS:
        step = -(-spare // MAX_STEPS)
    columns = spare // step + 1
    best = np.zeros(columns)  # least cost so far if at most this many spare steps are used
    picks = np.zeros((len(sizes), columns), dtype=np.int16)
    for i, (item_extras, item_costs) in enumerate(zip(extras, costs, strict=True)):
        table = np.full((len(item_extras), columns), np.inf)
        for j, (extra, cost) in enumerate(zip(item_extras, item_costs, strict=True)):
            used = -(-extra // step)
            if used < columns:
                table[j, used:] = best[: columns - used] + cost
        picks[i] = table.argmin(0)
        best = table.min(0)
    chosen: list[int] = []
    left = columns - 1
    for i in reversed(range(len(sizes))):
        pick = int(picks[i, left])
        chosen.append(pick)
        left -= -(-extras[i][pick] // step)
    return chosen[::-1]
