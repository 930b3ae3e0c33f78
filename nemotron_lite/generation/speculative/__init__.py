"""Speculative decoding: the MTP module drafts, the backbone verifies.

The distribution of the text stays that of plain decoding; greedy text stays the same.

    draft     d_1 .. d_k        k steps of the one MTP module, each reading the one before
    verify    p_1 .. p_{k+1}    one pass of the backbone over the chosen token and the draft
    accept    n <= k tokens, and one more that the backbone adds (ops/verification.py)
    keep      the cache keeps n + 1 tokens and forgets the rest (cache.py)

Decoding one token reads every weight once, and so does verifying k + 1. Each pass of the backbone
writes n + 1 tokens, for the cost of that pass and k small ones: it pays where drafts are often
right and the module is small.

    generate(model, prompts, 200, speculation=SpeculationOptions(draft_length=4))

drafter.py         the MTP module as a drafter, and its cache
loop.py            the loop above, for rows that accept different numbers of tokens
draft_length.py    how far a draft is worth going; no draft where none is
cost_model.py      what drafts and verifications cost by the ledger, and the gain to be expected
measured_costs.py  the same costs, measured on this machine
statistics.py      what happened, as data

Source: reference sheet section 5; Leviathan et al. 2023 (arXiv 2211.17192). Left out: trees of
drafts (Nemotron's deployments draft chains), other models as drafters.
"""

from nemotron_lite.generation.options import SpeculationCosts, SpeculationOptions
from nemotron_lite.generation.speculative.cost_model import ledger_costs, speedup
from nemotron_lite.generation.speculative.draft_length import AdaptiveDraftLength
from nemotron_lite.generation.speculative.drafter import Drafter, shortlist
from nemotron_lite.generation.speculative.loop import SpeculativeDecoding
from nemotron_lite.generation.speculative.measured_costs import measure_costs
from nemotron_lite.generation.statistics import Statistics

__all__ = [
    "AdaptiveDraftLength",
    "Drafter",
    "SpeculationCosts",
    "SpeculationOptions",
    "SpeculativeDecoding",
    "Statistics",
    "ledger_costs",
    "measure_costs",
    "shortlist",
    "speedup",
]
