"""The acceptance rule at Super's vocabulary: drafts of four tokens.

The definition here is the PyTorch form in float64. q is p with noise on its logits and drafts are
drawn from q, as by a draft model: some sequences are accepted whole and draw from the bonus row,
most draw from a residual. Only the thousand likeliest tokens have any probability, as after top-p.
That makes the same tokens a fair demand: with all 131,072 of them in play, the rounding of a
float32 sum would settle a draw in every few hundred sequences.

The floor is one reading of the row pair that a sequence draws from. The kernel sweeps it once for
the sum and on average half a time for the token; whether the second sweep comes from the cache is
what the measured share of the floor tells.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from registry import Case, Draw, Inputs
from torch import Tensor

from nemotron_kernels.verification import verify
from nemotron_lite import ops

VOCABULARY, DRAFT = 131_072, 4
LIKELY, NOISE = 1024, 0.5


def _likely(logits: Tensor) -> Tensor:
    """Probabilities of the likeliest tokens, zero elsewhere."""
    least = logits.topk(LIKELY).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf).softmax(-1)


def _inputs(batch: int) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        rows = 2 if draw.dry else batch
        shape = (rows, DRAFT + 1, VOCABULARY)
        p, q = (draw.normal(*shape, dtype=torch.float32, scale=2.0) for _ in range(2))
        drafts = draw.integers(0, VOCABULARY, rows, DRAFT)
        if not draw.dry:
            p, q = _likely(p), _likely(p + NOISE * q)
            chosen = q[:, :DRAFT].flatten(0, 1)
            drafts = torch.multinomial(chosen, 1, generator=draw.generator).view(rows, DRAFT)
        return {
            "p": p,
            "q": q[:, :DRAFT],
            "drafts": drafts,
            "uniforms": draw.uniform(rows, DRAFT + 1, dtype=torch.float64),
        }

    return make


def _run(p: Tensor, q: Tensor, drafts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(verify(p, q, drafts, uniforms))


def _torch(p: Tensor, q: Tensor, drafts: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    return tuple(ops.verify(p, q, drafts, uniforms, impl="torch"))


CASES = [
    Case(
        op="verify", name="forward", shape=f"{batch} drafts of {DRAFT}, Super's vocabulary",
        inputs=_inputs(batch), run=_run, exact=_torch, tolerance=1e-12,
        bytes=2 * batch * VOCABULARY * 4, peers={"torch": _torch}, key="verify",
    )
    for batch in (1, 16, 64)
]  # fmt: skip
