"""Exercises of chapter 04: from a router to a layer of experts, and what keeps its load even.

    04.route                which experts read a token, and with which weight
    04.mix_experts          dispatch and combine: the weighted sum of the chosen experts
    04.sort_pairs           optional: pairs of token and expert, sorted for a grouped kernel
    04.mixture_of_experts   a class: the layer, with the package's parameter names
    04.update_bias          balance by the selection bias, over several devices
    04.balance_loss         balance by a loss, sequence by sequence

The checks are in `checks.py`; the mistakes that they have to catch are in
`tests/course/chapters/ch04_mixture_of_experts/mutants.py`.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch04_mixture_of_experts import checks
from nemotron_lite.course.exercises import Check, Exercise

ROUTE = Exercise(
    id="04.route",
    title="The router",
    objective="O2: write the router.",
    minutes=12,
    difficulty=2,
    points=7,
    task=r"""
Compute the scores $s = \mathrm{sigmoid}(W x)$, one for each expert, in float32 whatever the dtype
of x is. Choose the `top_k` experts with the largest $s_i + b_i$. The weight of a chosen expert is
`scale` times its *score* $s_i$, divided by the sum of the scores of the chosen ones. The bias $b$
never enters a weight.
""".strip(),
    stub='''
def route(x, weight, bias, top_k, scale):
    """Choose experts for each token.

    Args:
        x: float tensor `t d`.
        weight: float tensor `e d`, a row for each expert.
        bias: float32 tensor `e`, the selection bias.
        top_k: experts to choose, at least 1 and at most e.
        scale: sum of the weights of one token.

    Returns:
        (weights, indices, scores): float32 `t k`, int64 `t k`, float32 `t e`. The order of the
        experts in a row has no meaning.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def route(x, weight, bias, top_k, scale):
    scores = torch.sigmoid(x.float() @ weight.float().T)
    indices = (scores + bias).topk(top_k, dim=-1).indices
    chosen = scores.gather(1, indices)
    weights = scale * chosen / chosen.sum(-1, keepdim=True)
    return weights, indices, scores
""",
    hints=(
        "`torch.sigmoid(x.float() @ weight.float().T)` gives the scores. Cast *before* the "
        "product: in bfloat16 close scores become equal, and the choice changes.",
        "`(scores + bias).topk(top_k, dim=-1).indices` is the choice. Then read the scores again "
        "without the bias: `scores.gather(1, indices)`.",
        "Divide by the sum of the *chosen* scores, `sum(-1, keepdim=True)`, not by that of all "
        "experts, and multiply by `scale`. Keep the weights in the graph: they are the only way "
        "by which a gradient reaches the router.",
    ),
    checks=(
        Check("scores", checks.route_scores, hint=1, points=1),
        Check("the choice", checks.route_choice, hint=2, points=1),
        Check("weights", checks.route_weights, hint=3, points=1),
        Check("the bias stays out of the weights", checks.route_bias, hint=2, points=2),
        Check("one expert, and all experts", checks.route_edges, hint=3, points=1),
        Check("gradients", checks.route_gradients, hint=3, points=1),
    ),
)


MIX_EXPERTS = Exercise(
    id="04.mix_experts",
    title="Dispatch and combine",
    objective="O2: write dispatch and combine.",
    minutes=15,
    difficulty=3,
    points=7,
    task=r"""
For each token add up the weighted outputs of its chosen experts:
$o = \sum_i w_i\, W_{2,i}\, \mathrm{relu}(W_{1,i}\, z)^2$. Here $z$ is the token $x$ itself; in
the next chapter it is narrower. Go expert by expert. Collect the tokens that chose it (dispatch),
compute all of them with two matrix products, and add each output, times its weight, to the row of
its token (combine).

