"""The convolution kernels against the loop over taps in float64 of the same rounded inputs.

Tolerances are relative rms errors: 2e-6 for float32; for float16 outputs, its rounding step.
"""

from __future__ import annotations

import pytest
import torch

import nemotron_kernels
from nemotron_kernels import causal_conv1d, causal_conv1d_step
from nemotron_lite import ops
from tests.compare import errors, relative_rms

TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3}


def _inputs(b: int, t: int, c: int, k: int) -> list[torch.Tensor]:
    return [
        torch.randn(b, t, c, dtype=torch.float64),
        torch.randn(c, k, dtype=torch.float64),
        torch.randn(c, dtype=torch.float64),
        torch.randn(b, k - 1, c, dtype=torch.float64),
    ]


def _exact(x, weight, bias=None, initial=None, **options):
    return ops.causal_conv1d(x, weight, bias, initial_state=initial, impl="naive", **options)


def _kernel(x, weight, bias=None, initial=None, **options):
    return causal_conv1d(x, weight, bias, initial_state=initial, **options)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("b", "t", "c", "k"),
    [(1, 1, 5, 4), (2, 2, 16, 4), (2, 63, 33, 4), (1, 131, 520, 4), (2, 70, 24, 3), (1, 9, 7, 2)],
)
def test_values_and_every_gradient(b: int, t: int, c: int, k: int, dtype: torch.dtype) -> None:
    found = errors(_kernel, _exact, _inputs(b, t, c, k), dtype)
    assert len(found) == 2 + 4
    assert max(found) < TOLERANCE[dtype], found


@pytest.mark.parametrize("given", [1, 2, 3])
def test_without_bias_and_initial_state(given: int) -> None:
    # x and the filter alone, then with a bias; both continue from zeros.
    found = errors(_kernel, _exact, _inputs(2, 66, 20, 4)[: max(2, given)])
    assert max(found) < TOLERANCE[torch.float32], found


@pytest.mark.parametrize("t", [1, 3, 67, 150])
def test_concatenated_documents(t: int) -> None:
    """Boundaries at random places and at the edge of a stretch; also documents of one token."""
    seq_idx = (torch.rand(2, t) < 0.3).cumsum(1)
    seq_idx[:, 63:65] += torch.tensor([0, 1]).repeat(1)[: max(0, min(2, t - 63))]

    def packed(function):
        return lambda *inputs: function(*inputs, seq_idx=seq_idx)

    found = errors(packed(_kernel), packed(_exact), _inputs(2, t, 12, 4))
    assert max(found) < TOLERANCE[torch.float32], found


def test_a_repeated_document_number_starts_a_new_document() -> None:
    """0 1 0 within the reach of a tap, and across the edge of a stretch."""
    seq_idx = torch.zeros(2, 70, dtype=torch.int64)
    seq_idx[0, [1, 5, 63]], seq_idx[1, 2:4], seq_idx[1, 64:66] = 1, 1, 1

    def packed(function):
        return lambda *inputs: function(*inputs, seq_idx=seq_idx)

    found = errors(packed(_kernel), packed(_exact), _inputs(2, 70, 12, 4))
    assert max(found) < TOLERANCE[torch.float32], found
    # Each document alone gives the same values.
    x, weight, bias, state = (v.float() for v in _inputs(1, 5, 12, 4))
    y, _ = _kernel(x, weight, bias, state, seq_idx=torch.tensor([[0, 1, 0, 0, 1]]))
    for start, stop in ((1, 2), (2, 4), (4, 5)):
        torch.testing.assert_close(y[:, start:stop], _exact(x[:, start:stop], weight, bias)[0])


def test_a_strided_view_of_document_numbers_and_32_bits() -> None:
    x, weight, bias, state = (v.float() for v in _inputs(2, 9, 12, 4))
    wide = (torch.rand(2, 18) < 0.3).cumsum(1)
    strided = wide[:, ::2]
    expected, _ = _exact(x, weight, bias, state, seq_idx=strided)
    for seq_idx in (strided, strided.int()):
        y, _ = _kernel(x, weight, bias, state, seq_idx=seq_idx)
        torch.testing.assert_close(y, expected)


def test_padded_rows_end_at_their_own_lengths() -> None:
    lengths = torch.tensor([0, 1, 2, 5, 70])

    def padded(function):
        return lambda *inputs: function(*inputs, lengths=lengths)

    found = errors(padded(_kernel), padded(_exact), _inputs(5, 70, 12, 4))
    assert max(found) < TOLERANCE[torch.float32], found


def test_a_slice_of_a_wider_projection_is_read_in_place() -> None:
    x, weight, bias, _ = (v.float() for v in _inputs(2, 17, 40, 4))
    expected, state = _exact(x[..., 5:29], weight[5:29], bias[5:29])
    y, found = _kernel(x[..., 5:29], weight[5:29], bias[5:29])
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(found, state)


