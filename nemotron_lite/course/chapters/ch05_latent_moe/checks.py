"""Checks of chapter 05's exercises.

Each check isolates one mistake, so that a failure names the hint about it. The costs are compared
with sums over a small mixture that is written out here, and the expected number of experts also
with its limits. The layer is compared with the package's (`layers.moe.MoE`), once with l = d: there
all widths are equal, so an expert, a router or a shared expert that reads the wrong vector raises
no error, and only the numbers tell. Inputs come from torch's global generator, which the grader
seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nemotron_lite import ops
from nemotron_lite.config import NemotronConfig
from nemotron_lite.course.exercises import close, gradients, keeps_inputs, raises, strided
from nemotron_lite.layers.moe import MoE

Answer = Callable[..., Any]


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def _integer(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, ()))


def _results(got: Any, count: int, name: str) -> list[Any]:
    """The results of a call, refused in words if their number is wrong."""
    if not isinstance(got, tuple | list) or len(got) != count:
        raise AssertionError(f"{name} returned {type(got).__name__}; expected {count} results.")
    return list(got)


# --- 05.step_costs ---------------------------------------------------------------------------


def _costs(answer: Answer, tokens: int, sizes: dict[str, Any], **formats: float | int) -> list[Any]:
    """The three results, for a mixture of some sizes."""
    call = {"weight_bytes": 2, "activation_bytes": 2, **sizes, **formats}
    order = ("d", "latent", "experts", "top_k", "f", "weight_bytes", "activation_bytes")
    return _results(answer(tokens, *(call[name] for name in order)), 3, "step_costs")


def _plain(latent: int | None = None) -> dict[str, Any]:
    """Sizes that differ from each other, with d a multiple of 4."""
    experts, top_k = _integer(20, 30), _integer(2, 5)
    return {
        "d": 4 * _integer(9, 12), "latent": latent, "experts": experts, "top_k": top_k,
        "f": _integer(13, 19),
    }  # fmt: skip


def _latent() -> dict[str, Any]:
    return _plain(latent=_integer(5, 8))


def costs_flops(answer: Answer) -> None:
    for tokens in (1, 7):
        sizes = _plain()
        # Each chosen expert: f outputs of d multiply-adds, then d outputs of f.
        one = 2 * (sizes["f"] * sizes["d"] + sizes["d"] * sizes["f"])
        got = _costs(answer, tokens, sizes)[0]
        what = f"FLOPs of {tokens} tokens, {sizes['top_k']} experts each"
        close(got, tokens * sizes["top_k"] * one, what=what, rtol=1e-9)


def costs_latent_flops(answer: Answer) -> None:
    for tokens in (1, 6):
        sizes = _latent()
        down = up = 2 * sizes["d"] * sizes["latent"]
        one = 4 * sizes["f"] * sizes["latent"]
        got = _costs(answer, tokens, sizes)[0]
        what = f"FLOPs of {tokens} tokens at latent width {sizes['latent']}"
        close(got, tokens * (down + sizes["top_k"] * one + up), what=what, rtol=1e-9)
    sizes["latent"] = sizes["d"]  # as wide as the model, and still there
    got = _costs(answer, 1, sizes)[0]
    expected = 4 * sizes["d"] * (sizes["d"] + sizes["top_k"] * sizes["f"])
    close(got, expected, what="FLOPs of one token with latent = d, projections included", rtol=1e-9)


def costs_one_token(answer: Answer) -> None:
    for sizes in (_plain(), _latent()):
        width, projections = sizes["d"], 0
        if sizes["latent"] is not None:
            width, projections = sizes["latent"], 2 * sizes["d"] * sizes["latent"]
        weights = sizes["top_k"] * 2 * sizes["f"] * width + projections
        for each in (2, 0.5625):
            got = _costs(answer, 1, sizes, weight_bytes=each, activation_bytes=1)[1]
            where = "plain" if sizes["latent"] is None else "latent"
            what = f"bytes read for one token, {where} mixture, {each:g} bytes per weight"
            close(got, weights * each, what=what, rtol=1e-6)


def costs_many_tokens(answer: Answer) -> None:
    # Half of the experts for each token: n tokens leave out one in 2^n.
    for tokens, share in ((2, 3 / 4), (3, 7 / 8), (60, 1.0)):
        sizes = {**_latent(), "experts": 16, "top_k": 8}
        weights = share * 16 * 2 * sizes["f"] * sizes["latent"] + 2 * sizes["d"] * sizes["latent"]
        got = _costs(answer, tokens, sizes)[1]
        what = f"bytes read for {tokens} tokens that choose 8 of 16 experts"
        close(got, 2 * weights, what=what, rtol=1e-6)
    sizes = _plain()
    tokens = _integer(4, 9)
    missed = 1.0
    for _ in range(tokens):
        missed *= (sizes["experts"] - sizes["top_k"]) / sizes["experts"]
    expected = 2 * sizes["experts"] * (1 - missed) * 2 * sizes["f"] * sizes["d"]
    close(_costs(answer, tokens, sizes)[1], expected, what=f"bytes read for {tokens} tokens")


def costs_exchange(answer: Answer) -> None:
    for sizes, width in ((_plain(), "d"), (_latent(), "latent")):
        for tokens in (1, 5):
            copies = tokens * sizes["top_k"]
            got = _costs(answer, tokens, sizes, weight_bytes=0.5625, activation_bytes=3)[2]
            what = f"bytes exchanged for {tokens} tokens, vectors of {width} numbers"
            close(got, 3 * (copies + copies) * sizes[width], what=what, rtol=1e-9)


# --- 05.equal_cost ---------------------------------------------------------------------------


def _sizes(answer: Answer, *arguments: int) -> list[Any]:
    """The three results: whole numbers, also as floats."""
    names = "latent", "new_experts", "new_top_k"
    got = _results(answer(*arguments), 3, "equal_cost")
    for name, value in zip(names, got, strict=True):
        if isinstance(value, Tensor) or not isinstance(value, int | float) or value != int(value):
            raise AssertionError(f"{name} is {value!r:.40}; expected a whole number.")
    return got


def _token_cost(d: int, width: int, experts: int, top_k: int, f: int) -> int:
    """Weights that one token uses: chosen experts, router rows, and projections if width < d."""
    one, projections = 2 * f * width, 0 if width == d else 2 * d * width
    return top_k * one + experts * d + projections


def equal_sizes(answer: Answer) -> None:
    for alpha in (2, 4):
        latent, experts, _ = _sizes(answer, 64, 4, 6, 96, alpha)
        close(latent, 64 // alpha, what=f"the latent width for d=64, alpha={alpha}", rtol=0)
        close(experts, 4 * alpha, what=f"the number of experts for 4 at alpha={alpha}", rtol=0)


def equal_experts(answer: Answer) -> None:
    # Four experts: the router is small beside the experts and the projections.
    for (top_k, f, alpha), expected in {(2, 48, 2): 2, (3, 48, 4): 10}.items():
        got = _sizes(answer, 64, 4, top_k, f, alpha)[2]
        what = f"experts per token for d=64, 4 experts, top_k={top_k}, f={f}, alpha={alpha}"
        close(got, expected, what=what, rtol=0)


def equal_router(answer: Answer) -> None:
    # Narrow experts, many of them: the router costs as much as four plain experts.
    got = _sizes(answer, 64, 64, 8, 16, 2)[2]
    close(got, 8, what="experts per token for d=64, 64 experts, top_k=8, f=16, alpha=2", rtol=0)


def equal_largest(answer: Answer) -> None:
    for _ in range(8):
        alpha = 2 * _integer(1, 2)
        d, experts, top_k, f = (
            4 * _integer(8, 16),
            _integer(8, 16),
            _integer(4, 6),
            _integer(64, 99),
        )
        plain = _token_cost(d, d, experts, top_k, f)
        latent, many, most = _sizes(answer, d, experts, top_k, f, alpha)
        case = f"d={d}, {experts} experts, top_k={top_k}, f={f}, alpha={alpha}"
        cost = _token_cost(d, int(latent), int(many), int(most), f)
        if cost > plain:
            raise AssertionError(
                f"{case}: {most} experts per token cost {cost}, more than {plain}."
            )
        if cost + 2 * f * latent <= plain:
            raise AssertionError(f"{case}: {most} experts per token; one more would also fit.")
    # 8 plain experts leave room for exactly 8 latent ones.
    close(_sizes(answer, 64, 64, 8, 16, 2)[2], 8, what="experts per token, an exact fit", rtol=0)


def equal_super(answer: Answer) -> None:
    got = _sizes(answer, 4096, 128, 6, 2688, 4)
    close(got, [1024, 512, 22], what="the sizes for 128 experts, 6 per token", rtol=0)


def equal_refused(answer: Answer) -> None:
    # The smallest that is allowed: alpha = 1, and one expert.
    close(_sizes(answer, 64, 4, 6, 96, 1)[:2], [64, 4], what="width and experts at alpha=1", rtol=0)
    close(_sizes(answer, 64, 4, 1, 80, 2)[2], 1, what="experts per token, room for one", rtol=0)
    for alpha in (3, 0, -2):
        raises(answer, 64, 4, 6, 96, alpha, what=f"alpha={alpha} with d=64")
    raises(answer, 64, 64, 4, 16, 2, what="router and projections cost as much as all experts")


# --- 05.latent_moe ---------------------------------------------------------------------------

SMALL = NemotronConfig.from_preset("lite").replace(
    pattern="E",
    hidden_size=12,
    moe_latent_size=5,
    n_routed_experts=7,
    num_experts_per_tok=3,
    moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=10,
)
OTHER = SMALL.replace(
    moe_latent_size=4,
    n_routed_experts=9,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    routed_scaling_factor=1.0,
)
WIDE = SMALL.replace(moe_latent_size=SMALL.hidden_size)


def _loaded(
    answer: Answer, config: NemotronConfig = SMALL, *, shared: float | int = 1
) -> tuple[Any, MoE]:
    """The learner's layer and the package's, with the same weights and a bias.

    `shared` multiplies the output of the shared expert.
    """
    package, layer = MoE(config), answer(config)
    with torch.no_grad():
        package.init_weights(0.3, 1.0)
        assert package.shared_experts is not None
        package.shared_experts.down_proj.weight.mul_(shared)
        package.gate.e_score_correction_bias.copy_(0.3 * torch.randn(config.n_routed_experts))
    layer.load_state_dict(package.state_dict())
    return layer, package


def _x(*shape: int) -> Tensor:
    return _random(*shape, SMALL.hidden_size, dtype=torch.float32)


def layer_parameters(answer: Answer) -> None:
    for config in (SMALL, OTHER):
        got = {name: list(value.shape) for name, value in answer(config).state_dict().items()}
        expected = {name: list(value.shape) for name, value in MoE(config).state_dict().items()}
        for name, shape in expected.items():
            assert name in got, f"the layer has no {name}; expected one of shape {shape}."
            assert got[name] == shape, f"{name} has shape {got[name]}; expected {shape}."
        more = sorted(set(got) - set(expected))
        assert not more, f"the layer has {more[0]}, which the package's layer does not have."


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


def layer_widths(answer: Answer) -> None:
    for shared, parts in ((0, "the routed experts"), (1, "routed and shared experts")):
        layer, package = _loaded(answer, WIDE, shared=shared)
        x = _x(2, 6)
        close(layer(x), package(x).detach(), what=f"{parts}, with latent = d")


def layer_plain(answer: Answer) -> None:
    plain = MoE(WIDE.replace(moe_latent_size=None))
    layer = answer(WIDE)
    with torch.no_grad():
        plain.init_weights(0.5, 1.0)
    identity = torch.eye(WIDE.hidden_size)
    projections = {f"fc{n}_latent_proj.weight": identity for n in (1, 2)}
    layer.load_state_dict({**plain.state_dict(), **projections})
    x = _x(2, 5)
    close(layer(x), plain(x).detach(), what="the layer with identity projections")


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
        theirs = expected[name].grad
        assert theirs is not None
        # A sum of large terms can be small: what it is rounded to depends on the largest.
        atol = 1e-5 * float(theirs.abs().max()) + 1e-6
        close(ours.grad, theirs, what=f"the gradient of {name}", rtol=1e-3, atol=atol)


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
        d, latent, k = config.hidden_size, config.expert_size, config.num_experts_per_tok
        f, s = config.moe_intermediate_size, config.moe_shared_expert_intermediate_size
        experts = config.n_routed_experts
        expected = experts * d + 2 * d * latent + 2 * k * f * latent + 2 * s * d
        what = f"parameters of one token, {k} of {experts} experts"
        close(answer(config).active_parameters(), expected, what=what, rtol=0)


# --- 05.principal ----------------------------------------------------------------------------


def _features(t: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random rows in which some directions, turned at random, are much larger than others."""
    turn = torch.linalg.qr(_random(d, d)).Q
    sizes = 2.0 ** -torch.arange(d, dtype=torch.float64)
    return ((_random(t, d) * sizes) @ turn.T).to(dtype)


