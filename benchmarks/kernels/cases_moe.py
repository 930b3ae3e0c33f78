"""The router, the sort and the experts at the shapes of Super and Nano.

Super: 512 experts, 22 per token, width 2,688 on a latent of 1,024. Nano: 128 experts, 6 per token,
width 1,856, directly on the token of width 2,688. Reference sheet section 1.1. Gradients at Super's
widths are measured on an eighth of its experts, the share of one GPU under expert parallelism over
eight: the whole layer in float64, with its gradients, does not fit on a GPU.

The definition here is the sorted PyTorch path in float64, which has its own test against the loop
over tokens. The loop would take minutes for 8,192 tokens.

The lower bound of the time counts the matrices of each expert that has tokens once. It does not
count the hidden rows, because a kernel could keep them on the chip.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.registry import Case, Draw, Inputs
from nemotron_kernels.experts import expert_mlp, few_pairs
from nemotron_kernels.grouped import tile_rows
from nemotron_kernels.routing import route_logits
from nemotron_kernels.sorting import sort_by_expert
from nemotron_lite import ops

TOKENS = 8192


class MoE(NamedTuple):
    """Sizes of the routed part of one layer."""

    name: str
    experts: int
    top_k: int
    hidden: int
    width: int
    dtype: torch.dtype = torch.bfloat16
    scale: float = 5.0


SUPER = MoE("Super", 512, 22, 2688, 1024)
EIGHTH = MoE("an eighth of Super", 64, 3, 2688, 1024)
NANO = MoE("Nano", 128, 6, 1856, 2688, scale=2.5)
# The width is in the name, because the record has "lite in float32" with the earlier width, 168.
LITE = MoE("lite, experts of width 128, float32", 64, 6, 128, 64, torch.float32)

_compiled = functools.cache(torch.compile)


def _route(model: MoE) -> dict[str, Any]:
    return {"top_k": model.top_k, "scale": model.scale}


def _route_inputs(model: MoE) -> Callable[[Draw], Inputs]:
    """Scores and biases whose sums differ clearly, for any two experts of a token.

    With random scores, 512 experts and 8192 tokens, some sums would differ by less than float32
    resolves. Kernel and definition would then choose different experts, and both would be right.
    Here the scores are a shuffled grid, and the bias moves each expert to its own position between
    two grid points, so that sums differ by at least 1 / experts^2.
    """
    e = model.experts

    def inputs(draw: Draw) -> Inputs:
        ranks = draw.uniform(TOKENS, e).argsort(dim=1).argsort(dim=1)
        steps = draw.integers(0, e // 8, e) + torch.arange(e, device=draw.device) / e
        return {"logits": torch.logit((ranks + 0.5) / e), "bias": steps / e}

    return inputs


def _route_torch(logits: Tensor, bias: Tensor, top_k: int, scale: float) -> tuple[Tensor, Tensor]:
    scores = logits.sigmoid()
    indices = torch.topk(scores.detach() + bias, top_k, dim=-1).indices  # the largest first
    weights = scores.gather(1, indices)
    return weights * (scale / (weights.sum(-1, keepdim=True) + 1e-20)), scores


def _route_cases(model: MoE) -> list[Case]:
    def run(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        found = route_logits(logits, bias, **_route(model))
        return found.weights, found.scores

    def eager(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return _route_torch(logits, bias, **_route(model))

    def compiled(logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return _compiled(_route_torch)(logits, bias, **_route(model))

    table, chosen = TOKENS * model.experts * 4, TOKENS * model.top_k
    return [
        Case(
            op="route",
            name="backward" if backward else "forward",
            shape=f"{model.name}, {TOKENS} tokens",
            inputs=_route_inputs(model),
            run=run,
            exact=eager,
            tolerance=1e-6,
            # Forward writes weights and scores; backward reads logits, both gradients, indices.
            bytes=3 * table + 12 * chosen if backward else 2 * table + 12 * chosen,
            leaves=("logits",) if backward else (),
            backward=backward,
            peers={"torch": eager, "compiled": compiled},
        )
        for backward in (False, True)
    ]


def _sort_case(model: MoE) -> Case:
    return Case(
        op="sort_by_expert",
        name="forward",
        shape=f"{model.name}, {TOKENS} tokens",
        inputs=lambda draw: {"indices": draw.integers(0, model.experts, TOKENS, model.top_k)},
        run=lambda indices: sort_by_expert(indices, model.experts, 128).pairs,
        exact=lambda indices: indices.flatten().argsort(stable=True),
        tolerance=1e-12,
        bytes=TOKENS * model.top_k * (8 + 4 + 4),
        peers={"torch": lambda indices: indices.flatten().argsort(stable=True)},
    )


def _expert_inputs(model: MoE, tokens: int) -> Callable[[Draw], Inputs]:
    _, e, k, f, width, dtype, _ = model

    # The number of tokens decides the tile size, so a dry run uses all tokens; empty tensors on the
    # CPU cost no memory until they are written.
    return lambda draw: {
        "z": draw.normal(tokens, width, dtype=dtype),
        "up": draw.normal(e, f, width, dtype=dtype, scale=width**-0.5),
        "down": draw.normal(e, width, f, dtype=dtype, scale=f**-0.5),
        "weights": draw.uniform(tokens, k),
        "indices": draw.integers(0, e, tokens, k),
    }


def _torch(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    return ops.expert_mlp(z, up, down, weights, indices, impl="cpu")


def _grouped_mm(z: Tensor, up: Tensor, down: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The same with torch's grouped product, between a sort and a gather."""
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(flat.numel(), device=flat.device)
    counts = torch.zeros(up.shape[0], dtype=torch.int64, device=flat.device)
    ends = counts.scatter_add_(0, flat, torch.ones_like(flat)).cumsum(0).int()
    hidden = F.grouped_mm(z[order // indices.shape[1]], up.mT, offs=ends)
    answers = F.grouped_mm(hidden.relu().square(), down.mT, offs=ends)
    return (answers[places].unflatten(0, indices.shape) * weights[..., None].to(z.dtype)).sum(1)


def _expert_case(model: MoE, tokens: int, backward: bool = False) -> Case:
    _, e, k, f, width, dtype, _ = model
    pairs, word = tokens * k, dtype.itemsize
    # How many experts have at least one token, if choices are uniform.
    busy = round(e * (1 - (1 - 1 / e) ** pairs))
    sorted_pairs = backward or pairs > few_pairs(e, k)
    matrices = busy * 2 * f * width * word
    rows = tokens * width * word
    name = "backward" if backward else "forward"
    tiles = f"tiles of {tile_rows(pairs, e, dtype)}" if sorted_pairs else "few tokens"
    kind = "float32" if dtype == torch.float32 else "16 bits"
    return Case(
        op="expert_mlp",
        name=name,
        shape=f"{model.name}, {tokens} tokens",
        inputs=_expert_inputs(model, tokens),
        run=expert_mlp,
        exact=_torch,
        tolerance=1e-6 if dtype == torch.float32 else 8e-3,
        # Backward reads the matrices, the squared hidden rows, z, dy; writes dz, dup and ddown.
        bytes=2 * matrices + pairs * f * word + 3 * rows if backward else matrices + 2 * rows,
        flops=(8 if backward else 4) * pairs * f * width,
        leaves=("z", "up", "down", "weights") if backward else (),
        backward=backward,
        peers={"torch": _torch, "grouped_mm": _grouped_mm},
        key=f"expert_mlp {name}, {tiles}, {kind}",
    )


CASES = [
    *_route_cases(SUPER),
    *_route_cases(NANO),
    _sort_case(SUPER),
    *[_expert_case(SUPER, tokens) for tokens in (1, 4, 64, 512, 1024, TOKENS)],
    _expert_case(EIGHTH, TOKENS, backward=True),
    *[_expert_case(NANO, tokens) for tokens in (1, 64, TOKENS)],
    _expert_case(NANO, TOKENS, backward=True),
    _expert_case(LITE, TOKENS),
    _expert_case(LITE, TOKENS, backward=True),
]
