"""The norm kernels against the formula in float64 of the same rounded inputs.

Relative rms errors: float32 2e-6, float16 outputs the size of their rounding step.
"""

from __future__ import annotations

import pytest
import torch

from nemotron_kernels import gated_rms_norm, rms_norm
from nemotron_lite import ops
from tests.compare import errors

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "d"), [((1,), 2), ((3,), 17), ((2, 67), 96), ((2, 1), 1024), ((5,), 2688)]
)
def test_plain(rows: tuple[int, ...], d: int, dtype: torch.dtype) -> None:
    found = errors(
        rms_norm, lambda *v: ops.rms_norm(*v, impl="naive"), [_randn(*rows, d), _randn(d)], dtype
    )
    assert len(found) == 3
    assert max(found) < TOLERANCE[dtype], found


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("rows", "c", "groups"),
    [
        ((1,), 8, 1),
        ((1,), 6, 2),
        ((2, 63), 96, 8),
        ((300,), 40, 2),
        ((2, 3), 4096, 8),
        ((3,), 9, 3),
    ],
)
def test_gated(rows: tuple[int, ...], c: int, groups: int, dtype: torch.dtype) -> None:
    inputs = [_randn(*rows, c), _randn(*rows, c), _randn(c)]
    found = errors(
        lambda y, z, w: gated_rms_norm(y, z, w, groups),
        lambda y, z, w: ops.gated_rms_norm(y, z, w, groups, impl="naive"),
        inputs,
        dtype,
    )
    assert len(found) == 4
    assert max(found) < TOLERANCE[dtype], found


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1.0])
def test_eps_matters_where_rows_are_small(eps: float) -> None:
    inputs = [
        _randn(4, 24) * torch.tensor([[1e-6], [1e-3], [1.0], [0.0]]),
        _randn(4, 24),
        _randn(24),
    ]
    found = errors(
        lambda y, z, w: gated_rms_norm(y, z, w, 2, eps),
        lambda y, z, w: ops.gated_rms_norm(y, z, w, 2, eps, impl="naive"),
        inputs,
    )
    assert max(found) < TOLERANCE[torch.float32], found


def test_gate_comes_before_the_norm_and_groups_are_separate() -> None:
    y, z = torch.tensor([[3.0, 4.0, 0.5, 0.0]]), torch.full((1, 4), 100.0)
    out = gated_rms_norm(y, z, torch.ones(4), 2, 0.0)
    # After normalization each pair has a mean square of one; the gate of 100 has no effect.
    expected = torch.tensor([[3.0, 4.0, 1.0, 0.0]]) / torch.tensor([12.5**0.5] * 2 + [0.5**0.5] * 2)
    torch.testing.assert_close(out, expected)


def test_groups_of_one_channel() -> None:
    """The value is w times the sign of y z. The gradient exists only by eps: too small to test."""
    y, z, w = (_randn(5, 3).float(), _randn(5, 3).float(), _randn(3).float())
    torch.testing.assert_close(gated_rms_norm(y, z, w, 3, 1e-12), w * torch.sign(y * z))


def test_rows_outside_a_tile_have_no_effect_even_without_eps() -> None:
    inputs = [_randn(5, 12), _randn(5, 12), _randn(12)]
    found = errors(
        lambda y, z, w: gated_rms_norm(y, z, w, 2, 0.0),
        lambda y, z, w: ops.gated_rms_norm(y, z, w, 2, 0.0, impl="naive"),
        inputs,
    )
    assert max(found) < TOLERANCE[torch.float32], found


def test_slices_of_a_projection_are_read_in_place() -> None:
    wide = _randn(2, 9, 70).float()
    y, z, w = wide[..., 3:27], wide[..., 40:64], _randn(24).float()
    expected = ops.gated_rms_norm(y, z, w, 3, impl="naive")
    torch.testing.assert_close(gated_rms_norm(y, z, w, 3), expected)
    # Rows with two strides, and channels that are not contiguous: copied first.
    torch.testing.assert_close(gated_rms_norm(y[:, :5], z[:, :5], w, 3), expected[:, :5])
    apart = y.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(gated_rms_norm(apart, z, w.repeat(2)[:24], 3), expected)


def test_expanded_gradients() -> None:
    x, w = _randn(3, 20).float().requires_grad_(), _randn(20).float()
    rms_norm(x, w).sum().backward()
    leaf = x.detach().clone().requires_grad_()
    ops.rms_norm(leaf, w, impl="naive").sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad)


def test_dtypes_may_differ() -> None:
    y, z, w = _randn(4, 16).half(), _randn(4, 16).float(), _randn(16).half()
    leaves = [v.requires_grad_() for v in (y, z, w)]
    out = gated_rms_norm(*leaves, 2)
    out.sum().backward()
    assert out.dtype == torch.float16
    assert [v.grad.dtype for v in leaves] == [torch.float16, torch.float32, torch.float16]
    exact = ops.gated_rms_norm(*(v.detach().double() for v in leaves), 2, impl="naive")
    torch.testing.assert_close(out.double(), exact, rtol=1e-3, atol=1e-4)


def test_bfloat16_rounds_the_result_only() -> None:
    """The interpreter truncates to bfloat16, so results are within one step of the exact value."""
    y, z, w = (_randn(*s).bfloat16() for s in [(6, 64), (6, 64), (64,)])
    out = gated_rms_norm(y, z, w, 2)
    exact = ops.gated_rms_norm(y.double(), z.double(), w.double(), 2, impl="naive")
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-7 + 1e-30).all()


def test_extreme_gates_stay_finite() -> None:
    z = torch.tensor([[-1e4, 1e4, 0.0, -80.0]]).requires_grad_()
    y, w = torch.ones(1, 4).requires_grad_(), torch.ones(4)
    gated_rms_norm(y, z, w, 2).sum().backward()
    assert y.grad.isfinite().all()
    assert z.grad.isfinite().all()


def test_no_rows() -> None:
    y, z, w = torch.zeros(0, 8), torch.zeros(0, 8), torch.ones(8)
    assert gated_rms_norm(y, z, w, 2).shape == (0, 8)
    assert rms_norm(y, w).shape == (0, 8)


def test_the_same_bits_twice() -> None:
    values = [_randn(300, 24).float(), _randn(300, 24).float(), _randn(24).float()]
    runs = []
    for _ in range(2):
        leaves = [v.clone().requires_grad_() for v in values]
        gated_rms_norm(*leaves, 2).square().sum().backward()
        runs.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_wrong_inputs_are_refused() -> None:
    y, w = torch.zeros(2, 6), torch.zeros(6)
    with pytest.raises(ValueError, match="6 channels do not split into 4 groups"):
        gated_rms_norm(y, y, w, 4)
    with pytest.raises(ValueError, match=r"z has shape \(1, 6\), y \(2, 6\); they must"):
        gated_rms_norm(y, y[:1], w, 2)
    with pytest.raises(ValueError, match=r"weight has shape \(5,\); expected \(6,\)"):
        rms_norm(y, w[:5])
    with pytest.raises(ValueError, match="at most 32768"):
        rms_norm(torch.zeros(1, 40_000), torch.zeros(40_000))
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        rms_norm(y.double(), w)