def _basis(answer: Answer, features: Tensor, latent: int) -> tuple[Tensor, Any]:
    got = keeps_inputs(answer, features, latent, what="principal")
    basis, kept = _results(got, 2, "principal")
    shape = [features.shape[1], latent]
    if not isinstance(basis, Tensor) or list(basis.shape) != shape:
        found = list(basis.shape) if isinstance(basis, Tensor) else type(basis).__name__
        raise AssertionError(f"the basis has shape {found}; expected d l, {shape}.")
    assert basis.dtype == features.dtype, f"the basis is {basis.dtype}, not {features.dtype}."
    return basis, kept


def _energy_in(features: Tensor, basis: Tensor) -> Tensor:
    """The share of the energy of the features inside the span of the columns."""
    q = torch.linalg.qr(basis.double()).Q
    share: Tensor = (features.double() @ q).square().sum() / features.double().square().sum()
    return share


def _most(features: Tensor, latent: int) -> Tensor:
    """The largest share that any subspace keeps (Eckart-Young)."""
    sizes = torch.linalg.svdvals(features.double()).square()
    share: Tensor = sizes[:latent].sum() / sizes.sum()
    return share


def principal_one(answer: Answer) -> None:
    # Tokens along one line.
    direction = torch.nn.functional.normalize(_random(6), dim=0)
    features = _random(9, 1) * direction
    basis, _ = _basis(answer, features, 1)
    close(
        (direction @ basis).abs(),
        torch.ones(1).double(),
        what="the cosine to the line of all tokens",
    )


