"""The router: from logits to the k experts of each token and their weights.

    s   = sigmoid(W x)                       one score per expert, in float32
    I   = the k experts with the largest s + b
    p_i = scale * s_i / (sum_{j in I} s_j + 1e-20)     for i in I

The result is a *choice*, so one rounding error in a score can send a token to another expert. Three
design decisions follow from that.

- The exponential uses arithmetic only (argument reduction and a polynomial), and the quotient is
  rounded correctly, without fused multiply-add. So the interpreter and every GPU compute the same
  bits, and what the tests show about the choice on a CPU also holds on the GPU. The hardware's
  `ex2.approx` is an approximation that the interpreter does not have.
- An expert's biased score and its index are combined in one 64-bit integer: the score's bits,
  changed so that they sort as integers, then the index, reversed. The k largest are then k integer
  maxima; ties go to the lower index, and a NaN or an infinity cannot make two slots pick the same
  expert.
- The backward pass starts from the logits again. 1 - s computed from s has lost its digits when s
  is close to 1; sigmoid(-x) has all of them.

With `n_group > 1` only experts in the `topk_group` best groups can be chosen. A group's score is
the sum of its two largest s + b. The product W x is a float32 matrix product in torch.

Source: Nemotron 3 Super report 2.1.1; the polynomial is exp's Taylor series to degree 7, with ln 2
split in two as in Cephes. Left out: token dropping, softmax routers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron_kernels._compat import (
    Config,
    by_arch,
    cdiv,
    check_inputs,
    next_power_of_2,
    on_device,
    unit_stride,
)

EPSILON = tl.constexpr(1e-20)
LOWEST = tl.constexpr(-(2**63))
MINUS_INFINITY = tl.constexpr(float("-inf"))


class Routed(NamedTuple):
    """What the router decided; the fields of `nemotron_lite.ops.Routing`."""

    weights: Float[Tensor, "t k"]  # p, in float32
    indices: Int[Tensor, "t k"]  # I, largest s + b first
    scores: Float[Tensor, "t e"]  # s, in float32


@triton.jit
def _sigmoid(x):
    """sigmoid(x) and sigmoid(-x), each to about one unit in the last place."""
    distance = tl.where(x < 0, -x, x)
    distance = tl.where(distance > 104.0, 104.0, distance)  # exp(-104) is zero in float32
    n = tl.floor(distance * 1.44269504 + 0.5)
    r = (n * 0.693359375 - distance) - n * 2.12194440e-4  # exp(-distance) = 2^-n exp(r)
    series = 1.0 / 5040.0
    series = series * r + 1.0 / 720.0
    series = series * r + 1.0 / 120.0
    series = series * r + 1.0 / 24.0
    series = series * r + 1.0 / 6.0
    series = series * r + 0.5
    series = series * r + 1.0
    series = series * r + 1.0
    whole = tl.where(n == n, n, 0.0).to(tl.int32)  # a NaN stays in `series`
    half = whole // 2  # 2^-n in two factors: one alone leaves the normal range
    first = ((127 - half) << 23).to(tl.float32, bitcast=True)
    second = ((127 - (whole - half)) << 23).to(tl.float32, bitcast=True)
    e = series * first * second
    total = 1.0 + e
    near, far = tl.div_rn(tl.full(e.shape, 1.0, tl.float32), total), tl.div_rn(e, total)
    return tl.where(x >= 0, near, far), tl.where(x >= 0, far, near)


@triton.jit
def _sortable(value, number):
    """One integer per (float32, number): larger value first, then lower number."""
    bits = value.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - number).to(tl.int64)


@triton.jit
def _number(key):
    return (0x7FFFFFFF - (key & 0x7FFFFFFF)).to(tl.int32)


@triton.jit
def _value(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _drop_weak_groups(
    keys,
    experts,
    E: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Give the experts outside the best groups a score of minus infinity."""
    group_of = experts // (E // N_GROUP)
    groups = tl.arange(0, GROUPS)[None, :]
    strength = tl.zeros([ROWS, GROUPS], dtype=tl.float32)
    for g in range(N_GROUP):
        members = tl.where(group_of == g, keys, LOWEST)
        best = tl.max(members, axis=1)
        second = tl.max(tl.where(members == best[:, None], LOWEST, members), axis=1)
        both = _value(best) + _value(second)
        strength = tl.where(groups == g, both[:, None], strength)
    numbers = groups + tl.zeros([ROWS, GROUPS], dtype=tl.int32)
    ranked = tl.where(numbers < N_GROUP, _sortable(strength, numbers), LOWEST)
    kept = tl.zeros(keys.shape, dtype=tl.int1)
    for _ in range(TOPK_GROUP):
        best = tl.max(ranked, axis=1)
        ranked = tl.where(ranked == best[:, None], LOWEST, ranked)
        kept = kept | (group_of == _number(best)[:, None])
    numbers = experts + tl.zeros(keys.shape, dtype=tl.int32)
    dropped = _sortable(tl.full(keys.shape, MINUS_INFINITY, tl.float32), numbers)
    return tl.where(kept, keys, dropped)