def test_channels_apart_and_expanded_gradients() -> None:
    x, weight, bias, _ = (v.float() for v in _inputs(2, 17, 24, 4))
    apart = x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert apart.stride(-1) != 1
    _kernel(apart, weight.t().contiguous().t(), bias)[0].sum().backward()
    leaf = x.clone().requires_grad_()
    _exact(leaf, weight, bias)[0].sum().backward()
    torch.testing.assert_close(apart.grad, leaf.grad)


def test_gradients_through_the_state_only() -> None:
    x, weight, bias, state = (v.float().requires_grad_() for v in _inputs(1, 2, 6, 4))
    _kernel(x, weight, bias, state)[1].sum().backward()
    assert (x.grad == 1).all()
    assert torch.equal(state.grad[0, :, 0], torch.tensor([0.0, 0.0, 1.0]))
    assert (weight.grad == 0).all()


@pytest.mark.parametrize("split", [0, 1, 2, 5, 64, 69])
def test_carrying_the_state_across_any_split(split: int) -> None:
    x, weight, bias, state = (v.float() for v in _inputs(2, 70, 10, 4))
    whole, end = _kernel(x, weight, bias, state)
    first, between = _kernel(x[:, :split], weight, bias, state)
    second, last = _kernel(x[:, split:], weight, bias, between)
    # The same operations on the same numbers: the same bits.
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(last, end)


def test_state_keeps_its_own_dtype() -> None:
    x, weight, bias, state = (v.half() for v in _inputs(1, 5, 6, 4))
    assert _kernel(x, weight, bias)[1].dtype == torch.float16
    y, carried = _kernel(x, weight, bias, state.float())
    assert (y.dtype, carried.dtype) == (torch.float16, torch.float32)


def test_large_inputs_saturate_without_nan() -> None:
    x = torch.tensor([-3e4, 3e4, 0.0, 1e38, -1e38])[None, :, None]
    leaf = x.clone().requires_grad_()
    y, _ = _kernel(leaf, torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    y.sum().backward()
    torch.testing.assert_close(y[0, :, 0], torch.tensor([0.0, 3e4, 0.0, 1e38, 0.0]))
    torch.testing.assert_close(leaf.grad[0, :, 0], torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0]))


def test_the_same_bits_twice() -> None:
    inputs = [v.float() for v in _inputs(2, 150, 24, 4)]
    runs = []
    for _ in range(2):
        leaves = [v.clone().requires_grad_() for v in inputs]
        _kernel(*leaves)[0].square().sum().backward()
        runs.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("c", "k"), [(5, 4), (1030, 4), (24, 2), (24, 3)])
def test_step(c: int, k: int, dtype: torch.dtype) -> None:
    x, weight, bias, state = (v.to(dtype) for v in _inputs(3, 1, c, k))
    exact = ops.causal_conv1d_step(*(v.double() for v in (state, x[:, 0], weight, bias)))
    y, after = causal_conv1d_step(state, x[:, 0], weight, bias)
    assert relative_rms(y, exact[0]) < TOLERANCE[dtype]
    assert torch.equal(after.double(), exact[1])


def test_step_in_place_of_a_strided_state() -> None:
    x, weight, bias, state = (v.float() for v in _inputs(3, 1, 10, 4))
    expected, after = causal_conv1d_step(state, x[:, 0], weight, bias)
    pool = torch.zeros(3, 5, 10)
    pool[:, 1:4] = state
    y, same = causal_conv1d_step(pool[:, 1:4], x[:, 0], weight, bias, out_state=pool[:, 1:4])
    assert torch.equal(y, expected)
    assert torch.equal(pool[:, 1:4], after)
    assert same.data_ptr() == pool[:, 1:4].data_ptr()
    assert (pool[:, [0, 4]] == 0).all()


def test_steps_equal_the_whole() -> None:
    x, weight, bias, state = (v.float() for v in _inputs(2, 6, 10, 4))
    whole, end = _kernel(x, weight, bias, state)
    for t in range(6):
        y, state = causal_conv1d_step(state, x[:, t], weight, bias)
        torch.testing.assert_close(y, whole[:, t])
    assert torch.equal(state, end)


def test_wrong_inputs_are_refused() -> None:
    x, weight = torch.zeros(2, 3, 6), torch.zeros(6, 4)
    with pytest.raises(ValueError, match=r"weight has shape \(6, 5\).*2 to 4 taps"):
        causal_conv1d(x, torch.zeros(6, 5))
    with pytest.raises(ValueError, match=r"initial_state has shape .*; expected \(2, 3, 6"):
        causal_conv1d(x, weight, initial_state=torch.zeros(2, 4, 6))
    with pytest.raises(ValueError, match=r"seq_idx has shape \(3,\)"):
        causal_conv1d(x, weight, seq_idx=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        causal_conv1d(x.double(), weight.double())
    with pytest.raises(ValueError, match="on meta"):
        causal_conv1d(x, weight.to("meta"))
    with pytest.raises(ValueError, match=r"state has shape \(2, 4, 6\)"):
        causal_conv1d_step(torch.zeros(2, 4, 6), x[:, 0], weight)
    with pytest.raises(AttributeError, match=r"no 'causal_conv'; it has 'causal_conv1d'"):
        _ = nemotron_kernels.causal_conv
