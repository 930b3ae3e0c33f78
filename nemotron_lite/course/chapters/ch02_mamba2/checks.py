"""Checks of chapter 02's exercises.

Every check compares with the definition in `ops`, on inputs made when it runs: float64, several
groups, and x and dt with the strides that a projection gives. The last checks of an exercise are
the cases in which published programs failed: heads that forget everything at each token, a state
from an earlier piece of text, channels near zero and channels too large for half precision.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron_lite import ops
from nemotron_lite.course.exercises import close, gradients, keeps_inputs

Answer = Callable[..., Any]


def scan_inputs(
    t: int, *, b: int = 2, h: int = 4, p: int = 3, g: int = 2, n: int = 5, seed: int = 0
) -> dict[str, Tensor]:
    """Inputs of a scan in float64, with x and dt strided as a projection leaves them."""
    random = torch.Generator().manual_seed(100 * t + seed)
    normal = partial(torch.randn, generator=random, dtype=torch.float64)
    wide = normal(b, t, h * (p + 1))
    return {
        "x": wide[..., h:].unflatten(-1, (h, p)),
        "dt": F.softplus(wide[..., :h]),
        "A": -torch.linspace(0.2, 2.0, h, dtype=torch.float64),
        "B": normal(b, t, g, n),
        "C": normal(b, t, g, n),
        "state": normal(b, h, p, n),
    }


def mask_by_hand(function: Answer) -> None:
    dt = torch.tensor([1.0, 2.0, 1.0]).view(1, 3, 1)
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.25, 1.0, 0.0], [0.125, 0.5, 1.0]])
    halving = -torch.log(torch.tensor([2.0]))
    close(function(dt, halving), expected[None, None], what="three tokens that halve the state")


def mask_in_the_matrix(function: Answer) -> None:
    v = scan_inputs(11)
    mask = function(v["dt"], v["A"])
    scores = torch.einsum("blgn,brgn->bglr", v["C"], v["B"]).repeat_interleave(2, dim=1)
    written = v["dt"].unsqueeze(-1) * v["x"]
    y = torch.einsum("bhlr,brhp->blhp", mask * scores, written)
    exact, _ = ops.selective_scan(*(v[name] for name in ("x", "dt", "A", "B", "C")))
    close(y, exact, what="mask * scores against the recurrence, 4 heads and 11 tokens")


def reference_mask(dt: Tensor, A: Tensor) -> Tensor:
    total = (dt * A).cumsum(1).transpose(1, 2)
    exponent = total.unsqueeze(-1) - total.unsqueeze(-2)
    seen = torch.ones(exponent.shape[-2:], dtype=torch.bool).tril()
    return exponent.masked_fill(~seen, -torch.inf).exp()


def mask_under_strong_decay(function: Answer) -> None:
    dt = torch.full((1, 12, 1), 40.0, requires_grad=True)
    A = torch.tensor([-5.0], requires_grad=True)
    mask = function(dt, A)
    close(mask, torch.eye(12)[None, None], what="a head that forgets everything at each token")
    mask.sum().backward()
    for name, leaf in (("dt", dt), ("A", A)):
        assert leaf.grad is not None, f"no gradient reaches {name}"
        assert leaf.grad.isfinite().all(), (
            f"under strong decay the gradient of {name} contains {leaf.grad.flatten()[0].item()}"
        )


def mask_gradients(function: Answer) -> None:
    v = scan_inputs(6)
    gradients(function, reference_mask, {"dt": v["dt"], "A": v["A"]})


def reference_chunk(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    return ops.selective_scan(x, dt, A, B, C, initial_state=state)


def chunk_alone(function: Answer) -> None:
    v = scan_inputs(6)
    v["state"] = torch.zeros_like(v["state"])
    close(
        function(*v.values())[0],
        reference_chunk(**v)[0],
        what="outputs of 6 tokens, from a zero state",
    )


def chunk_reads_state(function: Answer) -> None:
    v = scan_inputs(6)
    close(
        function(*v.values())[0], reference_chunk(**v)[0], what="outputs of 6 tokens after a state"
    )


def chunk_hands_on(function: Answer) -> None:
    v = scan_inputs(6)
    close(function(*v.values())[1], reference_chunk(**v)[1], what="the state after 6 tokens")


def chunks_in_a_row(function: Answer) -> None:
    v = scan_inputs(11, seed=1)
    exact, last = reference_chunk(**v)
    outputs, state = [], v["state"]
    for first, count in ((0, 4), (4, 4), (8, 3)):
        part = {k: v[k].narrow(1, first, count) for k in ("x", "dt", "B", "C")}
        y, state = function(part["x"], part["dt"], v["A"], part["B"], part["C"], state)
        outputs.append(y)
    close(torch.cat(outputs, dim=1), exact, what="11 tokens in chunks of 4, 4 and 3")
    close(state, last, what="the state after 11 tokens in three chunks")


def chunk_gradients(function: Answer) -> None:
    gradients(function, reference_chunk, scan_inputs(5, seed=2))


def chunk_under_strong_decay(function: Answer) -> None:
    v = scan_inputs(8)
    v["dt"] = torch.full_like(v["dt"], 500.0)
    exact, last = reference_chunk(**v)
    y, state = function(*v.values())
    close(y, exact, what="outputs of heads that forget everything at each token")
    close(state, last, what="the state of heads that forget everything at each token")


def norm_inputs(channels: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(channels)
    y, z = torch.randn(2, 3, 5, channels, generator=random, dtype=torch.float64)
    scale = torch.linspace(
        10.0, 100.0, channels, dtype=torch.float64
    )  # so large that eps does not matter
    weight = 1 + 0.3 * torch.randn(channels, generator=random, dtype=torch.float64)
    return {"y": (y * scale).to(dtype), "z": z.to(dtype), "weight": weight.to(dtype)}


def same_norm(function: Answer, v: dict[str, Tensor], groups: int, what: str) -> None:
    exact = ops.gated_rms_norm(v["y"], v["z"], v["weight"], groups, impl="naive")
    close(function(*v.values(), groups), exact, what=what)


def norm_one_group(function: Answer) -> None:
    same_norm(function, norm_inputs(6), 1, "one group of 6 channels")


def norm_groups(function: Answer) -> None:
    same_norm(function, norm_inputs(12), 3, "three groups of 4 channels")
    v = norm_inputs(12)
    before = function(*v.values(), 3)
    v["y"] = v["y"].clone()
    v["y"][..., 8:] *= 100
    close(
        function(*v.values(), 3)[..., :8],
        before[..., :8],
        what="the first two groups, when the third becomes 100 times larger",
    )


def norm_small(function: Answer) -> None:
    v = norm_inputs(8)
    v["y"] = 3e-5 * v["y"]
    same_norm(function, v, 2, "channels near zero, where eps decides")


def norm_half(function: Answer) -> None:
    v = norm_inputs(8, torch.float16)
    v["y"] = 60 * v["y"]
    exact = ops.gated_rms_norm(v["y"], v["z"], v["weight"], 2, impl="naive")
    result, what = function(*v.values(), 2), "the result for large float16 channels"
    close(result, exact, what=what, rtol=5e-3, atol=5e-3, dtype=True)


def norm_gradients(function: Answer) -> None:
    naive = partial(ops.gated_rms_norm, groups=2, impl="naive")
    gradients(partial(function, groups=2), naive, norm_inputs(8))


def conv_inputs(t: int, *, b: int = 2, c: int = 5, k: int = 4) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(t)
    normal = partial(torch.randn, generator=random, dtype=torch.float64)
    return {"state": normal(b, k - 1, c), "x": normal(b, t, c), "weight": normal(c, k),
            "bias": normal(c)}  # fmt: skip


def reference_token(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    y, _ = ops.causal_conv1d(x.unsqueeze(1), weight, bias, initial_state=state, impl="naive")
    return y[:, 0]


def conv_output(function: Answer) -> None:
    v = conv_inputs(1)
    v["x"] = v["x"][:, 0]
    exact = reference_token(**v)
    close(function(*v.values())[0], exact, what="the output of one token")


def conv_text(function: Answer) -> None:
    v = conv_inputs(9)
    exact, last = ops.causal_conv1d(
        v["x"], v["weight"], v["bias"], initial_state=v["state"], impl="naive"
    )
    state, outputs = v["state"], []
    for token in v["x"].unbind(1):
        y, state = function(state, token, v["weight"], v["bias"])
        outputs.append(y)
    close(state, last, what="the state after 9 tokens")
    close(torch.stack(outputs, dim=1), exact, what="9 tokens one at a time")


def conv_keeps_snapshot(function: Answer) -> None:
    v = conv_inputs(2)
    arguments = v["state"], v["x"][:, 0], v["weight"], v["bias"]
    keeps_inputs(
        function, *arguments, what="conv_token, whose old state a snapshot may still need,"
    )


def conv_gradients(function: Answer) -> None:
    v = conv_inputs(1)
    v["x"] = v["x"][:, 0]
    gradients(lambda **named: function(**named)[0], reference_token, v)
