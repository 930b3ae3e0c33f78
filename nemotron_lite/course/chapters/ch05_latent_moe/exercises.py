"""Exercises of chapter 05: what a mixture costs, and the layer whose experts work at width l.

    05.step_costs    FLOPs, bytes of weights and bytes between devices, for one step
    05.equal_cost    four times as many experts: how many per token cost the same
    05.latent_moe    a class: the layer, with the package's parameter names
    05.principal     the l directions that keep most of the tokens, and how much they keep
    05.compress      optional: a latent layer out of the weights of a plain one

The costs count weights and vectors only, as estimates for serving do. A real step also pays for
starting kernels, for synchronization and for uneven load.

The layer is built on `route` and `mix_experts` of chapter 04. The checks are in `checks.py`; the
mistakes that they have to catch are in `tests/course/chapters/ch05_latent_moe/mutants.py`.
"""

from __future__ import annotations

from nemotron_lite.course.chapters.ch05_latent_moe import checks
from nemotron_lite.course.exercises import Check, Exercise

STEP_COSTS = Exercise(
    id="05.step_costs",
    title="What one step costs",
    objective="O1: compute what a mixture costs.",
    minutes=10,
    difficulty=2,
    points=7,
    task=r"""
A step computes `tokens` tokens in one layer. Count its experts and, with a latent space, the two
projections. Router and shared expert are left out. An expert has two matrices, `f` by its width.
That width is `latent`; if `latent` is `None`, it is `d`, and there are no projections. Return:

1. the FLOPs, two for each weight and token;
2. the bytes of weights that are read. A step reads a matrix once, however many tokens use it. If
   each token chooses its $k$ of $e$ experts at random, $t$ tokens read $e\,(1 - (1 - k/e)^t)$
   different experts on average;
3. the bytes that devices exchange, each with some of the experts. For every token and chosen expert
   one vector goes to the expert (dispatch), and one comes back (combine). Count all of them; their
   width is that of the experts.
""".strip(),
    stub='''
def step_costs(tokens, d, latent, experts, top_k, f, weight_bytes, activation_bytes):
    """What the routed part of one layer costs, for one step.

    Args:
        tokens: tokens of the step, t.
        d: width of the model.
        latent: width of the experts, l; None: they read all d numbers, without projections.
        experts: how many there are, e.
        top_k: experts chosen per token, k.
        f: hidden width of an expert.
        weight_bytes: bytes of one weight; 2 in BF16, less than 1 in four-bit formats.
        activation_bytes: bytes of one number of a vector that is exchanged.

    Returns:
        (flops, bytes_read, bytes_exchanged): three numbers.
    """
    raise NotImplementedError
'''.strip(),
    solution="""\
def step_costs(tokens, d, latent, experts, top_k, f, weight_bytes, activation_bytes):
    width = d if latent is None else latent
    expert = 2 * f * width
    projections = 0 if latent is None else 2 * d * latent
    flops = 2 * tokens * (top_k * expert + projections)
    distinct = experts * (1 - (1 - top_k / experts) ** tokens)
    bytes_read = weight_bytes * (distinct * expert + projections)
    bytes_exchanged = 2 * tokens * top_k * width * activation_bytes
    return flops, bytes_read, bytes_exchanged
""",
    hints=(
        "Begin with three numbers: `width = d if latent is None else latent`, the weights of one "
        "expert, `2 * f * width`, and those of both projections, `2 * d * latent` or 0. One token "
        "uses `top_k` experts and the projections; each weight is one multiply-add, two FLOPs.",
        "`distinct = experts * (1 - (1 - top_k / experts) ** tokens)`. With one token this is "
        "`top_k`, with very many it is nearly `experts`. The projections are read once in a step. "
        "Bytes are weights times `weight_bytes`.",
        "A token sends `top_k` vectors and gets `top_k` back: `2 * tokens * top_k` vectors of "
        "`width` numbers. The projection runs before the dispatch, so what is sent has the width "
        "of the experts. The hidden width f never leaves the device.",
    ),
    checks=(
        Check("FLOPs of a plain mixture", checks.costs_flops, hint=1, points=1),
        Check("FLOPs with a latent space", checks.costs_latent_flops, hint=1, points=1),
        Check("weights read for one token", checks.costs_one_token, hint=2, points=1),
        Check("weights read for many tokens", checks.costs_many_tokens, hint=2, points=2),
        Check("vectors between devices", checks.costs_exchange, hint=3, points=2),
    ),
)


