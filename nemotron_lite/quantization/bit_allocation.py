"""The knapsack: one format for each module, the least cost that a budget of bits allows.

    minimise  sum_m cost(m, f_m)      such that  sum_m bits(m, f_m) <= budget

Each module takes one of its formats, so this is the multiple-choice knapsack. Its exact solution is
a table: best(i, r) is the least cost of the first i modules with r bits beyond the smallest
formats. Bits are counted in steps of their greatest common divisor where that makes at most
`STEPS` of them (then the answer is exact), else in steps of room / STEPS, rounded up for every
module: the budget holds in any case, and what is lost is at most one step for each module.

Greedy choice by gain per bit is as good except near the budget's edge, where a large module that
just does not fit leaves room unused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from nemotron_lite.quantization.sensitivity import Costs

STEPS = 2**14


def assign(costs: Costs, bits: float) -> dict[str, str]:
    """The cheapest format of each unit at no more than `bits` bits a weight on average.

    Args:
        costs: from `sensitivity`.
        bits: such as the report's 4.75, over the weights of all units.

    Returns:
        Path of the unit -> format.

    Raises:
        ValueError: a budget below the smallest formats; the message says what they take.
    """
    numbers = sum(unit.numbers for unit in costs.units)
    sizes = [[u.bits(f) for f in nats] for u, nats in zip(costs.units, costs.nats, strict=True)]
    smallest = sum(min(size) for size in sizes) / numbers
    if smallest > bits:
        raise ValueError(
            f"bits={bits}: the smallest formats of these modules take {smallest:.3f} bits a "
            'weight. Raise the budget, or allow smaller formats (choices="any").'
        )
    values = [list(nats.values()) for nats in costs.nats]
    picks = knapsack(sizes, values, math.floor(bits * numbers))
    return {
        unit.path: list(nats)[pick]
        for unit, nats, pick in zip(costs.units, costs.nats, picks, strict=True)
    }


def knapsack(
    sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int
) -> list[int]:
    """Which option of each item to take.

    Args:
        sizes, costs: of each option of each item.
        budget: the sum of the sizes may not exceed it.

    Raises:
        ValueError: nothing fits, or a cost that is no number.
    """
    if any(not math.isfinite(cost) for item in costs for cost in item):
        raise ValueError("a cost is NaN or infinite: nothing can be chosen by it.")
    floors = [min(item) for item in sizes]
    room = budget - sum(floors)
    if room < 0:
        raise ValueError(f"budget={budget}: the smallest options take {sum(floors)}.")
    extras = [[size - low for size in item] for item, low in zip(sizes, floors, strict=True)]
    step = math.gcd(*(extra for item in extras for extra in item)) or 1
    if room // step > STEPS:
        step = -(-room // STEPS)
    slots = room // step + 1
    best = np.zeros(slots)  # least cost so far, with at most this much room used
    picks = np.zeros((len(sizes), slots), dtype=np.int16)
    for i, (item, prices) in enumerate(zip(extras, costs, strict=True)):
        table = np.full((len(item), slots), np.inf)
        for j, (extra, price) in enumerate(zip(item, prices, strict=True)):
            used = -(-extra // step)
            if used < slots:
                table[j, used:] = best[: slots - used] + price
        picks[i] = table.argmin(0)
        best = table.min(0)
    chosen: list[int] = []
    left = slots - 1
    for i in reversed(range(len(sizes))):
        pick = int(picks[i, left])
        chosen.append(pick)
        left -= -(-extras[i][pick] // step)
    return chosen[::-1]