def principal_orthonormal(answer: Answer) -> None:
    for latent in (1, 3, 5):
        basis, _ = _basis(answer, 3 * _features(40, 6), latent)
        close(basis.T @ basis, torch.eye(latent).double(), what=f"basisᵀ basis for l={latent}")


def principal_best(answer: Answer) -> None:
    for dtype in (torch.float64, torch.float32):
        features = _features(50, 7, dtype)
        for latent in (1, 2, 4):
            got = _energy_in(features, _basis(answer, features, latent)[0])
            what = f"the share of the energy inside the basis, l={latent}"
            close(got, _most(features, latent), what=what)


def principal_mean(answer: Answer) -> None:
    features = _features(50, 7)
    features = features + 2 * _random(7)
    basis, kept = _basis(answer, features, 1)
    close(_energy_in(features, basis), _most(features, 1), what="the share inside one direction")
    close(kept, float(_most(features, 1)), what="kept, for features with a mean")


def principal_kept(answer: Answer) -> None:
    for scale in (1.0, 30.0):
        features = scale * _features(30, 5)
        for latent in (1, 3):
            _, kept = _basis(answer, features, latent)
            close(kept, float(_most(features, latent)), what=f"kept for l={latent}")


def principal_edges(answer: Answer) -> None:
    for t, d in ((3, 8), (20, 6)):
        features = _features(t, d)
        basis, kept = _basis(answer, features, d)
        close(basis.T @ basis, torch.eye(d).double(), what=f"basisᵀ basis, {t} tokens, l = d = {d}")
        close(kept, 1.0, what=f"kept, {t} tokens, l = d = {d}")
    features = strided(_features(2, 6))
    basis, _ = _basis(answer, features, 4)
    close(_energy_in(features, basis), torch.tensor(1.0).double(), what="2 tokens in 4 directions")