EQUAL_COST = Exercise(
    id="05.equal_cost",
    title="More experts at equal cost",
    objective="O2: derive the sizes of a latent mixture of equal cost.",
    minutes=10,
    difficulty=2,
    points=6,
    task=r"""
A plain mixture has `experts` experts, of which a token uses `top_k`. A latent one takes
$l = d / \alpha$ and $\alpha$ times as many experts of the same `f`. How many of them may a token
use, if it costs no more?

The cost is the number of weights that one token uses: the chosen experts, both projections, and the
router with its $d$ weights for *each* expert, chosen or not (`step_costs` left it out).
The plain mixture has a router too, and no projections. Return the largest number of experts per
token whose cost is at most that of the plain mixture.

Raise `ValueError` if `alpha` is below 1 or does not divide `d`, or if not even one expert fits.
""".strip(),
    stub='''
def equal_cost(d, experts, top_k, f, alpha):
    """Sizes of a latent mixture that costs a token no more than a plain one.

    Args:
        d: width of the model.
        experts: experts of the plain mixture.
        top_k: experts that it chooses per token.
        f: hidden width of an expert, the same in both.
        alpha: whole number; d / alpha is the latent width.

    Returns:
        (latent, new_experts, new_top_k): three whole numbers.

    Raises:
        ValueError: alpha is below 1 or does not divide d, or no expert fits.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def equal_cost(d, experts, top_k, f, alpha):
    if alpha < 1 or d % alpha:
        raise ValueError(f"alpha is {alpha}; expected a whole number that divides {d}.")
    latent, new_experts = d // alpha, alpha * experts
    budget = top_k * 2 * f * d + experts * d
    fixed = 2 * d * latent + new_experts * d
    new_top_k = (budget - fixed) // (2 * f * latent)
    if new_top_k < 1:
        raise ValueError(f"alpha is {alpha}: router and projections leave no room for an expert.")
    return latent, new_experts, new_top_k
""",
    hints=(
        "`latent = d // alpha` and `new_experts = alpha * experts`. One latent expert has "
        "`2 * f * latent` weights, one plain expert `2 * f * d`. Only the width changes, f stays.",
        "The plain mixture may spend `top_k * 2 * f * d + experts * d`. The latent one spends "
        "`2 * d * latent + new_experts * d` before it has chosen anybody: two projections, and a "
        "router that still reads all d numbers, with a row for each of the new experts.",
        "Divide what is left by the weights of one latent expert, with `//`: half an expert does "
        "not fit, and an exact fit counts. Test `alpha` before you divide by it, and raise "
        "`ValueError` too if the result is below 1.",
    ),
    checks=(
        Check("width and number of experts", checks.equal_sizes, hint=1, points=1),
        Check("experts and projections", checks.equal_experts, hint=2, points=1),
        Check("the router", checks.equal_router, hint=2, points=1),
        Check("the largest that fits", checks.equal_largest, hint=3, points=1),
        Check("the sizes of Super", checks.equal_super, hint=2, points=1),
        Check("what can be built and what cannot", checks.equal_refused, hint=3, points=1),
    ),
)


LATENT_MOE = Exercise(
    id="05.latent_moe",
    title="The layer",
    objective="O3: write the latent layer.",
    minutes=15,
    difficulty=3,
    points=8,
    task=r"""
`__init__` gives you the router and the shared expert, which read the full width $d$ as in chapter
04. Add the parameters of the latent space: `self.experts.up_proj` with shape `e f l`,
`self.experts.down_proj` with `e l f`, and two linear layers without bias, `self.fc1_latent_proj`
($W_{down}$, from $d$ to $l$) and `self.fc2_latent_proj` ($W_{up}$, from $l$ to $d$). Their
values do not matter, weights are loaded later.

`forward` computes

$$y = W_{up} \sum_{i \in I} w_i\, W_{2,i}\, \mathrm{relu}(W_{1,i}\, W_{down}\, x)^2
+ V_2\, \mathrm{relu}(V_1\, x)^2$$

Use your `route` and `mix_experts`. Keep `(scores, indices)` in `self.routing` as in chapter 04.

`active_parameters` is the number of parameters with which one token is computed.
""".strip(),
    stub='''
class LatentMoE(nn.Module):
    """Router and shared expert at width d, routed experts at width l."""

    def __init__(self, config):
        super().__init__()
        d, latent = config.hidden_size, config.moe_latent_size
        e, f = config.n_routed_experts, config.moe_intermediate_size
        s = config.moe_shared_expert_intermediate_size
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.gate, self.experts, self.shared_experts = nn.Module(), nn.Module(), nn.Module()
        self.gate.weight = nn.Parameter(torch.zeros(e, d))
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(e))
        self.shared_experts.up_proj = nn.Linear(d, s, bias=False)
        self.shared_experts.down_proj = nn.Linear(s, d, bias=False)
        raise NotImplementedError

    def forward(self, x):
        """The layer's output, `b t d` like x."""
        raise NotImplementedError

    def active_parameters(self):
        """Parameters with which one token is computed."""
        raise NotImplementedError
