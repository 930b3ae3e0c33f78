"""A chi-square test of counts against exact probabilities, for the tests of sampling.

    X = sum over cells of (count - expected)^2 / expected          cells expected less than 5 times
                                                                   are put together

Thresholds are those of one false alarm in ten thousand, by Wilson and Hilferty's cube root: good to
a percent from 3 degrees of freedom on. Seeds are fixed, so a test that passes once passes again.
"""

from __future__ import annotations

import torch
from torch import Tensor

Z = 3.719  # the 0.9999 quantile of the normal distribution
RARE = 5.0


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """(X, number of cells); infinite where something happened that has probability zero."""
    counts, probabilities = counts.double().flatten(), probabilities.double().flatten()
    expected = probabilities / probabilities.sum() * counts.sum()
    if bool((counts[expected == 0] > 0).any()):
        return float("inf"), len(counts)
    often = expected >= RARE
    cells = torch.cat([expected[often], expected[~often].sum()[None]])
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    used = cells > 0
    value = ((seen - cells)[used] ** 2 / cells[used]).sum()
    return float(value), int(used.sum())


def critical_value(freedom: int) -> float:
    """The 0.9999 quantile of the chi-square distribution."""
    share = 2 / (9 * freedom)
    return freedom * (1 - share + Z * share**0.5) ** 3