# --- 05.compress -----------------------------------------------------------------------------


def _mixture(e: int = 3, f: int = 5, d: int = 6) -> tuple[Tensor, Tensor]:
    return _random(e, f, d), _random(e, d, f)


def _orthonormal(d: int, latent: int) -> Tensor:
    return torch.linalg.qr(_random(d, latent)).Q


def _compressed(answer: Answer, up: Tensor, down: Tensor, basis: Tensor) -> list[Tensor]:
    """The four results, with the shapes that the layer needs."""
    got = keeps_inputs(answer, up, down, basis, what="compress")
    parts = _results(got, 4, "compress")
    (d, latent), (e, f) = basis.shape, up.shape[:2]
    shapes = {"fc1": [latent, d], "up": [e, f, latent], "down": [e, latent, f], "fc2": [d, latent]}
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
        found = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
        assert found == shape, f"{name} has shape {found}; expected {shape}."
    return parts


def compress_shapes(answer: Answer) -> None:
    for e, f, d, latent in ((3, 5, 6, 2), (4, 7, 5, 5), (1, 3, 4, 1)):
        _compressed(answer, *_mixture(e, f, d), _orthonormal(d, latent))


def compress_projections(answer: Answer) -> None:
    for latent in (2, 6):
        basis = strided(_orthonormal(6, latent))
        fc1, _, _, fc2 = _compressed(answer, *_mixture(), basis)
        x = _random(4, 6)
        # fc2 fc1 is the projection onto the subspace, and fc1 reads the coordinates.
        close(x @ fc1.T, x @ basis, what=f"fc1 of four tokens, l={latent}", dtype=True)
        close(fc2, basis, what=f"fc2, l={latent}", dtype=True)


