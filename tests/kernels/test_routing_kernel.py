"""The router's kernel against the definition in float64 of the same float32 logits.

It must choose what the definition chooses. The exception is two experts whose s + b differ by at
most 4 units in the last place, which float32 cannot decide. Those cases are counted.
"""

from __future__ import annotations

import pytest
import torch

from nemotron_kernels.routing import route, route_logits
from nemotron_lite import ops
from tests.compare import errors

SHAPES = [  # t, e, k, n_group, topk_group
    (1, 8, 2, 1, 1),
    (5, 10, 3, 1, 1),
    (123, 16, 3, 4, 2),
    (123, 130, 6, 1, 1),
    (300, 12, 4, 3, 3),  # more rows than one program takes; all groups kept
    (40, 512, 22, 8, 3),
    (40, 512, 22, 1, 1),
]
SIZES = ("t", "e", "k", "n_group", "topk_group")


def _exact(logits, bias, k, n_group, topk_group, normalize=True, scale=1.0):
    """The naive definition. The router's matrix is the identity, so the input is the logits."""
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    return ops.route(
        logits,
        eye,
        bias.to(logits.dtype),
        top_k=k,
        n_group=n_group,
        topk_group=topk_group,
        normalize=normalize,
        scale=scale,
        impl="naive",
    )


def _inputs(t: int, e: int, spread: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    return spread * torch.randn(t, e), 0.1 * torch.randn(e)


def _close_calls(found: torch.Tensor, exact: torch.Tensor, biased: torch.Tensor) -> int:
    """The number of rows with another choice; each must have a margin below 4 ulp."""
    rows = (found.sort(1).values != exact.sort(1).values).any(1)
    for chosen, expected, values in zip(found[rows], exact[rows], biased[rows], strict=True):
        missed = values[[e for e in expected.tolist() if e not in chosen.tolist()]]
        taken = values[[e for e in chosen.tolist() if e not in expected.tolist()]]
        top = values.abs().max().float()
        ulp = torch.nextafter(top, torch.tensor(torch.inf)) - top
        assert (missed.max() - taken.min()) < 4 * ulp, (missed, taken, ulp)
    return int(rows.sum())


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(SIZES, SHAPES)
def test_choice_weights_and_scores(t, e, k, n_group, topk_group, normalize) -> None:
    logits, bias = _inputs(t, e)
    choice = (k, n_group, topk_group, normalize, 5.0)
    found = route_logits(logits, bias, *choice)
    exact = _exact(logits.double(), bias, *choice)
    assert found.weights.dtype == found.scores.dtype == torch.float32
    assert found.indices.dtype == torch.int64
    assert _close_calls(found.indices, exact.indices, exact.scores + bias.double()) == 0
    assert torch.equal(found.indices, exact.indices)  # both have the largest first
    torch.testing.assert_close(found.scores.double(), exact.scores, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.weights.double(), exact.weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("centre", "most"), [(0.0, 2), (64.0, 8)])
def test_close_calls_of_many_tokens_are_few(centre: float, most: int) -> None:
    """A million scores at Super's size: choices that float32 cannot decide are rare.

    With biases near 0 and near 64 there were 0 and 7 of them among 16,384 tokens.
    """
    logits, bias = _inputs(2048, 512)
    bias = bias + centre
    found = route_logits(logits, bias, 22)
    biased = logits.double().sigmoid() + bias.double()
    exact = biased.topk(22).indices
    assert _close_calls(found.indices, exact, biased) <= most


@pytest.mark.parametrize("centre", [0.0, -2.0, 64.0])
def test_choice_is_exact_given_the_scores(centre: float) -> None:
    """Published biases are near 64, where float32 has steps of 2^-17, so there are many ties."""
    logits, bias = _inputs(200, 512)
    bias = bias + centre
    found = route_logits(logits, bias, 22)
    biased = found.scores + bias
    expected = biased.sort(dim=1, descending=True, stable=True).indices[:, :22]
    if centre == 64:
        ties = biased.sort(dim=1).values.diff(dim=1) == 0
        assert ties.any(1).float().mean() > 0.3
    assert torch.equal(found.indices, expected)


def test_ties_go_to_the_lower_number() -> None:
    found = route_logits(torch.zeros(3, 12), torch.zeros(12), 5, 3, 2)
    assert found.indices.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert torch.equal(found.weights, torch.full((3, 5), 0.2))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(SIZES, SHAPES)
def test_gradient_to_the_logits(t, e, k, n_group, topk_group, normalize) -> None:
    logits, bias = _inputs(t, e)
    choice = (k, n_group, topk_group, normalize, 2.5)
    found = errors(
        lambda x: route_logits(x, bias, *choice)[::2],
        lambda x: _exact(x, bias, *choice)[::2],
        [logits],
    )
    assert len(found) == 3
    assert max(found) < 1e-6, found


@pytest.mark.parametrize("part", [0, 2])
def test_gradient_through_one_output_only(part: int) -> None:
    logits, bias = _inputs(7, 16)
    found = errors(
        lambda x: route_logits(x, bias, 3, 1, 1, True, 5.0)[part],
        lambda x: _exact(x, bias, 3, 1, 1, True, 5.0)[part],
        [logits],
    )
    assert max(found) < 1e-6, found


def test_scores_to_two_units_in_the_last_place() -> None:
    logits = torch.linspace(-87, 87, 2**16).view(-1, 64)
    found = route_logits(logits, torch.zeros(64), 1).scores.double()
    exact = logits.double().sigmoid()
    assert ((found - exact) / exact).abs().max() < 2**-22


def test_saturated_scores_keep_their_gradient() -> None:
    """1 - s has no digits left at s = 1 - 1e-8; sigmoid(-x) has all of them."""
    x = torch.tensor([[-120.0, -90.0, -30.0, -1.0, 0.0, 1.0, 18.0, 30.0, 60.0, 120.0]])
    leaf = x.clone().requires_grad_()
    found = route_logits(leaf, torch.zeros(10), 2)
    found.scores.sum().backward()
    wide = x.double()
    exact = wide.sigmoid() * (-wide).sigmoid()
    torch.testing.assert_close(found.scores.double(), wide.sigmoid(), rtol=3e-7, atol=2e-45)
    torch.testing.assert_close(leaf.grad.double(), exact, rtol=5e-7, atol=2e-45)


def test_nan_and_infinity_stay_visible_and_experts_are_distinct() -> None:
    logits, bias = _inputs(4, 9)
    logits[0, 2] = float("nan")
    logits[1, 3] = float("inf")
    logits[2] = float("-inf")
    logits[3] = float("nan")
    found = route_logits(logits, bias, 4)
    assert all(len(set(row)) == 4 and set(row) <= set(range(9)) for row in found.indices.tolist())
    assert found.indices[0, 0] == 2 and found.weights[0].isnan().all()
    assert found.scores[1, 3] == 1
    assert (found.scores[2] == 0).all() and (found.weights[2] == 0).all()
    assert found.weights[3].isnan().all() and found.scores[3].isnan().all()


def test_strided_logits_and_expanded_gradients() -> None:
    wide, bias = _inputs(9, 40)
    expected = _exact(wide[:, 3:20].double(), bias[:17], 4, 1, 1)
    for view in (wide[:, 3:20], wide[:, 3:20].t().contiguous().t()):
        leaf = view.detach().requires_grad_()
        assert not leaf.is_contiguous()
        found = route_logits(leaf, bias[:17], 4)
        assert torch.equal(found.indices, expected.indices)
        (found.weights.sum() + found.scores.sum()).backward()  # gradients of stride 0
        exact = expected.scores * (1 - expected.scores)  # the weights always sum to one
        torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-5, atol=1e-7)


