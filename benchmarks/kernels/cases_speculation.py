"""The acceptance rule at Super's vocabulary: drafts of four tokens.

The definition here is the PyTorch form in float64. q is p with noise on its logits, and drafts are
sampled from q, as a draft model would do. Some sequences are accepted completely and sample from
the bonus row; most sample from a residual distribution. Only the thousand most likely tokens have a
probability above zero, as after top-p. With all 131,072 tokens, the rounding of a float32 sum would
change the sampled token in one of a few hundred sequences, and equal tokens could not be required.

The lower bound of the time is one reading of the pair of rows that a sequence samples from. The
kernel reads the pair once for the sum, and on average half of it again to find the token. The
measured share of the lower bound shows whether the second reading comes from the L2 cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.kernels.registry import Case, Draw, Inputs
from nemotron_kernels.verification import verify
from nemotron_lite import ops

VOCABULARY, DRAFT = 131_072, 4
LIKELY, NOISE = 1024, 0.5  # tokens with a probability above zero; noise on q's logits


def _likely(logits: Tensor) -> Tensor:
    """Probabilities of the most likely tokens, zero elsewhere."""
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
        op="verify",
        name="forward",
        shape=f"{batch} drafts of {DRAFT}, Super's vocabulary",
        inputs=_inputs(batch),
        run=_run,
        exact=_torch,
        tolerance=1e-12,
        bytes=2 * batch * VOCABULARY * 4,
        peers={"torch": _torch},
        key="verify",
    )
    for batch in (1, 16, 64)
]
