"""Checks of chapter 04's exercises.

Each check isolates one mistake: with one expert per token the normalization does not matter; with
one device neither does the sum over devices. So a failure names the hint about the actual mistake.
Expected values come from the package (`ops.route`, `ops.expert_mlp`, `layers.moe.MoE`,
`train.balance`). The order of the experts in a row has no meaning, so weights are compared as a
matrix of tokens by experts. Inputs come from torch's global generator, which the grader seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemotron_lite import ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.exercises import close, gradients, keeps_inputs, strided
from nemotron_lite.layers.moe import MoE
from nemotron_lite.train.balance import sequence_balance_loss

Answer = Callable[..., Any]


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def _results(got: Any, count: int, name: str) -> list[Any]:
    """The results of a call, refused in words if their number is wrong."""
    if not isinstance(got, tuple | list) or len(got) != count:
        raise AssertionError(f"{name} returned {type(got).__name__}; expected {count} results.")
    return list(got)


def _spread(weights: Any, indices: Any, experts: int) -> Tensor:
    """Weights as a matrix of tokens by experts, 0 where an expert was not chosen."""
    if not isinstance(weights, Tensor) or not isinstance(indices, Tensor):
        raise AssertionError("weights and indices must be tensors.")
    if indices.dtype != torch.int64 or weights.shape != indices.shape:
        raise AssertionError(
            f"indices are {indices.dtype} of shape {list(indices.shape)}, weights have shape "
            f"{list(weights.shape)}; expected int64 and the same shape."
        )
    if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < experts:
        raise AssertionError(f"indices must be from 0 to {experts - 1}.")
    return weights.new_zeros(len(weights), experts).scatter_add(1, indices, weights)


def _routed(answer: Answer, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The answer's weights as a matrix, and its scores."""
    weights, indices, scores = _results(answer(*arguments), 3, "route")
    return _spread(weights, indices, len(arguments[1])), scores


def _expected(x: Tensor, weight: Tensor, bias: Tensor, top_k: int, scale: float | int) -> Any:
    found = ops.route(x, weight, bias, top_k=top_k, scale=float(scale), impl="torch")
    return _spread(found.weights, found.indices, len(weight)), found.scores


def _tokens(t: int = 6, d: int = 8, e: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    x, weight = (_random(n, d, dtype=torch.float32) for n in (t, e))
    return x, weight, torch.zeros(e)


def route_scores(answer: Answer) -> None:
    x, weight, bias = _tokens()
    _, scores = _routed(answer, x, weight, bias, 5, 1.0)
    close(scores, torch.sigmoid(x @ weight.T), what="scores of six tokens", dtype=True)
    x, weight = x.bfloat16(), weight.bfloat16()
    expected = torch.sigmoid(x.float() @ weight.float().T)
    _, scores = _routed(answer, x, weight, bias, 5, 1.0)
    close(scores, expected, what="scores of bfloat16 tokens, in float32", dtype=True)


def route_choice(answer: Answer) -> None:
    # The bias is large enough to change the choice, and differs from expert to expert.
    x, weight, bias = _tokens(t=12, e=7)
    for shift in (bias, torch.linspace(-0.6, 0.6, 7)[torch.randperm(7)]):
        got = keeps_inputs(answer, x, weight, shift, 3, 1.0, what="route")
        indices = _results(got, 3, "route")[1]
        expected = (torch.sigmoid(x @ weight.T) + shift).topk(3).indices
        what = "the chosen experts, with a bias" if shift.any() else "the chosen experts"
        if not isinstance(indices, Tensor) or indices.shape != expected.shape:
            raise AssertionError(f"{what}: expected an int64 tensor of shape [12, 3].")
        close(indices.sort(-1).values, expected.sort(-1).values, what=what)


def route_bias(answer: Answer) -> None:
    # All experts are chosen, or all biases are equal: the bias can change nothing.
    x, weight, bias = _tokens()
    plain = _expected(x, weight, bias, 2, 2.5)[0]
    got = _routed(answer, x, weight, bias + 64, 2, 2.5)[0]
    close(got, plain, what="weights with a bias of 64 for every expert", atol=1e-4)
    shift = torch.tensor([0.5, -0.5, 3.0, -3.0, 0.0])
    plain = _expected(x, weight, bias, 5, 1.0)[0]
    got = _routed(answer, x, weight, shift, 5, 1.0)[0]
    close(got, plain, what="weights of all five experts, with different biases")


def route_weights(answer: Answer) -> None:
    x, weight, bias = _tokens()
    for top_k, scale in ((2, 1.0), (3, 5.0)):
        expected = _expected(x, weight, bias, top_k, scale)[0]
        got = _routed(answer, x, weight, bias, top_k, scale)[0]
        what = f"the sum of the weights of a token, top_k={top_k}, scale={scale:g}"
        close(got.sum(-1), expected.sum(-1), what=what)
        close(got, expected, what=f"the weights, top_k={top_k}, scale={scale:g}", dtype=True)


def route_edges(answer: Answer) -> None:
    x, weight, bias = _tokens(t=4)
    for top_k in (1, 5):
        expected = _expected(x, weight, bias, top_k, 2.5)[0]
        got = _routed(answer, x, weight, bias, top_k, 2.5)[0]
        close(got, expected, what=f"weights with top_k={top_k} of 5 experts")
    got = _routed(answer, x[:1], weight, bias, 2, 2.5)[0]
    close(got, _expected(x[:1], weight, bias, 2, 2.5)[0], what="one token alone")


def route_gradients(answer: Answer) -> None:
    x, weight, bias = _tokens()

    def ours(x: Tensor, weight: Tensor) -> Any:
        return _routed(answer, x, weight, bias, 2, 2.5)

    def package(x: Tensor, weight: Tensor) -> Any:
        return _expected(x, weight, bias, 2, 2.5)

    gradients(ours, package, (x, weight))


def _experts(e: int = 5, f: int = 6, d: int = 4) -> tuple[Tensor, Tensor]:
    return _random(e, f, d), _random(e, d, f)


def _choices(t: int, k: int, e: int) -> tuple[Tensor, Tensor]:
    """Weights and indices of t tokens; the experts of a token differ."""
    indices = torch.rand(t, e).topk(k).indices
    return torch.rand(t, k, dtype=torch.float64) + 0.1, indices


def _mixed(*arguments: Tensor) -> Tensor:
    return ops.expert_mlp(*arguments, impl="torch")


def mix_one(answer: Answer) -> None:
    up, down = _experts(e=1)
    z, weights, indices = _random(1, 4), torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1)
    arguments = (z, up, down, weights, indices.long())
    close(answer(*arguments), _mixed(*arguments), what="one token, one expert", dtype=True)