Do not compute experts for tokens that did not choose them. An expert that nobody chose must not be
used at all: its matrices may hold anything, even NaN.
""".strip(),
    stub='''
def mix_experts(z, up, down, weights, indices):
    """The weighted sum of each token's chosen experts.

    Args:
        z: float tensor `t d`.
        up: float tensor `e f d`, the first matrix of each expert.
        down: float tensor `e d f`, the second.
        weights: float tensor `t k`.
        indices: int tensor `t k`; the k experts of a token differ.

    Returns:
        Float tensor `t d`.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def mix_experts(z, up, down, weights, indices):
    y = torch.zeros_like(z)
    for expert in range(len(up)):
        tokens, slots = torch.where(indices == expert)
        hidden = F.relu(z[tokens] @ up[expert].T) ** 2
        answers = weights[tokens, slots, None] * (hidden @ down[expert].T)
        y = y.index_add(0, tokens, answers)
    return y
""",
    hints=(
        "One expert on some rows: `F.relu(rows @ up[expert].T) ** 2`, then `@ down[expert].T`. "
        "The square comes after the ReLU.",
        "`tokens, slots = torch.where(indices == expert)` gives the tokens that chose an expert, "
        "and in which column. `z[tokens]` are their rows, `weights[tokens, slots, None]` their "
        "weights. The weight multiplies the output of the expert: the square does not commute "
        "with it.",
        "Add with `y = y.index_add(0, tokens, answers)`. For an expert without tokens all of this "
        "has zero rows and adds nothing. Computing every expert for every token and multiplying "
        "by 0 costs e / k times as much, and 0 times NaN is NaN.",
    ),
    checks=(
        Check("one token, one expert", checks.mix_one, hint=1, points=1),
        Check("two experts with their weights", checks.mix_weights, hint=2, points=1),
        Check("every token meets its own experts", checks.mix_many, hint=2, points=1),
        Check("experts that nobody chose are not used", checks.mix_unused, hint=3, points=2),
        Check("gradients", checks.mix_gradients, hint=3, points=1),
        Check("strided tokens, inputs unchanged", checks.mix_strided, hint=3, points=1),
    ),
)


SORT_PAIRS = Exercise(
    id="04.sort_pairs",
    title="Pairs, sorted by expert",
    objective="O2: prepare the grouped form of the experts.",
    minutes=10,
    difficulty=3,
    points=4,
    task="""
Slot $j$ is column $j$ of `indices`. Number the pairs of token and slot row by row: pair `i` is
token `i // k`, slot `i % k`. Return the numbers of all pairs, sorted by their expert; pairs of the
same expert keep their order. And return where each expert begins in that list: the pairs of
expert `e` are `order[starts[e] : starts[e + 1]]`, which may be empty.
""".strip(),
    stub='''
def sort_pairs(indices, experts):
    """Pairs of token and slot in the order of their experts.

    Args:
        indices: int tensor `t k`.
        experts: how many there are; an expert may have no pair.

    Returns:
        (order, starts): int tensors of `t * k` and `experts + 1` numbers.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def sort_pairs(indices, experts):
    flat = indices.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=experts)
    starts = F.pad(counts.cumsum(0), (1, 0))
    return order, starts
""",
    hints=(
        "`indices.flatten()` has the expert of each pair. Its `argsort` is the list of pairs in "
        "the order of their experts. It is not the place of each pair, which is the inverse.",
        "`argsort(stable=True)` keeps the order of equal experts. The list names pairs; the token "
        "of a pair is `pair // k`, which whoever uses the list computes.",
        "`torch.bincount(flat, minlength=experts)` counts the pairs of every expert, also of the "
        "last ones that nobody chose. `F.pad(counts.cumsum(0), (1, 0))` puts the 0 in front.",
    ),
    checks=(
        Check("pairs sorted by expert", checks.sort_order, hint=1, points=1),
        Check("equal experts keep their order", checks.sort_stable, hint=2, points=1),
        Check("where each expert begins", checks.sort_starts, hint=3, points=1),
        Check("the grouped form", checks.sort_grouped, hint=2, points=1),
    ),
    kind="optional",
)


MIXTURE_OF_EXPERTS = Exercise(
    id="04.mixture_of_experts",
    title="The layer",
    objective="O2: build the layer.",
    minutes=15,
    difficulty=3,
    points=7,
    task=r"""
