"""The acceptance rule: its forms against each other, and the distribution of its tokens.

The distribution is tested at one position of a draft with 60,000 rows. The same test must reject a
wrong rule that looks plausible: after a rejection it draws from p instead of from p - q.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron_lite import ops
from tests.chi_square import chi_square, critical_value


def _case(
    b: int, k: int, v: int, seed: int, sharp: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """p, q, drafts from q, uniforms; some probabilities are exactly zero, as after top-p."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(2, b, k + 1, v, generator=generator) * sharp
    probabilities = raw.softmax(-1)
    probabilities = probabilities * (probabilities >= probabilities.median(-1, keepdim=True).values)
    p, q = probabilities / probabilities.sum(-1, keepdim=True)
    q = torch.where(torch.rand(b, 1, 1, generator=generator) < 0.4, p, q)[
        :, :k
    ]  # some rows of p and q agree
    uniforms = torch.rand(b, k + 1, generator=generator, dtype=torch.float64)
    flat = torch.rand(b * k, generator=generator, dtype=torch.float64)
    drafts = ops.draw(q.reshape(b * k, v), flat).view(b, k)
    return p, q, drafts, uniforms


@given(
    b=st.integers(1, 5), k=st.integers(0, 5), v=st.integers(2, 40), seed=st.integers(0, 999),
    ragged=st.booleans(),
)  # fmt: skip
def test_the_torch_form_is_the_definition(b: int, k: int, v: int, seed: int, ragged: bool) -> None:
    p, q, drafts, uniforms = _case(b, k, v, seed)
    lengths = torch.randint(k + 1, (b,), generator=torch.Generator().manual_seed(seed))
    lengths = lengths if ragged else None
    exact = ops.verify(p, q, drafts, uniforms, lengths, impl="naive")
    found = ops.verify(p, q, drafts, uniforms, lengths)
    assert torch.equal(found.accepted, exact.accepted)
    assert torch.equal(found.token, exact.token)
    assert lengths is None or bool((found.accepted <= lengths).all())
    rows = torch.arange(b)
    assert bool((p[rows, found.accepted, found.token] > 0).all()), "a token that p excludes"


def test_positions_beyond_a_row_s_length_are_not_read() -> None:
    p, q, drafts, uniforms = _case(4, 3, 9, seed=3)
    lengths = torch.tensor([0, 1, 2, 3])
    expected = ops.verify(p, q, drafts, uniforms, lengths)
    beyond = torch.arange(3) >= lengths[:, None]
    q[beyond], p[:, 1:][beyond] = float("nan"), float("nan")
    for impl in ("naive", "torch"):
        found = ops.verify(p, q, drafts.masked_fill(beyond, 0), uniforms, lengths, impl=impl)
        assert torch.equal(found.accepted, expected.accepted)
        assert torch.equal(found.token, expected.token)


@pytest.mark.parametrize("impl", ["naive", "torch"])
def test_one_hot_distributions_give_greedy_decoding(impl: str) -> None:
    eye = torch.eye(6)
    drafts = torch.tensor([[2, 3, 4], [2, 0, 4], [5, 3, 4]])
    best = torch.tensor([[2, 3, 4, 1]]).expand(3, 4)
    found = ops.verify(eye[best], eye[drafts], drafts, torch.rand(3, 4).double(), impl=impl)
    assert found.accepted.tolist() == [3, 1, 0]
    assert found.token.tolist() == [1, 3, 2]


def test_a_perfect_drafter_is_always_accepted() -> None:
    p, _, _, uniforms = _case(500, 4, 11, seed=5)
    drafts = ops.draw(p[:, :4].reshape(-1, 11), torch.rand(2000).double()).view(500, 4)
    assert bool((ops.verify(p, p[:, :4], drafts, uniforms).accepted == 4).all())


def test_a_token_of_weight_zero_is_never_drawn() -> None:
    weights = torch.tensor([[0.0, 0.3, 0.7, 0.0]])
    nearly_one = 1 - 2.0**-53
    for u, token in ((0.0, 1), (0.2999999, 1), (0.3001, 2), (nearly_one, 2)):
        assert ops.draw(weights, torch.tensor([u], dtype=torch.float64)).tolist() == [token]


ROWS = 60_000


def _biased(p, q, drafts, uniforms):
    """The wrong rule: draws from p after a rejection."""
    accept = uniforms[:, 0] * q[:, 0].gather(1, drafts)[:, 0] < p[:, 0].gather(1, drafts)[:, 0]
    return torch.where(accept, drafts[:, 0], ops.draw(p[:, 0], uniforms[:, 1]))


@pytest.mark.parametrize("sharp", [0.3, 1.0, 2.5])
def test_the_first_token_is_distributed_as_p_and_a_biased_rule_s_is_not(sharp: float) -> None:
    p, q, _, _ = _case(1, 1, 8, seed=int(10 * sharp), sharp=sharp)
    q = _case(1, 1, 8, seed=77, sharp=sharp)[1]
    q = (q + 0.05) / (q + 0.05).sum(-1, keepdim=True)
    p, q = p.expand(ROWS, -1, -1), q.expand(ROWS, -1, -1)
    uniforms = torch.rand(ROWS, 3, dtype=torch.float64)
    drafts = ops.draw(q[:, 0], uniforms[:, 2])[:, None]
    found = ops.verify(p, q, drafts, uniforms[:, :2])
    first = torch.where(found.accepted > 0, drafts[:, 0], found.token)
    value, cells = chi_square(torch.bincount(first, minlength=8), p[0, 0])
    assert value < critical_value(cells - 1)
    wrong = _biased(p, q, drafts, uniforms[:, :2])
    assert chi_square(torch.bincount(wrong, minlength=8), p[0, 0])[0] > critical_value(cells - 1)
    # The share accepted is the overlap of p and q, within five standard deviations.
    overlap = torch.minimum(p[0, 0], q[0, 0]).sum()
    assert abs(found.accepted.double().mean() - overlap) < 5 * 0.5 / ROWS**0.5


def test_wrong_inputs_are_refused() -> None:
    p, q, drafts, uniforms = _case(2, 3, 5, seed=0)
    with pytest.raises(ValueError, match=r"q has shape \[2, 2, 5\].*expected \[2, 3, 5\]"):
        ops.verify(p, q[:, :2], drafts[:, :2], uniforms)
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        ops.verify(p, q, drafts, uniforms, impl="cuda")
