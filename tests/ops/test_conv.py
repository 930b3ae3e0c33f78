"""The causal convolution: every form and the step against the loop over taps; split sequences."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_lite.ops import causal_conv1d, causal_conv1d_step, causal_conv1d_window
from tests.compare import errors, relative_rms


def _inputs(b: int, t: int, c: int, k: int) -> list[torch.Tensor]:
    torch.manual_seed(b * 100 + t)
    return [
        torch.randn(b, t, c, dtype=torch.float64),
        torch.randn(c, k, dtype=torch.float64),
        torch.randn(c, dtype=torch.float64),
        torch.randn(b, k - 1, c, dtype=torch.float64),
    ]


def _with(impl: str):
    def conv(x, weight, bias, state):
        return causal_conv1d(x, weight, bias, initial_state=state, impl=impl)

    return conv


@pytest.mark.parametrize(
    ("b", "t", "c", "k"), [(1, 1, 5, 4), (2, 2, 8, 4), (3, 17, 12, 4), (2, 9, 6, 2)]
)
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_every_form_equals_the_loop(impl: str, b: int, t: int, c: int, k: int) -> None:
    found = errors(_with(impl), _with("naive"), _inputs(b, t, c, k))
    assert max(found) < 1e-6, found


def test_loop_equals_the_formula() -> None:
    x, weight, bias, state = _inputs(1, 6, 3, 4)
    y, _ = causal_conv1d(x, weight, bias, initial_state=state, impl="naive")
    past = torch.cat([state, x], dim=1)
    for t in range(6):
        pre = bias + sum(weight[:, j] * past[0, t + j] for j in range(4))
        torch.testing.assert_close(y[0, t], pre * torch.sigmoid(pre))


def test_last_tap_reads_the_present() -> None:
    x = torch.zeros(1, 5, 1)
    x[0, 2] = 1.0
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    y, _ = causal_conv1d(x, weight)
    expected = torch.nn.functional.silu(torch.tensor([0.0, 0.0, 4.0, 3.0, 2.0]))
    torch.testing.assert_close(y[0, :, 0], expected)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_strided_input_and_no_bias(impl: str) -> None:
    wide = torch.randn(2, 11, 20)
    x, weight = wide[..., 5:13], torch.randn(8, 4)
    fast, _ = causal_conv1d(x, weight, impl=impl)
    naive, _ = causal_conv1d(x, weight, impl="naive")
    torch.testing.assert_close(fast, naive)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
@pytest.mark.parametrize("t", [3, 33])
def test_bfloat16(impl: str, t: int) -> None:
    x, weight, bias, state = (v.bfloat16() for v in _inputs(2, t, 8, 4))
    found, _ = causal_conv1d(x, weight, bias, initial_state=state, impl=impl)
    wide = (v.double() for v in (x, weight, bias))
    exact, _ = causal_conv1d(*wide, initial_state=state.double(), impl="naive")
    assert found.dtype == torch.bfloat16
    assert relative_rms(found, exact) < 8e-3


@settings(max_examples=30, deadline=None)
@given(
    t=st.integers(1, 12), split=st.integers(0, 12), impl=st.sampled_from(["naive", "torch", "cpu"])
)
def test_any_split_gives_the_same(t: int, split: int, impl: str) -> None:
    split = min(split, t)
    x, weight, bias, state = (v.float() for v in _inputs(2, t, 6, 4))
    whole, end = causal_conv1d(x, weight, bias, initial_state=state, impl=impl)
    pieces, carried = [], state
    for part in (x[:, :split], x[:, split:]):
        if part.shape[1]:
            y, carried = causal_conv1d(part, weight, bias, initial_state=carried, impl=impl)
            pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(carried, end)


def test_steps_equal_the_whole() -> None:
    x, weight, bias, state = (v.float() for v in _inputs(3, 7, 5, 4))
    whole, end = causal_conv1d(x, weight, bias, initial_state=state)
    for t in range(7):
        y, state = causal_conv1d_step(state, x[:, t], weight, bias)
        torch.testing.assert_close(y, whole[:, t])
    torch.testing.assert_close(state, end)


def test_the_final_state_is_at_each_rows_own_end() -> None:
    x, weight, bias, state = (v.float() for v in _inputs(3, 8, 5, 4))
    lengths = torch.tensor([8, 3, 0])
    _, end = causal_conv1d(x, weight, bias, initial_state=state, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        past = torch.cat([state[row], x[row, :length]])
        torch.testing.assert_close(end[row], past[len(past) - 3 :])


def test_concatenated_documents_do_not_see_each_other() -> None:
    x, weight, bias, _ = (v.float() for v in _inputs(1, 9, 5, 4))
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 3, 3]])
    whole, _ = causal_conv1d(x, weight, bias, seq_idx=seq_idx)
    for start, stop in [(0, 2), (2, 6), (6, 7), (7, 9)]:
        alone, _ = causal_conv1d(x[:, start:stop], weight, bias)
        torch.testing.assert_close(whole[:, start:stop], alone)


@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_every_form_equals_the_loop_on_concatenated_documents(impl: str) -> None:
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, 3, 3], [5, 5, 5, 2, 5, 5, 5, 5, 5, 2]])

    def rows(impl: str):
        def conv(x, weight, bias, state):
            return causal_conv1d(x, weight, bias, initial_state=state, seq_idx=seq_idx, impl=impl)

        return conv

    found = errors(rows(impl), rows("naive"), _inputs(2, 10, 6, 4))
    assert max(found) < 1e-6, found


def test_gradients_across_documents_against_numbers() -> None:
    x, weight, bias, _ = _inputs(1, 6, 2, 3)
    seq_idx = torch.tensor([[0, 0, 0, 1, 1, 2]])
    leaves = [v.requires_grad_() for v in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *v: causal_conv1d(*v, seq_idx=seq_idx)[0], leaves)


def test_unknown_implementation_is_refused() -> None:
    with pytest.raises(ValueError, match="no implementation 'cuda'"):
        causal_conv1d(torch.zeros(1, 2, 3), torch.zeros(3, 4), impl="cuda")


@pytest.mark.parametrize("impl", ["naive", "torch", "cpu", "traced"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_window_is_the_convolution_after_its_state(impl: str, bias: bool) -> None:
    x, weight, shift, state = _inputs(2, 5, 6, 4)
    added = shift if bias else None
    exact, _ = causal_conv1d(x, weight, added, initial_state=state, impl="naive")
    window = torch.cat([state, x], dim=1)
    before = window.clone()
    torch.testing.assert_close(causal_conv1d_window(window, weight, added, impl=impl), exact)
    assert torch.equal(window, before)