Use your `route` and `mix_experts`. `forward` makes rows of all tokens, routes them, adds the
chosen experts and the shared expert, which is $\mathrm{down}(\mathrm{relu}(\mathrm{up}(x))^2)$ with
weight 1, and gives the result the shape of `x`. It also keeps the pair `(scores, indices)` in
`self.routing`, for the statistics.

`active_parameters` is the number of parameters with which one token is computed: all but those of
the experts that it did not choose. The selection bias is a buffer and does not count.
""".strip(),
    stub='''
class MixtureOfExperts(nn.Module):
    """Router, routed experts and one shared expert, at the full width of the model."""

    def __init__(self, config):
        super().__init__()
        d, e, f = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        s = config.moe_shared_expert_intermediate_size
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.gate, self.experts, self.shared_experts = nn.Module(), nn.Module(), nn.Module()
        self.gate.weight = nn.Parameter(torch.zeros(e, d))
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(e))
        self.experts.up_proj = nn.Parameter(torch.zeros(e, f, d))
        self.experts.down_proj = nn.Parameter(torch.zeros(e, d, f))
        self.shared_experts.up_proj = nn.Linear(d, s, bias=False)
        self.shared_experts.down_proj = nn.Linear(s, d, bias=False)

    def forward(self, x):
        """The layer's output, `b t d` like x."""
        raise NotImplementedError

    def active_parameters(self):
        """Parameters with which one token is computed."""
        raise NotImplementedError
'''.strip(),
    solution="""class MixtureOfExperts(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, e, f = config.hidden_size, config.n_routed_experts, config.moe_intermediate_size
        s = config.moe_shared_expert_intermediate_size
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.gate, self.experts, self.shared_experts = nn.Module(), nn.Module(), nn.Module()
        self.gate.weight = nn.Parameter(torch.zeros(e, d))
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(e))
        self.experts.up_proj = nn.Parameter(torch.zeros(e, f, d))
        self.experts.down_proj = nn.Parameter(torch.zeros(e, d, f))
        self.shared_experts.up_proj = nn.Linear(d, s, bias=False)
        self.shared_experts.down_proj = nn.Linear(s, d, bias=False)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        bias = self.gate.e_score_correction_bias
        weights, indices, scores = route(rows, self.gate.weight, bias, self.top_k, self.scale)
        self.routing = scores, indices
        routed = mix_experts(
            rows, self.experts.up_proj, self.experts.down_proj, weights, indices
        )
        shared = self.shared_experts
        everyone = shared.down_proj(F.relu(shared.up_proj(rows)) ** 2)
        return (routed + everyone).view(x.shape)

    def active_parameters(self):
        up, down = self.experts.up_proj, self.experts.down_proj
        idle = len(up) - self.top_k
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - idle * (up[0].numel() + down[0].numel())
""",
    hints=(
        "The router has no sense of rows and times: `rows = x.reshape(-1, x.shape[-1])`. At the "
        "end `view(x.shape)` brings the shape back.",
        "`weights, indices, scores = route(rows, self.gate.weight, bias, self.top_k, self.scale)`, "
        "with the buffer `self.gate.e_score_correction_bias`. Then `mix_experts`, plus the shared "
        "expert on the same rows, without a factor. Set `self.routing = scores, indices`.",
        "`sum(p.numel() for p in self.parameters())` counts everything. Subtract what the "
        "`e - top_k` experts have that a token did not choose: one has "
        "`up_proj[0].numel() + down_proj[0].numel()` numbers. The router is read whole.",
    ),
    checks=(
        Check("shapes", checks.layer_shapes, hint=1, points=1),
        Check("the package's weights", checks.layer_values, hint=2, points=2),
        Check("the shared expert", checks.layer_shared, hint=2, points=1),
        Check("gradients", checks.layer_gradients, hint=2, points=1),
        Check("what the router decided is kept", checks.layer_routing, hint=2, points=1),
        Check("parameters of one token", checks.layer_active, hint=3, points=1),
    ),
    needs=("04.route", "04.mix_experts"),
)


UPDATE_BIAS = Exercise(
    id="04.update_bias",
    title="Balance by the bias",
    objective="O3: balance the load of the experts.",
    minutes=8,
    difficulty=2,
    points=5,
    task="""
After an update of the weights, move the selection bias. An expert with less than the mean load
goes up by `rate`, one with more goes down by `rate`, one with exactly the mean load stays. How far
it is from the mean does not matter.

Each device has counted its own tokens. What counts is the load over all devices together.
""".strip(),
    stub='''
