"""The router: the bias only selects, weights sum to the scale, groups limit the choice."""

from __future__ import annotations

import pytest
import torch

from nemotron_lite.ops import route
from tests.compare import errors


def _inputs(t: int = 9, e: int = 12, d: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(t)
    return torch.randn(t, d), torch.randn(e, d) * 2, torch.randn(e) * 0.3


def _dense(routing) -> torch.Tensor:  # the order within a row does not matter
    return torch.zeros_like(routing.scores).scatter(1, routing.indices, routing.weights)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (4, 2), (3, 1), (2, 2)])
@pytest.mark.parametrize("t", [1, 9])
def test_torch_equals_naive(t: int, n_group: int, topk_group: int, normalize: bool) -> None:
    x, weight, bias = _inputs(t)
    chosen = dict(top_k=3, n_group=n_group, topk_group=topk_group, normalize=normalize, scale=2.5)
    found = route(x, weight, bias, impl="torch", **chosen)
    naive = route(x, weight, bias, impl="naive", **chosen)
    assert torch.equal(found.indices.sort().values, naive.indices.sort().values)
    torch.testing.assert_close(_dense(found), _dense(naive))


def test_gradients() -> None:
    x, weight, bias = (v.double() for v in _inputs())

    def dense(impl: str):
        return lambda x, w: _dense(route(x, w, bias.to(x.dtype), top_k=3, scale=2.5, impl=impl))

    found = errors(dense("torch"), dense("naive"), [x, weight])
    assert max(found) < 1e-6, found


def test_bias_affects_the_choice_but_not_the_weights() -> None:
    x, weight, _ = _inputs()
    bias = torch.zeros(12)
    bias[7] = 100.0
    found = route(x, weight, bias, top_k=2, scale=5.0)
    assert (found.indices == 7).any(1).all()
    scores = torch.sigmoid(x @ weight.t())
    picked = scores.gather(1, found.indices)
    torch.testing.assert_close(found.weights, 5.0 * picked / picked.sum(1, keepdim=True))
    torch.testing.assert_close(found.weights.sum(1), torch.full((9,), 5.0))


def test_negative_biases_do_not_select_dropped_groups() -> None:
    """A mask of 0 instead of -inf would prefer a dropped group to a negative score."""
    x, weight, _ = _inputs(e=8)
    bias = torch.full((8,), -3.0)
    found = route(x, weight, bias, top_k=4, n_group=2, topk_group=1)
    assert ((found.indices // 4) == (found.indices[:, :1] // 4)).all()


def test_scores_are_float32_whatever_the_model() -> None:
    x, weight, bias = _inputs()
    low = route(x.bfloat16(), weight.bfloat16(), bias, top_k=2)
    exact = torch.sigmoid(x.bfloat16().double() @ weight.bfloat16().double().t())
    assert low.scores.dtype == low.weights.dtype == torch.float32
    torch.testing.assert_close(low.scores.double(), exact, rtol=1e-5, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = route(x.bfloat16(), weight, bias, top_k=2)
    assert mixed.scores.dtype == torch.float32
    torch.testing.assert_close(
        mixed.scores.double(),
        torch.sigmoid(x.bfloat16().double() @ weight.double().t()),
        rtol=1e-5,
        atol=1e-6,
    )
