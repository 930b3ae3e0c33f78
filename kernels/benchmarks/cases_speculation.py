"""The acceptance rule at Super's vocabulary: drafts of four tokens.

The definition here is the PyTorch form in float64. Drafts are uniform tokens, which p and q find
equally likely on average: about two thirds of the first ones are accepted, so that most sequences
draw from a residual and some from the bonus row.

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


def _inputs(batch: int) -> Callable[[Draw], Inputs]:
    def make(draw: Draw) -> Inputs:
        rows = 2 if draw.dry else batch
        shape = (rows, DRAFT + 1, VOCABULARY)
        p, q = (draw.normal(*shape, dtype=torch.float32, scale=2.0) for _ in range(2))
        if not draw.dry:
            p, q = p.softmax(-1), q.softmax(-1)
        return {
            "p": p,
            "q": q[:, :DRAFT],
            "drafts": draw.integers(0, VOCABULARY, rows, DRAFT),
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