'''.strip(),
    solution="""class LatentMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        d, latent = config.hidden_size, config.moe_latent_size
        e, f = config.n_routed_experts, config.moe_intermediate_size
        s = config.moe_shared_expert_intermediate_size
        self.top_k, self.scale = config.num_experts_per_tok, config.routed_scaling_factor
        self.gate, self.experts, self.shared_experts = nn.Module(), nn.Module(), nn.Module()
        self.gate.weight = nn.Parameter(torch.zeros(e, d))
        self.gate.register_buffer("e_score_correction_bias", torch.zeros(e))
        self.shared_experts.up_proj = nn.Linear(d, s, bias=False)
        self.shared_experts.down_proj = nn.Linear(s, d, bias=False)
        self.experts.up_proj = nn.Parameter(torch.zeros(e, f, latent))
        self.experts.down_proj = nn.Parameter(torch.zeros(e, latent, f))
        self.fc1_latent_proj = nn.Linear(d, latent, bias=False)
        self.fc2_latent_proj = nn.Linear(latent, d, bias=False)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        bias = self.gate.e_score_correction_bias
        weights, indices, scores = route(rows, self.gate.weight, bias, self.top_k, self.scale)
        self.routing = scores, indices
        z = self.fc1_latent_proj(rows)
        mixed = mix_experts(z, self.experts.up_proj, self.experts.down_proj, weights, indices)
        shared = self.shared_experts
        everyone = shared.down_proj(F.relu(shared.up_proj(rows)) ** 2)
        return (self.fc2_latent_proj(mixed) + everyone).view(x.shape)

    def active_parameters(self):
        up, down = self.experts.up_proj, self.experts.down_proj
        idle = len(up) - self.top_k
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - idle * (up[0].numel() + down[0].numel())
""",
    hints=(
        "`nn.Parameter(torch.zeros(e, f, latent))` and `nn.Parameter(torch.zeros(e, latent, f))` "
        "are the experts; `nn.Linear(d, latent, bias=False)` and the same with `latent, d` are the "
        "projections. `forward` begins with `rows = x.reshape(-1, x.shape[-1])` and ends with "
        "`view(x.shape)`.",
        "`route` and the shared expert read `rows`, all d numbers. Only the experts read "
        "`z = self.fc1_latent_proj(rows)`. `mix_experts` gives the weighted sum at width l, and "
        "`self.fc2_latent_proj` brings this one sum back. No norm, no activation and no factor "
        "stands beside the projections.",
        "As in chapter 04: all parameters, minus what the `e - top_k` experts have that a token "
        "did not choose, `up_proj[0].numel() + down_proj[0].numel()` each. Router and projections "
        "are used whole.",
    ),
    checks=(
        Check("the parameters of the package", checks.layer_parameters, hint=1, points=1),
        Check("shapes", checks.layer_shapes, hint=1, points=1),
        Check("the package's weights", checks.layer_values, hint=2, points=1),
        Check("who reads which width", checks.layer_widths, hint=2, points=1),
        Check("identity projections give a plain mixture", checks.layer_plain, hint=2, points=1),
        Check("gradients", checks.layer_gradients, hint=2, points=1),
        Check("what the router decided is kept", checks.layer_routing, hint=2, points=1),
        Check("parameters of one token", checks.layer_active, hint=3, points=1),
    ),
    needs=("04.route", "04.mix_experts"),
)


PRINCIPAL = Exercise(
    id="05.principal",
    title="The directions that keep most",
    objective="O4: say how narrow the latent space may be.",
    minutes=8,
    difficulty=3,
    points=6,
    task=r"""
A projection to $l$ numbers loses what lies outside of an $l$-dimensional subspace. Call the sum of
the squares of all numbers the *energy* of the features. Find the subspace that keeps most of it.

Return an orthonormal basis of it, one direction in each column, and the share of the energy that
is kept: that of the features projected onto the subspace, divided by all of it. The features are
used as they are; their mean is *not* subtracted, because $W_{down}$ has no bias.

There may be fewer tokens than directions.
""".strip(),
    stub='''