@triton.jit
def _route_kernel(
    logits_ptr,
    bias_ptr,
    weights_ptr,
    indices_ptr,
    scores_ptr,
    tokens,
    stride_t,
    scale,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    N_GROUP: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    wide = rows.to(tl.int64)[:, None]
    experts = tl.arange(0, EXPERTS)[None, :]
    inside = (rows < tokens)[:, None] & (experts < E)
    x = tl.load(logits_ptr + wide * stride_t + experts, mask=inside, other=0.0)
    s, _ = _sigmoid(x)
    tl.store(scores_ptr + wide * E + experts, s, mask=inside)

    biased = s + tl.load(bias_ptr + experts, mask=experts < E, other=0.0)
    numbers = experts + tl.zeros([ROWS, EXPERTS], dtype=tl.int32)
    keys = tl.where(numbers < E, _sortable(biased, numbers), LOWEST)
    if N_GROUP > 1:
        keys = _drop_weak_groups(keys, experts, E, N_GROUP, TOPK_GROUP, ROWS, GROUPS)
        keys = tl.where(numbers < E, keys, LOWEST)

    slots = tl.arange(0, SLOTS)[None, :]
    chosen = tl.full([ROWS, SLOTS], LOWEST, tl.int64)
    for j in range(TOP_K):
        best = tl.max(keys, axis=1)[:, None]
        keys = tl.where(keys == best, LOWEST, keys)
        chosen = tl.where(slots == j, best, chosen)

    taken = (rows < tokens)[:, None] & (slots < TOP_K)
    index = tl.where(taken, _number(chosen), 0)
    # The logits of the chosen experts are loaded again (from the GPU's cache). This is cheaper than
    # to extract them from x with k sums over all experts.
    x = tl.load(logits_ptr + wide * stride_t + index, mask=taken, other=0.0)
    s, _ = _sigmoid(x)
    s = tl.where(taken, s, 0.0)
    if NORMALIZE:
        s = tl.div_rn(s, (tl.sum(s, axis=1) + EPSILON)[:, None] + tl.zeros_like(s))
    tl.store(weights_ptr + wide * TOP_K + slots, s * scale, mask=taken)
    tl.store(indices_ptr + wide * TOP_K + slots, index.to(tl.int64), mask=taken)


@triton.jit
def _route_backward_kernel(
    logits_ptr,
    indices_ptr,
    grad_weights_ptr,
    grad_scores_ptr,
    grad_logits_ptr,
    tokens,
    stride_t,
    scale,
    E: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SCORES: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    SLOTS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = rows < tokens
    wide = rows.to(tl.int64)
    experts = tl.arange(0, EXPERTS)[None, :]
    inside = valid[:, None] & (experts < E)
    grad = tl.zeros([ROWS, EXPERTS], dtype=tl.float32)
    if HAS_SCORES:
        grad = tl.load(grad_scores_ptr + wide[:, None] * E + experts, mask=inside, other=0.0)
    if HAS_WEIGHTS:
        # p = scale s / S with S = sum s:  ds_i = scale / S * (dp_i - sum_j dp_j s_j / S)
        slots = tl.arange(0, SLOTS)[None, :]
        taken = valid[:, None] & (slots < TOP_K)
        place = wide[:, None] * TOP_K + slots
        index = tl.load(indices_ptr + place, mask=taken, other=0)
        x = tl.load(logits_ptr + wide[:, None] * stride_t + index, mask=taken, other=0.0)
        s, _ = _sigmoid(x)
        s = tl.where(taken, s, 0.0)
        dp = tl.load(grad_weights_ptr + place, mask=taken, other=0.0)
        factor = tl.zeros([ROWS], dtype=tl.float32) + scale
        shift = tl.zeros([ROWS], dtype=tl.float32)
        if NORMALIZE:
            total = tl.sum(s, axis=1) + EPSILON
            factor = factor / total
            shift = tl.sum(dp * s, axis=1) / total
        for j in range(TOP_K):
            index_j = tl.load(indices_ptr + wide * TOP_K + j, mask=valid, other=0)
            dp_j = tl.load(grad_weights_ptr + wide * TOP_K + j, mask=valid, other=0.0)
            ds = factor * (dp_j - shift)
            grad += tl.where(experts == index_j[:, None], ds[:, None], 0.0)
    x = tl.load(logits_ptr + wide[:, None] * stride_t + experts, mask=inside, other=0.0)
    s, opposite = _sigmoid(x)
    grad = grad * s * opposite
    tl.store(grad_logits_ptr + wide[:, None] * E + experts, grad, mask=inside)


# One warp per row, so that a maximum needs only shuffles inside a warp. No fused multiply-add, as
# the module docstring explains.
FORWARD = {
    0: Config({"ROWS": 256}, fp_fusion=False),
    80: Config({"ROWS": 1}, num_warps=1, num_stages=1, fp_fusion=False),
}
BACKWARD = FORWARD


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits, bias, top_k, n_group, topk_group, normalize, scale):  # type: ignore[no-untyped-def]
        tokens, experts = logits.shape
        weights = torch.empty(tokens, top_k, device=logits.device, dtype=torch.float32)
        indices = torch.empty(tokens, top_k, device=logits.device, dtype=torch.int64)
        scores = torch.empty(tokens, experts, device=logits.device, dtype=torch.float32)
        ctx.save_for_backward(logits, indices)
        ctx.normalize, ctx.scale = normalize, scale
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        if tokens:
            config = by_arch(FORWARD)
            with on_device(logits):
                _route_kernel[(cdiv(tokens, config["ROWS"]),)](
                    logits,
                    bias,
                    weights,
                    indices,
                    scores,
                    tokens,
                    logits.stride(0),
                    scale,
                    E=experts,
                    TOP_K=top_k,
                    N_GROUP=n_group,
                    TOPK_GROUP=topk_group,
                    NORMALIZE=normalize,
                    EXPERTS=next_power_of_2(experts),
                    SLOTS=next_power_of_2(top_k),
                    GROUPS=next_power_of_2(n_group),
                    **config.kwargs,
                )
        return weights, indices, scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_weights, _, grad_scores):  # type: ignore[no-untyped-def]
        logits, indices = ctx.saved_tensors
        tokens, experts = logits.shape
        grad_logits = torch.empty(tokens, experts, device=logits.device, dtype=torch.float32)
        if tokens:
            config = by_arch(BACKWARD)
            parts = [
                indices if part is None else part.contiguous()  # a pointer that is not read
                for part in (grad_weights, grad_scores)
            ]
            with on_device(logits):
                _route_backward_kernel[(cdiv(tokens, config["ROWS"]),)](
                    logits,
                    indices,
                    *parts,
                    grad_logits,
                    tokens,
                    logits.stride(0),
                    ctx.scale,
                    E=experts,
                    TOP_K=indices.shape[1],
                    NORMALIZE=ctx.normalize,
                    HAS_WEIGHTS=grad_weights is not None,
                    HAS_SCORES=grad_scores is not None,
                    EXPERTS=next_power_of_2(experts),
                    SLOTS=next_power_of_2(indices.shape[1]),
                    **config.kwargs,
                )
        return grad_logits, None, None, None, None, None, None