def _mixed(parts: list[Tensor], x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """The routed part of a latent layer."""
    fc1, up, down, fc2 = parts
    return ops.expert_mlp(x @ fc1.T, up, down, weights, indices, impl="torch") @ fc2.T


def _choices(t: int, k: int, e: int) -> tuple[Tensor, Tensor]:
    return torch.rand(t, k, dtype=torch.float64) + 0.1, torch.rand(t, e).topk(k).indices


def compress_exact(answer: Answer) -> None:
    up, down = _mixture()
    weights, indices = _choices(8, 2, 3)
    x = _random(8, 6)
    got = _mixed(_compressed(answer, up, down, _orthonormal(6, 6)), x, weights, indices)
    expected = ops.expert_mlp(x, up, down, weights, indices, impl="torch")
    close(got, expected, what="the latent layer with l = d, beside the plain one")


def compress_inside(answer: Answer) -> None:
    # Tokens of the subspace: the output is the plain one, projected onto the subspace.
    for latent in (1, 3):
        up, down = _mixture()
        basis = _orthonormal(6, latent)
        weights, indices = _choices(8, 2, 3)
        x = _random(8, latent) @ basis.T
        got = _mixed(_compressed(answer, up, down, basis), x, weights, indices)
        plain = ops.expert_mlp(x, up, down, weights, indices, impl="torch")
        what = f"tokens of the subspace, l={latent}, beside the plain output inside of it"
        close(got, plain @ basis @ basis.T, what=what)


def compress_gradients(answer: Answer) -> None:
    x, (weights, indices) = _random(4, 6), _choices(4, 2, 3)

    def ours(up: Tensor, down: Tensor, basis: Tensor) -> Tensor:
        return _mixed(_compressed(answer, up, down, basis), x, weights, indices)

    def package(up: Tensor, down: Tensor, basis: Tensor) -> Tensor:
        hidden = torch.einsum("td,dl,ml,efm->tef", x, basis, basis, up)
        answers = torch.einsum("tef,edf->ted", ops.squared_relu(hidden), down)
        dense = torch.zeros(4, 3, dtype=torch.float64).scatter(1, indices, weights)
        return torch.einsum("ted,te,dl,ml->tm", answers, dense, basis, basis)

    gradients(ours, package, (*_mixture(), _orthonormal(6, 3)))
