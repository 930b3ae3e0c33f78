"""Claims about pairs of models, tested over seeds: yes, no, or not decided.

A claim names two models. Both were trained with the same seeds, and the runs of one seed read the
same batches, so each seed gives one difference of their held-out scores in bits per byte, "model
minus other": below zero the model is better. The mean of n differences has the interval

    mean ± t(n - 1) s / sqrt(n)         t: the 97.5 % point of Student's distribution

which holds the true mean in 95 % of experiments, if the differences are normally distributed. A
margin says which difference matters. It is fixed before the runs.

    claim "better"          yes           the whole interval is below 0
                            no            the whole interval is above -margin: a gain that matters
                                          is excluded
    claim "not worse"       yes           the whole interval is below +margin
                            no            the whole interval is above +margin
    both                    not decided   anything else, or fewer than three seeds

"Not decided" is no weak "no": more seeds can turn it into either.

The number of seeds is planned before the runs. A verdict from fewer seeds is provisional: who
looks after each seed and stops at the first "yes" finds more of them than there are.

Left out: a correction for several claims. At 95 % each, up to 30 % of experiments with six claims
have at least one interval that misses.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats  # type: ignore[import-untyped]

CONFIDENCE = 0.95
LEAST_SEEDS = 3
MARGIN = 0.01  # bits per byte
KINDS = ("better", "not worse")


@dataclass(frozen=True)
class Claim:
    """A statement about two models.

    Attributes:
        words: the statement.
        source: who says so.
        model, other: names of the two models.
        kind: one of `KINDS`.
    """

    words: str
    source: str
    model: str
    other: str
    kind: str = "better"


CLAIMS = (
    Claim(
        "At equal FLOPs a mixture of experts learns more than a dense MLP.",
        "Shazeer et al. 2017 (arXiv 1701.06538)", "moe", "dense",
    ),
    Claim(
        "At equal FLOPs the hybrid learns more than the transformer, both with a standard mixture.",
        "the Nemotron-H report (arXiv 2504.03624), which claims equal accuracy or more",
        "hybrid", "moe",
    ),
    Claim(
        "At equal FLOPs and parameters LatentMoE (acc) learns more than a standard mixture.",
        "the LatentMoE paper (arXiv 2601.18089); reference sheet 4.4", "latent", "hybrid",
    ),
    Claim(
        "LatentMoE (eff) is not worse than a standard mixture, at fewer FLOPs per token.",
        "the LatentMoE paper (arXiv 2601.18089); reference sheet 4.4",
        "latent_eff", "hybrid", "not worse",
    ),
    Claim(
        "Trained to equal FLOPs, on more tokens, LatentMoE (eff) learns more than a standard "
        "mixture.",
        "follows from the claim before it", "latent_eff_longer", "hybrid",
    ),
    Claim(
        "At equal FLOPs the hybrid with LatentMoE learns more than a dense transformer.",
        "all of the above together", "latent", "dense",
    ),
)  # fmt: skip


def judge(differences: Sequence[float], kind: str, margin: float = MARGIN) -> dict[str, Any]:
    """The interval of some paired differences, and the verdict.

    Args:
        differences: model minus other, one per seed.
        kind: "better" or "not worse".
        margin: the difference that matters.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(map(repr, KINDS))}.")
    n = len(differences)
    found: dict[str, Any] = {
        "n": n, "each": list(differences), "mean": None, "interval": None, "verdict": "not decided",
    }  # fmt: skip
    if not n:
        return found
    mean = found["mean"] = statistics.fmean(differences)
    if n < 2:
        return found
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1))
    half = quantile * statistics.stdev(differences) / math.sqrt(n)
    low, high = mean - half, mean + half
    found["interval"] = [low, high]
    if n >= LEAST_SEEDS:
        bounds = (0.0, -margin) if kind == "better" else (margin, margin)
        found["verdict"] = "yes" if high < bounds[0] else "no" if low > bounds[1] else "not decided"
    return found


def judge_all(
    scores: Mapping[str, Mapping[int, float]], claims: Sequence[Claim] = CLAIMS
) -> list[dict[str, Any]]:
    """All claims, from the scores by model and seed; only seeds that both models have count."""
    found = []
    for claim in claims:
        ours, others = scores.get(claim.model, {}), scores.get(claim.other, {})
        seeds = sorted(set(ours) & set(others))
        found.append(
            {
                "claim": claim.words, "source": claim.source, "model": claim.model,
                "other": claim.other, "kind": claim.kind, "margin": MARGIN, "seeds": seeds,
                **judge([ours[s] - others[s] for s in seeds], claim.kind),
            }
        )  # fmt: skip
    return found