def route_logits(
    logits: Float[Tensor, "t e"],
    bias: Float[Tensor, "e"],
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> Routed:
    """Choose `top_k` experts per token from the router's logits.

    Args:
        logits: W x in float32; rows may have any stride; copied if a row is not contiguous.
        bias: float32; it affects the choice but not the weights, and has no gradient.
        n_group, topk_group: group-limited routing; 1 and 1 is none.
        normalize: divide the chosen scores by their sum.
        scale: factor on the weights.

    Returns:
        Routed, with gradients to `logits` from `weights` and from `scores`.

    Raises:
        ValueError: logits that are not float32; sizes that do not fit each other.
        RuntimeError: tensors on the CPU outside the interpreter.
    """
    check_inputs("route", logits, bias)
    experts = logits.shape[1]
    if logits.dtype != torch.float32:
        raise ValueError(
            f"route: logits are {logits.dtype}; the router works in float32. Pass logits.float()."
        )
    if bias.shape != (experts,):
        raise ValueError(
            f"route: bias has shape {tuple(bias.shape)}, expected ({experts},): one per expert."
        )
    if experts % n_group or not 1 <= topk_group <= n_group:
        raise ValueError(
            f"route: n_group={n_group} must divide {experts} experts, and topk_group={topk_group} "
            f"must be 1 to {n_group}."
        )
    if n_group > 1 and experts == n_group:
        raise ValueError(
            f"route: n_group={n_group} leaves one expert per group, but the score of a "
            "group is the sum of its two best. Use fewer groups."
        )
    available = experts // n_group * topk_group
    if not 1 <= top_k <= available:
        raise ValueError(
            f"route: top_k={top_k}, expected 1 to {available}: as many as {topk_group} of "
            f"{n_group} groups of {experts // n_group} experts hold."
        )
    bias = bias.float().contiguous()
    return Routed(
        *_Route.apply(
            unit_stride(logits), bias, top_k, n_group, topk_group, normalize, float(scale)
        )
    )


def route(
    x: Float[Tensor, "t d"],
    weight: Float[Tensor, "e d"],
    bias: Float[Tensor, "e"],
    top_k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> Routed:
    """`route_logits` of `x @ weight.T`, computed in float32 whatever the inputs and autocast say.

    The product is torch's, so on a GPU `torch.backends.cuda.matmul` decides about TF32; torch's
    default is full float32.

    Raises:
        ValueError, RuntimeError: as `route_logits`.
    """
    check_inputs("route", x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        logits = F.linear(x.float(), weight.float())
    return route_logits(logits, bias, top_k, n_group, topk_group, normalize, scale)
