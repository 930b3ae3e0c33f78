"""What speculation should cost and gain, by arithmetic on the config.

At small batches decoding is bound by memory traffic: each pass reads the weights that it uses once.
Per pass over t tokens of one row

    bytes(t) = dense weights + experts that t tokens use + SSM states

where t tokens use e (1 - (1 - k/e)^t) of e experts on average. Dense weights cost the same for one
token and for ten, so verifying k + 1 tokens is cheap. In a mixture of experts it is not free,
because different tokens use different experts. With bytes(1), a plain step, as the unit of cost,
and c_d for one pass of the MTP module and the head,

    gain = acceptance length / (bytes(k+1) / bytes(1) + k c_d)

Each term comes from the ledger. Some machines are not bound by memory traffic: a CPU that spends
its time between small operations, or any machine at a large batch. There, measure the costs instead
(`measured_costs`).
"""

from __future__ import annotations

from collections.abc import Sequence

from nemotron_lite import ledger
from nemotron_lite.config import NemotronConfig
from nemotron_lite.generation.options import SpeculationCosts


def ledger_costs(
    config: NemotronConfig, draft_length: int = 4, *, drafted_tokens: int | None = None
) -> SpeculationCosts:
    """Costs by the ledger at batch 1, without the keys and values of the context.

    Args:
        draft_length: the cost of a verified token is averaged up to this length, because each
            further token uses fewer new experts.
        drafted_tokens: length of the drafter's shortlist; the whole vocabulary when None.

    Raises:
        ValueError: a model without an MTP module, or a length below 1.
    """
    if not config.mtp_pattern:
        raise ValueError(
            "this config has no MTP module (mtp_pattern is empty), so there is nothing that drafts:"
            " take a config with one."
        )
    if draft_length < 1:
        raise ValueError(f"draft_length={draft_length} does not work: expected at least 1.")
    one = weights_read(config, 1)
    more = weights_read(config, 1 + draft_length)
    rows = ledger.parameters(config).rows
    head = (drafted_tokens or config.vocab_size) * config.hidden_size
    module = sum(row.active for row in rows if row.mtp)
    return SpeculationCosts(draft=(module + head) / one, verify=(more - one) / draft_length / one)


def weights_read(config: NemotronConfig, tokens: int) -> float:
    """Numbers that one pass of the backbone over `tokens` tokens of one row reads."""
    e, k = config.n_routed_experts, config.num_experts_per_tok
    hit = e * (1 - (1 - k / e) ** tokens)
    total = 0.0
    for row in ledger.parameters(config).rows:
        if row.mtp or row.part == "embedding":
            continue
        total += row.active * (hit / k if row.name == "experts" else 1)
    states = ledger.cached_values(config, 0)["ssm"]
    return total + 2 * states  # read and written, once per pass


def expected_acceptance_length(rates: Sequence[float]) -> float:
    """Acceptance length of drafts with these acceptance rates, one for each position."""
    all_accepted, total = 1.0, 1.0
    for rate in rates:
        all_accepted *= rate
        total += all_accepted
    return total


def speedup(acceptance_length: float, draft_length: int | float, costs: SpeculationCosts) -> float:
    """Tokens per second over those of plain decoding."""
    return acceptance_length / costs.of_pass(draft_length)
