"""Speculative decoding: the MTP module drafts, the backbone judges, the text stays the same.

    round:   draft     d_1 .. d_k        k turns of the one MTP module, each reading the last
             verify    p_1 .. p_{k+1}    one pass of the backbone over chosen token and draft
             accept    n <= k tokens, and one more that the backbone adds (ops/verification.py)
             keep      the cache takes in n + 1 tokens and forgets the rest (cache.py)

Decoding one token reads every weight once, and so does verifying k + 1. A round writes n + 1 tokens
for a pass and k small ones: it pays where drafts are right and the module is small.

    generate(model, prompts, 200, draft="mtp", draft_length=4)

drafting.py      the MTP module as a writer, and its memory
rounds.py        the loop above, for rows that accept differently
adaptive.py      how far a draft is worth going; no draft where none is
prediction.py    what a round costs by the ledger, and the gain to be expected
calibration.py   the same prices, measured on this machine
statistics.py    what happened, as data

Source: reference sheet section 5; Leviathan et al. 2023 (arXiv 2211.17192). Left out: trees of
drafts (Nemotron's deployments draft chains), other models as drafters.
"""

from nemotron_lite.generation.speculative.cost_model import Costs, costs, speedup
from nemotron_lite.generation.speculative.draft_length import Adaptive
from nemotron_lite.generation.speculative.drafter import Drafter, shortlist
from nemotron_lite.generation.speculative.loop import Speculation
from nemotron_lite.generation.speculative.measured_costs import calibrate
from nemotron_lite.generation.speculative.statistics import Statistics

__all__ = [
    "Adaptive",
    "Costs",
    "Drafter",
    "Speculation",
    "Statistics",
    "calibrate",
    "costs",
    "shortlist",
    "speedup",
]
