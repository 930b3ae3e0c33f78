"""The experts' kernels against a loop over tokens in float64 on the same rounded inputs; the sort.

Tolerances are relative rms errors: 1e-6 in float32, 1e-3 in float16 (squaring doubles the rounding
error of the hidden rows; eight times finer than the 8e-3 that bfloat16 is allowed).
"""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import InterpreterError

from nemotron_kernels import experts, grouped
from nemotron_kernels.experts import expert_mlp
from nemotron_kernels.sorting import sort_by_expert, tile_bound
from nemotron_lite import ops
from tests.compare import errors, relative_rms
from tests.kernels.interpreter import overflow_is_an_error

TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3}


def _indices(t: int, e: int, k: int) -> torch.Tensor:
    return torch.stack([torch.randperm(e)[:k] for _ in range(t)])


def _inputs(t: int, e: int, k: int, width: int = 60, hidden: int = 100) -> list[torch.Tensor]:
    return [
        torch.randn(t, width),
        torch.randn(e, hidden, width) / width**0.5,
        torch.randn(e, width, hidden) / hidden**0.5,
        torch.rand(t, k),
    ]


def _exact(*inputs: torch.Tensor) -> torch.Tensor:
    return ops.expert_mlp(*inputs, impl="naive")


def _against_the_definition(inputs, indices, dtype=torch.float32, **options) -> list[float]:
    return errors(
        lambda *v: expert_mlp(*v, indices, **options),
        lambda *v: _exact(*v, indices),
        inputs,
        dtype,
    )


# The sort


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(
    ("t", "e", "k"), [(1, 8, 2), (5, 10, 3), (123, 16, 3), (171, 3, 3), (200, 512, 22), (0, 4, 2)]
)
def test_sort_is_stable_and_counts(t: int, e: int, k: int, rows: int) -> None:
    indices = _indices(t, e, k) if t else torch.zeros(0, k, dtype=torch.int64)
    order = sort_by_expert(indices, e, rows)
    flat = indices.flatten()
    counts = torch.bincount(flat, minlength=e)
    assert torch.equal(order.pairs.long(), flat.argsort(stable=True))
    assert torch.equal(order.pairs[order.places.long()].long(), torch.arange(t * k))
    assert torch.equal(order.counts.long(), counts)
    assert order.starts[0] == 0 and torch.equal(order.starts[1:].long(), counts.cumsum(0))
    tiles = [
        (expert, start)
        for expert in range(e)
        for start in range(int(order.starts[expert]), int(order.starts[expert + 1]), rows)
    ]
    real = order.tile_experts >= 0
    assert real.numel() == tile_bound(t * k, e, rows) >= len(tiles)
    assert real.tolist() == sorted(real.tolist(), reverse=True)
    cut = torch.stack([order.tile_experts, order.tile_starts], 1)[real]
    assert [tuple(tile) for tile in cut.tolist()] == tiles


def test_everything_to_one_expert() -> None:
    order = sort_by_expert(torch.full((700, 1), 5, dtype=torch.int32), 8, 64)
    assert order.counts.tolist() == [0, 0, 0, 0, 0, 700, 0, 0]
    assert torch.equal(order.pairs, torch.arange(700, dtype=torch.int32))


@pytest.mark.parametrize("wrong", [-1, 8])
def test_debugging_catches_an_index_out_of_range(wrong: int) -> None:
    """What TRITON_DEBUG=1 does on a device: checks inside kernels stop the program."""
    indices, debugging = torch.tensor([[wrong, 2]]), overflow_is_an_error
    with debugging(), pytest.raises(InterpreterError, match="out of range"):
        sort_by_expert(indices, 8)
    with debugging(), pytest.raises(InterpreterError, match="out of range"), torch.no_grad():
        expert_mlp(*_inputs(1, 8, 2), indices)