def mix_weights(answer: Answer) -> None:
    up, down = _experts(e=2)
    z, indices = _random(1, 4), torch.tensor([[1, 0]])
    weights = torch.tensor([[0.25, 3.0]], dtype=torch.float64)
    arguments = (z, up, down, weights, indices)
    close(answer(*arguments), _mixed(*arguments), what="a token of experts 1 and 0")


def mix_many(answer: Answer) -> None:
    up, down = _experts(e=6)
    for k in (1, 3, 6):
        weights, indices = _choices(20, k, 6)
        arguments = (_random(20, 4), up, down, weights, indices)
        close(answer(*arguments), _mixed(*arguments), what=f"20 tokens, {k} of 6 experts each")


def mix_unused(answer: Answer) -> None:
    up, down = _experts(e=6)
    up[4:], down[4:] = math.nan, math.nan
    weights, indices = _choices(9, 2, 4)
    arguments = (_random(9, 4), up, down, weights, indices)
    close(answer(*arguments), _mixed(*arguments), what="experts 4 and 5 are NaN and not chosen")
    # An expert is chosen by one token only, and gives NaN for all others.
    up, down = _experts(e=3)
    z, indices = _random(4, 4), torch.tensor([[0, 1], [0, 1], [1, 0], [0, 2]])
    weights = torch.rand(4, 2, dtype=torch.float64)
    weights[3, 1] = 0.7
    up[2] = 0.0
    up[2, 0] = torch.eye(4, dtype=torch.float64)[1] * 1e200
    z[:, 1], z[3, 1] = 1.0, -1.0
    arguments = (z, up, down, weights, indices)
    what = "expert 2 overflows for every token but the one that chose it"
    close(answer(*arguments), _mixed(*arguments), what=what)


def mix_gradients(answer: Answer) -> None:
    up, down = _experts(e=4, f=3)
    weights, indices = _choices(5, 2, 4)
    gradients(answer, _mixed, (_random(5, 4), up, down, weights, indices))


def mix_strided(answer: Answer) -> None:
    up, down = _experts()
    weights, indices = _choices(7, 2, 5)
    arguments = (strided(_random(7, 4)), up, down, weights, indices)
    got = keeps_inputs(answer, *arguments, what="mix_experts")
    close(got, _mixed(*arguments), what="tokens that are a view of a wider tensor")