def test_no_tokens() -> None:
    leaf = torch.zeros(0, 8).requires_grad_()
    found = route_logits(leaf, torch.zeros(8), 2)
    assert found.weights.shape == found.indices.shape == (0, 2) and found.scores.shape == (0, 8)
    found.scores.sum().backward()
    assert leaf.grad.shape == (0, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_from_tokens_as_the_pytorch_router(dtype: torch.dtype) -> None:
    """The same float32 product, so the same choice, with and without autocast."""
    x, weight = torch.randn(33, 24).to(dtype), torch.randn(16, 24).to(dtype)
    bias = 0.1 * torch.randn(16)
    exact = ops.route(x, weight, bias, top_k=3, scale=5.0, impl="torch")
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = route(x, weight, bias, 3, 1, 1, True, 5.0)
        assert torch.equal(found.indices.sort(1).values, exact.indices.sort(1).values)
        torch.testing.assert_close(found.scores, exact.scores, rtol=1e-6, atol=0)


def test_gradients_reach_tokens_and_matrix_but_never_the_bias() -> None:
    x, weight = torch.randn(21, 24), torch.randn(10, 24) / 24**0.5
    bias = (0.1 * torch.randn(10)).requires_grad_()
    found = errors(
        lambda *v: route(*v, bias, 3, 1, 1, True, 5.0)[::2],
        lambda *v: ops.route(*v, bias.detach().double(), top_k=3, scale=5.0, impl="naive")[::2],
        [x, weight],
    )
    assert len(found) == 4
    assert max(found) < 2e-6, found
    assert bias.grad is None


def test_wrong_inputs_say_what_was_expected() -> None:
    logits, bias = _inputs(3, 12)
    with pytest.raises(ValueError, match=r"float16; the router works in float32"):
        route_logits(logits.half(), bias, 2)
    with pytest.raises(ValueError, match=r"not torch.float64"):
        route_logits(logits.double(), bias, 2)
    with pytest.raises(ValueError, match=r"bias has shape \(11,\), expected \(12,\)"):
        route_logits(logits, bias[:11], 2)
    with pytest.raises(ValueError, match="n_group=5 must divide 12"):
        route_logits(logits, bias, 2, 5)
    with pytest.raises(ValueError, match="topk_group=4 must be 1 to 3"):
        route_logits(logits, bias, 2, 3, 4)
    with pytest.raises(ValueError, match="one expert per group"):
        route_logits(logits, bias, 2, 12, 3)
    with pytest.raises(ValueError, match="top_k=5, expected 1 to 4"):
        route_logits(logits, bias, 5, 3, 1)
    with pytest.raises(ValueError, match="top_k=0"):
        route_logits(logits, bias, 0)