# Values and gradients


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("t", "e", "k", "width", "hidden"),
    [
        (1, 8, 2, 60, 100),
        (5, 10, 3, 60, 100),
        (123, 16, 3, 60, 100),  # tiles of 32 rows
        (90, 4, 2, 64, 128),  # of 64, and no tail anywhere
        (150, 3, 2, 60, 100),  # of 128 in 16 bits
        (37, 12, 4, 130, 33),
    ],
)
def test_values_and_every_gradient(t, e, k, width, hidden, dtype) -> None:
    found = _against_the_definition(_inputs(t, e, k, width, hidden), _indices(t, e, k), dtype)
    assert len(found) == 1 + 4
    assert max(found) < TOLERANCE[dtype], found


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_experts_without_tokens(dtype: torch.dtype) -> None:
    inputs, indices = _inputs(40, 16, 2), 3 * _indices(40, 5, 2)
    found = _against_the_definition(inputs, indices, dtype)
    assert max(found) < TOLERANCE[dtype], found
    up, down = (x.clone().requires_grad_() for x in inputs[1:3])
    expert_mlp(inputs[0], up, down, inputs[3], indices).square().sum().backward()
    idle = [e for e in range(16) if e not in indices]
    assert len(idle) >= 11
    assert (up.grad[idle] == 0).all() and (down.grad[idle] == 0).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("t", "e", "k"), [(1, 8, 2), (1, 12, 5), (2, 40, 5), (4, 16, 1)])
def test_few_tokens_are_not_sorted(t, e, k, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_sorted", lambda *_: pytest.fail("sorted"))
    inputs, indices = [x.to(dtype) for x in _inputs(t, e, k, 61, 530)], _indices(t, e, k)
    with torch.no_grad():
        found = expert_mlp(*inputs, indices)
    exact = _exact(*(x.double() for x in inputs), indices)
    assert found.dtype == dtype
    assert relative_rms(found, exact) < TOLERANCE[dtype]


def test_many_tokens_without_gradients_are_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "_unsorted", lambda *_: pytest.fail("not sorted"))
    inputs, indices = _inputs(9, 8, 2), _indices(9, 8, 2)
    with torch.no_grad():
        found = expert_mlp(*inputs, indices)
    assert relative_rms(found, _exact(*(x.double() for x in inputs), indices)) < 1e-6


def test_training_and_inference_agree_bit_for_bit() -> None:
    inputs, indices = [x.half() for x in _inputs(30, 8, 2)], _indices(30, 8, 2)
    with torch.no_grad():
        quiet = expert_mlp(*inputs, indices)
    assert torch.equal(quiet, expert_mlp(inputs[0].requires_grad_(), *inputs[1:], indices))


def test_the_same_bits_twice() -> None:
    inputs, indices = _inputs(60, 8, 3), _indices(60, 8, 3)
    runs = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in inputs]
        expert_mlp(*leaves, indices).square().sum().backward()
        runs.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("t", [1, 23])
def test_strided_inputs_and_expanded_gradients(t: int) -> None:
    """Slices of wider tensors, transposed matrices, int32 indices."""
    z, up, down, weights = _inputs(t, 9, 3)
    indices = _indices(t, 9, 3)

    def apart(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x, torch.full_like(x, 7)], -1)[..., 0]

    views = [
        torch.cat([torch.ones(t, 5), z, torch.ones(t, 3)], 1)[:, 5:-3],
        up.mT.contiguous().mT,
        torch.cat([down, down], 2)[..., : down.shape[2]],
        apart(weights),
    ]
    exact = [x.double().requires_grad_() for x in (z, up, down, weights)]
    expected = _exact(*exact, indices)
    expected.sum().backward()
    for first in (views[0], apart(z)):
        leaves = [x.detach().requires_grad_() for x in (first, *views[1:])]
        assert not any(x.is_contiguous() for x in leaves[:3]) or t == 1
        found = expert_mlp(*leaves, apart(indices.int()))
        found.sum().backward()
        assert relative_rms(found.detach(), expected.detach()) < 1e-6
        for leaf, wide in zip(leaves, exact, strict=True):
            assert relative_rms(leaf.grad, wide.grad) < 1e-6
        with torch.no_grad():
            assert relative_rms(expert_mlp(*leaves, apart(indices)), expected.detach()) < 1e-6