def principal(features, latent):
    """The subspace that keeps most of the energy.

    Args:
        features: float tensor `t d`, a row for each token.
        latent: number of directions l, from 1 to d.

    Returns:
        (basis, kept): `d l` with orthonormal columns in the dtype of the features, and a number
        from 0 to 1.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def principal(features, latent):
    energies, directions = torch.linalg.eigh(features.T @ features)
    basis = directions[:, -latent:]
    kept = energies[-latent:].sum() / energies.sum()
    return basis, kept
""",
    hints=(
        "The directions are the eigenvectors of the `d d` matrix `features.T @ features`, and each "
        "eigenvalue is the energy along its direction. `torch.linalg.eigh` gives d of them, "
        "however few the tokens are. Subtract nothing before.",
        "`eigh` sorts the eigenvalues in *ascending* order: the last columns are the largest. "
        "`directions[:, -latent:]` has shape `d l`; its columns have length 1.",
        "`kept` is the sum of the last l eigenvalues divided by the sum of all. With "
        "`torch.linalg.svd` instead, take the *squares* of the singular values, and the rows of "
        "its third result with `full_matrices=True`.",
    ),
    checks=(
        Check("one direction", checks.principal_one, hint=2, points=1),
        Check("an orthonormal basis", checks.principal_orthonormal, hint=2, points=1),
        Check("no other subspace keeps more", checks.principal_best, hint=1, points=1),
        Check("features with a mean", checks.principal_mean, hint=1, points=1),
        Check("the share that is kept", checks.principal_kept, hint=3, points=1),
        Check("few tokens, and all directions", checks.principal_edges, hint=1, points=1),
    ),
)


COMPRESS = Exercise(
    id="05.compress",
    title="A latent layer out of a plain one",
    objective="O4: measure what a narrower width loses.",
    minutes=10,
    difficulty=3,
    points=5,
    task=r"""
Take the experts of a plain mixture and the basis $B$ (`d l`, orthonormal columns) of a subspace.
Make the weights of a latent layer that does the same inside of the subspace. $W_{down} = B^\top$
reads the coordinates of a token, $W_{up} = B$ writes them back. Each expert has to do at width $l$
what it did at width $d$: $W_1' = W_1 B$ and $W_2' = B^\top W_2$.

With $l = d$ nothing is lost. With $l < d$, what a token or an expert's output has outside of the
subspace is lost.
""".strip(),
    stub='''
def compress(up, down, basis):
    """Weights of a latent layer, from plain experts and a subspace.

    Args:
        up: float tensor `e f d`.
        down: float tensor `e d f`.
        basis: float tensor `d l` with orthonormal columns.

    Returns:
        (fc1, up, down, fc2): `l d`, `e f l`, `e l f` and `d l`, as the layer stores them.
    """
    raise NotImplementedError
'''.strip(),
    solution="""def compress(up, down, basis):
    return basis.T, up @ basis, basis.T @ down, basis
""",
    hints=(
        "`nn.Linear` stores its matrix as `out in`. So `fc1`, from d to l, is `basis.T` with shape "
        "`l d`, and `fc2`, from l to d, is `basis`.",
        "An expert got x and now gets $z = B^\\top x$. The best guess of x is $B z$, so its first "
        "matrix becomes $W_1 B$: `up @ basis`, which `@` does for all experts at once.",
        "The second matrix wrote d numbers and now writes their coordinates: `basis.T @ down`, "
        "with the basis on the left. No expert is mixed with another; keep the gradients.",
    ),
    checks=(
        Check("shapes", checks.compress_shapes, hint=1, points=1),
        Check("the projections", checks.compress_projections, hint=1, points=1),
        Check("nothing is lost at full width", checks.compress_exact, hint=2, points=1),
        Check("what lies in the subspace", checks.compress_inside, hint=3, points=1),
        Check("gradients", checks.compress_gradients, hint=3, points=1),
    ),
    kind="optional",
)

EXERCISES: tuple[Exercise, ...] = (STEP_COSTS, EQUAL_COST, LATENT_MOE, PRINCIPAL, COMPRESS)
