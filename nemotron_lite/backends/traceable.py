"""Forms that `torch.compile` and `torch.export` can read: no loop over chunks, no sizes from data.

A compiler reads a Python function once, with tensors that have shapes and no numbers. Two of our
operations do not suit it in their plain form:

    ssd           its loop runs over chunks. A compiler would write the loop out, once for each
                  number of chunks, and compile again for every length.
    expert_mlp    it asks how many tokens each expert has, and makes one product for each. The
                  numbers are not known while the function is read.

The scan. After each chunk the state decays by exp(T_c), with T_c the sum of dt A over the chunk.
The state before chunk c is then one product with a triangular matrix, as inside a chunk:

    S_c = sum_{j < c} exp(T_{j+1} + ... + T_{c-1}) U_j        U_j: what chunk j adds to the state

The initial state is U_{-1}. The matrix has one row and column per chunk: 129 for 8,192 tokens.

The experts are an operator of their own, `nemotron_lite::expert_mlp`. A compiler calls it and does
not look inside. It runs the fast forms of cpu_experts.py. For a few pairs of token and expert, as
in decoding, they are ordinary batched products instead: an exported decoding step needs no operator
of ours.

Source: the segment sums of Dao and Gu 2024 (arXiv 2405.21060), listing 1, for the step from chunk
to chunk. Left out: Triton kernels inside a compiled program.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite.backends import cpu_experts
from nemotron_lite.dtypes import cast

CHUNK = 64  # tokens, as in cpu_ssd.py


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None,
    wide: torch.dtype,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`ops.ssd` of inputs whose shapes were checked, in plain differentiable operations.

    Args:
        x, dt, A, B, C, D: as there; dt is a step size already.
        state: before the first token; zeros when None.
        starts: `b t`, True at the first token of a document; None when there is only one.
        wide: dtype to compute in.
        chunk: tokens of a chunk; `CHUNK` when None.
    """
    chunk = CHUNK if chunk is None else chunk
    (b, t, h, p), (g, n) = x.shape, B.shape[2:]
    count = (t + chunk - 1) // chunk

    def chunks(v: Tensor) -> Tensor:  # b t ... -> b c q ...
        padded = F.pad(v, [0, 0] * (v.ndim - 2) + [0, count * chunk - t])
        return padded.reshape(b, count, chunk, *v.shape[2:])

    writes = chunks(x.to(wide) * dt.to(wide).unsqueeze(-1))  # b c q h p
    keys, queries = (chunks(v.to(wide)).repeat_interleave(h // g, dim=3) for v in (B, C))
    s = chunks(dt.double() * A.double()).cumsum(2)  # b c q h
    total = s[:, :, -1]  # b c h

    # In each chunk, document 0 is the one that was open before it.
    marks = torch.zeros_like(dt[..., 0]) if starts is None else starts
    document = chunks(marks.long()).cumsum(2)  # b c q
    from_before, in_last = document == 0, document == document[:, :, -1:]
    visible = (document.unsqueeze(3) == document.unsqueeze(2)).tril()  # b c l r

    def decay(exponent: Tensor, where: Tensor) -> Tensor:
        return exponent.masked_fill(~where.unsqueeze(-1), -math.inf).exp().to(wide)

    # Inside a chunk, and what is left of its writes at its end.
    L = decay(s.unsqueeze(3) - s.unsqueeze(2), visible)  # b c l r h
    scores = torch.einsum("bclhn,bcrhn->bclrh", queries, keys)
    y = torch.einsum("bclrh,bcrhp->bclhp", scores * L, writes)
    left = decay(total.unsqueeze(2) - s, in_last).unsqueeze(-1) * writes  # b c r h p
    added = torch.einsum("bcrhp,bcrhn->bchpn", left, keys)

    # From chunk to chunk: `added` with the initial state in front, times a triangle of decays. A
    # chunk in which a document starts lets nothing through.
    first = added.new_zeros(b, h, p, n) if state is None else state.to(wide)
    added = torch.cat([first.unsqueeze(1), added], dim=1)  # b 1+c h p n
    sums = F.pad(total, [0, 0, 1, 0]).cumsum(1)  # b 1+c h
    closed = F.pad(document[:, :, -1].clamp(max=1), [1, 0]).cumsum(1)  # b 1+c
    passes = (closed.unsqueeze(2) == closed.unsqueeze(1)).tril()  # b 1+c 1+c
    carry = decay(sums.unsqueeze(2) - sums.unsqueeze(1), passes)  # b to from h
    states = torch.einsum("btfh,bfhpn->bthpn", carry, added)

    y_before = torch.einsum("bchpn,bclhn->bclhp", states[:, :-1], queries)
    y = y + y_before * decay(s, from_before).unsqueeze(-1)
    y = y.reshape(b, count * chunk, h, p)[:, :t]
    if D is not None:
        y = y + D.to(wide).unsqueeze(-1) * x.to(wide)
    return y.to(x.dtype).contiguous(), states[:, -1].contiguous()


def expert_mlp(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """`ops.expert_mlp`, differentiable."""
    up, down, weights = (cast(part, z.dtype) for part in (up, down, weights))
    if not torch.is_grad_enabled() and cpu_experts.multiplies_pair_by_pair(up, indices):
        return cpu_experts.pair_by_pair(z, up, down, weights, indices)
    return _experts(z, up, down, weights, indices)


# The schemas are written out: where annotations are checked, functions are wrapped, and the names
# in their annotations cannot be looked up.
_INPUTS = "Tensor z, Tensor up, Tensor down, Tensor weights, Tensor indices"


@torch.library.custom_op(
    "nemotron_lite::expert_mlp", mutates_args=(), schema=f"({_INPUTS}) -> Tensor"
)
def _experts(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    with torch.no_grad():
        return cpu_experts.expert_mlp(z, up, down, weights, indices)


@_experts.register_fake
def _(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "nemotron_lite::expert_mlp_backward",
    mutates_args=(),
    schema=f"(Tensor grad, {_INPUTS}, bool needs_up, bool needs_down) -> Tensor[]",
)
def _experts_backward(
    grad: Tensor,
    z: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    indices: Tensor,
    needs_up: bool,
    needs_down: bool,
) -> list[Tensor]:
    """The gradients; an empty tensor for a matrix that needs none: an operator cannot give None."""
    with torch.no_grad():
        found = cpu_experts.gradients(grad, z, up, down, weights, indices, (needs_up, needs_down))
    return [z.new_empty(0) if part is None else part for part in found]


@_experts_backward.register_fake
def _(
    grad: Tensor,
    z: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    indices: Tensor,
    needs_up: bool,
    needs_down: bool,
) -> list[Tensor]:
    needs = (True, needs_up, needs_down, True)
    given = (z, up, down, weights)
    return [v.new_empty(v.shape if n else 0) for v, n in zip(given, needs, strict=True)]


def _keep_inputs(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):  # type: ignore[no-untyped-def]
    needs = ctx.needs_input_grad[1:3]
    of_z, of_up, of_down, of_weights = _experts_backward(grad, *ctx.saved_tensors, *needs)
    return of_z, of_up if needs[0] else None, of_down if needs[1] else None, of_weights, None


_experts.register_autograd(_differentiate, setup_context=_keep_inputs)