@pytest.mark.parametrize("wanted", range(4))
def test_only_the_required_gradients_are_computed(wanted: int) -> None:
    inputs, indices = _inputs(20, 6, 2), _indices(20, 6, 2)
    leaves = [x.clone().requires_grad_(i == wanted) for i, x in enumerate(inputs)]
    expert_mlp(*leaves, indices).square().sum().backward()
    exact = [x.double().requires_grad_() for x in inputs]
    _exact(*exact, indices).square().sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i != wanted for i in range(4)]
    assert relative_rms(leaves[wanted].grad, exact[wanted].grad) < 1e-6


def test_a_nan_stays_with_its_token() -> None:
    """Tiles are padded with token 0. If its NaN leaked, it would appear in every expert."""
    (z, up, down, weights), indices = _inputs(25, 8, 2), _indices(25, 8, 2)
    z[0] = float("nan")
    clean = [x for x in range(8) if x not in indices[0]]
    leaves = [x.requires_grad_() for x in (z, up, down, weights)]
    y = expert_mlp(*leaves, indices)
    assert y[0].isnan().all() and y[1:].isfinite().all()
    y.sum().backward()
    assert z.grad[1:].isfinite().all() and weights.grad[1:].isfinite().all()
    assert up.grad[clean].isfinite().all() and down.grad[clean].isfinite().all()
    with torch.no_grad():
        assert expert_mlp(z[:1], up, down, weights[:1], indices[:1]).isnan().all()


def test_float32_weights_and_float16_tokens() -> None:
    (z, up, down, weights), indices = _inputs(30, 6, 2), _indices(30, 6, 2)
    leaves = [z.half(), up, down, weights]
    leaves = [x.requires_grad_() for x in leaves]
    y = expert_mlp(*leaves, indices)
    y.sum().backward()
    assert y.dtype == z.half().dtype and [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]
    exact = [x.detach().half().double().requires_grad_() for x in leaves[:3]]
    exact.append(weights.detach().double().requires_grad_())  # the router's float32 is not rounded
    expected = _exact(*exact, indices)
    expected.sum().backward()
    assert relative_rms(y.detach(), expected.detach()) < 1e-3
    for leaf, wide in zip(leaves, exact, strict=True):
        assert relative_rms(leaf.grad, wide.grad) < 1e-3


def test_no_tokens() -> None:
    leaves = [x.requires_grad_() for x in _inputs(0, 4, 2)]
    y = expert_mlp(*leaves, torch.zeros(0, 2, dtype=torch.int64))
    assert y.shape == (0, 60)
    y.sum().backward()
    assert all((leaf.grad == 0).all() for leaf in leaves)


def test_float32_products_have_full_precision_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    rows = grouped._rows
    monkeypatch.setattr(grouped, "_rows", lambda *a: (asked.append(a[4]), rows(*a))[1])
    inputs, indices = _inputs(10, 4, 2), _indices(10, 4, 2)
    expert_mlp(*inputs, indices)
    expert_mlp(*inputs, indices, input_precision="tf32x3")
    assert asked == ["ieee", "ieee", "tf32x3", "tf32x3"]


def test_wrong_inputs_say_what_was_expected() -> None:
    (z, up, down, weights), indices = _inputs(6, 4, 2), _indices(6, 4, 2)
    with pytest.raises(ValueError, match=r"down has shape \(4, 100, 60\), expected \(4, 60, 100\)"):
        expert_mlp(z, up, down.mT, weights, indices)
    with pytest.raises(ValueError, match=r"up has shape \(4, 100, 59\), expected \(4, 100, 60\)"):
        expert_mlp(z, up[..., 1:], down, weights, indices)
    with pytest.raises(ValueError, match=r"weights has shape \(6, 1\), expected \(6, 2\)"):
        expert_mlp(z, up, down, weights[:, 1:], indices)
    with pytest.raises(ValueError, match=r"indices has shape \(5, 2\), expected \(6, 2\)"):
        expert_mlp(z, up, down, weights[1:], indices[1:])
    with pytest.raises(ValueError, match="input_precision='fp8' is none of 'ieee', 'tf32'"):
        expert_mlp(z, up, down, weights, indices, input_precision="fp8")
    with pytest.raises(ValueError, match=r"not torch.float64"):
        expert_mlp(z.double(), up.double(), down.double(), weights, indices)
    with pytest.raises(ValueError, match=r"indices are torch.float32, expected int32 or int64"):
        expert_mlp(z, up, down, weights, indices.float())