def _sorted(answer: Answer, indices: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    order, starts = _results(answer(indices, experts), 2, "sort_pairs")
    for found, count, name in ((order, indices.numel(), "order"), (starts, experts + 1, "starts")):
        if not isinstance(found, Tensor) or found.is_floating_point() or found.shape != (count,):
            raise AssertionError(f"{name} must be an int tensor of {count} numbers.")
    return order, starts


def sort_order(answer: Answer) -> None:
    # Every expert once: there are no equal experts.
    indices = torch.randperm(12).view(6, 2)
    order, _ = _sorted(answer, indices, 12)
    close(order, indices.flatten().argsort(), what="12 pairs of 12 experts, sorted")


def sort_stable(answer: Answer) -> None:
    indices = torch.randint(3, (40, 2))
    order, _ = _sorted(answer, indices, 3)
    expected = indices.flatten().argsort(stable=True)
    close(order, expected, what="80 pairs of 3 experts, in the order of the tokens")


def sort_starts(answer: Answer) -> None:
    for chosen, name in (([1, 3], "the first and the last"), ([0, 4], "those in the middle")):
        indices = torch.tensor(chosen)[torch.randint(2, (9, 2))]
        _, starts = _sorted(answer, indices, 5)
        counts = [int((indices == e).sum()) for e in range(5)]
        expected = torch.tensor([sum(counts[:e]) for e in range(6)])
        close(starts, expected, what=f"starts of 5 experts, without pairs: {name}")


def sort_grouped(answer: Answer) -> None:
    up, down = _experts(e=8)
    weights, indices = _choices(11, 3, 7)
    z = _random(11, 4)
    order, starts = _sorted(answer, indices, 8)
    rows = z.new_zeros(order.numel(), 4)
    for e in range(8):
        pairs = order[int(starts[e]) : int(starts[e + 1])]
        rows[pairs] = ops.squared_relu(z[pairs // 3] @ up[e].T) @ down[e].T
    got = (rows.view(11, 3, 4) * weights[..., None]).sum(1)
    close(got, _mixed(z, up, down, weights, indices), what="experts computed group by group")


SMALL = NemotronConfig.from_preset("lite").replace(
    pattern="E",
    hidden_size=12,
    moe_latent_size=None,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=10,
)
OTHER = SMALL.replace(
    n_routed_experts=9, num_experts_per_tok=4, moe_intermediate_size=5, routed_scaling_factor=1.0
)


def _loaded(
    answer: Answer, config: NemotronConfig = SMALL, *, shared: float | int = 1
) -> tuple[Any, MoE]:
    """The learner's layer and the package's, with the same weights and a bias.

    `shared` multiplies the output of the shared expert.
    """
    package, layer = MoE(config), answer(config)
    with torch.no_grad():
        package.init_weights(0.5, 1.0)
        assert package.shared_experts is not None
        package.shared_experts.down_proj.weight.mul_(shared)
        package.gate.e_score_correction_bias.copy_(0.3 * torch.randn(config.n_routed_experts))
    layer.load_state_dict(package.state_dict())
    return layer, package


def _x(*shape: int) -> Tensor:
    return _random(*shape, SMALL.hidden_size, dtype=torch.float32)


def layer_shapes(answer: Answer) -> None:
    layer, _ = _loaded(answer)
    for rows, tokens in ((1, 1), (2, 7)):
        got = layer(_x(rows, tokens))
        shape = list(got.shape) if isinstance(got, Tensor) else type(got).__name__
        expected = [rows, tokens, SMALL.hidden_size]
        assert shape == expected, f"the output has shape {shape}; expected {expected}."


def layer_values(answer: Answer) -> None:
    for config in (SMALL, OTHER):
        layer, package = _loaded(answer, config, shared=0)
        x = strided(_x(2, 9))
        got = keeps_inputs(layer, x, what="the layer")
        what = f"the routed experts, {config.num_experts_per_tok} of {config.n_routed_experts}"
        close(got, package(x).detach(), what=what, dtype=True)


def layer_shared(answer: Answer) -> None:
    layer, package = _loaded(answer)
    x = _x(2, 5)
    close(layer(x), package(x).detach(), what="routed and shared experts together")


def layer_gradients(answer: Answer) -> None:
    layer, package = _loaded(answer)
    x = _x(1, 6)
    gradients(layer, package, (x,), atol=1e-4)
    # `gradients` looks at the inputs; here are those of the weights.
    for net in (layer, package):
        net.zero_grad()
        net(x).square().sum().backward()
    expected = dict(package.named_parameters())
    for name, ours in layer.named_parameters():
        assert ours.grad is not None, f"the gradient of {name} does not exist."
        close(ours.grad, expected[name].grad, what=f"the gradient of {name}", rtol=1e-3, atol=1e-4)


def layer_routing(answer: Answer) -> None:
    layer, package = _loaded(answer)
    for shape in ((2, 5), (1, 3)):
        x = _x(*shape)
        layer(x)
        found = _results(getattr(layer, "routing", None), 2, "self.routing after a call")
        expected = package.gate(x.flatten(0, 1))
        close(found[0], expected.scores.detach(), what="the scores in self.routing")
        if not isinstance(found[1], Tensor):
            raise AssertionError("the second part of self.routing must be the indices.")
        got, wanted = (part.sort(-1).values for part in (found[1], expected.indices))
        close(got, wanted, what="the indices in self.routing")


def layer_active(answer: Answer) -> None:
    for config in (SMALL, OTHER):
        d, k, f = config.hidden_size, config.num_experts_per_tok, config.moe_intermediate_size
        s = config.moe_shared_expert_intermediate_size
        expected = config.n_routed_experts * d + 2 * k * f * d + 2 * s * d
        what = f"parameters of one token, {k} of {config.n_routed_experts} experts"
        close(answer(config).active_parameters(), expected, what=what, rtol=0)


def _moved(answer: Answer, bias: Tensor, loads: list[list[int]], rate: float) -> Tensor:
    """The change of the bias in units of the rate."""
    got = keeps_inputs(answer, bias, torch.tensor(loads), rate, what="update_bias")
    close(got, bias, what="the new bias", rtol=0, atol=1e9, dtype=True)  # shape and dtype
    change: Tensor = (got - bias) / rate
    return change


def bias_direction(answer: Answer) -> None:
    change = _moved(answer, torch.zeros(4), [[0, 10, 50, 2]], 0.01).sign()
    close(change, torch.tensor([1.0, 1.0, -1.0, 1.0]), what="directions for loads 0, 10, 50, 2")


def bias_step(answer: Answer) -> None:
    bias = torch.tensor([0.3, -0.2, 0.1, 0.0])
    for rate in (0.01, 0.5):
        change = _moved(answer, bias, [[1, 2, 900, 97]], rate)
        expected = torch.tensor([1.0, 1.0, -1.0, 1.0])
        close(change, expected, what=f"steps in units of the rate {rate}", atol=1e-3)


def bias_even(answer: Answer) -> None:
    change = _moved(answer, torch.full((4,), 0.25), [[5, 5, 3, 7]], 0.125)
    expected = torch.tensor([0.0, 0.0, 1.0, -1.0])
    close(change, expected, what="steps for loads 5, 5, 3, 7 of a mean of 5")


def bias_devices(answer: Answer) -> None:
    # On each device alone expert 0 has more than the mean; together it has less.
    loads = [[30, 0, 50, 20], [30, 50, 0, 20], [0, 30, 50, 20]]
    change = _moved(answer, torch.zeros(4), loads, 0.25)
    close(change, torch.tensor([1.0, -1.0, -1.0, 1.0]), what="steps for the loads of 3 devices")


def _scores(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) + 0.01


def loss_even(answer: Answer) -> None:
    scores = torch.full((2, 5, 4), 0.3, dtype=torch.float64)
    close(answer(scores, 4), 1.0 * torch.ones((), dtype=torch.float64), what="four equal experts")


def loss_collapsed(answer: Answer) -> None:
    # Every token has the same scores, so f is 1 / k for the first k experts.
    scores = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0], dtype=torch.float64) / 16
    scores = scores.expand(1, 6, 5)
    for k, expected in ((1, 5 * 0.5), (2, 5 * (0.5 + 0.25) / 2)):
        wanted = torch.tensor(expected, dtype=torch.float64)
        close(answer(scores, k), wanted, what=f"five experts, all tokens with the same {k}")


def loss_sequences(answer: Answer) -> None:
    # One sequence prefers expert 0, the other expert 1: even together, uneven each.
    one = torch.tensor([0.9, 0.1], dtype=torch.float64).expand(1, 4, 2)
    scores = torch.cat([one, one.flip(-1)])
    got = answer(scores, 1)
    close(got, torch.tensor(1.8, dtype=torch.float64), what="two sequences of opposite preference")


def loss_random(answer: Answer) -> None:
    for shape, k in (((3, 7, 6), 2), ((1, 1, 4), 3)):
        scores = _scores(*shape)
        got = keeps_inputs(answer, scores, k, what="balance_loss")
        close(got, sequence_balance_loss(scores, k), what=f"scores {list(shape)}, top_k={k}")


def loss_gradients(answer: Answer) -> None:
    gradients(answer, sequence_balance_loss, (_scores(2, 5, 4), 2))
