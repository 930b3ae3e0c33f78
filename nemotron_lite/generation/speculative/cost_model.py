"""What speculation should cost and gain, by arithmetic on the config.

At small batches decoding is paid in bytes: each pass reads the weights it uses once. Per pass over
t tokens of one row

    bytes(t) = dense weights + experts hit by t tokens + states        e (1 - (1 - k/e)^t) experts

Dense weights cost the same for one token and for ten, which is why verifying k + 1 tokens is cheap;
the experts are why it is not free in a mixture: different tokens wake different ones. In units of a
plain step (bytes(1)), with c_d the MTP module and the head once,

    gain = acceptance length / (bytes(k+1) / bytes(1) + k c_d)

Each term is the ledger's. On machines where something else than bytes is short (a CPU that spends
its time between small operations, a large batch), measured `Costs` say more: give them instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron_lite import ledger
from nemotron_lite.config import NemotronConfig


@dataclass(frozen=True)
class Costs:
    """Prices in units of one plain decoding step.

    Attributes:
        draft: one turn of the MTP module, head and choice included.
        verify: each token of a verification after the first.
        start: what a verification costs beyond a plain step before any token is added.
    """

    draft: float
    verify: float
    start: float = 0.0

    def round(self, draft_length: int | float) -> float:
        """A round with a draft of this length; a round without one is a plain step."""
        if draft_length == 0:
            return 1.0
        return 1.0 + self.start + draft_length * (self.draft + self.verify)


def costs(
    config: NemotronConfig, draft_length: int = 4, *, drafted_tokens: int | None = None
) -> Costs:
    """The ledger's prices at batch 1, the context's keys and values left out.

    Args:
        draft_length: the price of a verified token is averaged up to this length, since the more
            tokens there are, the fewer new experts each of them wakes.
        drafted_tokens: length of the drafter's shortlist; the whole vocabulary when None.

    Raises:
        ValueError: a model without an MTP module, or a length below 1.
    """
    if not config.mtp_pattern:
        raise ValueError("this model has no MTP module (mtp_pattern is empty): nothing drafts.")
    if draft_length < 1:
        raise ValueError(f"draft_length={draft_length}: expected at least 1.")
    one = pass_weights(config, 1)
    more = pass_weights(config, 1 + draft_length)
    rows = ledger.parameters(config).rows
    head = (drafted_tokens or config.vocab_size) * config.hidden_size
    module = sum(row.active for row in rows if row.mtp)
    return Costs(draft=(module + head) / one, verify=(more - one) / draft_length / one)


def pass_weights(config: NemotronConfig, tokens: int) -> float:
    """Numbers that one pass of the backbone over `tokens` tokens of one row reads."""
    e, k = config.n_routed_experts, config.num_experts_per_tok
    hit = e * (1 - (1 - k / e) ** tokens)
    total = 0.0
    for row in ledger.parameters(config).rows:
        if row.mtp or row.part == "embedding":
            continue
        total += row.active * (hit / k if row.name == "experts" else 1)
    state = config.mamba_inner_size * config.ssm_state_size
    return total + 2 * state * config.pattern.count("M")  # read and written, once per pass


def expected_length(rates: Sequence[float]) -> float:
    """Acceptance length of drafts as long as `rates`, which are by position."""
    reach, total = 1.0, 1.0
    for rate in rates:
        reach *= rate
        total += reach
    return total


def speedup(acceptance_length: float, draft_length: int | float, prices: Costs) -> float:
    """Tokens per second over those of plain decoding."""
    return acceptance_length / prices.round(draft_length)