def update_bias(bias, loads, rate):
    """The selection bias after one update.

    Args:
        bias: float tensor `e`.
        loads: int tensor `devices e`, tokens that each device sent to each expert.
        rate: the step.

    Returns:
        A new float tensor `e`.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def update_bias(bias, loads, rate):
    total = loads.sum(0).to(bias.dtype)
    return bias + rate * torch.sign(total.mean() - total)
""",
    hints=(
        "An expert with little load must be chosen more often: its bias goes *up*. The sign is "
        "that of mean minus load.",
        "`torch.sign` gives -1, 0 or 1. `mean()` needs floats: convert the counts first.",
        "Sum over the devices *before* the sign: `loads.sum(0)`. A device alone sees few tokens, "
        "and with biases of their own the devices would choose different experts.",
    ),
    checks=(
        Check("little load goes up, much goes down", checks.bias_direction, hint=1, points=1),
        Check("steps of one size", checks.bias_step, hint=2, points=1),
        Check("the mean load stays", checks.bias_even, hint=2, points=1),
        Check("the load of all devices", checks.bias_devices, hint=3, points=2),
    ),
)


BALANCE_LOSS = Exercise(
    id="04.balance_loss",
    title="Balance by a loss",
    objective="O3: balance the load inside each sequence.",
    minutes=12,
    difficulty=3,
    points=6,
    task=r"""
For one sequence of $t$ tokens and $e$ experts the loss is
$e \sum_i \mathrm{share}_i\,\mathrm{pref}_i$. $\mathrm{share}_i$ is the share of expert $i$ in the
$k\,t$ choices of the sequence; take the `top_k` largest *scores*, without a bias.
$\mathrm{pref}_i$ is the mean over the tokens of $s_i$ divided by the sum of all $e$ scores of the
token.

Return the mean over the sequences. The share is a count and has no gradient; pref has one.
""".strip(),
    stub='''
def balance_loss(scores, top_k):
    """e * sum_i share_i pref_i, averaged over the sequences; 1 if all experts are equal.

    Args:
        scores: float tensor `b t e`, above 0.
        top_k: experts chosen per token.

    Returns:
        A float tensor without axes.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def balance_loss(scores, top_k):
    tokens, experts = scores.shape[1:]
    chosen = scores.topk(top_k, dim=-1).indices
    counts = F.one_hot(chosen, experts).sum((1, 2))
    share = counts / (top_k * tokens)
    preference = (scores / scores.sum(-1, keepdim=True)).mean(1)
    return experts * (share * preference).sum(-1).mean()
""",
    hints=(
        "`chosen = scores.topk(top_k, dim=-1).indices`, and `F.one_hot(chosen, e)` is `b t k e`. "
        "Its sum over tokens and slots, divided by k times t, is share, with shape `b e`; each "
        "row adds up to 1.",
        "Everything is per sequence: no sum or mean over the batch before the product share times "
        "pref. "
        "Two sequences that prefer different experts must not cancel.",
        "pref is `(scores / scores.sum(-1, keepdim=True)).mean(1)`: divided by the sum over *all* "
        "experts, then averaged over tokens. It keeps its gradient, so no `detach`.",
    ),
    checks=(
        Check("equal scores give 1", checks.loss_even, hint=1, points=1),
        Check("a collapsed router", checks.loss_collapsed, hint=1, points=1),
        Check("sequence by sequence", checks.loss_sequences, hint=2, points=2),
        Check("random scores", checks.loss_random, hint=3, points=1),
        Check("gradients", checks.loss_gradients, hint=3, points=1),
    ),
)

EXERCISES: tuple[Exercise, ...] = (
    ROUTE,
    MIX_EXPERTS,
    SORT_PAIRS,
    MIXTURE_OF_EXPERTS,
    UPDATE_BIAS,
    BALANCE_LOSS,
)
