"""A chi-square test of counts against exact probabilities, for the tests of sampling.

    X = sum over cells of (count - expected)^2 / expected

Cells that are expected fewer than 5 times are pooled into one cell. Thresholds allow one false
alarm in ten thousand. Seeds are fixed, so a test that passes once passes again. X and its quantiles
come from scipy; the pooling and the cells of probability zero are handled here.
"""

from __future__ import annotations

import torch
from scipy import stats
from torch import Tensor

QUANTILE = 0.9999
RARE = 5.0


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, int]:
    """(X, number of cells); X is infinite if something of probability zero was counted."""
    counts, probabilities = counts.double().flatten(), probabilities.double().flatten()
    expected = probabilities / probabilities.sum() * counts.sum()
    if bool((counts[expected == 0] > 0).any()):
        return float("inf"), len(counts)
    often = expected >= RARE
    cells = torch.cat([expected[often], expected[~often].sum()[None]])
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    used = cells > 0
    return float(stats.chisquare(seen[used], cells[used]).statistic), int(used.sum())


def critical_value(freedom: int) -> float:
    """The quantile of X's distribution with `freedom` degrees of freedom."""
    return float(stats.chi2.ppf(QUANTILE, freedom))
